"""What a person must know of a finished run and would not see in its scores."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sead_dist.data.confusion import confusion
from sead_dist.data.examples import ExampleSet
from sead_dist.data.task_files import TaskSpec, constant_score
from sead_dist.runs.setup import Parts
from sead_dist.runs.unread import unread_keys


def never_predicted(task: TaskSpec, examples: ExampleSet, logits_BC: np.ndarray) -> list[str]:
    """Classes of the split that the model never predicts; none for a task of scores."""
    if not task.task_kind.has_classes:
        return []
    return confusion(task.labels, examples.labels_B, logits_BC).never_predicted


def make_remarks(parts: Parts, scores: Mapping[str, Any]) -> list[str]:
    """One line for each silent disappointment of the run; `scores` as in scores.json."""
    return [*_of_scores(parts, scores), *unread_keys(parts.config)]


def _of_scores(parts: Parts, scores: Mapping[str, Any]) -> Iterator[str]:
    metric = parts.task.metrics[0]
    for name, split in parts.splits.official.items():
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
        for who, classes in of["never_predicted"].items():
            if classes:
                yield f"{who} never predicts {', '.join(classes[:10])} on {name}"
