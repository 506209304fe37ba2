"""`sead-dist plan`: memory and time of a run under each placement, before it is started. People get
tables and notes, programs a file (--json).

Shapes: R rows of a batch.
"""

import importlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.filesize import decimal
from transformers import PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError
from sead_dist.planning.rates import given_rates, own_rates, read_given
from sead_dist.planning.scenario import (
    FULL,
    Estimate,
    Setting,
    estimates,
    own_placements,
    student_bytes,
)
from sead_dist.planning.workload import (
    Work,
    make_work,
    store_bytes,
    training_seconds,
    work_before,
)
from sead_dist.runs.checked_run import CheckedRun, check_run
from sead_dist.runs.checks import reject_encoders, reject_untaught, reject_unused_text
from sead_dist.runs.setup import idle_rank_lines
from sead_dist.runtime.console import TitledTable, clock, counted, parse_size
from sead_dist.runtime.distributed import World, from_main
from sead_dist.runtime.files import check_writable
from sead_dist.runtime.memory import held
from sead_dist.runtime.run_log import noted, write_json_for_person
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.store.layout import store_folder
from sead_dist.store.store import StoreFolder
from sead_dist.teachers.placement import choose_placements, least_free
from sead_dist.teachers.rates import shape_name
from sead_dist.teachers.teacher import Teacher

# libraries that a run imports only when it writes predictions and plots: they count as its memory
LATE = ("pandas", "matplotlib.figure")


@dataclass(frozen=True)
class Plan:
    """What is printed of a plan: tables, then lines."""

    tables: list[TitledTable]
    notes: list[str]


def plan(
    config: RunConfig,
    world: World,
    ranks: int | None,
    gpu_memory: str | None,
    rates_file: Path | None,
    fresh: bool,
    json_file: Path | None,
) -> Plan | None:
    """The plan, on rank 0 (None on others). Rates that are not known are measured. Every rank calls
    this.

    Raises UserError for a mistake in what is given, as the run itself would.
    """
    began = time.monotonic()
    reject_encoders(config)
    reject_untaught(config)
    reject_unused_text(config)
    size = ranks if ranks is not None else world.size
    if size < 1:
        raise UserError(f"--ranks {size} must be at least 1")
    if json_file is not None:
        from_main(world, partial(check_writable, "--json", json_file))
    memory = None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory")
    given = None if rates_file is None else read_given(rates_file)
    quiet_libraries(world)
    device = None if given is None else torch.device(given.device)
    with noted():
        checked = check_run(config, world, size, device)
    task, student = checked.task, checked.model
    reject_untimed(checked.teachers)
    # a file of predictions costs nothing
    teachers = [teacher for teacher in checked.teachers if teacher.file is None]
    work = from_main(world, partial(work_of, checked))
    own_bytes = student_bytes(student.config, config, size)
    if memory is not None and own_bytes > FULL * memory:
        raise UserError(
            f"--gpu-memory {gpu_memory}: the student's training state alone takes "
            f"{decimal(own_bytes)} on each of {size} ranks, and at most {FULL:.0%} of the memory "
            "may be used; split the student (deepspeed=zero2, zero3), or give more ranks or memory"
        )
    free = memory if memory is not None else free_of(world, size)
    beside = process_bytes(world, student) if given is None else None
    if given is not None and rates_file is not None:
        rates = given_rates(given, rates_file, config, student, work.choices, teachers)
    else:
        rates = own_rates(config, task, world, student, teachers, work, fresh, began)
    if not world.is_main:
        return None
    setting = Setting(config, teachers, student, work, rates, size, free, memory, beside)
    found = estimates(setting)
    if json_file is not None:
        write_json_for_person(json_file, as_json(setting, task.name, found))
    tables = [rate_table(setting, task.name), estimate_table(setting, found)]
    return Plan(tables, notes(setting, found))


def reject_untimed(teachers: Sequence[Teacher]) -> None:
    """Raises UserError for a teacher whose time cannot be estimated."""
    for teacher in teachers:
        if teacher.answers is not None and teacher.file is None:
            raise UserError(
                f"teacher {teacher.name} is of kind {teacher.entry.kind}, whose time cannot be "
                "estimated; leave it out of the plan"
            )


