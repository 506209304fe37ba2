"""The loss of a run: soft, hard and feature terms, and their shares by step.

Shapes: B rows of a micro-batch, R text rows, L tokens, C classes.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from sead_dist.config.schema import RunConfig
from sead_dist.data.kinds import TaskKind
from sead_dist.models.hidden_states import LayerOutputs
from sead_dist.objectives.feature_losses import FeatureLoss
from sead_dist.objectives.losses import LossTerms, SoftTargets, total_loss


@dataclass(frozen=True)
class DistillationLoss:
    """Built once for a run, called for each micro-batch. soft, hard: names of the two losses;
    alpha, alpha_end: the share of the soft one at the first and at the last of `total_steps`;
    feature: the loss over a teacher's hidden states or attention, if any."""

    soft: str
    hard: str
    alpha: float
    alpha_end: float | None
    total_steps: int
    feature: FeatureLoss | None = None

    def alpha_at(self, step: int) -> float:
        """The share of the soft loss at a step (from 0): alpha, or evenly from alpha at the first
        step to alpha_end at the last."""
        if self.alpha_end is None or self.total_steps < 2:
            return self.alpha
        done = step / (self.total_steps - 1)
        return (1 - done) * self.alpha + done * self.alpha_end

    def reading(self, compared: bool) -> AbstractContextManager[LayerOutputs | None]:
        """Inside, the student's forward fills what the feature loss compares, where it does."""
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
        student: LayerOutputs | None = None,
        teacher: LayerOutputs | None = None,
        mask_RL: torch.Tensor | None = None,
    ) -> LossTerms:
        """A micro-batch's share of the loss of its step, by `valid_rows` of the global batch.

        soft: None without teachers. student, teacher: what the feature loss compares, None in a
        step that asks for logits alone; mask_RL: the tokens that are no padding.
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
        """Whether by this step (from 1) something has taught the student's head."""
        return self.feature is None or not self.feature.has_no_head(step)


def make_loss(
    config: RunConfig, kind: TaskKind, total_steps: int, feature: FeatureLoss | None = None
) -> DistillationLoss:
    """The loss that `config` describes, for tasks of this kind."""
    soft = kind.soft_losses[0] if config.loss == "auto" else config.loss
    return DistillationLoss(
        soft, kind.hard_loss, config.alpha, config.alpha_end, total_steps, feature
    )
