"""The fine-tuned student that a run is compared with (the baseline).

The baseline is a run of its own in RUN/baseline, or the run that `baseline` names. Its own run is
made after the teachers are validated and before the first step. Before the first step, the ensemble
is compared with the baseline on the selection split: the gap is what the student can learn. At the
end, the log gives the share of this gap that the student keeps. A second comparison is of two
ensembles: the weights of one are equal, those of the other are fitted to the selection split.

Shapes: N teachers, B rows of the selection split, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from sead_dist.config.automatic import run_steps
from sead_dist.config.registered import NO_ENSEMBLE
from sead_dist.config.schema import METHOD_KEYS, RunConfig
from sead_dist.config.sections import AugmentConfig
from sead_dist.data.augmentation import run_rows
from sead_dist.data.examples import ExampleSet, has_label, subset
from sead_dist.data.significance import paired_gap, units_of
from sead_dist.data.splits import RunExamples
from sead_dist.data.tasks import TaskSpec, compute_metrics, constant_score
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.objectives.ensemble import asks_selection, combine, frozen_weights
from sead_dist.objectives.weightings import WEIGHTINGS, Known
from sead_dist.reporting.report import read_predictions
from sead_dist.reporting.run_files import Scores
from sead_dist.runs.checks import without_teachers_text
from sead_dist.runtime.run_log import is_finished, read_as, tell

FILE = "learnable.json"
# one point; a smaller gap is not worth a run
WORTH = 0.01
OWN = "auto"
FOLDER = "baseline"
# The baseline has at most a fifth of the run's steps. A step on gold labels alone takes about half
# the time of a step with teachers, so this is about a tenth of the run's time. It is up to a fifth
# where the store has the teachers' predictions.
MOST_OF_STEPS = 5
SECOND = "fitted"
# each part of the rows is scored with weights that are fitted to the other parts
PARTS = 5


@dataclass(frozen=True)
class SecondEnsemble:
    """Scores of the teachers' mean probabilities (or scores), with equal and with fitted weights.

    The rows are the labelled selection rows that every teacher predicts. fitted: each row is scored
    with weights that were not fitted to it. gap: `fitted` minus `equal`. interval: the 95% interval
    of the gap over rows. weights: of each teacher, fitted to all of the rows, as `ensemble=fitted`
    does.
    """

    rows: int
    equal: float
    fitted: float
    gap: float
    interval: tuple[float, float]
    weights: dict[str, float]


@dataclass(frozen=True)
class Learnable:
    """Scores on the selection split under `metric`, and whether there is anything to learn.

    finetuned: the score of the fine-tuned student; None without one. gap: the ensemble's score
    minus `finetuned`, or minus the score of the majority baseline where `finetuned` is None.
    interval: the 95% interval of the gap over rows. verdict: "yes", "no", "cannot be told from so
    few rows" or "cannot be told without a fine-tuned student".
    """

    metric: str
    rows: int
    majority: float
    finetuned: float | None
    best_teacher: float
    best_name: str
    ensemble: float
    gap: float
    interval: tuple[float, float]
    verdict: str
    second: SecondEnsemble | None = None


class ScoredTask(TypedDict):
    """The part of a run's scores.json that is read here."""

    task: str


def verdict(interval: tuple[float, float], has_finetuned: bool) -> str:
    """Whether there is anything to learn, by the interval of the ensemble's gap.

    has_finetuned: whether the gap is over the fine-tuned student. A gap over the majority baseline
    never gives "yes": fine-tuning alone may have it too.
    """
    low, high = interval
    if low > 0:
        return "yes" if has_finetuned else "cannot be told without a fine-tuned student"
    return "no" if high < WORTH else "cannot be told from so few rows"


def baseline_logits(baseline: Path, task: TaskSpec, selection: ExampleSet) -> NDArray[np.float32]:
    """The logits_BC that the student of a finished run gave to the rows of the selection split.

    Raises UserError for a run that is not finished, had teachers, or had another task or other
    selection rows.
    """
    if not is_finished(baseline):
        raise UserError(
            f"baseline={baseline} is not a finished run; give the folder of one, auto or null"
        )
    has = read_as(ScoredTask, baseline / "scores.json")["task"]
    if has != task.name:
        raise UserError(
            f"baseline={baseline} is a run of task {has}, and this run is of task {task.name}; "
            f"give a run of {task.name}"
        )
    if (baseline / "teacher_manifest.json").exists():
        raise UserError(
            f"baseline={baseline} was trained with teachers; give a run of method=finetune"
        )
    found = read_predictions(baseline / "predictions" / "selection.parquet")
    rows = found.places(selection.ids_B2)
    if None in rows:
        raise UserError(
            f"baseline={baseline} lacks {rows.count(None)} of this run's {len(rows)} selection "
            "rows; give a run with the same data and the same selection.* keys"
        )
    return np.asarray(found.student_logits_BC[np.array(rows, np.int64)], np.float32)


