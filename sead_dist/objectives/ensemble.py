"""Combine N teachers' logits into the student's soft targets.

Shapes: N teachers, B rows, R requested examples, C classes (in task order).
"""

from dataclasses import dataclass

import numpy as np
import torch

from sead_dist.config.schema import RunConfig, teacher_names
from sead_dist.data.examples import has_label
from sead_dist.data.kinds import TaskKind
from sead_dist.data.order import BatchStream
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.objectives.losses import SOFT_LOSSES, SoftTargets
from sead_dist.objectives.weightings import (
    WEIGHTINGS,
    ByRow,
    Known,
    WantedSteps,
    Weighting,
)


@dataclass(frozen=True)
class Ensemble:
    """The teachers of a run together: which of them a step needs, their weights, the soft targets,
    and the answer to a new text. weights_N: fixed before step 1. calibration_N: temperatures, fixed
    before step 1 too, by which each teacher's logits are divided first (None: all 1). seen_NU:
    which teacher was trained on which example of the training split, where that is known.
    """

    weighting: Weighting
    weights_N: torch.Tensor
    temperature: float
    has_classes: bool
    seed: int
    seen_NU: np.ndarray | None = None
    calibration_N: torch.Tensor | None = None

    def needed(
        self, batches: BatchStream, steps: range, entries_R: np.ndarray
    ) -> np.ndarray | None:
        """needed_NR: which teachers these steps need for which examples; None: all for all."""
        wanted = WantedSteps(batches, self.seed, steps, entries_R)
        needed_NR = self.weighting.needed(self.weights_N, wanted)
        if self.seen_NU is None:
            return needed_NR
        return unseen(needed_NR, self.seen_NU[:, entries_R])

    def soft_targets(
        self,
        teachers: TeacherLogits,
        labels_B: torch.Tensor | None,
        routes_B: torch.Tensor | None,
        step: int,
        micro: int,
    ) -> SoftTargets:
        """The soft targets of a micro-batch: number `micro` of step `step`. Else as `combine`."""
        weights_N = self.weighting.at(self.weights_N, self.seed, step, micro)
        teachers = TeacherLogits(self.calibrated(teachers.logits_NBC), teachers.present_NB)
        return combine(
            self.weighting, teachers, labels_B, weights_N, self.temperature, not self.has_classes,
            routes_B,
        )  # fmt: skip

    def answer(self, logits_NBC: torch.Tensor, routes_B: torch.Tensor | None) -> SoftTargets:
        """The ensemble's answer to new texts, at temperature 1 and without gold labels. logits_NBC:
        NaN where a teacher has no prediction."""
        present_NB = ~torch.isnan(logits_NBC).any(-1)
        weighting = self.weighting.scored_as(self.has_classes)
        logits_NBC = self.calibrated(logits_NBC).nan_to_num()
        if not weighting.needs_all:  # a run does not need teachers without weight
            present_NB &= weighting.of_rows(self.weights_N, logits_NBC, None, routes_B) > 0
        teachers = TeacherLogits(logits_NBC, present_NB)
        return combine(
            weighting, teachers, None, self.weights_N, 1.0, not self.has_classes, routes_B
        )

    def complete(self, logits_NBC: torch.Tensor, routes_B: torch.Tensor | None) -> torch.Tensor:
        """complete_B: where every teacher that counts has an answer (logits_NBC: NaN without)."""
        present_NB = ~torch.isnan(logits_NBC).any(-1)
        teachers = TeacherLogits(logits_NBC.nan_to_num(), torch.ones_like(present_NB))
        weighting = self.weighting.scored_as(self.has_classes)
        weights_NB = weighting.of_rows(self.weights_N, teachers.logits_NBC, None, routes_B)
        return (present_NB | (weights_NB == 0)).all(0)

    def calibrated(self, logits_NBC: torch.Tensor) -> torch.Tensor:
        """Each teacher's logits by its own temperature."""
        if self.calibration_N is None:
            return logits_NBC
        return logits_NBC / self.calibration_N.to(logits_NBC.device)[:, None, None]

    def agreement(
        self, student_BC: torch.Tensor, teachers: TeacherLogits, valid_B: torch.Tensor
    ) -> torch.Tensor:
        """[2, N]: for each teacher the rows where the student's class is the teacher's, and the
        rows that needed it. For scores all are 0."""
        if not self.has_classes:
            return torch.zeros(2, len(self.weights_N))
        needed_NB = teachers.present_NB & valid_B[None]
        same_NB = student_BC.argmax(-1)[None] == teachers.logits_NBC.argmax(-1)
        return torch.stack([(same_NB & needed_NB).sum(1), needed_NB.sum(1)]).float()


