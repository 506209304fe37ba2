"""A file of predictions: its answers, and the rows that they are for, found by id or by text.

Shapes: F rows of the file, K rows that are answered, C classes (in task order; 1 for scores).
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import softmax

from sead_dist.config.schema import TeacherConfig
from sead_dist.data.examples import ExampleSet
from sead_dist.data.formats import read_items
from sead_dist.data.kinds import class_of
from sead_dist.data.loading import EXTENSIONS, Rows, read_rows
from sead_dist.data.prediction_forms import (
    Answer,
    class_values,
    counts,
    labels,
    log_of,
    scores,
    top_labels,
    votes,
)
from sead_dist.data.prediction_sheet import ANNOTATOR_COLUMNS, Sheet, class_columns
from sead_dist.data.tasks import TaskSpec
from sead_dist.data.text_files import kind_of
from sead_dist.errors import UserError
from sead_dist.runtime.console import counted

# what a row is found by: its id, or its texts
Key = str | tuple[str, ...]
ID_COLUMN = "id"
# two answers to one row count as equal up to this: numbers may be written with few digits
SAME = 1e-6


@dataclass(frozen=True)
class PredictionFile:
    """The answers of a file. by_id: whether keys are ids, else they are texts. rows_K: the place of
    each answer in the file, from 1. values_KC: float32 logits, or scores. notes: for the log."""

    by_id: bool
    keys: list[Key]
    rows_K: list[int]
    values_KC: np.ndarray
    notes: list[str]


def id_of(id_2: np.ndarray) -> str:
    """An example's identity as files have it: 32 hex digits."""
    high, low = np.ascontiguousarray(id_2, np.int64).view(np.uint64).tolist()
    return f"{high:016x}{low:016x}"


def same_text(text: str) -> str:
    """The form in which texts are compared: Unicode's normal form C, without blanks around it."""
    return unicodedata.normalize("NFC", text).strip()


def text_keys(examples: ExampleSet) -> Iterable[tuple[str, ...]]:
    """The texts of each example, in the form by which a file's rows are found."""
    known: dict[str, str] = {}  # passages repeat

    def form(text: str) -> str:
        if text not in known:
            known[text] = same_text(text)
        return known[text]

    count = examples.choices
    for first in range(0, len(examples.texts_a), count):
        seconds = () if examples.texts_b is None else examples.texts_b[first : first + count]
        yield (form(examples.texts_a[first]), *map(form, seconds))


def read_prediction_file(entry: TeacherConfig, name: str, task: TaskSpec) -> PredictionFile:
    """The answers in the file of an entry. Raises UserError, with file and row, for what is not a
    prediction for this task."""
    path = Path(entry.path)
    # it is read with a header, and without the rule that official files have no quoting
    if path.is_file() and kind_of(path) not in EXTENSIONS:
        raise UserError(
            f"teacher {name}: predictions={path} is of unknown kind {kind_of(path)!r}; allowed: "
            f"{', '.join(EXTENSIONS)}"
        )
    try:
        rows = read_rows(path, replace(task, name=path.name, columns=()))
    except UserError as error:
        line = str(error).removeprefix("data file ")
        raise UserError(f"predictions of teacher {name}: {line}") from error
    if not rows:
        raise UserError(f"teacher {name}: {path} has no rows; give a file that has some")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    by_id = found_by_id(entry, path, task, rows, columns)
    keys = id_keys(path, rows, by_id) if by_id is not None else keys_by_text(path, task, rows)
    others = [column for column in columns if column not in {by_id, *task.fields}]
    sheet = Sheet(path, task, entry, rows, others)
    answers, notes = read_values(sheet, keys)
    return merged(entry, path, task, by_id is not None, answers, notes)


def found_by_id(
    entry: TeacherConfig, path: Path, task: TaskSpec, rows: Rows, columns: Sequence[str]
) -> str | None:
    """The column of ids that rows are found by; None where they are found by their texts."""
    if entry.id is not None:
        if entry.id not in columns:
            raise UserError(
                f"{path} has no column {entry.id!r} (id={entry.id}); its columns: "
                f"{', '.join(columns)}; name one of these with id, or leave id out"
            )
        return entry.id
    renamed = {task.renames.get(column, column) for column in columns}
    if task.reader == "plain" and set(task.fields) <= renamed:
        return None
    if ID_COLUMN in columns:
        return ID_COLUMN
    if task.reader != "plain":
        return None
    missing = next(field for field in task.fields if field not in renamed)
    raise UserError(
        f"{path} has neither a column {ID_COLUMN!r} nor the text column {missing!r}, so its rows "
        f"cannot be found; its columns: {', '.join(columns)}; rename one, or name the column of "
        "ids with id"
    )


def id_keys(path: Path, rows: Rows, column: str) -> list[Key]:
    """The id of each row, in small letters. Raises UserError for a value that is not an id."""
    keys: list[Key] = []
    for number, row in enumerate(rows, 1):
        value = str(row.get(column)).strip().casefold()
        if not re.fullmatch("[0-9a-f]{32}", value):
            raise UserError(
                f"{path} row {number}: column {column!r} holds {row.get(column)!r}, which is not "
                "an id as `sead-dist labels --rows` writes them (32 hex digits); give such ids, or "
                "the text columns of the task"
            )
        keys.append(value)
    return keys