def constant_logits(task: TaskSpec, examples: ExampleSet) -> NDArray[np.float32]:
    """The logits_BC of the majority baseline."""
    rows, metric = len(examples.labels_B), task.metrics[0]
    if not task.task_kind.has_classes:
        return np.zeros((rows, 1), np.float32)
    tried = [np.tile(one, (rows, 1)) for one in np.eye(task.num_labels, dtype=np.float32)]
    return max(tried, key=lambda one_BC: compute_metrics(task, one_BC, examples)[metric])


def compare_ensemble(
    task: TaskSpec,
    selection: ExampleSet,
    scores_N: list[float],
    names_N: list[str],
    ensemble_BC: NDArray[np.float32],
    finetuned_BC: NDArray[np.float32] | None,
) -> Learnable:
    """Compare the ensemble with the fine-tuned student, or with the majority baseline without one.

    scores_N: the teachers' scores on the selection split.
    """
    metric = task.metrics[0]
    reference_BC = constant_logits(task, selection) if finetuned_BC is None else finetuned_BC
    gap = paired_gap(metric, task.task_kind, ensemble_BC, reference_BC, selection)
    finetuned = None
    if finetuned_BC is not None:
        finetuned = compute_metrics(task, finetuned_BC, selection)[metric]
    best = scores_N.index(max(scores_N))
    return Learnable(
        metric=metric,
        rows=len(selection.labels_B),
        majority=constant_score(task, selection),
        finetuned=finetuned,
        best_teacher=scores_N[best],
        best_name=names_N[best],
        ensemble=compute_metrics(task, ensemble_BC, selection)[metric],
        gap=gap.value,
        interval=gap.interval,
        verdict=verdict(gap.interval, finetuned is not None),
    )


def second_ensemble(
    task: TaskSpec, selection: ExampleSet, names_N: Sequence[str], logits_NBC: NDArray[np.float32]
) -> SecondEnsemble | None:
    """Scores of the ensemble with fitted and with equal weights.

    logits_NBC: NaN where a teacher has no prediction. None with fewer than two teachers, and where
    all teachers together predict fewer labelled rows than `fitted` needs.
    """
    rows_B = np.flatnonzero(~np.isnan(logits_NBC).any(axis=(0, 2)) & has_label(selection.labels_B))
    examples, logits_NBC = subset(selection, rows_B), logits_NBC[:, rows_B]
    if len(names_N) < 2 or len(rows_B) < WEIGHTINGS[SECOND].fewest_rows:
        return None
    part_B = units_of(examples) % PARTS
    if len(set(part_B.tolist())) < PARTS:
        return None
    equal_BC = weighted(task, torch.full((len(names_N),), 1 / len(names_N)), logits_NBC)
    fitted_BC = np.empty_like(equal_BC)
    for part in range(PARTS):
        own_B = part_B == part
        weights_N = fit(names_N, logits_NBC[:, ~own_B], examples.labels_B[~own_B])
        fitted_BC[own_B] = weighted(task, weights_N, logits_NBC[:, own_B])
    metric = task.metrics[0]
    gap = paired_gap(metric, task.task_kind, fitted_BC, equal_BC, examples)
    weights_N = fit(names_N, logits_NBC, examples.labels_B)
    return SecondEnsemble(
        rows=len(rows_B),
        equal=compute_metrics(task, equal_BC, examples)[metric],
        fitted=compute_metrics(task, fitted_BC, examples)[metric],
        gap=gap.value,
        interval=gap.interval,
        weights=dict(zip(names_N, weights_N.tolist(), strict=True)),
    )


def fit(
    names_N: Sequence[str], logits_NBC: NDArray[np.float32], labels_B: NDArray[Any]
) -> torch.Tensor:
    """weights_N, fitted to the labels; their sum is 1."""
    given = [1.0] * len(names_N)
    known = Known(given, names=names_N, logits_NBC=logits_NBC, labels_B=labels_B)
    return frozen_weights(SECOND, known)


def weighted(
    task: TaskSpec, weights_N: torch.Tensor, logits_NBC: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The logits_BC of the teachers' mean under these weights."""
    all_NBC = torch.from_numpy(logits_NBC)
    teachers = TeacherLogits(all_NBC, torch.ones(all_NBC.shape[:2], dtype=torch.bool))
    regression = not task.task_kind.has_classes
    return combine(SECOND, teachers, None, weights_N, 1.0, regression).logits_BC.numpy()


def second_ensemble_line(found: SecondEnsemble, metric: str) -> str:
    """The line of the log on equal and fitted weights."""
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in found.weights.items())
    low, high = found.interval
    return (
        f"ensemble of all teachers, {metric} on {found.rows} selection rows: equal weights "
        f"{found.equal:.4f}, fitted weights {found.fitted:.4f} ({found.gap:+.4f}, {low:+.4f} to "
        f"{high:+.4f}; each fifth of the rows is scored with weights that are fitted to the other "
        f"four); weights that are fitted to all rows (ensemble=fitted): {weights}"
    )


