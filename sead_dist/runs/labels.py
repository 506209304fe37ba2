"""`sead-dist labels`: the rows that a run asks its teachers, and what its teachers say of them.

Shapes: N teachers, B rows of a split, C classes.
"""

import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sead_dist.config.schema import RunConfig, TeacherConfig
from sead_dist.data.examples import ExampleSet, has_label
from sead_dist.data.order import Split
from sead_dist.data.prediction_file import id_of
from sead_dist.data.splits import (
    RunExamples,
    RunSplits,
    check_tokens,
    load_examples,
    tokenize_splits,
)
from sead_dist.data.task_files import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.objectives.ensemble import Ensemble, unseen
from sead_dist.runs.labelling import check_no_tabs, check_output, write_table
from sead_dist.runs.prepared_teachers import needs_validation, weigh
from sead_dist.runs.quiet import quiet_libraries
from sead_dist.runs.requests import check_fitted, check_scored, tell_requests
from sead_dist.runs.setup import read_inputs
from sead_dist.runtime.distributed import World
from sead_dist.store.layout import default_store
from sead_dist.store.store import PredictionStore
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.placement import place
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher, tokenizers_of
from sead_dist.teachers.validation import ask_all, require_passed, validate

Columns = dict[str, list[Any]]


def write_rows(config: RunConfig, output: Path) -> None:
    """Write each row of training split, text, selection split and official splits once, with its id
    and texts, to be answered anywhere. Teachers are not looked at. Raises UserError."""
    check_output(output, "--rows")
    task = load_task(config.task)
    if not config.teachers:  # they are to come: what the sample leaves out is text for them
        config = config.model_copy(update={"teachers": [TeacherConfig(path="to come")]})
    # nor is the column that names them: whom a row is for changes no row
    config = config.model_copy(update={"teacher_column": None})
    examples = load_examples(config, task, print)
    columns: Columns = {}
    seen: set[str] = set()
    for part, kinds in parts_of(examples):
        rows = row_columns(task, part, kinds)
        first = {id_: at for at, id_ in reversed(list(enumerate(rows["id"])))}
        new = sorted(at for id_, at in first.items() if id_ not in seen)
        seen.update(first)
        extend(columns, {name: [values[at] for at in new] for name, values in rows.items()})
    if output.suffix.lower() == ".tsv":
        check_no_tabs(columns, output)
    write_table(columns, output, output.suffix.lower())


def write_labels(config: RunConfig, output: Path, world: World) -> None:
    """Write what each teacher of a run and its ensemble say of the same rows. Copies are left out.

    Columns: those of `write_rows`, the gold label, the ensemble's probability of each class
    (`probability_LABEL`, or `score`), each teacher's (`TEACHER_probability_LABEL`), the entropy of
    the ensemble's (nats), and the share of the teachers whose class is the ensemble's. What a
    teacher does not answer is empty. Raises UserError, as for a teacher that fails its validation.
    """
    check_output(output, "--output")
    with asking(config, output, world) as run:
        config, task, teachers, splits = run.config, run.task, run.teachers, run.splits
        everything = (splits.train, splits.selection, *splits.official.values())
        ensemble = weighed(run, everything)
        columns: Columns = {}
        for split, (part, kinds) in zip(everything, parts_of(run.examples), strict=True):
            asked_NU = None
            if split is splits.train and ensemble.seen_NU is not None:
                asked_NU = unseen(None, ensemble.seen_NU)
            what = split.examples.split
            said = ask_all(run.source, split, len(teachers), config.prefetch_rows, what, asked_NU)
            rows = row_columns(task, part, kinds)
            rows |= gold_column(task, part)
            extend(columns, rows | label_columns(task, ensemble, teachers, said, part))
    if output.suffix.lower() == ".tsv":
        check_no_tabs(columns, output)
    write_table(columns, output, output.suffix.lower())


@dataclass(frozen=True)
class Asking:
    """The teachers of a run, at work, and the splits that they may be asked. examples: without
    copies."""

    config: RunConfig
    task: TaskSpec
    examples: RunExamples
    splits: RunSplits
    teachers: Sequence[Teacher]
    source: StoredSource


@contextmanager
def asking(config: RunConfig, output: Path, world: World) -> Iterator[Asking]:
    """The teachers of a run while they may be asked; `output` is whose name the store knows them
    by. Nothing is asked yet. Raises UserError for what cannot be asked."""
    if not config.taught:
        raise UserError("there are no teachers to say anything; give teachers=[DIR, ...]")
    if world.size > 1:
        raise UserError("labels runs in one process; start it without a launcher")
    quiet_libraries(world)
    config = with_any_student(config)
    no_copies = config.augment.model_copy(update={"copies": None})
    config = config.model_copy(update={"augment": no_copies})
    task, examples, inputs, _ = read_inputs(config, print)
    teachers = read_teachers(config, task, world, inputs.tokenizer, examples)
    check_scored(config, examples, teachers)
    check_fitted(config, examples, teachers)
    check_tokens(examples, tokenizers_of(teachers))
    splits = tokenize_splits(examples, inputs.split)
    store = PredictionStore(Path(config.store.path or default_store()), print)
    alone = place(teachers, ["colocated"] * len(teachers), np.ones((len(teachers), 1)))
    keys = [teacher.key for teacher in teachers]
    accept_any = config.store.accept == "any"
    with tempfile.TemporaryDirectory() as run, store.hold(str(output), keys, accept_any):
        source = StoredSource(
            teachers, alone, world, store, task.name, Path(run), accept_any,
            config.trust_remote_code, print, lambda _doing: None,
        )  # fmt: skip
        try:
            for split in (splits.train, splits.selection, *splits.official.values()):
                source.share_tokens(split, inputs)
            yield Asking(config, task, examples, splits, teachers, source)
        finally:
            source.close()


