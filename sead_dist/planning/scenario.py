"""Memory and time of a run under each placement of its teachers. Memory of models is counted from
parameters, as in the tables of docs/placement.md. Activations and what libraries hold come on top.

Shapes: N teachers, W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError
from sead_dist.models.sequence_classifier import DTYPES, outline
from sead_dist.objectives.feature_losses import feature_steps
from sead_dist.planning.rates import MOMENTS, Rates
from sead_dist.planning.workload import (
    Work,
    batch_shapes,
    bound,
    teachers_seconds,
    training_seconds,
)
from sead_dist.runs.setup import check_placed
from sead_dist.teachers.feature_teacher import candidates
from sead_dist.teachers.placement import choose_placements, held_bytes, share_rows
from sead_dist.teachers.rates import costs
from sead_dist.teachers.sharding import layers_of
from sead_dist.teachers.teacher import Teacher
from sead_dist.training.deepspeed_config import OFFLOADS, zero_config

# the part of a GPU that weights and the student's state may take; activations have the rest
FULL = 0.8
PLACEMENTS = ("colocated", "partitioned", "sharded", "pool")


@dataclass(frozen=True)
class Setting:
    """What a plan is made of. size: how many ranks. free: bytes that placement counts on, on the
    smallest rank. memory: bytes of a GPU, None where not given. process_bytes: bytes that a rank's
    process holds beside models and their work, None where not known."""

    config: RunConfig
    teachers: list[Teacher]
    student: PreTrainedModel
    work: Work
    rates: Rates
    size: int
    free: int
    memory: int | None
    process_bytes: int | None


@dataclass(frozen=True)
class Estimate:
    """A run under one placement. Bytes are of the rank that needs most. other_bytes: activations,
    and what the process holds beside models, None where not measured. before_s: seconds of what the
    run trains before its own steps, by name. seconds: until the last step is trained. Start-up,
    scoring the student, and what the student's ranks exchange are not in it. examples_per_second:
    over teachers_s and training_s. bound: the most examples/s that the rates allow. workers: how
    many a pool needs to keep up with the student, each as quick as a rank; the times hold for so
    many. at_least: the seconds lack the transfer of split teachers' weights, whose speed is not
    known. rejected: why a run cannot have this placement."""

    placement: str
    placements: list[str]
    student_bytes: int
    teacher_bytes: int
    other_bytes: int | None
    fits: bool | None
    before_s: dict[str, float]
    teachers_s: float
    training_s: float
    seconds: float
    examples_per_second: float
    bound: float
    workers: int
    at_least: bool
    rejected: str | None


def estimates(setting: Setting) -> list[Estimate]:
    """The run under each placement, and under its own where that is a mixture."""
    count = len(setting.teachers)
    if not count:
        return [estimate(setting, "no teachers", [])]
    found = [estimate(setting, name, [name] * count) for name in PLACEMENTS]
    own, _ = own_placements(setting)
    if len({*own}) > 1:
        found.append(estimate(setting, "this run", own))
    return found


def own_placements(setting: Setting) -> tuple[list[str], str]:
    """Where this run's teachers go, and why."""
    default = setting.config.placement
    return choose_placements(setting.teachers, default, setting.size, setting.free)


def estimate(setting: Setting, name: str, placements: list[str]) -> Estimate:
    """The run with its teachers at these placements, one for each teacher."""
    config, teachers, rates, size = setting.config, setting.teachers, setting.rates, setting.size
    work, workers_s = without_pool(setting, placements)
    rejected = None
    try:
        check_placed(config, teachers, placements)
    except UserError as error:
        rejected = str(error)
    costs_N = costs(teachers, rates.teachers_N)
    share_NW = share_rows(teachers, placements, costs_N, size, setting.free)
    held = teacher_bytes(teachers, placements, share_NW, config.trust_remote_code)
    own = student_bytes(setting.student.config, config, size)
    teachers_s = teachers_seconds(work, teachers, rates.teachers_N, share_NW, rates.device)
    split = size > 1 and "sharded" in placements
    if split and rates.link is not None:
        teachers_s += gathered_bytes(setting, work, placements) / rates.link
    training_s = training_seconds(work, rates.student, size) + feature_seconds(setting)
    seconds = teachers_s + training_s
    before_s = {name: training_seconds(of, rates.student, size) for name, of in work.before.items()}
    return Estimate(
        placement=name,
        placements=placements,
        student_bytes=own,
        teacher_bytes=held,
        other_bytes=other_bytes(setting, placements),
        fits=fits(setting, placements, own + held),
        before_s=before_s,
        teachers_s=teachers_s,
        training_s=training_s,
        seconds=seconds + sum(before_s.values()),
        examples_per_second=work.examples / max(seconds, 1e-12),
        bound=bound(work, teachers, rates.teachers_N, rates.student, size, rates.device),
        workers=int(np.ceil(workers_s / max(seconds, 1e-12))),
        at_least=split and rates.link is None,
        rejected=rejected,
    )


