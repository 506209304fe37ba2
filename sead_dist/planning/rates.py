"""The rates that a plan uses: given in a file, kept, measured now, or scaled.

Shapes: N teachers.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.config.schema import Precision, RunConfig, Section
from sead_dist.config.yaml_text import read_yaml
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError
from sead_dist.models.sequence_classifier import DTYPES
from sead_dist.planning.workload import Work
from sead_dist.runtime.distributed import World, from_main, gather_objects
from sead_dist.runtime.memory import held, reset_peak
from sead_dist.teachers.placement import TEACHER_SHARE, free_bytes
from sead_dist.teachers.rates import (
    COST_TOKENS,
    MEASURED_LENGTHS,
    STEP_FORWARDS,
    TURNS,
    Rate,
    Stopwatch,
    beyond,
    default_rates,
    full_batch,
    lengths_to_measure,
    measure_batches,
    measure_teacher,
    operations,
    random_inputs,
    remember,
    remembered,
    scaled_rate,
    student_key,
    teacher_key,
    this_machine,
)
from sead_dist.teachers.teacher import Teacher
from sead_dist.training.engine import build_optimizer

# from a plan's first line to its last measurement; a whole plan takes about 30 seconds
BUDGET_S = 20.0
# bytes of weights that are read into a model in a second, at least
LOAD_PER_S = 200 * 2**20
# bytes of an optimiser's moments for each parameter
MOMENTS = {"adamw": 8, "sgd": 0}
STAT = Path("/proc/stat")
# the machine is busy where more than this share of a process's threads lacks a processor
SHARED = 0.1
# processor time is counted in hundredths of a second: shorter spans say nothing
SHORTEST_S = 0.2

Speed = Annotated[float, Field(gt=0)]


class GivenRates(Section):
    """Rates of other hardware, from a file of --rates. forward, training: operations (additions and
    multiplications) per second of a teacher's forward and of the student's step, by precision.
    link: bytes per second that a rank receives from the others."""

    hardware: str
    device: Literal["cuda", "cpu"] = "cuda"
    forward: dict[Precision, Speed]
    training: dict[Precision, Speed]
    link: Speed | None = None


@dataclass(frozen=True)
class Rates:
    """The rates of all models. hardware: where they hold. link: bytes per second that a rank
    receives, where known. notes: lines on where the rates come from."""

    hardware: str
    device: str
    student: Rate
    teachers_N: list[Rate]
    link: float | None = None
    notes: tuple[str, ...] = ()


def read_given(path: Path) -> GivenRates:
    """The file of --rates. Raises UserError where it does not fit GivenRates."""
    fields = read_yaml(path, f"--rates {path}")
    known = ", ".join(GivenRates.model_fields)
    if not isinstance(fields, dict):
        raise UserError(f"--rates {path} has no keys; give {known}")
    try:
        return GivenRates.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]")
        reason = first["msg"][0].lower() + first["msg"][1:]
        value = first["input"]
        said = "" if isinstance(value, dict) else f", not {value!r}"
        if first["type"] == "extra_forbidden":
            reason, said = "there is no such key", ""
        raise UserError(f"--rates {path}: {key}: {reason}{said}; its keys are {known}") from None


def given_rates(
    given: GivenRates,
    path: Path,
    config: RunConfig,
    student: PreTrainedModel,
    choices: int,
    teachers: Sequence[Teacher],
) -> Rates:
    """All rates, scaled by operations from those of the file. Raises UserError where the file
    lacks a precision that the run computes in."""

    def speed(kind: str, dtype: str) -> float:
        speeds: dict[str, float] = getattr(given, kind)
        if dtype in speeds:
            return speeds[dtype]
        raise UserError(f"--rates {path}: {kind} has no {dtype}, which the run computes in; add it")

    def by_length(model_config: PretrainedConfig, reached: float, times: int) -> Rate:
        lengths, trusted = MEASURED_LENGTHS, config.trust_remote_code
        works = (times * operations(model_config, at, trusted) for at in lengths)
        return Rate(lengths, tuple(work / reached for work in works), 0.0, 0.0, scaled=True)

    step = speed("training", config.precision)
    return Rates(
        given.hardware,
        given.device,
        by_length(student.config, step, STEP_FORWARDS * choices),
        [by_length(t.config, speed("forward", t.dtype), 1) for t in teachers],
        given.link,
        (f"every rate is scaled from {path}",),
    )


def own_rates(
    config: RunConfig,
    task: TaskSpec,
    world: World,
    student: PreTrainedModel,
    teachers: Sequence[Teacher],
    work: Work,
    fresh: bool,
    began: float,
) -> Rates:
    """This machine's rates. Kept ones are used where they reach to the task's lengths. The
    others are measured until BUDGET_S after `began` (monotonic seconds), or else scaled. Every rank
    calls this, and all measure at the same time: a figure is the slowest rank's."""
    device, path = world.device, default_rates()
    machine = this_machine(device)
    kept = from_main(world, lambda: {} if fresh else remembered(path))
    # those of a busy machine are used only where there is no time to measure again
    found = {key: rate for key, rate in kept.items() if not rate.busy}
    own_key = student_key(student, config, task.kind, machine)
    keys_N = [teacher_key(teacher, machine) for teacher in teachers]
    keys = {own_key, *keys_N}
    own_K = lengths_to_measure(work.lengths_SM, config.max_length)
    lengths_N = [
        lengths_to_measure(work.lengths_SM, min(config.max_length, t.inputs.max_length))
        for t in teachers
    ]
    # one of each shape; the smallest first, so that the others can be scaled from it
    kinds = {key: n for n, key in reversed(list(enumerate(keys_N)))}
    short = [n for key, n in kinds.items() if not _reaches(found.get(key), lengths_N[n])]
    share_s = BUDGET_S / max(1, len(short) + (not _reaches(found.get(own_key), own_K)))
    rows_N = [partial(full_batch, teacher, device) for teacher in teachers]
    todo = [n for n in short if _wanted(found.get(keys_N[n]), lengths_N[n], rows_N[n], share_s)]
    todo.sort(key=lambda n: teachers[n].parameters)
    mine: dict[str, Rate] = {}
    if _wanted(found.get(own_key), own_K, lambda _length: config.micro_batch_size, share_s):
        measure = partial(measure_student, student, config, device, work.choices, own_K)
        mine[own_key] = timed_quietly(measure, _until(began, 1 + len(todo)), device)
    for place, n in enumerate(todo):
        until = _until(began, len(todo) - place)
        room = TEACHER_SHARE * free_bytes(device)
        # it is loaded in the same time
        if teachers[n].bytes <= min(room, (until - time.monotonic()) * LOAD_PER_S):
            trust = config.trust_remote_code
            measure = partial(measure_teacher, teachers[n], device, trust, lengths_N[n])
            mine[keys_N[n]] = timed_quietly(measure, until, device)
    measured = {
        key: rate
        for key, rate in _slowest(gather_objects(world, mine)).items()
        if key not in found or rate.lengths_K[-1] >= found[key].lengths_K[-1]
    }
    notes = [
        f"rates: {len(measured)} measured now, {len(keys & {*found} - {*measured})} remembered"
    ]
    again = len(keys & {*kept} & {*measured} - {*found})
    if again:
        notes.append(f"{again} measured again, since the machine was busy the time before")
    known = {**kept, **measured}
    busy = sum(known[key].busy for key in keys & {*known})
    if busy:
        notes.append(
            f"WARNING: other processes used the processors while {busy} of the rates were "
            "measured; the next plan measures them again"
        )
    if world.is_main and measured:
        notes += keep(path, measured)
    known_N = [known.get(key) for key in keys_N]
    rates_N = fill(config, student, known[own_key], work.choices, teachers, known_N)
    return Rates(
        machine.device,
        device.type,
        _marked(known[own_key], own_K),
        [_marked(rate, lengths_K) for rate, lengths_K in zip(rates_N, lengths_N, strict=True)],
        notes=tuple(notes),
    )


