"""Validate the teachers, and fix the ensemble's weights, before the first step."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NotRequired

import numpy as np
import torch
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from sead_dist.config.schema import RunConfig, teacher_names
from sead_dist.data.examples import ExampleSet, has_label, subset
from sead_dist.data.splits import RunSplits
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError
from sead_dist.objectives.ensemble import (
    Ensemble,
    frozen_weights,
    make_ensemble,
    needs_selection,
)
from sead_dist.objectives.teacher_weights import FEWEST_ROWS, fit_temperature
from sead_dist.objectives.weightings import Known
from sead_dist.runs.baseline import (
    FILE,
    OWN,
    SECOND,
    Learnable,
    baseline_folder,
    baseline_logits,
    compare_ensemble,
    learnable_line,
    second_ensemble,
    second_ensemble_line,
)
from sead_dist.runs.requests import idle_row_lines, seen_examples
from sead_dist.runs.setup import RunSetup
from sead_dist.runs.without_gold import unvalidated_line
from sead_dist.runtime.distributed import from_main
from sead_dist.runtime.run_log import read_as, tell, write_json
from sead_dist.teachers.teacher import Teacher, describe_folds
from sead_dist.teachers.validation import (
    Validation,
    describe,
    measure_drift,
    request_and_validate,
    require_passed,
)

# the teachers' validations, and their logits_NBC of the selection split
Validated = tuple[list[Validation], np.ndarray | None]


def validated(setup: RunSetup) -> Validated:
    """The teachers' validations, and their logits_NBC of the selection split.

    ([], None) where nothing in the run needs them. Raises UserError for a teacher that fails its
    validation.
    """
    config, task, teachers = setup.config, setup.task, setup.teachers
    selection = setup.splits.selection
    if setup.source is None or not needs_validation(config, selection.examples):
        return [], None
    setup.world.set_activity("validating the teachers")
    overlap = setup.examples.dev_in_training
    validations, logits_NBC = request_and_validate(
        setup.source, task, selection, config.prefetch_rows, overlap
    )
    if config.teacher_validation == "fp32":
        drifts = measure_drift(setup.source, selection)
        validations = [
            replace(e, drift=drift) for e, drift in zip(validations, drifts, strict=True)
        ]
    for validation, teacher in zip(validations, teachers, strict=True):
        tell(describe(validation, teacher, len(selection)))
    if setup.world.is_main:
        record = [asdict(validation) for validation in validations]
        write_json(Path(config.output_dir) / "teacher_validation.json", record)
    if config.validates:
        require_passed(task, validations, teachers)
    return validations, logits_NBC


def prepare_teachers(setup: RunSetup, found: Validated | None = None) -> Ensemble | None:
    """The ensemble with its weights frozen; None without teachers.

    found: the validations, where they are known. Without it the teachers are validated here.
    """
    config, task, teachers = setup.config, setup.task, setup.teachers
    if setup.source is None:
        return None
    validations, logits_NBC = found or validated(setup)
    selection = setup.splits.selection
    if not selection.examples.has_gold:
        tell(unvalidated_line(config, setup.examples.labelled_rows))
    ensemble = frozen_ensemble(config, task, teachers, validations, logits_NBC, setup.splits)
    names = [teacher.name for teacher in teachers]
    for line in repeated_teacher_lines(teachers):
        tell(line)
    weights, calibration = from_main(
        setup.world, lambda: kept_weights(Path(config.output_dir), ensemble, names)
    )
    ensemble = replace(
        ensemble,
        weights_N=torch.tensor(weights),
        calibration_N=None if calibration is None else torch.tensor(calibration),
    )
    for line in calibration_lines(config, task, ensemble, selection.examples, logits_NBC):
        tell(line)
    for line in (*weight_lines(ensemble, names), *training_row_lines(setup, ensemble)):
        tell(line)
    if logits_NBC is not None:
        log_learnable(setup, validations, logits_NBC, ensemble)
    return ensemble


def weight_lines(ensemble: Ensemble, names: Sequence[str]) -> list[str]:
    """A line on each teacher's weight, where the weights are fixed."""
    if ensemble.weighting.one_teacher:
        return [f"the one teacher of this student: {names[int(ensemble.weights_N.argmax())]}"]
    if not ensemble.weighting.has_frozen_weights:
        return []
    weights = ensemble.weights_N.tolist()
    told_N = [f"{name} {of:.3f}" for name, of in zip(names, weights, strict=True)]
    return [f"weights: {', '.join(told_N)}"]


