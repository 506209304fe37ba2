"""The columns of a file of predictions: which ones hold classes, labels or scores, and what a label
in them stands for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sead_dist.config.schema import TeacherConfig
from sead_dist.data.kinds import class_of, file_values, normalise_label, number_name
from sead_dist.data.loading import Rows
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError

PREFIXES = ("probability_", "prob_", "p_", "logit_", "logprob_")
ANNOTATOR_COLUMNS = ("annotator", "sample")
LABEL_COLUMNS = ("prediction", "predicted_label", "answer", "label")
SCORE_COLUMNS = ("prediction", "predicted_score", "score", "label")
# in files that `sead-dist labels` writes
GOLD_COLUMN = "gold_label"
CONFIDENCE_COLUMNS = ("confidence", "probability")


@dataclass(frozen=True)
class Sheet:
    """A file's rows and what reads them. columns: those that may hold answers. unknown: labels that
    the task lacks, with their counts. unanswered: missing answers, with their counts."""

    path: Path
    task: TaskSpec
    entry: TeacherConfig
    rows: Rows
    columns: list[str]
    unknown: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)

    def at(self, number: int) -> str:
        return f"{self.path} row {number}"

    def count_unanswered(self, *cells: Any, bare: bool = False) -> bool:
        """Whether each of a row's cells holds a missing answer, or the row is bare. Such a row is
        counted."""
        said = ["" if cell is None or cell != cell else str(cell) for cell in cells]
        missing = {text.strip().casefold() for text in self.entry.abstain}
        unanswered = bare or all(text.strip().casefold() in missing for text in said)
        if unanswered:
            self.unanswered[said[0]] += 1
        return unanswered

    def label_index(self, value: Any) -> int | None:
        """The class of a label in the file. One that the task lacks gives None, and is counted."""
        index = self.known_label(str(value))
        if index is None:
            self.unknown[str(value)] += 1
        return index

    def known_label(self, name: str) -> int | None:
        """The class of a label in the file, by the entry's `labels` first. Where these give numbers
        a meaning, no other number stands for a class."""
        mapped = self.mapping.get(name)
        if mapped is None:
            bare = _bare(name)
            alike = {to for of, to in self.mapping.items() if _bare(of) == bare}
            if not alike and self.numbers_are_mapped and number_name(name) is not None:
                return None
            mapped = alike.pop() if len(alike) == 1 else name
        return class_of(self.classes, mapped)

    @cached_property
    def mapping(self) -> dict[str, str]:
        """What labels of the file stand for, by the entry."""
        return self.entry.labels if isinstance(self.entry.labels, dict) else {}

    @cached_property
    def numbers_are_mapped(self) -> bool:
        """Whether the mapping gives the meaning of numbers, and the task's own names do not."""
        task = self.task
        own = (*task.labels, *task.aliases, *task.value_aliases)
        return any(map(number_name, self.mapping)) and not any(map(number_name, own))

    @cached_property
    def classes(self) -> dict[str, int]:
        """The labels that a file may hold, and their classes."""
        return file_values(self.task)


def _bare(name: str) -> str:
    """The form in which labels of a file are compared. Numbers are compared as such: a column of
    whole numbers with a gap is read as 1.0, 2.0."""
    return number_name(name) or normalise_label(name)


def find_column(sheet: Sheet, given: str | None, key: str, usual: Sequence[str]) -> str | None:
    """The column that the entry names under `key`, else the first of the usual ones."""
    if given is not None and given not in sheet.columns:
        raise UserError(
            f"{sheet.path} has no column {given!r} ({key}={given}); its columns beside those that "
            f"rows are found by: {', '.join(sheet.columns) or 'none'}; name one of these with {key}"
        )
    return given or next((name for name in usual if name in sheet.columns), None)