def unseen(needed_NR: np.ndarray | None, seen_NR: np.ndarray) -> np.ndarray:
    """needed_NR (None: all are needed) without the teachers that were trained on the row. Where
    all teachers that a row needs were trained on it, they all stay."""
    needed_NR = np.ones_like(seen_NR) if needed_NR is None else needed_NR
    fit_NR = needed_NR & ~seen_NR
    return np.where(fit_NR.any(0), fit_NR, needed_NR)


def make_ensemble(
    config: RunConfig, kind: TaskKind, weights_N: torch.Tensor, seen_NU: np.ndarray | None = None
) -> Ensemble:
    """The ensemble that `config` names, with these frozen weights."""
    return Ensemble(
        WEIGHTINGS[config.ensemble], weights_N, config.temperature, kind.has_classes, config.seed,
        seen_NU,
    )  # fmt: skip


def frozen_weights(name: str, known: Known) -> torch.Tensor:
    """weights_N of this ensemble, fixed before step 1, of sum 1. Raises UserError where all are 0,
    one is below 0, or there is not one for each teacher."""
    weights_N = WEIGHTINGS[name].frozen(known)
    if weights_N.shape != (len(known.given),):
        raise UserError(
            f"ensemble={name} gave weights of the shape {tuple(weights_N.shape)} before the first "
            f"step; expected one for each of the {len(known.given)} teachers; correct its plugin"
        )
    if not bool((weights_N >= 0).all()):
        raise UserError(
            f"ensemble={name} gave the weights {weights_N.tolist()}; expected 0 or more; correct "
            "its plugin"
        )
    if not weights_N.sum() > 0:
        raise UserError(
            f"ensemble={name}: every teacher's weight is 0; give one a larger weight, or give "
            "another ensemble"
        )
    return weights_N / weights_N.sum()


def needs_selection(config: RunConfig) -> bool:
    """Whether the teachers' answers on the selection split determine which teachers are needed, or
    their weights."""
    return config.taught and WEIGHTINGS[config.ensemble].needs_selection(config)


def check_selection(config: RunConfig, labels_B: np.ndarray) -> None:
    """Raises UserError where the selection split has too few labelled rows for the weighting."""
    fewest = WEIGHTINGS[config.ensemble].fewest_rows if config.taught else 0
    count = int(has_label(labels_B).sum())
    if count < fewest:
        raise UserError(
            f"ensemble={config.ensemble} needs {fewest} labelled rows in the selection split, and "
            f"it has {count}; give more rows, raise "
            f"selection.fraction ({config.selection.fraction:g} now), or use "
            "ensemble=mean_probabilities"
        )


def method_problem(config: RunConfig, kind: TaskKind) -> str | None:
    """Why the method cannot be applied to a task of this kind; None where it can."""
    method, loss = config.ensemble, config.loss
    weighting = WEIGHTINGS.get(method)
    if weighting is not None and weighting.needs_classes and not kind.has_classes:
        return f"ensemble={method} needs classes; for a {kind.name} task use ensemble=mean_logits"
    fits = loss in ("auto", *kind.soft_losses) or kind.has_classes
    if not fits and SOFT_LOSSES[loss].needs_classes:
        use = f"use loss={kind.soft_losses[0]}, or loss=auto"
        return f"loss={loss} needs classes; for a {kind.name} task {use}"
    return None if weighting is None else weighting.problem(config)