def training_row_lines(setup: RunSetup, ensemble: Ensemble) -> list[str]:
    """Lines on unlabelled rows without a prediction, and on rows that a teacher was trained on."""
    config, teachers, train = setup.config, setup.teachers, setup.splits.train
    lines = []
    if config.feature_loss is None:
        lines = idle_row_lines(ensemble, teachers, train.examples)
    if ensemble.seen_NU is not None:
        labelled = setup.examples.labelled_rows
        lines.append(describe_folds(teachers, ensemble.seen_NU, train, labelled))
    elif any(teacher.trained_rows is not None for teacher in teachers):
        lines.append(
            f"WARNING: ensemble={config.ensemble} has one teacher for a row, and uses it also on "
            "rows that it was trained on; an ensemble of all teachers leaves these out"
        )
    return lines


def repeated_teacher_lines(teachers: Sequence[Teacher]) -> list[str]:
    """A line for each teacher that is given more than once, and so counts more than once."""
    first: dict[str, str] = {}
    lines = []
    for teacher in teachers:
        earlier = first.setdefault(teacher.key.fingerprint, teacher.name)
        if earlier != teacher.name:
            lines.append(
                f"WARNING: teacher {teacher.name} is the same as {earlier}, which therefore counts "
                "more than once; give it once"
            )
    return lines


class Frozen(TypedDict):
    """ensemble.json: the teachers' weights and temperatures, fixed before step 1."""

    weights: list[float]
    calibration: NotRequired[list[float] | None]


def kept_weights(
    run: Path, ensemble: Ensemble, names: Sequence[str]
) -> tuple[list[float], list[float] | None]:
    """The teachers' weights and temperatures of the run's first start.

    The first start writes the ensemble's to ensemble.json, and later starts read them. Raises
    UserError where the file has another number of weights.
    """
    path, weights_N = run / "ensemble.json", ensemble.weights_N
    if not path.is_file():
        record: dict[str, object] = {"teachers": list(names), "weights": weights_N.tolist()}
        if ensemble.calibration_N is not None:
            record["calibration"] = ensemble.calibration_N.tolist()
        write_json(path, record)
    kept = read_as(Frozen, path)
    weights, calibration = kept["weights"], kept.get("calibration")
    if any(len(of) != len(weights_N) for of in (weights, calibration or weights)):
        raise UserError(
            f"{path} holds {len(weights)} weights for {len(weights_N)} teachers; restore it, or "
            "give another output_dir"
        )
    return weights, calibration


def log_learnable(
    setup: RunSetup,
    validations: Sequence[Validation],
    logits_NBC: np.ndarray,
    ensemble: Ensemble,
) -> None:
    """Log and record whether the ensemble is better than the fine-tuned student.

    Without a fine-tuned student it is compared with the majority baseline.
    """
    selection, baseline = setup.splits.selection.examples, baseline_folder(setup.config)

    routes = selection.routes_B
    routes_B = None if routes is None else torch.from_numpy(routes)
    all_NBC = torch.from_numpy(logits_NBC)
    complete_B = ensemble.complete(all_NBC, routes_B).numpy()
    scored = [validation for validation in validations if validation.score is not None]
    if not scored or len(set(selection.labels_B[complete_B].tolist())) < 2:
        tell(
            "the ensemble cannot be compared with a baseline: too few selection rows have a gold "
            "label and predictions, or all of them have the same label"
        )
        return

    def find() -> Learnable:
        answer = ensemble.answer(all_NBC, routes_B)
        finetuned_BC = None
        if baseline is not None:
            finetuned_BC = baseline_logits(baseline, setup.task, selection)[complete_B]
        found = compare_ensemble(
            setup.task,
            selection if complete_B.all() else subset(selection, complete_B),
            [validation.score or 0.0 for validation in scored],
            [validation.name for validation in scored],
            answer.logits_BC.numpy()[complete_B],
            finetuned_BC,
        )
        if setup.config.ensemble == SECOND:
            return found
        names = [teacher.name for teacher in setup.teachers]
        calibrated_NBC = ensemble.calibrated(all_NBC).numpy()
        second = second_ensemble(setup.task, selection, names, calibrated_NBC)
        return replace(found, second=second)

    found = from_main(setup.world, find)
    line = learnable_line(found)
    if ensemble.weighting.fewest_rows:
        line += "; the ensemble's weights were fitted to these rows, so its score is too high"
    tell(line)
    if found.second is not None:
        tell(second_ensemble_line(found.second, found.metric))
    if setup.world.is_main:
        write_json(Path(setup.config.output_dir) / FILE, asdict(found))