def work_of(checked: CheckedRun) -> Work:
    """The work of the run; predictions that the store holds are not in it."""
    config, folder = checked.config, store_folder(checked.config.store.path)
    store = None
    if (folder / "format.json").is_file():
        store = StoreFolder(folder, read_only=True)
    examples, inputs, teachers = checked.examples, checked.inputs, checked.teachers
    work = make_work(config, checked.task.name, examples, inputs, teachers, store)
    before = work_before(config, examples, inputs, teachers, checked.model.config)
    return replace(work, before=before)


def free_of(world: World, size: int) -> int:
    """Bytes free on the smallest of `size` ranks. More ranks than there are now would share the
    memory of this machine, or have GPUs of their own."""
    free = least_free(world)
    return free if world.device.type == "cuda" else free * world.size // max(size, world.size)


def process_bytes(world: World, student: PreTrainedModel) -> int | None:
    """Bytes that this process holds of libraries and data, as a run's process will; 0 on a GPU,
    None where not known. The student's weights are counted with the student."""
    if world.device.type == "cuda":
        return 0
    for name in LATE:
        importlib.import_module(name)
    now = held(world.device)
    return None if now is None else max(0, now - sum(p.nbytes for p in student.parameters()))


def per_second(rate: float) -> str:
    """A rate as text: whole from 100 on, else in three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def rate_rows(setting: Setting) -> list[dict[str, Any]]:
    """The rate of each model alone, on the task's lengths in full batches, in examples/s."""
    work, rates = setting.work, setting.rates
    epoch_s = training_seconds(work, rates.student, 1) / max(work.steps, 1)
    each = work.examples / max(work.steps, 1)
    rows = [
        {
            "model": f"student {shape_name(setting.student.config)}",
            "dtype": setting.config.precision,
            "examples_per_second": each / max(epoch_s, 1e-12),
            "scaled": rates.student.scaled,
        }
    ]
    lengths = work.lengths_SM.reshape(-1)
    for teacher, rate in zip(setting.teachers, rates.teachers_N, strict=True):
        full_R = teacher.cut.full_rows(lengths, rates.device)
        each_R = work.choices * rate.row_s(lengths) + rate.batch_s / full_R
        row_s = float(np.mean(each_R))
        dtype = teacher.dtype if teacher.entry.quantization is None else teacher.entry.quantization
        rows.append(
            {
                "model": f"{teacher.name} {shape_name(teacher.config)}",
                "dtype": dtype,
                "examples_per_second": 1 / max(row_s, 1e-12),
                "scaled": rate.scaled,
            }
        )
    return rows


def placement_lines(setting: Setting) -> list[str]:
    """Where the run's teachers go and why, and what `auto` would take where it is not set."""
    teachers, default = setting.teachers, setting.config.placement
    if not teachers:
        return []
    own, reason = own_placements(setting)
    told = any(teacher.entry.placement is not None for teacher in teachers)
    lines = [f"{'this run' if told or default != 'auto' else 'auto'} takes {reason}"]
    if len({*own}) > 1:
        pairs = zip(teachers, own, strict=True)
        lines[0] += "; " + ", ".join(f"{teacher.name} {place}" for teacher, place in pairs)
    if default != "auto":
        auto = choose_placements(teachers, "auto", setting.size, setting.free)[1]
        lines.append(f"auto would take {auto}")
    return lines


def notes(setting: Setting, found: Sequence[Estimate]) -> list[str]:
    """Lines below the tables: the choice and why, and what is not counted."""
    work, allowed = setting.work, [one for one in found if one.rejected is None]
    lines = placement_lines(setting)
    for one in allowed:
        if one.workers:
            lines.append(
                f"{one.placement}: the student need not wait with {counted(one.workers, 'worker')} "
                "or more, each as fast as a rank, in jobs of their own; times count from the "
                "workers' start"
            )
    if work.passes == 0 and setting.teachers:
        lines.append("the store holds every prediction: the teachers cost nothing")
    lines += [f"{one.placement}: {one.rejected}" for one in found if one.rejected is not None]
    if setting.memory is not None:
        lines.append(f"fits: into {FULL:.0%} of --gpu-memory; the rest is for activations")
        if not any(one.fits for one in allowed if one.placement != "pool"):
            pool = any(one.fits for one in allowed) * ", or a pool (placement=pool)"
            lines.append(
                f"no placement on these ranks fits into {decimal(setting.memory)}: give more "
                f"ranks, more memory, teachers in fewer bits (teacher_precision=bf16){pool}"
            )
    lines += uncertain(setting, found)
    if setting.teachers:
        lines.append(
            "examples/s and bound: training examples divided by the seconds of training and of the "
            "teachers' pass (with the selection and official splits); the time of a pool's "
            "teachers is in neither"
        )
    unknown = any(one.other_bytes is None for one in found)
    activations = "activations, libraries and data, " if unknown else ""
    drift = "comparing teachers with fp32, " if setting.config.teacher_validation == "fp32" else ""
    more = f"{drift}{activations}the exchange of gradients"
    lines.append(f"not counted: start-up, scoring the student, {more}")
    return [*setting.rates.notes, *lines]


