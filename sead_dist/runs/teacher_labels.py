"""`sead-dist labels`: the rows of a run, its teachers' predictions, and likely label errors.

Label errors are found by confident learning (Northcutt, Jiang and Chuang 2021,
https://arxiv.org/abs/1911.00068). A prediction of a row that the teacher was trained on does not
count there, since it is near the gold label, right or wrong.

Shapes: N teachers, U unique examples of a split, B rows of a split, C classes, E errors.
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
from sead_dist.data.splits import RunExamples, RunSplits, load_examples, tokenize_splits
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.objectives.ensemble import Ensemble, unseen
from sead_dist.runs.checked_run import read_run
from sead_dist.runs.predicted_rows import check_no_tabs, check_output, write_table
from sead_dist.runs.prepared_teachers import frozen_ensemble, needs_validation
from sead_dist.runs.requests import tell_requests
from sead_dist.runs.without_gold import ensemble_targets
from sead_dist.runtime.distributed import World
from sead_dist.runtime.run_log import tell
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.store.layout import store_folder
from sead_dist.store.store import StoreFolder
from sead_dist.teachers.placement import place
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher, out_of_fold
from sead_dist.teachers.validation import request_all, request_and_validate, require_passed

Columns = dict[str, list[Any]]


def write_rows(config: RunConfig, output: Path) -> None:
    """Write each row of a run once, with its id and texts, so that other programs can predict it.

    The rows are those of the training split, the unlabelled text, the selection split and the
    official splits. Teachers are not read. Raises UserError for a mistake in keys or files.
    """
    check_output(output, "--rows")
    task = load_task(config.task)
    # the column that names a row's teacher is not read either, since it changes no row
    asked: dict[str, Any] = {"teacher_column": None}
    # Where no teachers are given or used, the rows are for teachers to come. Rows that the sample
    # of the training split leaves out are unlabelled text for them.
    if not config.teachers:
        asked["teachers"] = [TeacherConfig(path="to come")]
    if not config.uses_teachers:
        asked["ensemble"] = RunConfig.model_fields["ensemble"].get_default()
    config = config.model_copy(update=asked)
    examples = load_examples(config, task)
    columns: Columns = {}
    seen: set[str] = set()
    for part, kinds in parts_of(examples):
        rows = row_columns(task, part, kinds)
        first = {id_: at for at, id_ in reversed(list(enumerate(rows["id"])))}
        new = sorted(at for id_, at in first.items() if id_ not in seen)
        seen.update(first)
        extend(columns, {name: [values[at] for at in new] for name, values in rows.items()})
    write(columns, output)


def write_labels(config: RunConfig, output: Path, world: World) -> None:
    """Write the predictions of a run's teachers and ensemble. Copies are left out.

    Columns: those of `write_rows`, `gold_label`, the ensemble's probability of each class
    (`probability_LABEL`, or `score`), each teacher's (`TEACHER_probability_LABEL`, or
    `TEACHER_score`). For classes also `entropy` (of the ensemble's probabilities, in nats), and
    `agreement` (the share of the row's teachers that have the ensemble's class). A cell without a
    prediction is empty. Raises UserError, also for a teacher that fails its validation.
    """
    check_output(output, "--output")
    with loaded_teachers(config, output, world) as run:
        config, task, teachers, splits = run.config, run.task, run.teachers, run.splits
        everything = (splits.train, splits.selection, *splits.official.values())
        ensemble = ensemble_of_run(run, everything)
        columns: Columns = {}
        for split, (part, kinds) in zip(everything, parts_of(run.examples), strict=True):
            needed_NU = None
            if split is splits.train and ensemble.seen_NU is not None:
                needed_NU = unseen(None, ensemble.seen_NU)
            what = split.examples.split
            said = request_all(run.source, split, config.prefetch_rows, what, needed_NU)
            rows = row_columns(task, part, kinds)
            rows |= gold_column(task, part)
            extend(columns, rows | label_columns(task, ensemble, teachers, said, part))
    write(columns, output)


@dataclass(frozen=True)
class LoadedTeachers:
    """The loaded teachers of a run, and the splits of which they can give predictions.

    examples: without copies.
    """

    config: RunConfig
    task: TaskSpec
    examples: RunExamples
    splits: RunSplits
    teachers: Sequence[Teacher]
    source: StoredSource


@contextmanager
def loaded_teachers(config: RunConfig, output: Path, world: World) -> Iterator[LoadedTeachers]:
    """Within the block, the teachers of a run can be used. None is used here.

    output: the name under which the store holds their predictions meanwhile. Raises UserError for
    teachers that cannot be used.
    """
    if not config.teachers:
        raise UserError("labels needs teachers, and there are none; give teachers=[DIR, ...]")
    if not config.uses_teachers:
        by = "" if config.method is None else f"method={config.method}: "
        raise UserError(
            f"{by}ensemble={config.ensemble} uses none of the teachers, and labels writes their "
            "predictions; give another method or ensemble (ensemble=mean_probabilities)"
        )
    if world.size > 1:
        raise UserError(
            f"labels runs in one process, and WORLD_SIZE={world.size}; start it without a launcher"
        )
    quiet_libraries(world)
    config = with_any_student(config)
    no_copies = config.augment.model_copy(update={"copies": None})
    config = config.model_copy(update={"augment": no_copies})
    checked = read_run(config, world, learns=False)
    task, examples, teachers = checked.task, checked.examples, checked.teachers
    splits = tokenize_splits(examples, checked.inputs.split)
    store = StoreFolder(store_folder(config.store.path))
    alone = place(teachers, ["colocated"] * len(teachers), np.ones((len(teachers), 1)))
    keys = [teacher.key for teacher in teachers]
    accept_any = config.store.accept == "any"
    with tempfile.TemporaryDirectory() as run, store.hold(str(output), keys, accept_any):
        source = StoredSource(
            teachers, alone, world, store, task.name, Path(run), accept_any,
            config.trust_remote_code, lambda _doing: None,
        )  # fmt: skip
        try:
            for split in (splits.train, splits.selection, *splits.official.values()):
                source.share_tokens(split, checked.inputs)
            yield LoadedTeachers(config, task, examples, splits, teachers, source)
        finally:
            source.close()


def with_any_student(config: RunConfig) -> RunConfig:
    """The configuration with the first model among the teachers as its student, if none is named.

    No student is trained. It only determines how texts are tokenised.
    """
    model = next((entry for entry in config.teachers if entry.is_model), None)
    if config.student.path is not None or config.student.shape is not None or model is None:
        return config
    start = config.student.model_copy(update={"path": model.path})
    return config.model_copy(update={"student": start})


def ensemble_of_run(run: LoadedTeachers, asked: Iterable[Split]) -> Ensemble:
    """The ensemble as a run of these teachers has it before its first step.

    The requests to endpoints for the splits `asked` are logged first.
    """
    config, task, teachers, splits = run.config, run.task, run.teachers, run.splits
    tell_requests(run.source, asked)
    selection = splits.selection
    if not needs_validation(config, selection.examples):
        return frozen_ensemble(config, task, teachers, [], None, splits)
    found, said = request_and_validate(
        run.source, task, selection, config.prefetch_rows, run.examples.dev_in_training
    )
    if config.validates:
        require_passed(task, found, teachers)
    return frozen_ensemble(config, task, teachers, found, said, splits)


def parts_of(examples: RunExamples) -> Iterator[tuple[ExampleSet, list[str]]]:
    """Each split, with the kind of each of its rows: train, text, or the split's name."""
    labelled = examples.labelled_rows
    kinds = ["train"] * labelled + ["text"] * (len(examples.train) - labelled)
    yield examples.train, kinds
    for part in (examples.selection, *examples.official.values()):
        yield part, [part.split] * len(part)


def row_columns(task: TaskSpec, part: ExampleSet, kinds: list[str]) -> Columns:
    """Columns of id, split and texts. A text that is one column of the data has its name."""
    columns: Columns = {"id": [id_of(id_2) for id_2 in part.ids_B2], "split": kinds}
    columns[name_of(task.text_a, "text_a")] = part.texts_a[:: part.choices]
    if part.texts_b is not None:
        seconds = task.choices or (task.text_b or "",)
        for place, template in enumerate(seconds):
            usual = f"text_b_{place + 1}" if task.choices else "text_b"
            columns[name_of(template, usual)] = part.texts_b[place :: part.choices]
    return columns


def name_of(template: str, usual: str) -> str:
    """The name of the column in a template of a single column, else the usual name."""
    match = re.fullmatch(r"\{(\w+)\}", template)
    return match[1] if match else usual


def gold_column(task: TaskSpec, part: ExampleSet) -> Columns:
    """The column of gold labels, by name or as scores; None in rows without one."""
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
    """Columns of the ensemble's and the teachers' predictions. said_NBC: NaN without one."""
    together_BC = ensemble_targets(ensemble, said_NBC, part).astype(np.float64)
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


def probability_columns(task: TaskSpec, prefix: str, p_BC: np.ndarray) -> Columns:
    """A column for each class, `{prefix}probability_LABEL`."""
    return {
        f"{prefix}probability_{label}": as_cells(p_B)
        for label, p_B in zip(task.labels, p_BC.T, strict=True)
    }


def as_cells(values_B: np.ndarray) -> list[Any]:
    """The numbers as a list, with None for NaN."""
    return [None if value != value else value for value in values_B.tolist()]


def extend(columns: Columns, more: Columns) -> None:
    """Append the rows of `more` to `columns`."""
    for name, values in more.items():
        columns.setdefault(name, []).extend(values)


# A probability this much below a threshold still reaches it, since a mean of equal numbers may be
# rounded up.
ROUNDING = 1e-6


def write_errors(config: RunConfig, output: Path, world: World) -> None:
    """Write the rows of training split and selection split whose gold label is likely wrong.

    Columns: `rank`, `row` (in its file, from 1), the id, split and texts of `write_rows`,
    `gold_label`, `suggested_label` (the ensemble's class), `gold_probability` and
    `suggested_probability` (the ensemble's), `margin` (their difference), and `TEACHER_label` (each
    teacher's class, empty where its prediction does not count). The row with the largest margin has
    rank 1. Raises UserError for a regression task, and where no teacher's predictions count.
    """
    check_output(output, "--errors")
    task = load_task(config.task)
    if not task.task_kind.has_classes:
        raise UserError(f"--errors is for labels, and task {task.name} has scores; use --output")
    no_text = config.unlabeled.model_copy(update={"path": None, "rest": False})
    columns: Columns = {}
    labels, said_of_all, probabilities = [], [], []
    with loaded_teachers(config.model_copy(update={"unlabeled": no_text}), output, world) as run:
        splits, teachers = (run.splits.train, run.splits.selection), run.teachers
        fit = [out_of_fold(teachers, split) for split in splits]
        check_fit(teachers, fit, splits)
        ensemble = ensemble_of_run(run, splits)
        for split, fit_NU in zip(splits, fit, strict=True):
            part, ahead = split.examples, run.config.prefetch_rows
            said = request_all(run.source, split, ahead, part.split, fit_NU)
            said_of_all.append(said)
            probabilities.append(ensemble_targets(ensemble, said, part).astype(np.float64))
            labels.append(part.labels_B)
            numbers: Columns = {"row": (part.rows_B + 1).tolist()}
            extend(columns, numbers | row_columns(task, part, [part.split] * len(part)))
    labels_B, p_BC = np.concatenate(labels), np.concatenate(probabilities)
    errors_E = label_errors(labels_B, p_BC)
    columns = {name: [values[row] for row in errors_E] for name, values in columns.items()}
    said_NEC = np.concatenate(said_of_all, axis=1)[:, errors_E]
    answers = answer_columns(task, teachers, labels_B[errors_E], p_BC[errors_E], said_NEC)
    columns = {"rank": list(range(1, len(errors_E) + 1))} | columns | answers
    write(columns, output)


def label_errors(labels_B: np.ndarray, p_BC: np.ndarray) -> np.ndarray:
    """errors_E: the rows whose label is likely wrong, by falling margin.

    labels_B: -1 where unlabelled. p_BC: NaN where there is no prediction. The margin is the
    probability of the most probable class minus that of the label.

    A class is likely for a row where its probability reaches its mean over the rows that have this
    class as their label (section 3.1 of the paper). A row is an error where neither its most
    probable likely class nor its most probable class is its label, as in cleanlab.
    """
    known_B = has_label(labels_B) & ~np.isnan(p_BC).any(axis=1)
    of_label = [p_BC[known_B & (labels_B == c), c] for c in range(p_BC.shape[1])]
    threshold_C = np.array([p_K.mean() if len(p_K) else np.inf for p_K in of_label])
    likely_BC = p_BC >= threshold_C - ROUNDING
    class_B = np.where(likely_BC, p_BC, -1).argmax(axis=1)
    wrong_B = known_B & likely_BC.any(axis=1) & (class_B != labels_B)
    rows_E = np.flatnonzero(wrong_B & (p_BC.argmax(axis=1) != labels_B))
    margin_E = p_BC[rows_E].max(axis=1, initial=0) - p_BC[rows_E, labels_B[rows_E]]
    return np.asarray(rows_E[np.argsort(-margin_E, kind="stable")])


def answer_columns(
    task: TaskSpec, teachers: Sequence[Teacher], labels_E: np.ndarray, p_EC: np.ndarray,
    said_NEC: np.ndarray,
) -> Columns:  # fmt: skip
    """Columns of the two labels of each error, their probabilities, and each teacher's class."""
    rows_E, class_E = np.arange(len(labels_E)), p_EC.argmax(axis=1)
    gold_E, suggested_E = p_EC[rows_E, labels_E], p_EC[rows_E, class_E]
    columns: Columns = {
        "gold_label": [task.labels[label] for label in labels_E],
        "suggested_label": [task.labels[label] for label in class_E],
        "gold_probability": gold_E.tolist(),
        "suggested_probability": suggested_E.tolist(),
        "margin": (suggested_E - gold_E).tolist(),
    }
    for teacher, said_EC in zip(teachers, said_NEC, strict=True):
        columns[f"{teacher.name}_label"] = [
            None if np.isnan(said_C).any() else task.labels[int(said_C.argmax())]
            for said_C in said_EC
        ]
    return columns


def check_fit(
    teachers: Sequence[Teacher], fit: Sequence[np.ndarray], splits: Sequence[Split]
) -> None:
    """Log for how many labelled rows each teacher's predictions count.

    Raises UserError where there is no such row.
    """
    fit_NB = np.concatenate(
        [
            fit_NU[:, split.entry_B] & has_label(split.examples.labels_B)
            for fit_NU, split in zip(fit, splits, strict=True)
        ],
        axis=1,
    )
    if not any(has_label(split.examples.labels_B).any() for split in splits):
        raise UserError("no row has a gold label that could be wrong; use --output")
    if not fit_NB.any():
        raise UserError(
            "no teacher has predictions of labelled rows that it was not trained on; train "
            "teachers with folds (sead-dist finetune ... folds=5), or add a file of predictions"
        )
    counts = zip(teachers, fit_NB.sum(1).tolist(), strict=True)
    own = ", ".join(f"{teacher.name} {count}" for teacher, count in counts)
    tell(f"labelled rows that teachers were not trained on: {own} of {fit_NB.shape[1]}")


def write(columns: Columns, output: Path) -> None:
    """Write the columns as a file of the kind that its name gives."""
    kind = output.suffix.lower()
    if kind == ".tsv":
        check_no_tabs(columns, output)
    write_table(columns, output, kind)
