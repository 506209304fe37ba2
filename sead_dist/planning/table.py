"""`sead-dist plan`: memory and time of a run, for each placement, before it is started."""

import time
from functools import partial
from pathlib import Path

from rich.filesize import decimal
from transformers import PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError
from sead_dist.planning.memory import FULL, student_bytes
from sead_dist.planning.rates import given_rates, own_rates, read_given
from sead_dist.planning.rendering import as_json, show
from sead_dist.planning.scenario import Setting, estimates
from sead_dist.planning.workload import Work, make_work
from sead_dist.runs.checks import refuse_unused_text
from sead_dist.runs.quiet import quiet_libraries
from sead_dist.runs.requests import answered_examples
from sead_dist.runs.setup import read_inputs
from sead_dist.runtime.console import parse_size
from sead_dist.runtime.distributed import World, from_main, on_every_rank
from sead_dist.runtime.memory import held
from sead_dist.runtime.own_files import check_writable
from sead_dist.runtime.run_log import write_json_for_person
from sead_dist.store.layout import default_store
from sead_dist.store.store import PredictionStore
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.feature_teacher import check_feature_teacher, held_everywhere
from sead_dist.teachers.placement import least_free


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
    began = time.monotonic()
    if config.encoders:
        raise UserError("plan is for distill: give teachers=[...] instead of encoders")
    refuse_unused_text(config)
    size = ranks if ranks is not None else world.size
    if size < 1:
        raise UserError(f"--ranks {size} must be at least 1")
    if json_file is not None:
        from_main(world, partial(check_writable, "--json", json_file))
    memory = None if gpu_memory is None else parse_size(gpu_memory, "--gpu-memory")
    given = None if rates_file is None else read_given(rates_file)
    quiet_libraries(world)
    task, examples, inputs, student = on_every_rank(
        world, lambda: read_inputs(config, lambda _note: None)
    )
    teachers = []
    if config.taught:
        teachers = read_teachers(config, task, world, inputs.tokenizer, examples)
    examples = on_every_rank(world, lambda: answered_examples(config, examples, teachers))
    for teacher in teachers:
        if teacher.answers is not None and teacher.file is None:
            raise UserError(
                f"teacher {teacher.name} is of kind {teacher.entry.kind}, whose time cannot be "
                "told before; plan without it"
            )
    on_every_rank(world, lambda: check_feature_teacher(config, teachers, inputs, world))
    all_teachers = held_everywhere(config, teachers)
    # a file of predictions costs nothing
    teachers = [teacher for teacher in all_teachers if teacher.file is None]
    folder = Path(config.store.path) if config.store.path else default_store()

    def count() -> Work:
        store = PredictionStore(folder, print) if (folder / "format.json").is_file() else None
        return make_work(config, task.name, examples, inputs, all_teachers, store)

    work = from_main(world, count)
    own_bytes = student_bytes(student.config, config, size)
    if memory is not None and own_bytes > FULL * memory:
        raise UserError(
            f"--gpu-memory {gpu_memory}: the student's training state alone takes "
            f"{decimal(own_bytes)} of each of {size} ranks, and {FULL:.0%} of the memory may be "
            "taken; split the student (deepspeed=zero2, zero3), or give more ranks or memory"
        )
    free = memory if memory is not None else free_of(world, size)
    beside = process_bytes(world, student) if given is None else None
    if given is not None and rates_file is not None:
        rates = given_rates(given, rates_file, config, student, work.choices, teachers)
    else:
        rates = own_rates(config, task, world, student, teachers, work, fresh, began)
    if world.is_main:
        setting = Setting(config, teachers, student, work, rates, size, free, memory, beside)
        found = estimates(setting)
        show(setting, task.name, found)
        if json_file is not None:
            write_json_for_person(json_file, as_json(setting, task.name, found))


def free_of(world: World, size: int) -> int:
    """Bytes free on the smallest of `size` ranks. More ranks than there are now would share the
    memory of this machine, or have GPUs of their own."""
    free = least_free(world)
    return free if world.device.type == "cuda" else free * world.size // max(size, world.size)


def process_bytes(world: World, student: PreTrainedModel) -> int | None:
    """What this process holds of libraries and data, as a run's will; nothing of it on a GPU. The
    student's weights are counted with the student."""
    if world.device.type == "cuda":
        return 0
    now = held(world.device)
    return None if now is None else max(0, now - sum(p.nbytes for p in student.parameters()))