def needs_validation(config: RunConfig, selection: ExampleSet) -> bool:
    """Whether the teachers' scores must be known before the first step.

    False where the selection split has no gold labels, since there are no scores then.
    """
    if not selection.has_gold:
        return False
    calibrates = any(entry.calibrates for entry in config.teachers)
    named = config.baseline not in (None, OWN)
    return config.validates or needs_selection(config) or calibrates or named


def frozen_ensemble(
    config: RunConfig,
    task: TaskSpec,
    teachers: Sequence[Teacher],
    validations: Sequence[Validation],
    logits_NBC: np.ndarray | None,
    splits: RunSplits,
) -> Ensemble:
    """The ensemble, with weights frozen from the teachers' scores and logits.

    logits_NBC: of the selection split; None where it was not computed.
    """
    names = [teacher.name for teacher in teachers]
    known = Known(
        given=[teacher.entry.weight for teacher in teachers],
        chosen=None if config.teacher is None else names.index(config.teacher),
        sizes=[teacher.parameters for teacher in teachers],
        scores=[validation.score for validation in validations] or [None] * len(teachers),
        names=names,
        labels_B=splits.selection.examples.labels_B,
    )
    calibration_N = None
    if logits_NBC is not None:
        labels_B = splits.selection.examples.labels_B
        calibration_N = calibrate(config, task, logits_NBC, labels_B)
        scaled_NBC = logits_NBC
        if calibration_N is not None:
            scaled_NBC = logits_NBC / calibration_N.numpy()[:, None, None]
        known = replace(known, logits_NBC=scaled_NBC)
    seen_NU = seen_examples(config, teachers, splits.train.ids_U2)
    ensemble = make_ensemble(
        config, task.task_kind, frozen_weights(config.ensemble, known), seen_NU
    )
    return replace(ensemble, calibration_N=calibration_N)


def calibrate(
    config: RunConfig, task: TaskSpec, logits_NBC: np.ndarray, labels_B: np.ndarray
) -> torch.Tensor | None:
    """calibration_N: the fitted temperature of each teacher; None where all are 1.

    It is 1 for a teacher whose entry has no calibration, for one that predicts too few rows, and
    for a regression task.
    """
    found = [1.0] * len(logits_NBC)
    for n, rows_B in enumerate(rows_to_calibrate(task, logits_NBC, labels_B)):
        if config.teachers[n].calibrates and len(rows_B) >= FEWEST_ROWS:
            found[n] = fit_temperature(logits_NBC[n, rows_B], labels_B[rows_B])
    return None if all(one == 1 for one in found) else torch.tensor(found)


def rows_to_calibrate(
    task: TaskSpec, logits_NBC: np.ndarray, labels_B: np.ndarray
) -> list[np.ndarray]:
    """The labelled rows that each teacher predicts; empty for a regression task."""
    answered_NB = ~np.isnan(logits_NBC).any(axis=2) & has_label(labels_B)[None]
    return [np.flatnonzero(of & task.task_kind.has_classes) for of in answered_NB]


def calibration_lines(
    config: RunConfig,
    task: TaskSpec,
    ensemble: Ensemble,
    selection: ExampleSet,
    logits_NBC: np.ndarray | None,
) -> list[str]:
    """Lines on the fitted temperatures of teachers whose entry has calibration."""
    if logits_NBC is None or not task.task_kind.has_classes:
        return []
    lines = []
    names = teacher_names(config.teachers)
    for n, rows_B in enumerate(rows_to_calibrate(task, logits_NBC, selection.labels_B)):
        if not config.teachers[n].calibrates:
            continue
        if len(rows_B) < FEWEST_ROWS:
            line = f"{names[n]} is not calibrated: it has predictions of {len(rows_B)} labelled "
            line += f"selection rows, and {FEWEST_ROWS} are needed"
            if ensemble.weighting.of_logits and len(names) > 1:
                line += "; give ensemble=mean_probabilities, since a teacher that is too confident "
                line += "outweighs the others in a mean of logits"
            lines.append(line)
        elif ensemble.calibration_N is not None:
            lines.append(
                f"{names[n]} is calibrated by the temperature "
                f"{float(ensemble.calibration_N[n]):.3f}"
            )
    return lines
