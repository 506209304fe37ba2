"""The temperatures of a run's teachers, fitted on the selection split.

Shapes: N teachers, B rows of the selection split, C classes.
"""

import numpy as np
import torch

from sead_dist.config.schema import RunConfig, teacher_names
from sead_dist.data.examples import ExampleSet, has_label
from sead_dist.data.task_files import TaskSpec
from sead_dist.objectives.calibration import FEWEST_ROWS, fit_temperature
from sead_dist.objectives.ensemble import Ensemble


def calibrate(
    config: RunConfig, task: TaskSpec, logits_NBC: np.ndarray, labels_B: np.ndarray
) -> torch.Tensor | None:
    """calibration_N: the temperature of each teacher that asks for one and answers enough rows, 1
    of the others; None where it is 1 of all. Of scores there is none."""
    found = [1.0] * len(logits_NBC)
    for n, rows_B in enumerate(rows_to_calibrate(task, logits_NBC, labels_B)):
        if config.teachers[n].calibrates and len(rows_B) >= FEWEST_ROWS:
            found[n] = fit_temperature(logits_NBC[n, rows_B], labels_B[rows_B])
    return None if all(one == 1 for one in found) else torch.tensor(found)


def rows_to_calibrate(
    task: TaskSpec, logits_NBC: np.ndarray, labels_B: np.ndarray
) -> list[np.ndarray]:
    """The labelled rows that each teacher answers; none for a task of scores."""
    answered_NB = ~np.isnan(logits_NBC).any(axis=2) & has_label(labels_B)[None]
    return [np.flatnonzero(of & task.task_kind.has_classes) for of in answered_NB]


def told_calibration(
    config: RunConfig,
    task: TaskSpec,
    ensemble: Ensemble,
    selection: ExampleSet,
    logits_NBC: np.ndarray | None,
) -> list[str]:
    """Lines on the temperatures of teachers that ask for one."""
    if logits_NBC is None or not task.task_kind.has_classes:
        return []
    lines = []
    names = teacher_names(config.teachers)
    for n, rows_B in enumerate(rows_to_calibrate(task, logits_NBC, selection.labels_B)):
        if not config.teachers[n].calibrates:
            continue
        if len(rows_B) < FEWEST_ROWS:
            line = f"{names[n]} is not calibrated: it answers {len(rows_B)} labelled selection "
            line += f"rows, and {FEWEST_ROWS} are needed"
            if ensemble.weighting.of_logits and len(names) > 1:
                line += "; beside others a mean of probabilities (ensemble=mean_probabilities) is "
                line += "advised, since one that is too sure outweighs them in a mean of logits"
            lines.append(line)
        elif ensemble.calibration_N is not None:
            lines.append(
                f"{names[n]} is calibrated by the temperature "
                f"{float(ensemble.calibration_N[n]):.3f}"
            )
    return lines