def class_columns(sheet: Sheet) -> dict[int, str]:
    """Class -> the column of its values; {} where the file has none. Raises UserError where it
    has some of them, but not one for each class."""
    found: dict[int, str] = {}
    for column in sheet.columns:
        bare = next((column.removeprefix(of) for of in PREFIXES if column.startswith(of)), column)
        index = sheet.known_label(bare)
        if index is None:
            continue
        if index in found:
            raise UserError(
                f"{sheet.path}: the columns {found[index]!r} and {column!r} both belong to the "
                f"label {sheet.task.labels[index]!r}; remove one"
            )
        found[index] = column
    missing = [label for index, label in enumerate(sheet.task.labels) if index not in found]
    if found and missing:
        raise UserError(
            f"{sheet.path} has columns of classes ({', '.join(found.values())}), and none for "
            f"{', '.join(missing)}; add it, map names (labels: {{NAME: LABEL}}), or name the "
            "column of labels with column"
        )
    return found


def answer_column(sheet: Sheet, usual: Sequence[str]) -> str:
    """The column of answers: the one that the entry names, else the first of the usual ones. Raises
    UserError where there is none, and where another one may be meant."""
    usual = (*usual, sheet.task.label_column)
    found = find_column(sheet, sheet.entry.column, "column", usual)
    if found is None:
        classes = ", ".join(sheet.task.labels)
        either = f"a column for each class ({classes}), or " if classes else ""
        raise UserError(
            f"{sheet.path} has no predictions: expected {either}one of the columns "
            f"{', '.join(dict.fromkeys(usual))}; its other columns: "
            f"{', '.join(sheet.columns) or 'none'}; name the right one with column"
        )
    if sheet.entry.column is None:
        reject_second_column(sheet, found, usual)
    return found


def reject_second_column(sheet: Sheet, found: str, usual: Sequence[str]) -> None:
    """Raises UserError where another column may hold the answers as well as the one found. A column
    with a usual name of gold labels may hold these, and another one the teacher's answers."""
    task = sheet.task
    renamed = (old for old, new in task.renames.items() if new == task.label_column)
    gold = {"label", task.label_column, *renamed}
    if GOLD_COLUMN in sheet.columns:
        gold = {GOLD_COLUMN}
    others = sheet.columns if found in gold else [name for name in usual if name not in gold]
    entry = sheet.entry
    beside = {found, entry.confidence, entry.annotator, *CONFIDENCE_COLUMNS, *ANNOTATOR_COLUMNS}
    numbers = holds_numbers(sheet, found)
    for other in others:
        if other in beside or other not in sheet.columns or not holds_answers(sheet, other):
            continue
        # numbers beside a column of names, or one number in all rows, are a seed or a count
        said = filled_cells(sheet, other)
        chance = holds_numbers(sheet, other) and (not numbers or len(set(said)) == 1)
        if not chance and not hold_same_classes(sheet, found, other):
            raise UserError(
                f"{sheet.path}: the columns {found!r} and {other!r} both hold predictions of "
                f"task {task.name}; name the teacher's: column: {found}, or column: {other}"
            )


def hold_same_classes(sheet: Sheet, one: str, other: str) -> bool:
    """Whether two columns of labels hold the same class in every row."""
    if not sheet.task.task_kind.has_classes:
        return False
    pairs = ((str(row.get(one)), str(row.get(other))) for row in sheet.rows)
    return all(sheet.known_label(a) == sheet.known_label(b) for a, b in pairs)


def filled_cells(sheet: Sheet, column: str) -> list[str]:
    """What stands in the cells of a column that are not empty."""
    cells = [row.get(column) for row in sheet.rows]
    return [str(cell) for cell in cells if cell is not None and cell == cell and str(cell).strip()]


def holds_numbers(sheet: Sheet, column: str) -> bool:
    """Whether all that stands in a column is a number."""
    return all(number_name(text) is not None for text in filled_cells(sheet, column))


def holds_answers(sheet: Sheet, column: str) -> bool:
    """Whether a column is not empty and each value in it is a label, or a score, of the task."""
    said = filled_cells(sheet, column)
    if sheet.task.task_kind.has_classes:
        return bool(said) and all(sheet.known_label(text) is not None for text in said)
    return bool(said) and all(sheet.task.task_kind.is_label(sheet.task, text) for text in said)