def feature_seconds(setting: Setting) -> float:
    """Seconds of the feature teacher's own forwards, in the student's micro-batches. Where it
    is chosen only after the validation, the costliest candidate is counted."""
    config, work, may = setting.config, setting.work, candidates(setting.config, setting.teachers)
    steps = min(work.steps, feature_steps(config, work.steps))
    live = replace(work, steps=steps, row_cost=work.choices)
    pairs = zip(setting.teachers, setting.rates.teachers_N, strict=True)
    rates = [replace(rate, once_s=0.0) for teacher, rate in pairs if teacher in may]
    return max((training_seconds(live, rate, setting.size) for rate in rates), default=0.0)


def other_bytes(setting: Setting, placements: Sequence[str]) -> int | None:
    """Bytes that a rank holds beside weights and training state: its process, and the largest
    activations of one model, because models work one after the other. None where not measured."""
    pairs = zip(setting.rates.teachers_N, placements, strict=True)
    at_work = [setting.rates.student, *(rate for rate, place in pairs if place != "pool")]
    found = [rate.work_bytes for rate in at_work]
    if setting.process_bytes is None or None in found:
        return None
    return setting.process_bytes + max(one for one in found if one is not None)


def without_pool(setting: Setting, placements: Sequence[str]) -> tuple[Work, float]:
    """(the work without that of a pool, the seconds that one worker takes for the pool's work)."""
    work, rates = setting.work, setting.rates
    sides: list[list[list[np.ndarray]]] = [[], []]
    for placement, requests in zip(placements, work.requests_N, strict=True):
        for side, mine in zip(sides, (placement != "pool", placement == "pool"), strict=True):
            side.append(requests if mine else [])
    own, pooled = (replace(work, requests_N=side) for side in sides)
    alone_N1 = np.ones((len(placements), 1))
    return own, teachers_seconds(pooled, setting.teachers, rates.teachers_N, alone_N1, rates.device)


def fits(setting: Setting, placements: Sequence[str], needed: int) -> bool | None:
    """Whether FULL of the given memory holds `needed`, and each pool teacher as a whole."""
    if setting.memory is None:
        return None
    pairs = zip(setting.teachers, placements, strict=True)
    pooled = max((teacher.bytes for teacher, place in pairs if place == "pool"), default=0)
    return max(needed, pooled) <= FULL * setting.memory


def gathered_bytes(setting: Setting, work: Work, placements: Sequence[str]) -> int:
    """Bytes of weights that a rank receives while split teachers compute its rows. For every batch
    it receives all of the weights but its own part."""
    size, received = setting.size, 0
    for teacher, placement, requests in zip(
        setting.teachers, placements, work.requests_N, strict=True
    ):
        if placement == "sharded":
            mine = [rows[::size] for rows in requests if len(rows)]
            batches = len(batch_shapes(teacher, mine, setting.rates.device)[0])
            received += batches * (teacher.bytes - held_bytes(teacher.bytes, "sharded", size))
    return received


def bytes_at_work(config: PretrainedConfig, dtype: str, trust_remote_code: bool) -> int:
    """Bytes that a model split by layers holds whole while it computes: all that is in no layer,
    and twice the largest layer (the present and the next one)."""
    model = outline(config, trust_remote_code)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    total = sum(p.numel() for p in model.parameters())
    whole = total - sum(layers) + 2 * max(layers, default=0)
    return int(min(total, whole)) * DTYPES[dtype].itemsize


def student_bytes(student: PretrainedConfig, config: RunConfig, size: int) -> int:
    """Bytes of the student's parameters, gradients and moments on one of `size` ranks. Where
    DeepSpeed moves a part to the machine's memory, only those on the GPU are counted."""
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
    """Bytes of the teachers' weights on the rank that holds most. With split teachers, what the
    largest of them holds whole while it computes is added."""
    size = share_NW.shape[1] if len(teachers) else 1
    held_W = np.zeros(size)
    at_work = 0
    for teacher, placement, share_W in zip(teachers, placements, share_NW, strict=True):
        held_W += (share_W > 0) * held_bytes(teacher.bytes, placement, size)
        if placement == "sharded" and size > 1:
            whole = bytes_at_work(teacher.config, teacher.dtype, trust_remote_code)
            at_work = max(at_work, whole)
    return int(held_W.max()) + at_work
