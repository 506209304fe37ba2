"""A split without gold labels: the ensemble's answers take their place, and agreement with them
that of a score.

Shapes: B examples, C classes.
"""

from dataclasses import replace

import numpy as np

from sead_dist.data.examples import ExampleSet, has_label, subset
from sead_dist.data.task_files import TaskSpec, compute_metrics


def answered_by_teachers(task: TaskSpec, examples: ExampleSet, said_BC: np.ndarray) -> ExampleSet:
    """The same with the ensemble's answers for labels: the class of the highest logit or
    probability, or the score; none where said_BC is NaN."""
    absent_B = np.isnan(said_BC).any(axis=1)
    kind = task.task_kind
    said_B = np.nan_to_num(said_BC).argmax(axis=1) if kind.has_classes else said_BC[:, 0]
    labels_B = np.where(absent_B, kind.unlabelled, said_B).astype(examples.labels_B.dtype)
    return replace(examples, labels_B=labels_B, by_teachers=True)


def metric_names(task: TaskSpec, examples: ExampleSet) -> list[str]:
    """The task's metrics, as they are called on this split."""
    return [name_of(name) for name in task.metrics] if examples.by_teachers else list(task.metrics)


def name_of(metric: str) -> str:
    """What a metric is called where the labels are the ensemble's answers."""
    return "agreement" if metric == "accuracy" else f"agreement_{metric}"


def score(task: TaskSpec, logits_BC: np.ndarray, examples: ExampleSet) -> dict[str, float]:
    """The task's metrics of a model on a split, by these names. Without gold labels: on the rows
    that the ensemble answers; {} where these are none, or not known yet."""
    if examples.has_gold:
        return compute_metrics(task, logits_BC, examples)
    rows_B = has_label(examples.labels_B)
    if not rows_B.any():
        return {}
    found = compute_metrics(task, logits_BC[rows_B], subset(examples, rows_B))
    return dict(zip(metric_names(task, examples), found.values(), strict=True))