def with_any_student(config: RunConfig) -> RunConfig:
    """Nothing is trained: where no student is named, texts are read as the first model among the
    teachers reads them."""
    model = next((entry for entry in config.teachers if entry.is_model), None)
    if config.student.path is not None or config.student.shape is not None or model is None:
        return config
    start = config.student.model_copy(update={"path": model.path})
    return config.model_copy(update={"student": start})


def weighed(run: Asking, asked: Iterable[Split]) -> Ensemble:
    """The ensemble as a run of these teachers has it before its first step, after a line on what
    will be asked: these splits."""
    config, task, teachers, splits = run.config, run.task, run.teachers, run.splits
    tell_requests(run.source, asked, print)
    selection = splits.selection
    if not needs_validation(config, selection.examples):
        return weigh(config, task, teachers, [], None, splits)
    said = ask_all(run.source, selection, len(teachers), config.prefetch_rows, "the validation")
    found = validate(task, teachers, said, selection, run.examples.dev_in_training)
    if config.validates:
        require_passed(task, found, teachers)
    return weigh(config, task, teachers, found, said, splits)


def parts_of(examples: RunExamples) -> Iterator[tuple[ExampleSet, list[str]]]:
    """Each split, with what each of its rows is: train, text, or the split's name."""
    labelled = examples.labelled_rows
    kinds = ["train"] * labelled + ["text"] * (len(examples.train) - labelled)
    yield examples.train, kinds
    for part in (examples.selection, *examples.official.values()):
        yield part, [part.split] * len(part)


def row_columns(task: TaskSpec, part: ExampleSet, kinds: list[str]) -> Columns:
    """Id, split and texts; a text that is one column of the task has that column's name."""
    columns: Columns = {"id": [id_of(id_2) for id_2 in part.ids_B2], "split": kinds}
    columns[name_of(task.text_a, "text_a")] = part.texts_a[:: part.choices]
    if part.texts_b is not None:
        seconds = task.choices or (task.text_b or "",)
        for place, template in enumerate(seconds):
            usual = f"text_b_{place + 1}" if task.choices else "text_b"
            columns[name_of(template, usual)] = part.texts_b[place :: part.choices]
    return columns


def name_of(template: str, usual: str) -> str:
    match = re.fullmatch(r"\{(\w+)\}", template)
    return match[1] if match else usual


def gold_column(task: TaskSpec, part: ExampleSet) -> Columns:
    """The gold labels by name, or scores; None where there is none."""
    known_B = has_label(part.labels_B)
    names = task.labels
    return {
        "gold_label": [
            None if not known else names[int(label)] if names else float(label)
            for known, label in zip(known_B, part.labels_B, strict=True)
        ]
    }


def label_columns(
    task: TaskSpec, ensemble: Ensemble, teachers: Sequence[Teacher], said_NBC: np.ndarray,
    part: ExampleSet,
) -> Columns:  # fmt: skip
    """What the ensemble says and each teacher; said_NBC: NaN where one does not answer."""
    together_BC = together(ensemble, said_NBC, part)
    if not task.task_kind.has_classes:
        columns = {"score": as_cells(together_BC[:, 0])}
        for teacher, of_BC in zip(teachers, said_NBC, strict=True):
            columns[f"{teacher.name}_score"] = as_cells(of_BC[:, 0])
        return columns
    own_NBC = torch.softmax(ensemble.calibrated(torch.from_numpy(said_NBC)).double(), -1).numpy()
    columns = probability_columns(task, "", together_BC)
    for teacher, of_BC in zip(teachers, own_NBC, strict=True):
        columns |= probability_columns(task, f"{teacher.name}_", of_BC)
    surprise_BC = np.log(np.maximum(together_BC, 1e-300))
    columns["entropy"] = as_cells(-(together_BC * surprise_BC).sum(axis=1))
    answered_NB = ~np.isnan(said_NBC).any(axis=-1)
    same_NB = (own_NBC.argmax(axis=-1) == together_BC.argmax(axis=-1)[None]) & answered_NB
    with np.errstate(invalid="ignore"):
        columns["agreement"] = as_cells(same_NB.sum(axis=0) / answered_NB.sum(axis=0))
    return columns


def together(ensemble: Ensemble, said_NBC: np.ndarray, part: ExampleSet) -> np.ndarray:
    """The ensemble's p_BC, or scores_B1; NaN where no teacher answers."""
    routes_B = None if part.routes_B is None else torch.from_numpy(part.routes_B)
    answer = ensemble.answer(torch.from_numpy(said_NBC), routes_B)
    together_BC = answer.targets_BC.double().numpy()
    together_BC[answer.weights_NB.sum(0).numpy() == 0] = np.nan
    return np.asarray(together_BC)


def probability_columns(task: TaskSpec, prefix: str, p_BC: np.ndarray) -> Columns:
    return {
        f"{prefix}probability_{label}": as_cells(p_B)
        for label, p_B in zip(task.labels, p_BC.T, strict=True)
    }


def as_cells(values_B: np.ndarray) -> list[Any]:
    """Numbers, None for NaN."""
    return [None if value != value else value for value in values_B.tolist()]


def extend(columns: Columns, more: Columns) -> None:
    for name, values in more.items():
        columns.setdefault(name, []).extend(values)
