"""The values of a file of predictions: a column for each class (probabilities, log-probabilities or
logits), or a column of labels with or without their probabilities, votes, most probable labels, or
scores.

Every form gives, for each answer, logits of the task's classes: logarithms of probabilities, or
the file's own logits. Shapes: C classes (in task order), A answers.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sead_dist.data.kinds import score_of
from sead_dist.data.prediction_sheet import (
    ANNOTATOR_COLUMNS,
    CONFIDENCE_COLUMNS,
    LABEL_COLUMNS,
    SCORE_COLUMNS,
    Sheet,
    answer_column,
    class_columns,
    find_column,
)
from sead_dist.errors import UserError

# probabilities sum to 1 within this
TOLERANCE = 0.02
# a probability counts as at least so much, since it becomes a logarithm
LEAST = 1e-6
# so many rows of one label, all with a confidence below chance, are not a coincidence
IMPROBABLE = 10
# keys of one entry in a list of the most probable labels
TOP_LABEL, TOP_VALUE = ("label", "token"), ("probability", "score", "prob", "logprob")

# key of a row, the row (from 1), logits_C or score
Answer = tuple[Any, int, np.ndarray]


def log_of(probabilities_C: np.ndarray) -> np.ndarray:
    """Logits whose softmax these probabilities are, each at least `LEAST`."""
    return np.asarray(np.log(np.maximum(probabilities_C, LEAST)), np.float32)


def is_finite(value: float) -> bool:
    """Whether a value is a finite float32, as logits and scores are: not NaN, and not 1e39."""
    return abs(value) <= float(np.finfo(np.float32).max)


def counts(found: Counter[str]) -> str:
    """Labels with their counts, the commonest eight, for a message."""
    listed = ", ".join(f"{name[:40]!r} {count}" for name, count in found.most_common(8))
    return f"{listed} and {len(found) - 8} more" if len(found) > 8 else listed


# a column for each class


def class_values(sheet: Sheet, kind: str) -> list[np.ndarray | None]:
    """Logits of each row by its columns of classes."""
    of_class = class_columns(sheet)
    if not of_class:
        raise UserError(
            f"{sheet.path}: kind: {kind} needs a column for each class "
            f"({', '.join(sheet.task.labels)}); its columns: {', '.join(sheet.columns)}"
        )
    ordered = [of_class[index] for index in range(len(sheet.task.labels))]
    read: list[tuple[int, np.ndarray] | None] = []
    for number, row in enumerate(sheet.rows, 1):
        cells = [row.get(column) for column in ordered]
        # as `labels --output` writes a row that no teacher answers
        bare = all(cell is None or not str(cell).strip() for cell in cells)
        if sheet.count_unanswered(*cells, bare=bare):
            read.append(None)
            continue
        values_C = np.array([score_of(cell) for cell in cells])
        for column, cell, value in zip(ordered, cells, values_C, strict=True):
            # a probability of 0 has the logarithm -inf
            if not (is_finite(value) or (value == -math.inf and kind != "logits")):
                raise UserError(
                    f"{sheet.at(number)}: column {column!r} holds {cell!r}; expected a number; "
                    "correct it, or declare it as no prediction (abstain)"
                )
        read.append((number, values_C))
    if kind == "logits":
        return [None if of is None else of[1].astype(np.float32) for of in read]
    answered = [of for of in read if of is not None]
    if kind != "log_probabilities":
        reject_percentages(sheet, answered)
    if kind == "columns":
        kind = kind_of_numbers(sheet, answered)
    return [None if of is None else by_probabilities(sheet, kind, *of) for of in read]


def reject_percentages(sheet: Sheet, read: Sequence[tuple[int, np.ndarray]]) -> None:
    """Raises UserError where the values of every row are percentages."""
    if read and all(
        values_C.min() >= 0 and abs(values_C.sum() / 100 - 1) <= TOLERANCE for _, values_C in read
    ):
        number, values_C = read[0]
        raise UserError(
            f"{sheet.at(number)}: {first_values(values_C)} are percentages, here and in all other "
            "rows; expected probabilities in [0, 1]; divide by 100"
        )


def kind_of_numbers(sheet: Sheet, read: Sequence[tuple[int, np.ndarray]]) -> str:
    """Whether these are probabilities or logarithms of them."""
    if all(bool(((values_C >= 0) & (values_C <= 1)).all()) for _, values_C in read):
        return "probabilities"
    if all(bool((values_C <= 0).all()) for _, values_C in read):
        return "log_probabilities"
    number, values_C = next(of for of in read if bool(((of[1] < 0) | (of[1] > 1)).any()))
    raise UserError(
        f"{sheet.at(number)}: {first_values(values_C)} are not probabilities, which lie in [0, 1], "
        "and not all rows are logarithms of probabilities; if they are logits, give kind: logits"
    )


def first_values(values_C: np.ndarray) -> str:
    """The first six values, for a message."""
    return ", ".join(f"{value:.4g}" for value in values_C[:6])


def by_probabilities(sheet: Sheet, kind: str, number: int, values_C: np.ndarray) -> np.ndarray:
    """Logits of one row. Raises UserError for what are not probabilities."""
    p_C = np.exp(values_C) if kind == "log_probabilities" else values_C
    if ((p_C < 0) | (p_C > 1 + 1e-9)).any():
        after = " after exp" if kind == "log_probabilities" else ""
        raise UserError(
            f"{sheet.at(number)}: {first_values(values_C)} are not {kind.replace('_', '-')}; "
            f"expected numbers in [0, 1]{after}; correct the row"
        )
    total = float(p_C.sum())
    if abs(total - 1) > TOLERANCE:
        # values in [0, 1] are not logits, so the hint is for log-probabilities
        other = ", or give kind: logits if these are logits" if kind == "log_probabilities" else ""
        raise UserError(
            f"{sheet.at(number)}: its probabilities sum to {total:.4g}; expected 1 within "
            f"{TOLERANCE:g}; correct the row{other}"
        )
    return log_of(p_C / total)


# a column of labels, or of scores


def labels(sheet: Sheet, notes: list[str]) -> Iterator[np.ndarray | None]:
    """Logits of each row by its label. With a column of confidences the label has that probability,
    and the other classes share the rest. Without one the label counts as one vote."""
    column = answer_column(sheet, LABEL_COLUMNS)
    entry, classes = sheet.entry, len(sheet.task.labels)
    sure = find_column(sheet, entry.confidence, "confidence", CONFIDENCE_COLUMNS)
    if sure is None:
        notes.append(f"labels alone, each as one vote smoothed by {entry.smoothing:g} a class")
    found: list[tuple[int, float] | None] = []
    for number, row in enumerate(sheet.rows, 1):
        index = one_label(sheet, number, column, row.get(column))
        if index is None:
            found.append(None)
            continue
        cell = 1.0 if sure is None else row.get(sure)
        value = score_of(cell)
        if not 0 <= value <= 1:
            raise UserError(
                f"{sheet.at(number)}: column {sure!r} holds {cell!r}; expected a "
                "probability from 0 to 1; correct it (divide percentages by 100), or name another "
                "column with confidence"
            )
        found.append((index, value))
    if sure is not None:
        reject_one_class(sheet, sure, [of for of in found if of is not None])
    for one in found:
        if one is None:
            yield None
        elif sure is None:
            yield log_of(smoothed(Counter([one[0]]), classes, entry.smoothing))
        else:
            p_C = np.full(classes, (1 - one[1]) / (classes - 1))
            p_C[one[0]] = one[1]
            yield log_of(p_C)


def reject_one_class(sheet: Sheet, column: str, found: Sequence[tuple[int, float]]) -> None:
    """Raises UserError where all rows of a label have a confidence below chance. Then the column is
    the probability of a fixed class, and not of each row's label."""
    chance = 1 / len(sheet.task.labels)
    for index, label in enumerate(sheet.task.labels):
        values = [value for of, value in found if of == index]
        if len(values) >= IMPROBABLE and max(values) < chance:
            raise UserError(
                f"{sheet.path}: {column!r} is below {chance:.3g} in all {len(values)} rows of the "
                f"label {label!r}, so it is not a probability of the row's own label; give a "
                "column for each class, or name the column of the label's probability "
                "(confidence: COLUMN)"
            )


