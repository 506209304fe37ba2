"""Which rows a teacher was trained on, where its fine-tuning left a fold of them out: a file beside
its weights, by the rows' identities.

Soft targets of a teacher on rows that it was trained on are near their gold labels. So of such a
row only the teachers are asked that were not trained on it, where there is one.

Shapes: N teachers, U unique examples of a split, R requested ones.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from sead_dist.data.examples import entries
from sead_dist.data.order import Split
from sead_dist.errors import UserError, reading
from sead_dist.models.pretrained import COPY
from sead_dist.teachers.teacher import TRAINED_ROWS, Teacher


def write_trained_rows(model: Path, train: Split) -> None:
    """Put the identities of the rows that a model was trained on into its folder."""
    save_file({"ids_U2": train.ids_U2}, model / TRAINED_ROWS)


def trained_on(teacher: Teacher, split: Split) -> np.ndarray | None:
    """bool [U]: which examples of a split a teacher was trained on; None where its folder does not
    say. Raises UserError for a file that is damaged."""
    if teacher.file is not None:  # it has nothing to say of the rows that it lacks
        return np.asarray(teacher.file.places(split.ids_U2) < 0)
    path = teacher.trained_rows
    if path is None:
        return None
    with reading(path, COPY, f"teacher {teacher.name}: {path.name}"):
        known_K2 = load_file(path)["ids_U2"]
        if known_K2.dtype != np.int64 or known_K2.ndim != 2 or known_K2.shape[1] != 2:
            raise UserError(f"teacher {teacher.name}: {path.name} holds no identities; {COPY}")
    _, entry_B = entries(np.concatenate([split.ids_U2, known_K2]))
    count = len(split.ids_U2)
    return np.asarray(np.isin(entry_B[:count], entry_B[count:]))


def seen_by(teachers: Sequence[Teacher], split: Split) -> np.ndarray | None:
    """seen_NU: which teacher was trained on which example of a split; None where no teacher's
    folder says so. One whose folder says nothing counts as not trained on any."""
    if all(teacher.trained_rows is None for teacher in teachers):
        return None
    seen = [trained_on(teacher, split) for teacher in teachers]
    none_U = np.zeros(len(split.ids_U2), bool)
    return np.stack([none_U if one is None else one for one in seen])


def out_of_fold(teachers: Sequence[Teacher], split: Split) -> np.ndarray:
    """fit_NU: which teachers' predictions of which examples of a split tell nothing of the gold
    label that they were taught. A model's folder must say so. A file of predictions and a language
    model with a prompt were not trained on any."""
    seen = [trained_on(teacher, split) for teacher in teachers]
    return np.stack([
        np.full(len(split.ids_U2), teacher.entry.prompt is not None) if one is None else ~one
        for teacher, one in zip(teachers, seen, strict=True)
    ])  # fmt: skip


def told_folds(
    teachers: Sequence[Teacher], seen_NU: np.ndarray, train: Split, labelled: int
) -> str:
    """A line on the teachers that left out rows. labelled: how many rows, the first ones, have a
    label."""
    seen_NB = seen_NU[:, train.entry_B[:labelled]]
    counts = zip(teachers, seen_NB.sum(1).tolist(), strict=True)
    own = ", ".join(f"{one.name} {count}" for one, count in counts if one.trained_rows and count)
    unseen = int((~seen_NB).any(0).sum())
    return (
        f"labelled rows that teachers were trained on: {own} of {labelled}; {unseen} rows have "
        "teachers that were not trained on them, which alone are asked of these"
    )
