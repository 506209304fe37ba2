"""Losses: pure functions of logits, registered by name, and the loss of a run that adds them up.

The loss of a run (`DistillationLoss`) may have a feature term. Its shares may change by step.

Shapes: N teachers, B rows, R text rows, L tokens, C classes. A loss function returns one value a
row. `total_loss` divides by the valid rows of the *global* batch. So the sum over micro-batches and
ranks is the global batch's mean.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from sead_dist.config.registered import take_name
from sead_dist.config.schema import RunConfig
from sead_dist.data.kinds import TaskKind
from sead_dist.errors import UserError, expect

if TYPE_CHECKING:
    from sead_dist.models.hidden_states import LayerOutputs
    from sead_dist.objectives.feature_losses import FeatureLoss


@dataclass(frozen=True)
class SoftTargets:
    """targets_BC: probabilities at `temperature`, or scores. logits_BC: the combined logits, whose
    softmax at `temperature` gives the targets; or scores. weights_NB: sum to 1 over teachers, or to
    0 in a row that no teacher answers."""

    targets_BC: torch.Tensor
    logits_BC: torch.Tensor
    weights_NB: torch.Tensor
    temperature: float


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's part of the global batch's mean: scalars that are summed over micro-batches.

    total: what is differentiated. soft, hard, feature: the terms before they are multiplied by
    their shares, for the log. feature is over a teacher's hidden states or attention.
    """

    total: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    feature: torch.Tensor


def known(labels_B: torch.Tensor) -> torch.Tensor:
    """known_B: False where a row has no gold label."""
    # a loss is a function of tensors; the type of the labels is the `label_type` of the kind
    return ~torch.isnan(labels_B) if labels_B.is_floating_point() else labels_B >= 0


SoftFunction = Callable[[torch.Tensor, SoftTargets], torch.Tensor]
HardFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SoftLoss:
    """loss(student_BC, soft) -> loss_B. needs_classes: the loss is not defined for scores."""

    loss: SoftFunction
    needs_classes: bool = False


def divergence(student_BC: torch.Tensor, soft: SoftTargets) -> torch.Tensor:
    """T^2 * KL(targets || softmax(student / T)) (Hinton et al. 2015, section 2: gradients of soft
    targets scale with 1/T^2)."""
    log_q_BC = F.log_softmax(student_BC / soft.temperature, dim=-1)
    kl_BC = F.kl_div(log_q_BC, soft.targets_BC, reduction="none")
    return kl_BC.sum(-1) * soft.temperature**2


def squared_difference(student_BC: torch.Tensor, soft: SoftTargets) -> torch.Tensor:
    """The mean over classes of the squared difference of logits (or of scores, for regression)."""
    return F.mse_loss(student_BC, soft.logits_BC, reduction="none").mean(-1)


def centered_difference(student_BC: torch.Tensor, soft: SoftTargets) -> torch.Tensor:
    """`squared_difference` of logits less their row's mean, on which probabilities do not depend
    (as KL at a high temperature: Hinton et al. 2015, section 2.1; logits by MSE: Kim et al.
    2021)."""
    own_BC = student_BC - student_BC.mean(-1, keepdim=True)
    their_BC = soft.logits_BC - soft.logits_BC.mean(-1, keepdim=True)
    return F.mse_loss(own_BC, their_BC, reduction="none").mean(-1)