def one_label(sheet: Sheet, number: int, column: str, cell: Any) -> int | None:
    """The class in a cell. A missing answer and an unknown label give None, and are counted."""
    if sheet.count_unanswered(cell):
        return None
    if isinstance(cell, list | dict) or (isinstance(cell, str) and re.match(r"\s*[\[{]", cell)):
        raise UserError(
            f"{sheet.at(number)}: column {column!r} holds {str(cell)[:60]!r}; expected a label; if "
            "it lists labels with their probabilities, give kind: top_k"
        )
    if cell is None or cell != cell:
        raise UserError(
            f"{sheet.at(number)}: column {column!r} holds no label ({cell!r}); fill it in, or "
            'declare it as no prediction (abstain: [""])'
        )
    return sheet.label_index(cell)


def smoothed(votes_of: Mapping[int, float], classes: int, smoothing: float) -> np.ndarray:
    """(votes of a class + smoothing) / (votes + classes * smoothing): p_C."""
    votes_C = np.array([float(votes_of.get(index, 0)) for index in range(classes)])
    return np.asarray((votes_C + smoothing) / (votes_C.sum() + classes * smoothing))


def votes(sheet: Sheet, keys: Sequence[Any]) -> Iterator[Answer]:
    """One answer for each key, by the labels that its annotators or samples gave."""
    column = answer_column(sheet, LABEL_COLUMNS)
    who = find_column(sheet, sheet.entry.annotator, "annotator", ANNOTATOR_COLUMNS)
    given: dict[Any, dict[int | str, int]] = {}
    first: dict[Any, int] = {}
    rows_of: dict[Any, int] = {}
    for number, (key, row) in enumerate(zip(keys, sheet.rows, strict=True), 1):
        index = one_label(sheet, number, column, row.get(column))
        if index is None:
            continue
        named = None if who is None else row.get(who)
        # a vote without a name is a vote of its own
        by = number if named is None or named != named or not str(named).strip() else str(named)
        before = given.setdefault(key, {}).setdefault(by, index)
        if before != index:
            raise UserError(
                f"{sheet.path}: rows {rows_of[key, by]} and {number} are two votes of {who} {by} "
                "on one row; remove one"
            )
        rows_of[key, by] = number
        first.setdefault(key, number)
    classes = len(sheet.task.labels)
    for key, of in given.items():
        p_C = smoothed(Counter(of.values()), classes, sheet.entry.smoothing)
        yield key, first[key], log_of(p_C)


