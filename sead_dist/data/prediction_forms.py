"""What the values of a file of predictions are, and those in a column for each class:
probabilities, log-probabilities or logits.

Every form gives, for each answer, logits of the task's classes: logarithms of probabilities, or
the file's own logits. Shapes: C classes (in task order), A answers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sead_dist.config.schema import TeacherConfig
from sead_dist.data.kinds import class_of, file_values, normalise_label, score_of
from sead_dist.data.loading import Rows
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError

# probabilities sum to 1 within this
TOLERANCE = 0.02
# a probability counts as at least so much, since it becomes a logarithm
LEAST = 1e-6
PREFIXES = ("probability_", "prob_", "p_", "logit_", "logprob_")
ANNOTATOR_COLUMNS = ("annotator", "sample")

# key of a row, the row (from 1), logits_C or score
Answer = tuple[Any, int, np.ndarray]


@dataclass(frozen=True)
class Sheet:
    """A file's rows and what reads them. columns: those that may hold answers. unknown: labels that
    the task has not, with their counts; withheld: how many answers are missing ones."""

    path: Path
    task: TaskSpec
    entry: TeacherConfig
    rows: Rows
    columns: list[str]
    numbers: list[int]
    unknown: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)

    def at(self, number: int) -> str:
        return f"{self.path} row {number}"

    def is_withheld(self, value: Any) -> bool:
        """Whether a cell holds a missing answer."""
        text = "" if value is None else str(value).strip().casefold()
        return text in {missing.strip().casefold() for missing in self.entry.abstain}

    def label_index(self, value: Any) -> int | None:
        """The class of a label in the file; None, and counted, for one that the task has not."""
        index = self.known_label(str(value))
        if index is None:
            self.unknown[str(value)] += 1
        return index

    def known_label(self, name: str) -> int | None:
        mapping = self.entry.labels if isinstance(self.entry.labels, dict) else {}
        mapped = mapping.get(name)
        if mapped is None:
            bare = normalise_label(name)
            alike = {to for of, to in mapping.items() if normalise_label(of) == bare}
            mapped = alike.pop() if len(alike) == 1 else name
        return class_of(self.classes, mapped)

    @cached_property
    def classes(self) -> dict[str, int]:
        """The labels that a file may hold, and their classes."""
        return file_values(self.task)


def probabilities_of(logits_AC: np.ndarray) -> np.ndarray:
    shifted_AC = np.exp(logits_AC - logits_AC.max(axis=-1, keepdims=True))
    return np.asarray(shifted_AC / shifted_AC.sum(axis=-1, keepdims=True))


def log_of(probabilities_C: np.ndarray) -> np.ndarray:
    """Logits whose softmax these probabilities are, each at least `LEAST`."""
    return np.asarray(np.log(np.maximum(probabilities_C, LEAST)), np.float32)


def check_mapping(sheet: Sheet) -> None:
    """Raises UserError for `labels` that map to no label of the task, or one name to two."""
    mapping = sheet.entry.labels if isinstance(sheet.entry.labels, dict) else {}
    for name, label in mapping.items():
        if class_of(sheet.classes, label) is None:
            allowed = ", ".join(sheet.task.labels)
            raise UserError(
                f"labels of {sheet.path}: {name!r} stands for {label!r}, which is no label of task "
                f"{sheet.task.name}; its labels: {allowed or 'none, it has scores'}"
            )


def kind_of_values(sheet: Sheet) -> str:
    """What the values are: as the entry says, else as the columns do."""
    kind, has_classes = sheet.entry.kind, sheet.task.task_kind.has_classes
    if not has_classes:
        if kind not in ("auto", "scores"):
            raise UserError(
                f"{sheet.path}: kind: {kind} is for classes, and task {sheet.task.name} has "
                "scores; leave kind out"
            )
        return "scores"
    if kind == "scores":
        raise UserError(
            f"{sheet.path}: kind: scores is for tasks of scores, and {sheet.task.name} has classes"
        )
    if kind != "auto":
        return kind
    if sheet.entry.annotator is not None or set(ANNOTATOR_COLUMNS) & set(sheet.columns):
        return "votes"
    if sheet.entry.column is None and class_columns(sheet):
        return "columns"
    return "labels"


def refuse_unknown(sheet: Sheet) -> None:
    if sheet.unknown and sheet.entry.unknown == "refuse":
        raise UserError(
            f"{sheet.path} has labels that task {sheet.task.name} has not: "
            f"{counts(sheet.unknown)}; its labels: {', '.join(sheet.task.labels)}; map them "
            "(labels: {NAME: LABEL}), take them as no answer (abstain: [NAME]), or unknown: skip"
        )


def counts(found: Counter[str]) -> str:
    listed = ", ".join(f"{name[:40]!r} {count}" for name, count in found.most_common(8))
    return f"{listed} and {len(found) - 8} more" if len(found) > 8 else listed


def find_column(sheet: Sheet, given: str | None, key: str, usual: Sequence[str]) -> str | None:
    """The column that the entry names under `key`, else the first of the usual ones."""
    if given is not None and given not in sheet.columns:
        raise UserError(
            f"{sheet.path} has no column {given!r} ({key}={given}); its columns: "
            f"{', '.join(sheet.columns)}"
        )
    return given or next((name for name in usual if name in sheet.columns), None)


# a column for each class


def class_columns(sheet: Sheet) -> dict[int, str]:
    """Class -> the column of its values; {} where the file has none. Raises UserError where it has
    some, and not one for each class."""
    found: dict[int, str] = {}
    for column in sheet.columns:
        bare = next((column.removeprefix(of) for of in PREFIXES if column.startswith(of)), column)
        index = sheet.known_label(bare)
        if index is None:
            continue
        if index in found:
            raise UserError(
                f"{sheet.path}: the columns {found[index]!r} and {column!r} both are of the label "
                f"{sheet.task.labels[index]!r}; remove one"
            )
        found[index] = column
    missing = [label for index, label in enumerate(sheet.task.labels) if index not in found]
    if found and missing:
        raise UserError(
            f"{sheet.path} has columns of classes ({', '.join(found.values())}), and none of "
            f"{', '.join(missing)}; add it, map names (labels: {{NAME: LABEL}}), or name the "
            "column of labels with column"
        )
    return found


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
    for number, row in zip(sheet.numbers, sheet.rows, strict=True):
        cells = [row.get(column) for column in ordered]
        # as `labels --output` writes a row that no teacher answers
        bare = all(cell is None or not str(cell).strip() for cell in cells)
        if bare or (sheet.entry.abstain and all(sheet.is_withheld(cell) for cell in cells)):
            sheet.withheld["" if cells[0] is None else str(cells[0])] += 1
            read.append(None)
            continue
        values_C = np.array([score_of(cell) for cell in cells])
        for column, cell, value in zip(ordered, cells, values_C, strict=True):
            # a probability of 0 has the logarithm -inf
            if not (math.isfinite(value) or (value == -math.inf and kind != "logits")):
                raise UserError(
                    f"{sheet.at(number)}: column {column!r} holds {cell!r}; expected a number; "
                    "correct it, or take it as no answer (abstain)"
                )
        read.append((number, values_C))
    if kind == "logits":
        return [None if of is None else of[1].astype(np.float32) for of in read]
    if kind == "columns":
        kind = guessed(sheet, [of for of in read if of is not None])
    return [None if of is None else by_probabilities(sheet, kind, *of) for of in read]


def guessed(sheet: Sheet, read: Sequence[tuple[int, np.ndarray]]) -> str:
    """Whether these are probabilities or logarithms of them."""
    if all(bool(((values_C >= 0) & (values_C <= 1)).all()) for _, values_C in read):
        return "probabilities"
    if all(bool((values_C <= 0).all()) for _, values_C in read):
        return "log_probabilities"
    number, values_C = next(of for of in read if bool(((of[1] < 0) | (of[1] > 1)).any()))
    raise UserError(
        f"{sheet.at(number)}: {told(values_C)} are no probabilities, which lie in [0, 1], nor are "
        "all rows logarithms of some; where they are logits say so (kind: logits)"
    )


def told(values_C: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values_C[:6])


def by_probabilities(sheet: Sheet, kind: str, number: int, values_C: np.ndarray) -> np.ndarray:
    """Logits of one row. Raises UserError for what are no probabilities."""
    p_C = np.exp(values_C) if kind == "log_probabilities" else values_C
    if ((p_C < 0) | (p_C > 1 + 1e-9)).any():
        raise UserError(
            f"{sheet.at(number)}: {told(values_C)} are no {kind.replace('_', '-')}, which lie in "
            "[0, 1]" + (" after exp" if kind == "log_probabilities" else "") + "; correct the row"
        )
    total = float(p_C.sum())
    if abs(total - 1) > TOLERANCE:
        raise UserError(
            f"{sheet.at(number)}: its probabilities sum to {total:.4g}; expected 1 within "
            f"{TOLERANCE:g}; correct the row, or say what they are (kind: logits)"
        )
    return log_of(p_C / total)