def check_method(config: RunConfig, kind: TaskKind) -> None:
    """Check that ensemble, loss and teacher fit the task and the other keys. Raises UserError."""
    reason = method_problem(config, kind)
    if reason is not None:
        raise UserError(reason)
    names = teacher_names(config.teachers)
    if config.teacher is not None and config.teacher not in names:
        raise UserError(
            f"teacher={config.teacher} is not a teacher of this run; give one of {', '.join(names)}"
        )


def combine(
    weighting: Weighting | str,
    teachers: TeacherLogits,
    labels_B: torch.Tensor | None,
    weights_N: torch.Tensor,
    temperature: float,
    regression: bool = False,
    routes_B: torch.Tensor | None = None,
) -> SoftTargets:
    """The soft targets of a micro-batch. A teacher that does not answer a row has no
    weight there; the weights of the others are scaled to sum 1. Where none of the others has a
    weight, they have equal weights.

    labels_B: gold labels or scores, -1 or NaN where unlabelled; None where they may not be used
    (then weightings by gold labels give all teachers the same weight). routes_B: each row's
    teacher, for `routed`.
    """
    if isinstance(weighting, str):
        weighting = WEIGHTINGS[weighting]
    logits_NBC = teachers.logits_NBC.float()
    weights_NB = row_weights(weighting, teachers, labels_B, weights_N, routes_B)
    weights_NB = weights_NB * teachers.present_NB
    weights_NB = torch.where(weights_NB.sum(0) > 0, weights_NB, teachers.present_NB.float())
    weights_NB = weights_NB / weights_NB.sum(0, keepdim=True).clamp(min=1e-30)
    if regression:
        scores_BC = (weights_NB[..., None] * logits_NBC).sum(0)
        return SoftTargets(scores_BC, scores_BC, weights_NB, temperature)
    if weighting.of_logits:
        logits_BC = (weights_NB[..., None] * logits_NBC).sum(0)
        return SoftTargets(
            torch.softmax(logits_BC / temperature, -1), logits_BC, weights_NB, temperature
        )
    # mean of probabilities, in log space: log sum_n w_n p_n
    log_p_NBC = torch.log_softmax(logits_NBC / temperature, dim=-1)
    log_w_NB1 = torch.log(weights_NB.clamp(min=1e-30))[..., None]
    log_p_BC = torch.logsumexp(log_p_NBC + log_w_NB1, dim=0)
    log_p_BC = log_p_BC - torch.logsumexp(log_p_BC, -1, keepdim=True)
    return SoftTargets(log_p_BC.exp(), log_p_BC * temperature, weights_NB, temperature)


def row_weights(
    weighting: Weighting,
    teachers: TeacherLogits,
    labels_B: torch.Tensor | None,
    weights_N: torch.Tensor,
    routes_B: torch.Tensor | None,
) -> torch.Tensor:
    """weights_NB, before those of missing answers are set to 0. A weighting by the teachers'
    answers to a row gets only the teachers that answer it, so rows that the same teachers answer
    are weighted together."""
    logits_NBC, present_NB = teachers.logits_NBC.float(), teachers.present_NB
    if not isinstance(weighting, ByRow) or bool(present_NB.all()):
        return weighting.of_rows(weights_N, logits_NBC, labels_B, routes_B)
    weights_NB = torch.zeros_like(present_NB, dtype=torch.float32)
    for pattern_N in torch.unique(present_NB, dim=1).T:
        rows = torch.nonzero((present_NB == pattern_N[:, None]).all(0)).flatten()
        asked = torch.nonzero(pattern_N).flatten()
        if len(asked):
            labels = None if labels_B is None else labels_B[rows]
            part_NBC = logits_NBC[asked][:, rows]
            found = weighting.of_rows(weights_N[asked], part_NBC, labels, routes_B)
            weights_NB[asked[:, None], rows[None]] = found.float()
    return weights_NB