def uncertain(setting: Setting, found: Sequence[Estimate]) -> list[str]:
    """Which figures are scaled, at least, or at most."""
    work, lines = setting.work, []
    if any(rate.scaled for rate in (setting.rates.student, *setting.rates.teachers_N)):
        lines.append(
            "scaled: not measured up to the task's longest texts, but computed from another rate "
            "by the number of operations"
        )
    lines += idle_rank_lines(setting.config, setting.size)
    if any(one.at_least for one in found):
        lines.append(">=: moving split teachers' weights between ranks is not counted")
    if "repair" in work.before:
        lines.append("repair: scaled from the student's step by operations")
    if work.least_steps is not None:
        patience = setting.config.early_stopping_patience
        lines.append(
            f"at most: early_stopping_patience={patience} may end the run from step "
            f"{work.least_steps:,} on, which cannot be known before"
        )
    return lines


def rate_table(setting: Setting, task: str) -> TitledTable:
    """The table of the rate of each model."""
    return (
        f"{task}: examples/s of each model on {setting.rates.hardware}",
        ["model", "precision", "examples/s", "source"],
        [
            [
                *(r["model"], r["dtype"], per_second(r["examples_per_second"])),
                "scaled" if r["scaled"] else "measured",
            ]
            for r in rate_rows(setting)
        ],
    )


def estimate_table(setting: Setting, found: Sequence[Estimate]) -> TitledTable:
    """The table of memory and time of each placement."""
    work = setting.work
    columns = ["placement", "memory of a rank", "student", "teachers", "the rest", "fits"]
    columns += [*work.before, "teachers' pass"]
    columns += ["training", "to the end", "examples/s", "bound"]
    rows: list[list[object]] = []
    for one in found:
        if one.rejected is not None:
            rows.append([one.placement, "not possible", *[""] * (len(columns) - 2)])
            continue
        more = ">= " if one.at_least else ""
        most = "" if work.least_steps is None else "<= "
        both = "about " if more and most else more or most
        rest = one.other_bytes or 0
        bytes_ = (
            one.student_bytes + one.teacher_bytes + rest, one.student_bytes, one.teacher_bytes, rest
        )  # fmt: skip
        pool = one.placement == "pool"
        rows.append(
            [
                one.placement + pool * f", {counted(one.workers, 'worker')}",
                *map(decimal, bytes_),
                {None: "", True: "yes", False: "no"}[one.fits],
                *map(clock, one.before_s.values()),
                "by workers" if pool else more + clock(one.teachers_s),
                most + clock(one.training_s),
                both + clock(one.seconds),
                per_second(one.examples_per_second),
                per_second(one.bound),
            ]
        )
    if setting.memory is None:
        rows = [row[:5] + row[6:] for row in rows]
        columns.remove("fits")
    title = (
        f"{counted(setting.size, 'rank')}: {'' if work.least_steps is None else 'at most '}"
        f"{work.examples:,} examples in {work.steps:,} steps; "
        f"{work.passes:,} teacher forwards, {decimal(store_bytes(work, setting.teachers))} more in "
        "the store"
    )
    return title, columns, rows


def as_json(setting: Setting, task: str, found: Sequence[Estimate]) -> dict[str, Any]:
    """The plan for --json."""
    chosen, reason = choose_placements(setting.teachers, "auto", setting.size, setting.free)
    return {
        "task": task,
        "ranks": setting.size,
        "hardware": setting.rates.hardware,
        "steps": setting.work.steps,
        "least_steps": setting.work.least_steps,
        "examples": setting.work.examples,
        "teacher_forwards": setting.work.passes,
        "store_bytes": store_bytes(setting.work, setting.teachers),
        "rates": rate_rows(setting),
        "placements": [asdict(one) for one in found],
        "auto": chosen,
        "reason": reason,
        "this_run": own_placements(setting)[0],
        "notes": notes(setting, found),
    }
