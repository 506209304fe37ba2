"""Published scores on GLUE's dev splits, which a report shows beside its own.

All of them are single runs whose checkpoint was selected on dev (`NOTE`). SEAD's are those of its
model cards (Mei and Sroch 2022). The others are reported figures of fine-tuning the same students
and BERT-base.
"""

from dataclasses import dataclass
from typing import Literal

NOTE = "selected on dev, single run"
Width = Literal[256, 384]
WIDTHS: tuple[Width, ...] = (256, 384)


@dataclass(frozen=True)
class Figure:
    """One published score: a fraction under `metric`, on one evaluation split of `task`.

    width: hidden size of the student; None for BERT-base.
    """

    task: str
    who: str
    width: Width | None
    split: str
    metric: str
    score: float


# task, split, metric -> SEAD h256, SEAD h384, XtremeDistil h256, XtremeDistil h384, BERT-base
_TABLE: tuple[tuple[str, str, str, tuple[float | None, ...]], ...] = (
    ("sst2", "validation", "accuracy", (0.9266, 0.9312, 0.912, 0.923, 0.932)),
    ("mrpc", "validation", "accuracy", (0.8897, 0.9093, 0.900, 0.900, 0.873)),
    ("mrpc", "validation", "f1", (0.9206, 0.9345, None, None, None)),
    ("qqp", "validation", "accuracy", (0.9065, 0.9126, 0.906, 0.910, 0.913)),
    ("qqp", "validation", "f1", (0.8746, 0.8822, None, None, None)),
    ("mnli", "validation_matched", "accuracy", (0.8277, 0.8495, 0.839, 0.854, 0.845)),
    ("mnli", "validation_mismatched", "accuracy", (0.8310, 0.8508, None, None, None)),
    ("qnli", "validation", "accuracy", (0.8979, 0.9098, 0.895, 0.903, 0.917)),
    ("rte", "validation", "accuracy", (0.7906, 0.8231, 0.801, 0.809, 0.686)),
    ("stsb", "validation", "pearson", (0.8962, 0.9058, None, None, None)),
    ("stsb", "validation", "spearmanr", (0.8978, 0.9032, None, None, None)),
    ("wnli", "validation", "accuracy", (0.5634, 0.5775, None, None, None)),
)
_WHO: tuple[tuple[str, Width | None], ...] = (
    ("SEAD h256", 256),
    ("SEAD h384", 384),
    ("XtremeDistil h256, fine-tuned", 256),
    ("XtremeDistil h384, fine-tuned", 384),
    ("BERT-base", None),
)

FIGURES: tuple[Figure, ...] = tuple(
    Figure(task, who, width, split, metric, score)
    for task, split, metric, scores in _TABLE
    for (who, width), score in zip(_WHO, scores, strict=True)
    if score is not None
)


def sead_figures(task: str, width: Width) -> list[Figure]:
    """SEAD's published scores on `task` with a student of this width; empty where none are."""
    return [f for f in FIGURES if f.task == task and f.who == f"SEAD h{width}"]
