"""`sead-dist predict`: a finished model's predictions of rows.

The rows come from a file, from standard input, or from a call from Python.

Shapes: B examples, C classes (task order).
"""

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sead_dist.config.sections import Labels
from sead_dist.data.examples import ExampleSet, build_examples
from sead_dist.data.formats import read_items
from sead_dist.data.loading import NOT_ARROW, Rows, read_bytes, read_rows
from sead_dist.data.tasks import TaskSpec
from sead_dist.data.text_files import TEXT_KINDS, kind_of, readable, rows_of_text
from sead_dist.errors import RunError, UserError
from sead_dist.runs.prediction import load_answerer, task_of, tell_cuts
from sead_dist.runtime.console import PipedConsole, counted, shown_progress
from sead_dist.runtime.distributed import World, from_main, in_world
from sead_dist.runtime.files import check_writable, is_stream, written_for_person
from sead_dist.runtime.run_log import tell
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.training.evaluation import ROWS_PER_BATCH, student_logits

WRITTEN = (".tsv", ".csv", ".jsonl", ".parquet")
# the file name of standard input and standard output
STANDARD = Path("-")
# columns that a prediction adds, of every kind of task; a file may not have them already
ADDED = ("predicted_label", "predicted_score")
# the number of skipped rows that are named one by one
TOLD = 20


@dataclass(frozen=True)
class Settings:
    """The settings of a prediction.

    labels: the model's class names in its order, or "task_order". batch_rows: the rows of one
    forward. skip_malformed: whether rows that cannot be read are skipped. progress: whether a
    progress bar is shown on standard error. skipped: a line for each skipped row.
    """

    labels: Labels = None
    batch_rows: int = ROWS_PER_BATCH
    skip_malformed: bool = False
    progress: bool = False
    skipped: list[str] = field(default_factory=list)

    def examples(self, task: TaskSpec, rows: Rows, name: str) -> ExampleSet:
        """The examples of the rows, which need no labels.

        Raises UserError where there are no rows. For a row that cannot be read, it names the row.
        """
        if not readable(rows):
            raise UserError(f"{name} has no rows; give at least one")
        skipped = self.skipped if self.skip_malformed else None
        try:
            return build_examples(task, rows, name, labelled=False, skipped=skipped)
        except UserError as error:
            others = read_items(task, rows, name, labelled=False, skipped=[])
            if skipped is None and next(others, None) is not None:
                raise UserError(
                    f"{error}; correct the row, or skip such rows (--skip-malformed, in Python: "
                    "skip_malformed=True)"
                ) from error
            raise

    def tell_skipped(self, world: World) -> None:
        """Log which rows were skipped, and why."""
        lines = self.skipped
        if not lines or not world.is_main:
            return
        for line in lines[:TOLD]:
            tell(f"skipped: {line}", aside=True)
        more = f"; the lines above name the first {TOLD}" if len(lines) > TOLD else ""
        tell(f"skipped {counted(len(lines), 'row')} that cannot be read{more}", aside=True)


def predict_file(
    name: str,
    file: Path,
    task_name: str | None,
    output: Path | None,
    labels: Labels,
    kind: str | None = None,
    batch_rows: int = ROWS_PER_BATCH,
    skip_malformed: bool = False,
) -> str | None:
    """Write the rows of `file`, in their order, with the model's prediction of each. For standard
    output, return them on rank 0 as a text that the caller prints; else return None.

    Columns added: `predicted_label` and `probability_LABEL` for every label; for regression
    `predicted_score`. A row of the file may hold several examples (official MultiRC, ReCoRD). Then
    one row is written for each example: the number of its `row` (from 1) and its texts.

    file: needs no labels; `-` is standard input. output: `-` is standard output. Its default is
    new.predicted.tsv for new.tsv, and standard output for standard input. kind: the kind of the
    input (`jsonl`), where its name does not show it. The default of standard input is JSONL.
    skip_malformed: rows that cannot be read are skipped, and named. Raises UserError before any
    work, also where `output` exists.
    """
    if file.is_dir() and not (file / "state.json").is_file():  # `datasets` saves a folder with it
        raise UserError(f"{file} is a folder; give a file")
    settings = Settings(labels, batch_rows, skip_malformed, progress=True)
    kind = input_kind(file, kind)
    output, written = output_of(file, output, kind)
    with in_world() as world:
        quiet_libraries(world)
        task = task_of(name, task_name)
        world.set_activity("reading the rows")
        rows = read_input(file, kind, task, skip_malformed, world)
        examples = settings.examples(
            task, rows, "standard input" if file == STANDARD else file.name
        )
        settings.tell_skipped(world)
        columns = input_columns(rows, examples)
        added = task.task_kind.answers(task, np.zeros((0, task.num_labels), np.float32))
        if clash := sorted({*added, *ADDED} & set(columns)):
            raise UserError(f"{file} has a column {clash[0]!r} already; rename it")
        if written == ".tsv":
            check_no_tabs(columns, output)
        elif written == ".parquet":
            as_arrow(columns, output)
        columns |= answer_examples(name, task, examples, settings, world)
        if output != STANDARD:
            from_main(world, lambda: write_table(columns, output, written))
        elif world.is_main:
            return as_lines(rows_of_columns(columns), list(columns), written)
    return None


