"""How far a teacher in fewer bits (bf16, fp16, 8-bit weights) says something else than in fp32.

Shapes: N teachers, U unique examples of a split, R examples compared, C classes.
"""

from dataclasses import dataclass

import numpy as np

from sead_dist.data.order import Split
from sead_dist.teachers.base import Request, TeacherSource
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher, in_fp32

# of a large selection split so many rows, evenly spread, are compared
MOST_ROWS = 2000


@dataclass(frozen=True)
class Drift:
    """Over `rows` examples: the largest difference of a logit, and how many predicted classes
    differ (None for scores)."""

    rows: int
    largest: float
    changed: int | None


def compare(logits_RC: np.ndarray, fp32_RC: np.ndarray) -> Drift:
    changed = None
    if logits_RC.shape[1] > 1:
        changed = int((logits_RC.argmax(axis=1) != fp32_RC.argmax(axis=1)).sum())
    return Drift(len(logits_RC), float(np.abs(logits_RC - fp32_RC).max(initial=0.0)), changed)


def is_reduced(teacher: Teacher) -> bool:
    reduced = teacher.dtype != "fp32" or teacher.entry.quantization is not None
    return reduced and teacher.answers is None


def measure_drift(source: StoredSource, split: Split) -> list[Drift | None]:
    """Each teacher against itself in fp32, placed alike; None for those that are in fp32. What is
    computed for it is kept in the store, and not counted among the run's forwards. Every rank calls
    this, while the source is idle."""
    reduced = [n for n, teacher in enumerate(source.teachers) if is_reduced(teacher)]
    drifts: list[Drift | None] = [None] * len(source.teachers)
    if not reduced:
        return drifts
    count = len(split.ids_U2)
    entries_R = np.unique(np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(np.int64))
    twins = StoredSource(
        [in_fp32(source.teachers[n], source.world.device) for n in reduced],
        source.placement.pick(reduced),
        source.world, source.store, source.task, source.run / "drift",
        False,  # predictions of another class would be compared with themselves
        source.trust_remote_code, source.say, source.progress_or_stop,
    )  # fmt: skip
    try:
        said_NRC, fp32_NRC = (_ask(one, split, entries_R) for one in (source, twins))
    finally:
        twins.close()
    for n, fp32_RC in zip(reduced, fp32_NRC, strict=True):
        drifts[n] = compare(said_NRC[n], fp32_RC)
    return drifts


def _ask(source: TeacherSource, split: Split, entries_R: np.ndarray) -> np.ndarray:
    request = Request(split, entries_R, None, "the drift report")
    return source.submit(request).result().logits_NBC.numpy()


def describe_drift(drift: Drift) -> str:
    line = f"against fp32 on {drift.rows} rows: logits differ by at most {drift.largest:.4g}"
    if drift.changed is not None:
        share = drift.changed / max(drift.rows, 1)
        line += f", {drift.changed} predictions changed ({share:.2%})"
    return line