def squared_error(student_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """hard_B of scores: (student - gold)^2, 0 where the gold score is NaN."""
    known_B = known(labels_B)
    gold_B = torch.where(known_B, labels_B, torch.zeros_like(labels_B))
    return torch.where(known_B, (student_BC[:, 0] - gold_B) ** 2, torch.zeros_like(gold_B))


def cross_entropy(student_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """hard_B of classes, in nats: 0 where the label is -1."""
    return F.cross_entropy(student_BC, labels_B, ignore_index=-1, reduction="none")


# losses that the key `loss` can name
SOFT_LOSSES = {
    "kl": SoftLoss(divergence, needs_classes=True),
    "mse": SoftLoss(squared_difference),
    "mse_centered": SoftLoss(centered_difference, needs_classes=True),
}
# losses that a kind of task can name
HARD_LOSSES: dict[str, HardFunction] = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
}


def register_loss(name: str, loss: SoftFunction, *, needs_classes: bool = False) -> None:
    """Let `loss` name this soft loss: loss(student_BC, soft) -> loss_B, one value a row.

    student_BC: the student's logits, or scores (C is 1). soft: `targets_BC`, `logits_BC`,
    `temperature`. needs_classes: a task whose labels are scores cannot use it. Raises
    UserError where the name is taken.
    """
    expect("needs_classes", needs_classes, bool, "True or False")
    take_name("loss", name, loss, Callable, "a function of student_BC and soft")
    SOFT_LOSSES[name] = SoftLoss(loss, needs_classes)


def register_hard_loss(name: str, loss: HardFunction) -> None:
    """Let a kind of task name this hard loss: loss(student_BC, labels_B) -> loss_B, 0 where a row
    has no gold label. Raises UserError where the name is taken."""
    take_name("hard loss", name, loss, Callable, "a function of student_BC and labels_B")
    HARD_LOSSES[name] = loss


def check_losses(kind: TaskKind) -> None:
    """Check that the losses which a kind of task names are registered. Raises UserError."""
    soft = (("soft_losses", name, list(SOFT_LOSSES)) for name in kind.soft_losses)
    for key, name, registered in (("hard_loss", kind.hard_loss, list(HARD_LOSSES)), *soft):
        if name not in registered:
            raise UserError(
                f"{key} of the kind of task {kind.name} names {name!r}; expected one of "
                f"{', '.join(registered)}; correct its plugin, or register the loss there"
            )


def soft_loss(student_BC: torch.Tensor, soft: SoftTargets, loss: str) -> torch.Tensor:
    """loss_B against the soft targets, by the loss of this name. Raises UserError for a loss that
    gives another shape: torch would broadcast it without an error."""
    loss_B = SOFT_LOSSES[loss].loss(student_BC, soft)
    if loss_B.shape != student_BC.shape[:1]:
        raise UserError(
            f"loss={loss} gave the shape {tuple(loss_B.shape)} for {len(student_BC)} rows; "
            "expected one value a row; correct its plugin"
        )
    return loss_B


def hard_loss(
    student_BC: torch.Tensor, labels_B: torch.Tensor, loss: str = "cross_entropy"
) -> torch.Tensor:
    """loss_B against the gold labels (squared_error: scores); 0 where a row has no label. Raises
    UserError for a loss that gives another shape, as `soft_loss` does."""
    loss_B = HARD_LOSSES[loss](student_BC, labels_B)
    if loss_B.shape != student_BC.shape[:1]:
        raise UserError(
            f"hard_loss={loss} gave the shape {tuple(loss_B.shape)} for {len(student_BC)} rows; "
            "expected one value a row; correct its plugin"
        )
    return loss_B


def total_loss(
    student_BC: torch.Tensor,
    labels_B: torch.Tensor,
    valid_B: torch.Tensor,
    soft: SoftTargets | None,
    loss: str,
    alpha: float,
    valid_rows: int,
    hard: str = "cross_entropy",
) -> LossTerms:
    """Labelled rows: alpha * soft + (1 - alpha) * hard. Unlabelled rows: soft alone. Rows that no
    teacher answers, and all rows without teachers: hard alone. Rows that are not valid do not
    count. (Invariant 2.)

    loss, hard: names of the soft and the hard loss. valid_rows: valid rows of the global batch,
    over all micro-batches and ranks.
    """
    zero_B = student_BC.new_zeros(student_BC.shape[0])
    hard_B = torch.where(valid_B, hard_loss(student_BC, labels_B, hard), zero_B)
    if soft is None:
        total = hard_B.sum() / valid_rows
        none = torch.zeros_like(total.detach())
        return LossTerms(total=total, soft=none, hard=total.detach(), feature=none)
    answered_B = soft.weights_NB.sum(0) > 0
    soft_B = torch.where(valid_B & answered_B, soft_loss(student_BC, soft, loss), zero_B)
    share_B = torch.where(known(labels_B), alpha, 1.0)
    share_B = torch.where(answered_B, share_B, torch.zeros_like(share_B))
    total = (share_B * soft_B + (1 - share_B) * hard_B).sum() / valid_rows
    return LossTerms(
        total=total,
        soft=soft_B.sum().detach() / valid_rows,
        hard=hard_B.sum().detach() / valid_rows,
        feature=torch.zeros_like(total.detach()),
    )


@dataclass(frozen=True)
class DistillationLoss:
    """Built once for a run, called for each micro-batch. soft, hard: names of the two losses.
    alpha, alpha_end: the share of the soft loss at the first and at the last of `total_steps`.
    feature: the loss over a teacher's hidden states or attention, if any."""

    soft: str
    hard: str
    alpha: float
    alpha_end: float | None
    total_steps: int
    feature: "FeatureLoss | None" = None

    def alpha_at(self, step: int) -> float:
        """The share of the soft loss at a step (from 0): alpha. With alpha_end it changes evenly
        from alpha at the first step to alpha_end at the last."""
        if self.alpha_end is None or self.total_steps < 2:
            return self.alpha
        done = step / (self.total_steps - 1)
        return (1 - done) * self.alpha + done * self.alpha_end

    def reading(self, compared: bool) -> "AbstractContextManager[LayerOutputs | None]":
        """Inside the `with`, the student's forward fills the layer outputs that the feature loss
        compares. compared: whether it does so in this step. None where nothing is compared."""
        if self.feature is None or not compared:
            return nullcontext()
        return self.feature.reading()

    def terms(
        self,
        student_BC: torch.Tensor,
        labels_B: torch.Tensor,
        valid_B: torch.Tensor,
        soft: SoftTargets | None,
        step: int,
        valid_rows: int,
        student: "LayerOutputs | None" = None,
        teacher: "LayerOutputs | None" = None,
        mask_RL: torch.Tensor | None = None,
    ) -> LossTerms:
        """A micro-batch's part of the loss of its step, divided by the global batch's `valid_rows`.

        soft: None without teachers. student, teacher: the layer outputs that the feature loss
        compares; None in a step that needs logits alone. mask_RL: which tokens are not padding.
        """
        alpha = self.alpha_at(step)
        terms = total_loss(
            student_BC, labels_B, valid_B, soft, self.soft, alpha, valid_rows, self.hard
        )
        if self.feature is None:
            return terms
        assert mask_RL is not None
        mask_RL = mask_RL.to(student_BC.device)
        return self.feature.join(terms, student, teacher, mask_RL, valid_B, valid_rows)

    def teaches_head(self, step: int) -> bool:
        """Whether the student's head has been trained when this step (from 1) is over."""
        return self.feature is None or not self.feature.has_no_head(step)


def make_loss(
    config: RunConfig, kind: TaskKind, total_steps: int, feature: "FeatureLoss | None" = None
) -> DistillationLoss:
    """The loss that `config` describes, for tasks of this kind."""
    soft = kind.soft_losses[0] if config.loss == "auto" else config.loss
    return DistillationLoss(
        soft, kind.hard_loss, config.alpha, config.alpha_end, total_steps, feature
    )