def keep(path: Path, measured: dict[str, Rate]) -> list[str]:
    """Keep rates for later plans. Returns a line where they cannot be kept."""
    try:
        remember(path, measured)
    except OSError as error:
        return [
            f"the rates cannot be written to {path} ({error.strerror}), so the next plan measures "
            "them again; name another file with SEAD_DIST_RATES"
        ]
    return []


def _wanted(
    rate: Rate | None, lengths_K: Sequence[int], rows_of: Callable[[int], int], share_s: float
) -> bool:
    """Whether to measure a model: it has no rate, or one that ends below the task's lengths while
    share_s is enough to measure it."""
    if rate is None:
        return True
    if _reaches(rate, lengths_K):
        return False
    once_s = rate.seconds(lengths_K, [rows_of(length) for length in lengths_K])
    return rate.once_s + (TURNS + 1) * once_s < share_s


def _until(began: float, left: int) -> float:
    """When the next of `left` measurements must end (monotonic seconds)."""
    now = time.monotonic()
    return now + (began + BUDGET_S - now) / left


def _reaches(rate: Rate | None, lengths_K: Sequence[int]) -> bool:
    return rate is not None and rate.lengths_K[-1] >= lengths_K[-1]


def _marked(rate: Rate, lengths_K: Sequence[int]) -> Rate:
    """The rate, marked as scaled where it was not measured up to the task's longest text."""
    return rate if _reaches(rate, lengths_K) else replace(rate, scaled=True)


