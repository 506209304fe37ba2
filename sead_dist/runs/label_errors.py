"""`sead-dist labels --errors`: training rows whose gold label the teachers contradict, by confident
learning (Northcutt, Jiang and Chuang 2021, https://arxiv.org/abs/1911.00068).

A prediction of a row that the teacher was trained on does not count: it is near the gold label,
right or wrong.

Shapes: N teachers, U unique examples of a split, B rows, C classes, E errors.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import has_label
from sead_dist.data.order import Split
from sead_dist.data.task_files import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.runs.labelling import check_no_tabs, check_output, write_table
from sead_dist.runs.labels import Columns, asking, extend, row_columns, weighed
from sead_dist.runs.without_gold import together
from sead_dist.runtime.distributed import World
from sead_dist.teachers.teacher import Teacher, out_of_fold
from sead_dist.teachers.validation import ask_all

# a probability this much below a threshold still reaches it: means of equal numbers are rounded
ROUNDING = 1e-6


def write_errors(config: RunConfig, output: Path, world: World) -> None:
    """Write the rows of training split and selection split whose gold label looks wrong, the most
    suspicious first.

    Columns: `rank`, `row` (of its file, from 1), the id, split and texts of `write_rows`,
    `gold_label`, `suggested_label` (the ensemble's class), the ensemble's probability of each of
    the two, their difference `margin`, by which the rows are ranked, and each teacher's class
    (`TEACHER_label`), empty where its prediction does not count. Raises UserError for scores, and
    where no teacher's predictions count.
    """
    check_output(output, "--errors")
    task = load_task(config.task)
    if not task.task_kind.has_classes:
        raise UserError(f"--errors is for labels, and task {task.name} has scores; use --output")
    no_text = config.unlabeled.model_copy(update={"path": None, "rest": False})
    columns: Columns = {}
    labels, said_of_all, probabilities = [], [], []
    with asking(config.model_copy(update={"unlabeled": no_text}), output, world) as run:
        splits, teachers = (run.splits.train, run.splits.selection), run.teachers
        fit = [out_of_fold(teachers, split) for split in splits]
        check_fit(teachers, fit, splits)
        ensemble = weighed(run, splits)
        for split, fit_NU in zip(splits, fit, strict=True):
            part, ahead = split.examples, run.config.prefetch_rows
            said = ask_all(run.source, split, ahead, part.split, fit_NU)
            said_of_all.append(said)
            probabilities.append(together(ensemble, said, part).astype(np.float64))
            labels.append(part.labels_B)
            numbers: Columns = {"row": (part.rows_B + 1).tolist()}
            extend(columns, numbers | row_columns(task, part, [part.split] * len(part)))
    labels_B, p_BC = np.concatenate(labels), np.concatenate(probabilities)
    errors_E = label_errors(labels_B, p_BC)
    columns = {name: [values[row] for row in errors_E] for name, values in columns.items()}
    said_NEC = np.concatenate(said_of_all, axis=1)[:, errors_E]
    answers = answer_columns(task, teachers, labels_B[errors_E], p_BC[errors_E], said_NEC)
    columns = {"rank": list(range(1, len(errors_E) + 1))} | columns | answers
    if output.suffix.lower() == ".tsv":
        check_no_tabs(columns, output)
    write_table(columns, output, output.suffix.lower())


def label_errors(labels_B: np.ndarray, p_BC: np.ndarray) -> np.ndarray:
    """errors_E: the rows whose label is likely wrong, by falling margin between the most probable
    class and the label. labels_B: -1 where unlabelled; p_BC: NaN where there is no prediction.

    A class counts as likely for a row where its probability reaches the mean that it has in rows of
    this label (section 3.1 of the paper). An error is a row whose most probable likely class is not
    its label, and whose most probable class is not either, as in cleanlab.
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
    """The two labels of each error and their probabilities, and what each teacher says."""
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
    """Say how many labelled rows each teacher's predictions count for. Raises UserError where there
    are none."""
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
    print(f"labelled rows that teachers were not trained on: {own} of {fit_NB.shape[1]}")
