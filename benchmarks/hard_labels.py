"""A loss of `table.py --part levers`: cross-entropy to the ensemble's arg-max instead of its soft
targets. Compared with the soft targets, it shows what the probabilities add."""

import torch
from torch.nn import functional as F

import sead_dist as sd
from sead_dist.objectives.losses import SoftTargets


def hard_labels(student_BC: torch.Tensor, soft: SoftTargets) -> torch.Tensor:
    return F.cross_entropy(student_BC, soft.targets_BC.argmax(-1), reduction="none")


sd.register_loss("hard_labels", hard_labels, needs_classes=True)
