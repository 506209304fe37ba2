"""What a person must know of a finished run and would not see in its scores."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sead_dist.config.automatic import ENOUGH_TO_CHOOSE
from sead_dist.data.confusion import confusion
from sead_dist.data.examples import ExampleSet
from sead_dist.data.resampling import paired_gap
from sead_dist.data.task_files import TaskSpec, constant_score
from sead_dist.runs.setup import Parts
from sead_dist.runs.unread import unread_keys
from sead_dist.runtime.console import counted


def never_predicted(task: TaskSpec, examples: ExampleSet, logits_BC: np.ndarray) -> list[str]:
    """Classes of the split that the model never predicts; none for a task of scores."""
    if not task.task_kind.has_classes:
        return []
    return confusion(task.labels, examples.labels_B, logits_BC).never_predicted


def ensemble_gap(
    task: TaskSpec, examples: ExampleSet, ensemble_BC: np.ndarray, best_BC: np.ndarray, name: str
) -> dict[str, Any]:
    """How much better the ensemble scores on a split than the teacher `name`, the best of its
    members on the selection split, and the 95% interval over rows."""
    gap = paired_gap(task.metrics[0], task.task_kind, ensemble_BC, best_BC, examples)
    return {"teacher": name, "gap": gap.value, "interval": list(gap.interval)}


def make_remarks(parts: Parts, scores: Mapping[str, Any]) -> list[str]:
    """One line for each silent disappointment of the run; `scores` as in scores.json."""
    return [*_of_selection(parts), *_of_scores(parts, scores), *unread_keys(parts.config)]


def _of_selection(parts: Parts) -> Iterator[str]:
    rows = len(parts.splits.selection)
    if parts.splits.selection.examples.has_gold and rows < ENOUGH_TO_CHOOSE:
        yield (
            f"the selection split has {counted(rows, 'row')}, and what is chosen by fewer than "
            f"{ENOUGH_TO_CHOOSE} is chosen by chance too"
        )


def _of_scores(parts: Parts, scores: Mapping[str, Any]) -> Iterator[str]:
    metric = parts.task.metrics[0]
    for name, split in parts.splits.official.items():
        if not split.examples.has_gold:
            yield (
                f"{name} has no gold labels: its figures are agreement with the teachers, and "
                "whether they are right is not known"
            )
            continue
        best = constant_score(parts.task, split.examples)
        score = scores[name]["student"][metric]
        if score <= best:
            yield (
                f"the student is no better than a constant answer on {name}: {metric} {score:.4f}, "
                f"of the best constant answer {best:.4f}"
            )
    for name, of in scores.items():
        if "ensemble_rows" in of:
            split = parts.splits.selection if name == "selection" else parts.splits.official[name]
            yield (
                f"the ensemble is scored on {of['ensemble_rows']} of {len(split)} {name} rows, "
                "those that all of its teachers answer"
            )
        gap = of.get("ensemble_gap")
        if gap is not None and gap["interval"][0] <= 0:
            low, high = gap["interval"]
            yield (
                f"the ensemble is no better than its best teacher {gap['teacher']} on {name}: "
                f"{metric} {gap['gap']:+.4f} ({low:+.4f} to {high:+.4f}, 95%, over rows)"
            )
        for who, classes in of["never_predicted"].items():
            if classes:
                yield f"{who} never predicts {', '.join(classes[:10])} on {name}"
