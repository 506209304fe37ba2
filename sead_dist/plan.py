"""`sead-dist plan`: memory and time of a run, for each placement, before it is started.

Shapes: N teachers, W ranks.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal
from transformers import PreTrainedModel

from sead_dist.config import RunConfig
from sead_dist.distributed import World, from_main, on_every_rank
from sead_dist.errors import UserError
from sead_dist.forecast import (
    Work,
    batch_shapes,
    bound,
    make_work,
    store_bytes,
    teachers_seconds,
    training_seconds,
)
from sead_dist.memory import FULL, student_bytes, teacher_bytes
from sead_dist.parts import check_placed, quiet_libraries, read_inputs
from sead_dist.planrates import Rates, given_rates, own_rates, read_given
from sead_dist.pretrained import fitting_length
from sead_dist.rates import costs, shape_name
from sead_dist.report import print_table
from sead_dist.runlog import write_json
from sead_dist.storecli import parse_size
from sead_dist.teachers.layout import default_store
from sead_dist.teachers.placement import choose_placements, held_bytes, least_free, share_rows
from sead_dist.teachers.roster import Teacher, call_roster
from sead_dist.teachers.store import PredictionStore

PLACEMENTS = ("colocated", "partitioned", "sharded")


@dataclass(frozen=True)
class Forecast:
    """A run under one placement. Bytes are of the rank that needs most. seconds: until the last
    step is trained; start-up, scoring the student, and what the student's ranks exchange are not in
    it. at_least: nor is the transfer of split teachers' weights, whose speed is not known. refused:
    why this placement cannot be."""

    placement: str
    student_bytes: int
    teacher_bytes: int
    fits: bool | None
    teachers_s: float
    training_s: float
    seconds: float
    examples_per_second: float
    bound: float
    at_least: bool
    refused: str | None


@dataclass(frozen=True)
class Setting:
    """What a plan is made of. free: bytes that placement counts on, on the smallest rank; memory:
    of a GPU, where it was given."""

    config: RunConfig
    teachers: list[Teacher]
    student: PreTrainedModel
    work: Work
    rates: Rates
    size: int
    free: int
    memory: int | None


def plan(
    config: RunConfig,
    world: World,
    ranks: int | None,
    gpu_memory: str | None,
    rates_file: Path | None,
    fresh: bool,
    json_file: Path | None,
) -> None:
    """Measure what is not known, and print the plan. Every rank calls this.

    Raises UserError for a mistake in what is asked, as the run itself would.
    """
    if config.encoders:
        raise UserError("plan is for distill: give teachers=[...] instead of encoders")
    size = ranks if ranks is not None else world.size
    if size < 1:
        raise UserError(f"--ranks {size} must be at least 1")
    memory = None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory")
    given = None if rates_file is None else read_given(rates_file)
    quiet_libraries(world)
    task, examples, tokenizer, student = on_every_rank(
        world, lambda: read_inputs(config, lambda _note: None)
    )
    teachers = call_roster(config, task, world, tokenizer) if config.taught else []
    max_length = fitting_length(config.max_length, student.config)
    folder = Path(config.store.path) if config.store.path else default_store()

    def count() -> Work:
        store = PredictionStore(folder, print) if (folder / "format.json").is_file() else None
        return make_work(config, task.name, examples, tokenizer, max_length, teachers, store)

    work = from_main(world, count)
    own_bytes = student_bytes(student.config, config, size)
    if memory is not None and own_bytes > FULL * memory:
        raise UserError(
            f"--gpu-memory {gpu_memory}: the student's training state alone takes "
            f"{decimal(own_bytes)} of each of {size} ranks, and {FULL:.0%} of the memory may be "
            "taken; split the student (deepspeed=zero2, zero3), or give more ranks or memory"
        )
    free = memory if memory is not None else least_free(world)
    if given is not None and rates_file is not None:
        rates = given_rates(given, rates_file, config, student, work.choices, teachers)
    else:
        rates = own_rates(config, task, world, student, teachers, work, fresh)
    if world.is_main:
        setting = Setting(config, teachers, student, work, rates, size, free, memory)
        forecasts = [forecast(setting, placement) for placement in PLACEMENTS]
        show(setting, task.name, forecasts)
        if json_file is not None:
            write_json(json_file, as_json(setting, task.name, forecasts))


def forecast(setting: Setting, placement: str) -> Forecast:
    """The run with all of its teachers under one placement."""
    config, teachers, work, rates = setting.config, setting.teachers, setting.work, setting.rates
    size = setting.size
    placements = [placement] * len(teachers)
    refused = None
    try:
        check_placed(config, teachers, placements)
    except UserError as error:
        refused = str(error)
    costs_N = costs(teachers, rates.teachers_N)
    share_NW = share_rows(teachers, placements, costs_N, size, setting.free)
    held = teacher_bytes(teachers, placements, share_NW, config.trust_remote_code)
    own = student_bytes(setting.student.config, config, size)
    teachers_s = teachers_seconds(work, teachers, rates.teachers_N, share_NW, rates.device)
    split = placement == "sharded" and size > 1
    if split and rates.link is not None:
        teachers_s += gathered_bytes(setting) / rates.link
    training_s = training_seconds(work, rates.student, size)
    return Forecast(
        placement,
        own,
        held,
        None if setting.memory is None else own + held <= FULL * setting.memory,
        teachers_s,
        training_s,
        teachers_s + training_s,
        work.examples / max(teachers_s + training_s, 1e-12),
        bound(work, teachers, rates.teachers_N, rates.student, size, rates.device),
        split and rates.link is None,
        refused,
    )


def gathered_bytes(setting: Setting) -> int:
    """Weights that a rank receives from the others while split teachers compute its rows: all but
    its own part, for every batch."""
    size, received = setting.size, 0
    for teacher, requests in zip(setting.teachers, setting.work.requests_N, strict=True):
        mine = [rows[::size] for rows in requests if len(rows)]
        batches = len(batch_shapes(teacher, mine, setting.rates.device)[0])
        received += batches * (teacher.bytes - held_bytes(teacher.bytes, "sharded", size))
    return received


def rate_rows(setting: Setting) -> list[dict[str, Any]]:
    """The rate of each model on the task's lengths, in examples/s; alone, in full batches."""
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
        dtype = teacher.dtype if teacher.entry.weights is None else teacher.entry.weights
        rows.append(
            {
                "model": f"{teacher.name} {shape_name(teacher.config)}",
                "dtype": dtype,
                "examples_per_second": 1 / max(row_s, 1e-12),
                "scaled": rate.scaled,
            }
        )
    return rows