# the most probable labels


def top_labels(sheet: Sheet, notes: list[str]) -> Iterator[np.ndarray | None]:
    """Logits of each row by a list of labels with their probabilities, or with logarithms of them
    where no value of the file is above 0. The other classes share what is missing of 1."""
    column = answer_column(sheet, LABEL_COLUMNS)
    missing: list[float] = []
    cells = [row.get(column) for row in sheet.rows]
    read = [
        None if sheet.count_unanswered(cell) else top_pairs(sheet, number, column, cell)
        for number, cell in enumerate(cells, 1)
    ]
    logarithms = all(value <= 0 for pairs in read for _, value in pairs or ())
    for number, (cell, pairs) in enumerate(zip(cells, read, strict=True), 1):
        if pairs is None:
            yield None
            continue
        if not logarithms and any(value < 0 for _, value in pairs):
            raise not_top_labels(sheet, number, column, cell)
        p_C = np.zeros(len(sheet.task.labels))
        named = np.zeros(len(p_C), bool)
        for label, value in pairs:
            index = sheet.label_index(label)
            if index is not None:
                p_C[index] += math.exp(value) if logarithms else value
                named[index] = True
        total = float(p_C.sum())
        if total > 1 + TOLERANCE:
            raise UserError(
                f"{sheet.at(number)}: the probabilities in {column!r} sum to {total:.4g}; expected "
                "at most 1; correct the row"
            )
        if not named.any():
            yield None
            continue
        missing.append(max(0.0, 1 - total))
        p_C[~named] = missing[-1] / max(int((~named).sum()), 1)
        yield log_of(p_C / max(float(p_C.sum()), LEAST))
    mean = f"{np.mean(missing):.4f}" if missing else "1"
    notes.append(f"top_k: on average {mean} of the probability goes to labels that are not listed")


def top_pairs(sheet: Sheet, number: int, column: str, cell: Any) -> list[tuple[str, float]]:
    """(label, probability or its logarithm) pairs of a cell that holds {label: p}, [[label, p]], or
    [{label: .., probability: ..}], as such or as JSON."""
    try:
        given = json.loads(cell) if isinstance(cell, str) else cell
        held = list(given.items()) if isinstance(given, dict) else [_pair(one) for one in given]
        pairs = [(str(label), score_of(value)) for label, value in held if value is not None]
    except (TypeError, ValueError, StopIteration):
        pairs = []
    # a logarithm of 0 is -inf
    if not pairs or not all(value <= 1 for _, value in pairs):
        raise not_top_labels(sheet, number, column, cell)
    return pairs


def not_top_labels(sheet: Sheet, number: int, column: str, cell: Any) -> UserError:
    """The error for a cell that is no list of labels with their probabilities."""
    return UserError(
        f"{sheet.at(number)}: column {column!r} holds {str(cell)[:60]!r}; expected labels with "
        'their probabilities: {"LABEL": 0.9, ...} or [["LABEL", 0.9], ...]; correct the row'
    )


def _pair(one: Any) -> tuple[Any, Any]:
    if isinstance(one, dict):
        label = next(one[name] for name in TOP_LABEL if name in one)
        return label, next(one[name] for name in TOP_VALUE if name in one)
    label, value = one
    return label, value


def scores(sheet: Sheet, notes: list[str]) -> Iterator[np.ndarray | None]:
    """The score of each row."""
    column = answer_column(sheet, SCORE_COLUMNS)
    for number, row in enumerate(sheet.rows, 1):
        cell = row.get(column)
        if sheet.count_unanswered(cell):
            yield None
            continue
        value = score_of(cell)
        if not is_finite(value):
            raise UserError(
                f"{sheet.at(number)}: column {column!r} holds {cell!r}; expected a number; correct "
                "it, or declare it as no prediction (abstain)"
            )
        reject_other_scale(sheet, number, column, value)
        yield np.array([value], np.float32)


def reject_other_scale(sheet: Sheet, number: int, column: str, value: float) -> None:
    """Raises UserError for a score that is outside the task's range by more than the width of the
    range. A regression's own answers may lie a little outside."""
    low, high = sheet.task.score_range or (-math.inf, math.inf)
    if abs(value - (low + high) / 2) > 1.5 * (high - low):
        raise UserError(
            f"{sheet.at(number)}: column {column!r} holds {value:g}, and the scores of task "
            f"{sheet.task.name} go from {low:g} to {high:g}; convert the file to this scale, or "
            "correct the row"
        )
