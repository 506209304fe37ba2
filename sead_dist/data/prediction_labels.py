"""The forms in which a file of predictions has a column of labels or of scores: a label with or
without its probability, votes, the most probable labels, a score.

Shapes: C classes (in task order).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sead_dist.data.kinds import score_of
from sead_dist.data.prediction_forms import (
    ANNOTATOR_COLUMNS,
    LEAST,
    TOLERANCE,
    Answer,
    Sheet,
    find_column,
    log_of,
)
from sead_dist.errors import UserError

LABEL_COLUMNS = ("prediction", "predicted_label", "answer", "label")
SCORE_COLUMNS = ("prediction", "predicted_score", "score", "label")
CONFIDENCE_COLUMNS = ("confidence", "probability")
# of one of the most probable labels, in a list of mappings
TOP_LABEL, TOP_VALUE = ("label", "token"), ("probability", "score", "prob", "logprob")


def answer_column(sheet: Sheet, usual: Sequence[str]) -> str:
    usual = (*usual, sheet.task.label_column)
    found = find_column(sheet, sheet.entry.column, "column", usual)
    if found is None:
        classes = ", ".join(sheet.task.labels)
        either = f"a column for each class ({classes}), or " if classes else ""
        raise UserError(
            f"{sheet.path} has no answers: expected {either}one of the columns "
            f"{', '.join(dict.fromkeys(usual))}; its other columns: "
            f"{', '.join(sheet.columns) or 'none'}; name the right one with column"
        )
    return found


def labels(sheet: Sheet, notes: list[str]) -> list[np.ndarray | None]:
    """Logits of each row by its label: of one with a confidence, which the label has, and the rest
    is shared out; else as of one vote."""
    column = answer_column(sheet, LABEL_COLUMNS)
    entry, classes = sheet.entry, len(sheet.task.labels)
    sure = find_column(sheet, entry.confidence, "confidence", CONFIDENCE_COLUMNS)
    if sure is None:
        notes.append(f"labels alone, each as one vote smoothed by {entry.smoothing:g} a class")
    found: list[np.ndarray | None] = []
    for number, row in zip(sheet.numbers, sheet.rows, strict=True):
        index = one_label(sheet, number, column, row.get(column))
        if index is None:
            found.append(None)
            continue
        if sure is None:
            found.append(log_of(smoothed(Counter([index]), classes, entry.smoothing)))
            continue
        value = score_of(row.get(sure))
        if not 0 <= value <= 1:
            raise UserError(
                f"{sheet.at(number)}: column {sure!r} holds {row.get(sure)!r}; expected a "
                "probability from 0 to 1; correct it, or name another column with confidence"
            )
        p_C = np.full(classes, (1 - value) / (classes - 1))
        p_C[index] = value
        found.append(log_of(p_C))
    return found


def one_label(sheet: Sheet, number: int, column: str, cell: Any) -> int | None:
    """The class in a cell; None, and counted, for a missing answer and for an unknown label."""
    if sheet.is_withheld(cell):
        sheet.withheld["" if cell is None else str(cell)] += 1
        return None
    if isinstance(cell, list | dict) or (isinstance(cell, str) and re.match(r"\s*[\[{]", cell)):
        raise UserError(
            f"{sheet.at(number)}: column {column!r} holds {str(cell)[:60]!r}, and expected is a "
            "label; where it lists labels with their probabilities say so (kind: top_k)"
        )
    if cell is None or cell != cell:
        raise UserError(
            f"{sheet.at(number)}: column {column!r} holds no label ({cell!r}); fill it in, or take "
            'it as no answer (abstain: [""])'
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
    given: dict[Any, dict[Any, int]] = {}
    first: dict[Any, int] = {}
    rows_of: dict[Any, int] = {}
    for number, key, row in zip(sheet.numbers, keys, sheet.rows, strict=True):
        index = one_label(sheet, number, column, row.get(column))
        if index is None:
            continue
        by = number if who is None else str(row.get(who))
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


def top_labels(sheet: Sheet, notes: list[str]) -> list[np.ndarray | None]:
    """Logits of each row by a list of labels with their probabilities; what is missing of 1 is
    shared out among the other classes."""
    column = answer_column(sheet, LABEL_COLUMNS)
    found: list[np.ndarray | None] = []
    missing: list[float] = []
    for number, row in zip(sheet.numbers, sheet.rows, strict=True):
        cell = row.get(column)
        if sheet.is_withheld(cell):
            sheet.withheld["" if cell is None else str(cell)] += 1
            found.append(None)
            continue
        p_C = np.zeros(len(sheet.task.labels))
        named = np.zeros(len(p_C), bool)
        for label, value in top_pairs(sheet, number, column, cell):
            index = sheet.label_index(label)
            if index is not None:
                p_C[index] += value
                named[index] = True
        total = float(p_C.sum())
        if total > 1 + TOLERANCE:
            raise UserError(
                f"{sheet.at(number)}: the probabilities in {column!r} sum to {total:.4g}; expected "
                "at most 1; correct the row"
            )
        if not named.any():
            found.append(None)
            continue
        missing.append(max(0.0, 1 - total))
        p_C[~named] = missing[-1] / max(int((~named).sum()), 1)
        found.append(log_of(p_C / max(float(p_C.sum()), LEAST)))
    mean = f"{np.mean(missing):.4f}" if missing else "1"
    notes.append(f"top_k: on average {mean} of the probability is missing, and shared out")
    return found


def top_pairs(sheet: Sheet, number: int, column: str, cell: Any) -> list[tuple[str, float]]:
    """(label, probability) of a cell: {label: p}, [[label, p]], or [{label: .., probability: ..}],
    as they are or as JSON; all at or below 0: logarithms."""
    try:
        given = json.loads(cell) if isinstance(cell, str) else cell
        held = list(given.items()) if isinstance(given, dict) else [_pair(one) for one in given]
        pairs = [(str(label), score_of(value)) for label, value in held if value is not None]
    except (TypeError, ValueError, StopIteration):
        pairs = []
    if pairs and all(value <= 0 for _, value in pairs):
        pairs = [(label, math.exp(value)) for label, value in pairs]
    if not pairs or not all(0 <= value <= 1 for _, value in pairs):
        raise UserError(
            f"{sheet.at(number)}: column {column!r} holds {str(cell)[:60]!r}; expected labels with "
            'their probabilities: {"LABEL": 0.9, ...} or [["LABEL", 0.9], ...]; correct the row'
        )
    return pairs


def _pair(one: Any) -> tuple[Any, Any]:
    if isinstance(one, dict):
        label = next(one[name] for name in TOP_LABEL if name in one)
        return label, next(one[name] for name in TOP_VALUE if name in one)
    label, value = one
    return label, value


def scores(sheet: Sheet, notes: list[str]) -> list[np.ndarray | None]:
    """The score of each row."""
    column = answer_column(sheet, SCORE_COLUMNS)
    found: list[np.ndarray | None] = []
    for number, row in zip(sheet.numbers, sheet.rows, strict=True):
        cell = row.get(column)
        if sheet.entry.abstain and sheet.is_withheld(cell):
            sheet.withheld["" if cell is None else str(cell)] += 1
            found.append(None)
            continue
        value = score_of(cell)
        if not math.isfinite(value):
            raise UserError(
                f"{sheet.at(number)}: column {column!r} holds {cell!r}; expected a number; correct "
                "it, or take it as no answer (abstain)"
            )
        found.append(np.array([value], np.float32))
    return found