def notes(setting: Setting, forecasts: Sequence[Forecast]) -> list[str]:
    """What a reader of the tables should know: the choice and why, and what is not counted."""
    config, size = setting.config, setting.size
    lines: list[str] = []
    if setting.teachers:
        auto = choose_placements(setting.teachers, "auto", size, setting.free)[1]
        lines.append(f"auto takes {auto}")
        if config.placement != "auto":
            lines.append(f"this run: placement {config.placement}, as asked")
        one = forecasts[0]
        if one.teachers_s > 0 and one.training_s > 0:
            workers = int(np.ceil(size * one.teachers_s / one.training_s))
            lines.append(
                f"pool: teachers in jobs of their own keep up with the student from {workers} "
                f"such ranks on; the run then takes {clock(one.training_s)} from their start"
            )
    if setting.work.passes == 0 and setting.teachers:
        lines.append("the store holds every prediction: the teachers cost nothing")
    lines += [f"{one.placement}: {one.refused}" for one in forecasts if one.refused is not None]
    if any(one.at_least for one in forecasts):
        lines.append("sharded: at least, since moving the weights between ranks is not counted")
    if setting.config.internals is not None:
        lines.append("the guide's own forwards in each step are not counted")
    lines.append("not counted: start-up, scoring the student, activations, gradients' exchange")
    return lines


def per_second(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def clock(seconds: float) -> str:
    """ "41 s", "12 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def show(setting: Setting, task: str, forecasts: Sequence[Forecast]) -> None:
    """The plan on the console."""
    work, rates = setting.work, setting.rates
    print_table(
        f"{task}: examples/s of each model on {rates.hardware}",
        ["model", "numbers", "examples/s", ""],
        [
            [r["model"], r["dtype"], per_second(r["examples_per_second"]), "scaled" * r["scaled"]]
            for r in rate_rows(setting)
        ],
    )
    columns = ["placement", "memory of a rank", "student", "teachers", "fits", "teachers' pass"]
    columns += ["training", "to the end", "examples/s", "bound"]
    rows: list[list[object]] = []
    for one in forecasts:
        if one.refused is not None:
            rows.append([one.placement, "refused", *[""] * (len(columns) - 2)])
            continue
        more = ">= " if one.at_least else ""
        fits = {None: "", True: "yes", False: "no"}[one.fits]
        bytes_ = (one.student_bytes + one.teacher_bytes, one.student_bytes, one.teacher_bytes)
        rows.append(
            [
                one.placement,
                *map(decimal, bytes_),
                fits,
                more + clock(one.teachers_s),
                clock(one.training_s),
                more + clock(one.seconds),
                per_second(one.examples_per_second),
                per_second(one.bound),
            ]
        )
    ranks = f"{setting.size} rank{'s' * (setting.size > 1)}"
    title = (
        f"{ranks}: {work.examples:,} examples in {work.steps:,} steps; {work.passes:,} teacher "
        f"forwards, {decimal(store_bytes(setting.work, setting.teachers))} more in the store"
    )
    print_table(title, columns, rows)
    for line in notes(setting, forecasts):
        print(line)


def as_json(setting: Setting, task: str, forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """The plan for --json."""
    chosen, reason = choose_placements(setting.teachers, "auto", setting.size, setting.free)
    return {
        "task": task,
        "ranks": setting.size,
        "hardware": setting.rates.hardware,
        "steps": setting.work.steps,
        "examples": setting.work.examples,
        "teacher_forwards": setting.work.passes,
        "store_bytes": store_bytes(setting.work, setting.teachers),
        "rates": rate_rows(setting),
        "placements": [asdict(one) for one in forecasts],
        "auto": chosen,
        "reason": reason,
        "notes": notes(setting, forecasts),
    }
