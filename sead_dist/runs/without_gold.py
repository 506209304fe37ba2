"""Runs with a split that has no gold labels.

Some keys are rejected then. Elsewhere the ensemble's predictions serve as labels.

Shapes: N teachers, B rows, C classes.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sead_dist.config.schema import DataConfig, RunConfig
from sead_dist.data.examples import ExampleSet, score, with_teacher_labels
from sead_dist.data.splits import RunExamples, load_official
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError
from sead_dist.objectives.ensemble import Ensemble, needs_selection
from sead_dist.objectives.weightings import WEIGHTINGS
from sead_dist.reporting.report import read_predictions
from sead_dist.runs.baseline import OWN
from sead_dist.training.evaluation import EvalResult, mean_loss


def check_gold(config: RunConfig, task: TaskSpec, examples: RunExamples) -> None:
    """Raises UserError for a key or task that needs gold labels where a split has none."""
    for part in (examples.selection, *examples.official.values()):
        if part.answers is not None and not part.has_gold:
            raise UserError(
                f"{part.split} has no gold labels, and task {task.name} is scored by accepted "
                "answers, which no teacher gives; give rows with their answers"
            )
    if not config.taught or examples.selection.has_gold:
        return
    weighting = WEIGHTINGS[config.ensemble]
    unnamed = len(config.teachers) > 1 and config.teacher is None
    falls_back = weighting.alike_without_gold or weighting.one_teacher
    by_labels = needs_selection(config) and not falls_back
    rejected = {
        "final_checkpoint=best": config.final_checkpoint == "best",
        "early_stopping_patience": config.early_stopping_patience is not None,
        "teacher_validation=fp32": config.teacher_validation == "fp32",
        f"baseline={config.baseline}": config.baseline not in (None, OWN),
        f"ensemble={config.ensemble}": by_labels,
        f"ensemble={config.ensemble} without teacher=NAME": unnamed and weighting.one_teacher,
        "feature_loss without teacher=NAME": unnamed and config.feature_loss is not None,
    }
    for key, asked in rejected.items():
        if asked:
            fix = "name one teacher" if key.endswith("NAME") else f"leave {key} out"
            raise UserError(
                f"{key} needs gold labels in the selection split, and it has none; {fix}, or give "
                "rows with gold labels"
            )


def unvalidated_line(config: RunConfig, labelled_rows: int) -> str:
    """The line of the log on teachers where the selection split has no gold labels."""
    line = "the selection split has no gold labels: no teacher is validated or calibrated"
    # An ensemble goes by the labels of the selection split, or by those of the training rows. The
    # training rows may have labels where the selection split has none.
    lacks = needs_selection(config) or not labelled_rows
    if WEIGHTINGS[config.ensemble].alike_without_gold and lacks:
        line += f", and ensemble={config.ensemble} gives all teachers the same weight"
    return line


def ensemble_targets(
    ensemble: Ensemble, logits_NBC: np.ndarray, examples: ExampleSet
) -> np.ndarray:
    """The ensemble's targets_BC at temperature 1; NaN in rows that no teacher predicts.

    logits_NBC: NaN in rows that a teacher does not predict.
    """
    routes = examples.routes_B
    routes_B = None if routes is None else torch.from_numpy(routes)
    answer = ensemble.answer(torch.from_numpy(logits_NBC), routes_B)
    said_BC = answer.targets_BC.numpy()
    said_BC[answer.weights_NB.sum(0).numpy() == 0] = np.nan
    return said_BC


def with_ensemble_labels(
    task: TaskSpec, examples: ExampleSet, ensemble: Ensemble, logits_NBC: np.ndarray
) -> tuple[ExampleSet, np.ndarray]:
    """(the examples, the ensemble's targets_BC as `ensemble_targets` gives them).

    Where the examples have no gold labels, their labels are the ensemble's predictions.
    """
    said_BC = ensemble_targets(ensemble, logits_NBC, examples)
    if not examples.has_gold:
        examples = with_teacher_labels(task, examples, said_BC)
    return examples, said_BC


def rescored(task: TaskSpec, result: EvalResult, examples: ExampleSet) -> EvalResult:
    """The result, scored by the labels of `examples`, which are the ensemble's predictions."""
    loss = mean_loss(task.task_kind, result.logits_BC, examples.labels_B)
    return replace(result, metrics=score(task, result.logits_BC, examples), loss=loss)


def load_to_score(name: str, task: TaskSpec, data: DataConfig, split: str) -> ExampleSet:
    """A split to score the model `name` on.

    Where the split has no gold labels, its labels are the predictions of the run's ensemble, which
    the run directory keeps. Raises UserError where neither exists.
    """
    kept = Path(name) / "predictions" / f"{split}.parquet"
    examples = load_official(task, data, split, may_lack=kept.is_file())
    if examples.has_gold:
        return examples
    found = read_predictions(kept)
    said_BC = found.ensemble_probabilities_BC
    rows = found.places(examples.ids_B2)
    if said_BC is None or None in rows:
        raise UserError(
            f"{split} has no gold labels, and {name} has its teachers' predictions only of the "
            "rows of its own data; give rows with gold labels"
        )
    return with_teacher_labels(task, examples, said_BC[np.array(rows, np.int64)])