def keys_by_text(path: Path, task: TaskSpec, rows: Rows) -> list[Key]:
    """The texts of each row, as the task makes them. Raises UserError where a row is several
    examples."""
    items = list(read_items(task, rows, str(path), labelled=False))
    if len(items) != len(rows):
        raise UserError(
            f"{path}: a row of task {task.name} in this form stands for several examples; give a "
            "column with the ids that `sead-dist labels --rows` writes"
        )
    return [(same_text(item.texts_a[0]), *map(same_text, item.texts_b)) for item in items]


def read_values(sheet: Sheet, keys: Sequence[Key]) -> tuple[list[Answer], list[str]]:
    """(the answers of the rows, notes for the log). Raises UserError for what is not an answer."""
    check_mapping(sheet)
    kind = kind_of_values(sheet)
    if kind == "votes":
        answers = list(votes(sheet, keys))
        rows = counted(len(answers), "row")
        notes = [f"{rows} by votes, smoothed by {sheet.entry.smoothing:g} a class"]
    else:
        notes = []
        read = {"scores": scores, "labels": labels, "top_k": top_labels}.get(kind)
        values = read(sheet, notes) if read is not None else class_values(sheet, kind)
        answers = [
            (key, number, values_C)
            for number, (key, values_C) in enumerate(zip(keys, values, strict=True), 1)
            if values_C is not None
        ]
    reject_unknown(sheet)
    notes += [
        f"{counted(count, 'row')} without a prediction ({what!r})"
        for what, count in sheet.unanswered.items()
    ]
    if sheet.unknown:
        notes.append(f"labels that the task does not have are skipped: {counts(sheet.unknown)}")
    if not answers:
        raise UserError(
            f"{sheet.path} has no prediction of any row: each one is missing or an unknown label; "
            "add some, shorten the list of abstain, or map the labels (labels: {NAME: LABEL})"
        )
    return answers, notes


def check_mapping(sheet: Sheet) -> None:
    """Raises UserError for `labels` that map a name to no label of the task."""
    mapping = sheet.entry.labels if isinstance(sheet.entry.labels, dict) else {}
    for name, label in mapping.items():
        if class_of(sheet.classes, label) is None:
            allowed = ", ".join(sheet.task.labels)
            raise UserError(
                f"labels of {sheet.path}: {name!r} stands for {label!r}, which is not a label of "
                f"task {sheet.task.name}; its labels: {allowed or 'none, it has scores'}"
            )


def kind_of_values(sheet: Sheet) -> str:
    """The kind of the values, by the entry, else by the columns. Raises UserError where it does not
    fit the task."""
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
            f"{sheet.path}: kind: scores is for tasks of scores, and task {sheet.task.name} has "
            "classes; leave kind out"
        )
    if kind != "auto":
        return kind
    if sheet.entry.annotator is not None or set(ANNOTATOR_COLUMNS) & set(sheet.columns):
        return "votes"
    if sheet.entry.column is None and class_columns(sheet):
        return "columns"
    return "labels"


def reject_unknown(sheet: Sheet) -> None:
    """Raises UserError for labels that the task lacks, unless the entry allows them."""
    if sheet.unknown and sheet.entry.unknown == "reject":
        raise UserError(
            f"{sheet.path} has labels that task {sheet.task.name} does not have: "
            f"{counts(sheet.unknown)}; its labels: {', '.join(sheet.task.labels)}; map them "
            "(labels: {NAME: LABEL}), declare them as no prediction (abstain: [NAME]), or skip "
            "them (unknown: skip)"
        )


def merged(
    entry: TeacherConfig,
    path: Path,
    task: TaskSpec,
    by_id: bool,
    answers: Sequence[tuple[Key, int, np.ndarray]],
    notes: list[str],
) -> PredictionFile:
    """One prediction for each key. Raises UserError where two differ and are not averaged."""
    of_key: dict[Key, list[tuple[int, np.ndarray]]] = {}
    for key, row, values_C in answers:
        of_key.setdefault(key, []).append((row, values_C))
    classes = task.num_labels
    values_KC = np.zeros((len(of_key), classes), np.float32)
    averaged = 0
    for place, (key, found) in enumerate(of_key.items()):
        values_KC[place] = found[0][1]
        alike = [np.allclose(found[0][1], of, rtol=SAME, atol=SAME) for _, of in found]
        if all(alike):
            continue
        if entry.duplicates == "reject":
            what, other = key if isinstance(key, str) else key[0], found[alike.index(False)][0]
            raise UserError(
                f"{path}: rows {found[0][0]} and {other} hold different predictions of "
                f"{what[:60]!r}; remove one, or give duplicates: mean, or annotator: "
                "COLUMN if they are votes"
            )
        averaged += 1
        values_KC[place] = mean_of(task, [values_C for _, values_C in found])
    if averaged:
        notes.append(f"{averaged} rows are the mean of several predictions")
    rows_K = [found[0][0] for found in of_key.values()]
    return PredictionFile(by_id, list(of_key), rows_K, values_KC, notes)


def mean_of(task: TaskSpec, values: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of probabilities as logits, or of scores. The order of `values` does not count."""
    rows_MC = np.array(sorted(one_C.tolist() for one_C in values), np.float64)
    if not task.task_kind.has_classes:
        return np.asarray(rows_MC.mean(axis=0), np.float32)
    return log_of(softmax(rows_MC, axis=1).mean(axis=0))