def _slowest(everyone: Sequence[dict[str, Rate]]) -> dict[str, Rate]:
    """Of each model that all ranks have measured, the slowest rate."""
    shared = set(everyone[0]).intersection(*everyone)
    return {
        key: max((mine[key] for mine in everyone), key=lambda rate: rate.row_s_K[0])
        for key in sorted(shared)
    }


def fill(
    config: RunConfig,
    student: PreTrainedModel,
    student_rate: Rate,
    choices: int,
    teachers: Sequence[Teacher],
    known_N: Sequence[Rate | None],
) -> list[Rate]:
    """Every teacher's rate. An unknown one is scaled by operations from the known teacher nearest
    in size, if possible of the same precision. Where no teacher is known, it is scaled from the
    student's step."""
    trust = config.trust_remote_code
    works_N = [operations(t.config, COST_TOKENS, trust) for t in teachers]
    step = STEP_FORWARDS * choices * operations(student.config, COST_TOKENS, trust)

    def scaled(n: int) -> Rate:
        near = [
            (
                teachers[m].dtype != teachers[n].dtype,
                abs(math.log(works_N[n] / works_N[m])),
                m,
                rate,
            )
            for m, rate in enumerate(known_N)
            if rate is not None
        ]
        if not near:
            return scaled_rate(student_rate, works_N[n] / step)
        _, _, m, rate = min(near, key=lambda one: one[:3])
        return scaled_rate(rate, works_N[n] / works_N[m])

    return [rate if rate is not None else scaled(n) for n, rate in enumerate(known_N)]


def measure_student(
    model: PreTrainedModel,
    config: RunConfig,
    device: torch.device,
    choices: int,
    lengths_K: Sequence[int],
    until: float,
) -> Rate:
    """The rate of the student's step on micro-batches of config.micro_batch_size examples, as one
    process takes it: what ranks exchange is not in it. The model is trained on random inputs."""
    model = model.to(device).train()
    held_before = held(device) if reset_peak(device) else None
    optimizer = build_optimizer(model, config)
    mixed = config.precision != "fp32"

    def batch(rows: int, length: int) -> Callable[[], None]:
        inputs = random_inputs(model, rows * choices, length, device)

        def learn() -> None:
            dtype = DTYPES[config.precision]
            with torch.autocast(device.type, dtype) if mixed else nullcontext():
                logits = model(**inputs).logits
            logits.float().square().mean().backward()

        return learn

    def work(length: int) -> float:
        return STEP_FORWARDS * choices * operations(model.config, length, config.trust_remote_code)

    timer = Stopwatch(device, until)
    found = measure_batches(timer, lengths_K, lambda _length: config.micro_batch_size, batch, work)
    rate = Rate(*found, once_s=0.0)
    shortest = rate.lengths_K[0]
    learn = batch(config.micro_batch_size, shortest)

    def step() -> None:
        learn()  # into new gradients, as the first micro-batch of each step does
        if config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    optimizer.zero_grad(set_to_none=True)
    # a stopwatch of its own: a stopwatch times its first piece of work even after `until`
    step_s = Stopwatch(device, until).time(step, work(shortest))
    assert step_s is not None
    micro_s = rate.seconds([shortest], [config.micro_batch_size])
    # gradients and moments; the weights were held before
    state = sum(p.numel() for p in model.parameters()) * (4 + MOMENTS[config.optim])
    work_bytes = beyond(device, held_before, state)
    return replace(rate, once_s=max(0.0, step_s - micro_s), work_bytes=work_bytes)


def used_seconds() -> float | None:
    """Seconds that all processors of this machine have worked since it started; None where the
    system has no such count."""
    try:
        fields = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class OtherProcesses:
    """How busy other processes are, counted from now on."""

    def __init__(self) -> None:
        self.began, self.used, self.own = time.monotonic(), used_seconds(), time.process_time()

    def are_busy(self, device: torch.device) -> bool:
        """Whether they left this process fewer processors than it has threads. False on a GPU,
        where it is not known. Other ranks of this plan on the machine do not count."""
        used, wall = used_seconds(), time.monotonic() - self.began
        if device.type == "cuda" or used is None or self.used is None or wall < SHORTEST_S:
            return False
        threads, ranks = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        others = (used - self.used - (time.process_time() - self.own)) / wall
        crowd = others - threads * (ranks - 1) + threads - (os.cpu_count() or 1)
        return crowd > SHARED * threads


def timed_quietly(measure: Callable[[float], Rate], until: float, device: torch.device) -> Rate:
    """The rate of `measure(until)`; where others are busy, measured again or marked as such."""
    others = OtherProcesses()
    first = measure(until)
    if not others.are_busy(device):
        return first
    now = time.monotonic()
    if now + (now - others.began) <= until:
        others = OtherProcesses()
        again = measure(until)
        if not others.are_busy(device):
            return again
        first = min(first, again, key=lambda rate: rate.row_s_K[0])
    return replace(first, busy=True)