def learnable_line(found: Learnable) -> str:
    """The line of the log on what there is to learn."""
    line = f"is there anything to learn? {found.metric} on {found.rows} selection rows: "
    line += f"majority baseline {found.majority:.4f}, "
    if found.finetuned is not None:
        line += f"fine-tuned student {found.finetuned:.4f}, "
    line += f"best teacher {found.best_teacher:.4f} ({found.best_name}), "
    low, high = found.interval
    over = "the majority baseline" if found.finetuned is None else "the fine-tuned student"
    line += f"ensemble {found.ensemble:.4f}; the ensemble's gap over {over} is {found.gap:+.4f} "
    return line + f"({low:+.4f} to {high:+.4f}): {found.verdict}"


def kept_shares(baseline: Path, scores: dict[str, Any], metric: str) -> dict[str, dict[str, float]]:
    """Scores by split, for each split that the baseline was scored on too.

    finetuned, student, ensemble: the scores under `metric`. share: the share of the gap between
    `finetuned` and `ensemble` that the student keeps; it is left out where there is no gap.
    """
    before = read_as(Scores, baseline / "scores.json")["splits"]
    shares: dict[str, dict[str, float]] = {}
    for split, of in scores.items():
        finetuned = before[split]["student"].get(metric) if split in before else None
        # an ensemble of files may predict other rows than the students
        if finetuned is None or of["ensemble"] is None or "ensemble_rows" in of:
            continue
        student, ensemble = of["student"][metric], of["ensemble"][metric]
        shares[split] = {"finetuned": finetuned, "student": student, "ensemble": ensemble}
        if ensemble > finetuned:
            shares[split]["share"] = (student - finetuned) / (ensemble - finetuned)
    return shares


def share_lines(shares: dict[str, dict[str, float]]) -> list[str]:
    """Lines on the share of the gap that the student keeps."""
    return [
        f"{split}: fine-tuned student {of['finetuned']:.4f}, student {of['student']:.4f}, ensemble "
        f"{of['ensemble']:.4f}; share of the gap that is kept: "
        + (f"{of['share']:.0%}" if "share" in of else "there is no gap")
        for split, of in shares.items()
    ]


def baseline_folder(config: RunConfig) -> Path | None:
    """The run directory of the fine-tuned student; None without one.

    The run's own baseline counts once it is finished.
    """
    if config.baseline != OWN:
        return None if config.baseline is None else Path(config.baseline)
    own = Path(config.output_dir) / FOLDER
    return own if is_finished(own) else None


def own_baseline(config: RunConfig) -> RunConfig:
    """The configuration of the run's own baseline.

    It trains the same student on the same labelled rows without teachers. Its number of steps is
    the one that fine-tuning chooses by itself.
    """
    untaught = {key: RunConfig.model_fields[key].get_default() for key in METHOD_KEYS}
    own = without_teachers_text(
        config.model_copy(
            update={
                **untaught,
                "method": "finetune",
                "ensemble": NO_ENSEMBLE,
                "output_dir": str(Path(config.output_dir) / FOLDER),
                "max_steps": None,
                "num_train_epochs": None,
                "early_stopping_patience": None,
                "baseline": None,
                "teacher_column": None,
                "push_to_hub": False,
                "report_to": None,
            }
        )
    )
    if own.augment.copies is None:  # else the log warns that keys of copies are not read
        own = own.model_copy(update={"augment": AugmentConfig(copies=None)})
    return own


def baseline_steps(config: RunConfig, examples: RunExamples) -> int:
    """Steps of the run's own baseline; 0 where none is made.

    None is made where `baseline` is null or names a run, without teachers, where the teachers are
    not validated, and where rows have no gold labels.
    """
    validates = config.validates or asks_selection(config)
    if config.baseline != OWN or not config.taught or not validates:
        return 0
    held = (examples.selection, *examples.official.values())
    if not examples.labelled_rows or not all(part.has_gold for part in held):
        return 0
    own = own_baseline(config)
    labelled = examples.labelled_rows
    return run_steps(own, labelled, run_rows(own, labelled, 0))


def needs_own_baseline(config: RunConfig, examples: RunExamples, total_steps: int) -> bool:
    """Whether the run makes its own baseline. A line is logged where that would take too long.

    total_steps: the steps of the run.
    """
    steps = baseline_steps(config, examples)
    if not steps or baseline_folder(config) is not None:
        return False
    if steps * MOST_OF_STEPS > total_steps:
        tell(
            f"the run makes no fine-tuned student to compare with: its {steps} steps are more than "
            f"a fifth of this run's {total_steps}; train one with method=finetune and give "
            "baseline=RUN_DIR"
        )
        return False
    return True


def baseline_line(config: RunConfig, examples: RunExamples) -> str:
    """The line of the log before the run's own baseline is made."""
    return (
        "a fine-tuned student to compare with is trained first: "
        f"{baseline_steps(config, examples)} steps without teachers, in "
        f"{Path(config.output_dir) / FOLDER} (with baseline=null there is none)"
    )