def answer_examples(
    name: str, task: TaskSpec, examples: ExampleSet, settings: Settings, world: World
) -> dict[str, list[Any]]:
    """The columns that a prediction by the model `name` adds, one value for each example."""
    world.set_activity("loading the model")
    answerer = load_answerer(name, task, settings.labels, world.device, examples)
    split = answerer.inputs.split(examples)
    tell_cuts(split, answerer.inputs.max_length, world)
    # blank: one of the texts has no letter
    blank_B = (examples.sentences_BS == 0).any(axis=1)
    blank = sorted({int(row) + 1 for row in examples.rows_B[blank_B]})
    if blank and world.is_main:
        listed = ", ".join(map(str, blank[:TOLD])) + (", ..." if len(blank) > TOLD else "")
        tell(f"{counted(len(blank), 'row')} with a blank text: {listed}", aside=True)
    console = PipedConsole(highlight=False, stderr=True, quiet=not settings.progress)
    shows = world.is_main and settings.progress
    put = partial(tell, aside=True) if shows else lambda _line: None
    world.set_activity("predicting rows")
    where = (console, put, "rows predicted", len(split))
    with shown_progress(*where, in_notebooks=world.is_main) as bar:
        logits_BC = student_logits(
            answerer.model, answerer.forward, split, world, settings.batch_rows, bar.advance
        )
    return task.task_kind.answers(task, logits_BC)


def answers_by_row(
    columns: Mapping[str, Sequence[Any]], count: int, examples: ExampleSet
) -> list[dict[str, Any] | None]:
    """The predictions, one for each of `count` rows; None for a skipped row.

    Where rows hold several examples, there is one prediction for each example.
    """
    said = rows_of_columns(columns)
    if len(np.unique(examples.rows_B)) < len(examples):
        return list(said)
    answers: list[dict[str, Any] | None] = [None] * count
    for row, answer in zip(examples.rows_B.tolist(), said, strict=True):
        answers[row] = answer
    return answers


def input_kind(file: Path, kind: str | None) -> str:
    """The kind of the input, such as `.csv`.

    Raises UserError where neither its name nor `kind` gives it.
    """
    if kind is not None:
        return f".{kind}"
    if file == STANDARD:
        return ".jsonl"
    if kind_of(file) == "" and file.exists() and not file.is_dir():
        raise UserError(
            f"{file} has no ending that names its format; give --kind tsv, csv, jsonl or txt"
        )
    return kind_of(file)


def output_of(file: Path, output: Path | None, kind: str) -> tuple[Path, str]:
    """(the file to write, its kind). Raises UserError for an output that cannot be written."""
    same = kind if kind in WRITTEN else ".jsonl" if kind in TEXT_KINDS else ".parquet"
    if output is None:
        output = STANDARD if file == STANDARD else file.with_name(f"{file.stem}.predicted{same}")
    if output == STANDARD:
        if same == ".parquet":
            raise UserError(
                "--output -: standard output is text, and the input is not; give a file"
            )
        return output, same
    check_output(output, "--output")
    return output, output.suffix.lower()


