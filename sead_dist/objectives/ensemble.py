"""Combine N teachers' logits into the student's soft targets.

Shapes: N teachers, B rows, G rows of a global batch, R requested examples, C classes (in task
order).

Weights depend on the row alone or are frozen before step 1 (invariant 8).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sead_dist.config.schema import EnsembleMethod, RunConfig, teacher_names
from sead_dist.data.kinds import TaskKind
from sead_dist.data.order import BatchStream, micro_batch_seed
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import TeacherLogits

# frozen before step 1, or (random) drawn by the place in the run
FIXED_METHODS = ("single", "mean_logits", "mean_probabilities", "fixed", "score", "random")
# what one teacher says is its own logits, not what they become on the way over probabilities
OF_LOGITS = ("mean_logits", "single", "random", "routed")
NEED_CLASSES = ("mean_probabilities", "confidence", "entropy")


@dataclass(frozen=True)
class SoftTargets:
    """targets_BC: probabilities at `temperature` (regression: scores); logits_BC: the combined
    logits whose softmax at `temperature` the targets are; weights_NB sum to 1 over teachers."""

    targets_BC: torch.Tensor
    logits_BC: torch.Tensor
    weights_NB: torch.Tensor
    temperature: float


def why_unfit(config: RunConfig, kind: TaskKind) -> str | None:
    """Why the method cannot be applied to a task of this kind; None where it can."""
    method = config.ensemble
    if not kind.has_classes and method in NEED_CLASSES:
        return f"ensemble={method} needs classes; for a {kind.name} task use ensemble=mean_logits"
    if config.loss not in ("auto", *kind.soft_losses):
        use = f"use loss={kind.soft_losses[0]}, or loss=auto"
        return f"loss={config.loss} needs classes; for a {kind.name} task {use}"
    if method == "routed" and config.teacher_column is None:
        return (
            "ensemble=routed needs teacher_column=COLUMN, the column of the data that names each "
            "example's teacher"
        )
    return None


def check_method(config: RunConfig, kind: TaskKind) -> None:
    """What is asked of the teachers fits the task and the other keys. Raises UserError."""
    reason = why_unfit(config, kind)
    if reason is not None:
        raise UserError(reason)
    names = teacher_names(config.teachers)
    if config.teacher is not None and config.teacher not in names:
        raise UserError(
            f"teacher={config.teacher} is no teacher of this run; its teachers: {', '.join(names)}"
        )


def frozen_weights(
    method: EnsembleMethod,
    given: Sequence[float],
    scores: Sequence[float],
    feature_teacher: int | None,
) -> torch.Tensor:
    """Per-teacher weights_N fixed before step 1: given ones (`fixed`), the selection scores above
    zero (`score`), all for the feature teacher or else for the first of the best scores (`single`),
    or equal ones. Raises UserError when all are zero."""
    if method == "single":
        chosen = list(scores).index(max(scores)) if feature_teacher is None else feature_teacher
        return torch.eye(len(given))[chosen]
    raw = {"fixed": list(given), "score": [max(score, 0.0) for score in scores]}
    weights_N = torch.tensor(raw.get(method, [1.0] * len(given)), dtype=torch.float32)
    if not weights_N.sum() > 0:
        raise UserError(f"ensemble={method}: every teacher's weight is 0; give one a larger weight")
    return weights_N / weights_N.sum()


def chosen_teacher(seed: int, step: int, micro: int, teachers: int) -> int:
    """The one teacher that `random` asks for a micro-batch: a pure function of its place."""
    generator = torch.Generator().manual_seed(micro_batch_seed(seed + 1, step, micro))
    return int(torch.randint(teachers, (1,), generator=generator))


def asked_teachers(
    batches: BatchStream,
    config: RunConfig,
    weights_N: torch.Tensor,
    steps: range,
    entries_R: np.ndarray,
) -> np.ndarray | None:
    """asked_NR: `random` asks one teacher per micro-batch, `routed` one per row, other methods all
    whose weight is not 0 (None: all)."""
    teachers = len(weights_N)
    asked_NR = np.zeros((teachers, len(entries_R)), bool)
    if config.ensemble not in ("random", "routed"):
        asked_NR[weights_N.numpy() > 0] = True
        return None if asked_NR.all() else asked_NR
    routes_B = batches.split.examples.routes_B
    for step in steps:
        if routes_B is not None:
            rows_B = batches.rows(step)
            at_B = np.searchsorted(entries_R, batches.split.entry_B[rows_B])
            asked_NR[routes_B[rows_B], at_B] = True
            continue
        for micro, rows_B in enumerate(batches.micro_batches(step)):
            entries_B = batches.split.entry_B[rows_B]
            chosen = chosen_teacher(config.seed, step, micro, teachers)
            asked_NR[chosen, np.searchsorted(entries_R, entries_B)] = True
    return asked_NR


def row_weights(
    method: EnsembleMethod, logits_NBC: torch.Tensor, labels_B: torch.Tensor | None
) -> torch.Tensor:
    """Per-example weights_NB of the methods that look at what the teachers say.

    confidence: softmax over teachers of -cross-entropy with the gold label, scaled as CA-MKD does
    (Zhang et al. 2022, eq. 4: (1 - exp(l_n) / sum_m exp(l_m)) / (N - 1)). entropy: softmax over
    teachers of -entropy (the sure teacher counts more), in the manner of EBKD (Kwon et al. 2020).
    answers: in proportion to the probability that a teacher gives the gold label; for scores
    exp(-e_n / mean_m e_m), e the squared errors (our own). Where the gold label counts, unlabelled
    rows have equal weights.
    """
    N, B, _ = logits_NBC.shape
    equal_NB = torch.full((N, B), 1.0 / N, device=logits_NBC.device)
    if method == "entropy":
        log_p_NBC = torch.log_softmax(logits_NBC, dim=-1)
        entropy_NB = -(log_p_NBC.exp() * log_p_NBC).sum(-1)
        return torch.softmax(-entropy_NB, dim=0)
    if labels_B is None or N == 1:
        return equal_NB
    loss_NB = errors(logits_NBC, labels_B)
    if method == "confidence":
        weights_NB = (1.0 - torch.softmax(loss_NB, dim=0)) / (N - 1)
    else:
        weights_NB = torch.softmax(-loss_NB, dim=0)
    return torch.where(known(labels_B)[None], weights_NB, equal_NB)


def known(labels_B: torch.Tensor) -> torch.Tensor:
    """known_B: False where a row has no gold label."""
    return ~torch.isnan(labels_B) if labels_B.is_floating_point() else labels_B >= 0


def errors(logits_NBC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """How wrong each teacher is on each labelled row, loss_NB: cross-entropy with the gold label;
    for scores the squared error over the teachers' mean one, so that the scale does not count."""
    if labels_B.is_floating_point():
        error_NB = (logits_NBC[..., 0] - labels_B[None]) ** 2
        return error_NB / error_NB.mean(0, keepdim=True).clamp(min=1e-12)
    N, B, _ = logits_NBC.shape
    gold_NB1 = labels_B.clamp(min=0)[None, :, None].expand(N, B, 1)
    log_p_NBC = torch.log_softmax(logits_NBC, dim=-1)
    return -log_p_NBC.gather(-1, gold_NB1).squeeze(-1)


