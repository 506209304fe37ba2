"""Remarks on a run that its scores do not show.

They name weak results that are easy to miss, and keys that the run does not read.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sead_dist.config.automatic import ENOUGH_TO_CHOOSE, final_checkpoint
from sead_dist.config.load import usual_values
from sead_dist.config.registered import BUILT_IN
from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import ExampleSet
from sead_dist.data.metrics import confusion
from sead_dist.data.significance import paired_gap
from sead_dist.data.splits import RunSplits
from sead_dist.data.tasks import TaskSpec, constant_score
from sead_dist.objectives.ensemble import needs_selection
from sead_dist.objectives.weightings import WEIGHTINGS, Fixed, Routed, Single
from sead_dist.runtime.console import counted
from sead_dist.teachers.teacher import Teacher


def never_predicted(task: TaskSpec, examples: ExampleSet, logits_BC: np.ndarray) -> list[str]:
    """Classes of the split that the model never predicts; none for a regression task."""
    if not task.task_kind.has_classes:
        return []
    return confusion(task.labels, examples.labels_B, logits_BC).never_predicted


def ensemble_gap(
    task: TaskSpec, examples: ExampleSet, ensemble_BC: np.ndarray, best_BC: np.ndarray, name: str
) -> dict[str, Any]:
    """The ensemble's score on a split minus that of the teacher `name`, with its 95% interval.

    The teacher is the best one on the selection split. The interval is over rows.
    """
    gap = paired_gap(task.metrics[0], task.task_kind, ensemble_BC, best_BC, examples)
    return {"teacher": name, "gap": gap.value, "interval": list(gap.interval)}


def make_remarks(
    config: RunConfig,
    task: TaskSpec,
    splits: RunSplits,
    scores: Mapping[str, Any],
    teachers: Sequence[Teacher],
) -> list[str]:
    """One line for each weak result that is easy to miss, and each key that is not read.

    scores: by split, as in scores.json.
    """
    rows = len(splits.selection)
    chosen = final_checkpoint(config, rows) == "best" or needs_selection(config)
    lines = []
    if chosen and splits.selection.examples.has_gold and rows < ENOUGH_TO_CHOOSE:
        lines.append(
            f"the selection split has {counted(rows, 'row')}, and with fewer than "
            f"{ENOUGH_TO_CHOOSE} a choice by scores is partly chance"
        )
    lines += _of_scores(task, splits, scores)
    lines += (line for one in teachers if one.file is not None for line in one.file.remarks)
    return [*lines, *unread_keys(config)]


def _of_scores(task: TaskSpec, splits: RunSplits, scores: Mapping[str, Any]) -> Iterator[str]:
    metric = task.metrics[0]
    for name, split in splits.official.items():
        if not split.examples.has_gold:
            yield (
                f"{name} has no gold labels: scores there measure agreement with the teachers, and "
                "whether the teachers are right is not known"
            )
            continue
        best = constant_score(task, split.examples)
        score = scores[name]["student"][metric]
        if score <= best:
            yield (
                f"the student is no better than the majority baseline on {name}: {metric} "
                f"{score:.4f}, baseline {best:.4f}"
            )
    for name, of in scores.items():
        if "ensemble_rows" in of:
            split = splits.selection if name == "selection" else splits.official[name]
            yield (
                f"the ensemble is scored on {of['ensemble_rows']} of {len(split)} {name} rows, "
                "those with a prediction of each of its teachers"
            )
        gap = of.get("ensemble_gap")
        if gap is not None and gap["interval"][0] <= 0:
            low, high = gap["interval"]
            yield (
                f"the ensemble is not better beyond chance on {name} than {gap['teacher']}, its "
                f"best teacher by the selection split: {metric} {gap['gap']:+.4f} ({low:+.4f} to "
                f"{high:+.4f}, 95%, over rows)"
            )
        for who, classes in of["never_predicted"].items():
            if classes:
                yield f"{who} never predicts {', '.join(classes[:10])} on {name}"


OF_TEACHERS = (
    *("temperature", "alpha", "alpha_end", "loss", "teacher", "teacher_column"),
    *("feature_loss_weight", "feature_stage_ratio"),
)


def unread_keys(config: RunConfig) -> list[str]:
    """A line for each key that is set and that this run does not read.

    A key is set where it differs from the default and from the method's file.
    """
    usual = usual_values(config)
    lines = []
    for key, why in _unread(config):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value != usual.get(key):
            lines.append(f"{key}={value} is not read: {why}")
    named = [entry.name or entry.path for entry in config.teachers if entry.weight != 1.0]
    # an ensemble of a plugin may read the weights
    built_in = config.taught and config.ensemble in BUILT_IN["ensemble"]
    if named and built_in and not isinstance(WEIGHTINGS[config.ensemble], Fixed):
        lines.append(
            f"the weight of teacher {named[0]} is not read: it is for ensemble=fixed, and this run "
            f"has ensemble={config.ensemble}"
        )
    return lines


def _unread(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.fold is None:
        yield "folds", "it is for finetune, which trains teachers"
    if not config.has_text:
        yield "unlabeled.ratio", "there is no unlabelled text"
    if (why := _reason_against_copies(config)) is not None:
        yield "augment.operations", why
        yield "augment.gold_labels", why
    if config.repair.text is None:
        for key in ("repair.steps", "repair.teacher"):
            yield key, "there is no repair.text, so nothing is repaired"
    if config.final_checkpoint in ("best", "last"):
        yield "average_share", f"it is for final_checkpoint=average, not {config.final_checkpoint}"
    if not config.taught:
        for key in OF_TEACHERS:
            yield key, "the run uses no teacher"
        return
    yield from _unread_by_method(config)


def _reason_against_copies(config: RunConfig) -> str | None:
    """Why the run makes no copies, by its keys alone; None where it may make some."""
    if config.uses_copies:
        return None
    if config.augment.copies is None:
        return "augment.copies is null"
    if not config.taught:
        return "without teachers a run makes copies with augment.gold_labels=true only"
    return "files of predictions have no predictions of copies"


def _unread_by_method(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys that the run's ensemble, loss or feature loss does not read."""
    ensemble = f"this run has ensemble={config.ensemble}"
    weighting = WEIGHTINGS[config.ensemble]
    if not isinstance(weighting, Single) and config.feature_loss is None:
        yield "teacher", f"it is for ensemble=single or a feature_loss, and {ensemble}"
    if not isinstance(weighting, Routed):
        yield "teacher_column", f"it is for ensemble=routed, and {ensemble}"
    if config.feature_loss is None:
        yield "feature_loss_weight", "there is no feature_loss"
    if config.feature_loss != "tinybert":
        yield "feature_stage_ratio", "it is for feature_loss=tinybert"
    if config.loss in ("mse", "mse_centered") and weighting.of_logits:
        yield "temperature", f"loss={config.loss} compares logits"