def read_input(file: Path, kind: str, task: TaskSpec, skip_malformed: bool, world: World) -> Rows:
    """The rows of the file, or of standard input. Rank 0 alone reads standard input."""
    if file != STANDARD and kind == kind_of(file):
        return read_rows(file, task, skip_malformed)
    if file == STANDARD:
        content, named = from_main(world, sys.stdin.buffer.read), Path("standard input")
    else:
        content, named = from_main(world, lambda: read_bytes(file)), file
    try:
        return rows_of_text(content, named, kind, task, skip_malformed)
    except UserError as error:
        kinds = " or ".join(other[1:] for other in TEXT_KINDS if other != kind)
        raise UserError(
            f"{error}; it is read as {kind[1:]}; for another format give --kind {kinds}"
        ) from error


def check_output(output: Path, option: str) -> None:
    """Raises UserError for an output that cannot be written. option: its name in the error."""
    if output.suffix.lower() not in WRITTEN:
        raise UserError(
            f"{option} {output}: unknown kind {output.suffix!r}; allowed: {', '.join(WRITTEN)}"
        )
    if output.exists() and not is_stream(output):
        raise UserError(f"{option} {output} exists and is not overwritten; give a new name")
    check_writable(option, output)


def input_columns(rows: Rows, examples: ExampleSet) -> dict[str, list[Any]]:
    """The file's own columns. For rows of several examples: the row's number and the texts."""
    if len(np.unique(examples.rows_B)) == len(examples):
        rows = [rows[row] for row in examples.rows_B.tolist()]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}
    columns: dict[str, list[Any]] = {"row": (examples.rows_B + 1).tolist()}
    columns["text_a"] = examples.texts_a
    if examples.texts_b is not None:
        columns["text_b"] = examples.texts_b
    return columns


def check_no_tabs(columns: Mapping[str, Sequence[Any]], output: Path) -> None:
    """Raises UserError for a text that TSV cannot hold, since fields are not quoted here."""
    for name, values in columns.items():
        for number, value in enumerate(values, 1):
            if any(mark in as_text(value) for mark in "\t\n\r"):
                raise UserError(
                    f"--output {output}: {name!r} of row {number} holds a tab or line break, which "
                    "TSV cannot hold; give a .csv, .jsonl or .parquet file"
                )


def rows_of_columns(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of one length as rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def as_text(value: Any) -> str:
    """A value as a field of TSV or CSV: None is empty, a list or mapping is JSON."""
    if value is None:
        return ""
    return json.dumps(value, default=str) if isinstance(value, dict | list) else str(value)


def as_arrow(columns: Mapping[str, Sequence[Any]], output: Path) -> pa.Table:
    """The columns as a table for a Parquet file. Raises UserError for values that it cannot
    hold."""
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(list(values))
        except NOT_ARROW as error:
            line = str(error).splitlines()[0]
            raise UserError(
                f"--output {output}: column {name!r}: {line}; give a .jsonl file instead"
            ) from None
    return pa.table(arrays)


def write_table(columns: Mapping[str, Sequence[Any]], output: Path, kind: str) -> None:
    """Write the columns as a file of this kind, and log it. The file appears whole or not at all.

    Raises UserError for values that Parquet cannot hold, RunError where the file cannot be written.
    """
    rows = rows_of_columns(columns)
    try:
        with written_for_person(output) as aside:
            if kind == ".parquet":
                pq.write_table(as_arrow(columns, output), aside)
            else:
                text = as_lines(rows, list(columns), kind)
                aside.write_text(text, encoding="utf-8", newline="")
    except pa.ArrowException as error:
        raise UserError(
            f"--output {output}: {str(error).splitlines()[0]}; give a .jsonl file instead"
        ) from None
    except OSError as error:
        raise RunError(
            f"--output {output} cannot be written: {error.strerror}; remove the cause, or give "
            "another file"
        ) from error
    # the line goes to standard error where the output is a stream, which may hold the rows
    tell(f"{counted(len(rows), 'row')} written to {output}", aside=is_stream(output))


def as_lines(rows: Rows, names: Sequence[str], kind: str) -> str:
    """Rows as the text of a .jsonl, .tsv or .csv file; the latter two begin with the names."""
    if kind == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
        return "".join(line + "\n" for line in lines)
    texts = [list(names), *([as_text(row[name]) for name in names] for row in rows)]
    if kind == ".tsv":
        return "".join("\t".join(fields) + "\n" for fields in texts)
    written = io.StringIO(newline="")
    csv.writer(written, lineterminator="\n").writerows(texts)
    return written.getvalue()