def routed_weights(routes_B: torch.Tensor, teachers: int) -> torch.Tensor:
    """weights_NB: all for the one teacher that the row's data names."""
    return torch.nn.functional.one_hot(routes_B, teachers).T.float()


def combine(
    method: EnsembleMethod,
    teachers: TeacherLogits,
    labels_B: torch.Tensor | None,
    weights_N: torch.Tensor,
    temperature: float,
    regression: bool = False,
    routes_B: torch.Tensor | None = None,
) -> SoftTargets:
    """The soft targets of a micro-batch. Teachers that were not asked for a row get no weight.

    labels_B: gold labels or scores, -1 or NaN where unlabelled; None where they may not be looked
    at (then `confidence` and `answers` weigh all teachers alike). routes_B: each row's teacher,
    for `routed`.
    """
    logits_NBC = teachers.logits_NBC.float()
    if routes_B is not None:
        weights_NB = routed_weights(routes_B, len(logits_NBC))
    elif method in FIXED_METHODS:
        weights_NB = weights_N.to(logits_NBC.device)[:, None].expand(logits_NBC.shape[:2])
    else:
        weights_NB = row_weights(method, logits_NBC, labels_B)
    weights_NB = weights_NB * teachers.present_NB
    weights_NB = weights_NB / weights_NB.sum(0, keepdim=True).clamp(min=1e-12)
    if regression:
        scores_BC = (weights_NB[..., None] * logits_NBC).sum(0)
        return SoftTargets(scores_BC, scores_BC, weights_NB, temperature)
    if method in OF_LOGITS:
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


def agreement(
    student_BC: torch.Tensor, teachers: TeacherLogits, valid_B: torch.Tensor
) -> torch.Tensor:
    """[2, N]: per teacher, rows where the student's class is the teacher's, and rows asked."""
    asked_NB = teachers.present_NB & valid_B[None]
    same_NB = student_BC.argmax(-1)[None] == teachers.logits_NBC.argmax(-1)
    return torch.stack([(same_NB & asked_NB).sum(1), asked_NB.sum(1)]).float()
