"""How much memory a rank needs, counted from parameters: the tables of docs/placement.md.

Activations, and what libraries hold, come on top. Shapes: N teachers, W ranks.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PretrainedConfig

from sead_dist.config.schema import RunConfig
from sead_dist.models.sequence_classifier import DTYPES, outline
from sead_dist.teachers.placement import held_bytes
from sead_dist.teachers.sharding import layers_of
from sead_dist.teachers.teacher import Teacher
from sead_dist.training.deepspeed_config import OFFLOADS, zero_config

# the part of a GPU that weights and the student's state may take; the rest is activations'
FULL = 0.8
MOMENTS = {"adamw": 8, "sgd": 0}


def bytes_at_work(config: PretrainedConfig, dtype: str, trust_remote_code: bool) -> int:
    """What a model that is split by layers holds whole while it computes: all that is in no layer,
    the largest layer and the next."""
    model = outline(config, trust_remote_code)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    total = sum(p.numel() for p in model.parameters())
    whole = total - sum(layers) + 2 * max(layers, default=0)
    return int(min(total, whole)) * DTYPES[dtype].itemsize


def student_bytes(student: PretrainedConfig, config: RunConfig, size: int) -> int:
    """The student's parameters, gradients and moments on one of `size` ranks; on its GPU where
    DeepSpeed leaves the rest to the machine's memory."""
    parameters = int(
        sum(p.numel() for p in outline(student, config.trust_remote_code).parameters())
    )
    moments = MOMENTS[config.optim]
    zero = zero_config(config, size)
    stage = zero.stage if zero is not None else 0
    settings = zero.values["zero_optimization"] if zero is not None else {}
    if any(settings.get(name) for name in OFFLOADS):
        at_work = bytes_at_work(student, "fp32", config.trust_remote_code)
        return 4 * parameters if stage < 3 else at_work
    each = {
        0: 8 + moments,
        1: 8 + (4 + moments) / size,
        2: 4 + (8 + moments) / size,
        3: (12 + moments) / size,
    }[stage]
    return round(parameters * each)


def teacher_bytes(
    teachers: Sequence[Teacher],
    placements: Sequence[str],
    share_NW: np.ndarray,
    trust_remote_code: bool,
) -> int:
    """The teachers' weights on the rank that holds most; of split teachers with what the largest
    holds whole while it computes."""
    size = share_NW.shape[1] if len(teachers) else 1
    held_W = np.zeros(size)
    at_work = 0
    for teacher, placement, share_W in zip(teachers, placements, share_NW, strict=True):
        held_W += (share_W > 0) * held_bytes(teacher.bytes, placement, size)
        if placement == "sharded" and size > 1:
            whole = bytes_at_work(teacher.config, teacher.dtype, trust_remote_code)
            at_work = max(at_work, whole)
    return int(held_W.max()) + at_work
