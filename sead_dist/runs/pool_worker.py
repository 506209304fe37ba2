"""`sead-dist teach`: a worker of the teacher pool, which fills the store for one student's run.

It computes predictions in the order in which that student needs them. In a run that validates
its teachers, the selection split is first. The training rows by step and the official splits
follow. The worker's command has the configuration of the student's run. The student need not have
started.
"""

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from sead_dist.config.schema import RunConfig
from sead_dist.data.order import BatchStream
from sead_dist.data.splits import RunExamples, RunSplits, tokenize_splits
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import RunError, UserError, rejection
from sead_dist.models.inputs import ModelInputs
from sead_dist.objectives.ensemble import needs_selection
from sead_dist.runs.checked_run import read_run
from sead_dist.runs.chosen_keys import steps_of
from sead_dist.runs.claim import read_student_store
from sead_dist.runs.prepared_teachers import frozen_ensemble, needs_validation
from sead_dist.runs.requests import tell_requests
from sead_dist.runtime.console import counted
from sead_dist.runtime.distributed import StopFlag, World, node_name
from sead_dist.runtime.heartbeat import StopRequestedError
from sead_dist.runtime.run_log import RunLog, is_finished, noted, read_if_written, tell, write_json
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.store.layout import Layout, store_folder
from sead_dist.store.store import StoreFolder
from sead_dist.teachers.placement import place
from sead_dist.teachers.pool import Leases, Worker, items_of_split, items_of_training
from sead_dist.teachers.pool_client import differing_facts, store_id
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.validation import Validation, request_and_validate, require_passed
from sead_dist.training.identity import Identity


def worker_folder(run: Path, number: int, workers: int) -> Path:
    """The folder of a worker's own files, in the student's run directory."""
    return run / ".pool" / f"worker-{number}-of-{workers}"


def parse_worker(text: str) -> tuple[int, int]:
    """(2, 16) for "2/16". Raises UserError for any other form."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    number, workers = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= workers:
        raise UserError(f"--worker {text!r} is not a worker; give NUMBER/WORKERS, e.g. 1/4 to 4/4")
    return number, workers


@dataclass(frozen=True)
class StudentRun:
    """The parts of the student's run that a worker needs. inputs: the inputs of the student."""

    config: RunConfig
    task: TaskSpec
    examples: RunExamples
    splits: RunSplits
    inputs: ModelInputs
    teachers: list[Teacher]
    identity: Identity

    @property
    def run(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def pooled_N(self) -> list[bool]:
        """For each teacher, whether it is in the pool."""
        default = self.config.placement
        return [(teacher.entry.placement or default) == "pool" for teacher in self.teachers]

    @property
    def accept_any(self) -> bool:
        return self.config.store.accept == "any"


def read_student_run(config: RunConfig, world: World) -> StudentRun:
    """Read the student's run. Raises UserError for a mistake in task, data, student or teachers."""
    with noted():
        run = read_run(config, world)
    splits = tokenize_splits(run.examples, run.inputs.split)
    identity = run.identity(world)
    return StudentRun(config, run.task, run.examples, splits, run.inputs, run.teachers, identity)


def teach(config: RunConfig, worker: str, world: World) -> Path:
    """Compute the predictions that the student of `config` needs from its pool. Returns the
    worker's folder.

    The worker ends once all of them are in the store, once the student is finished, or on a stop.
    Its folder holds a finished run, except after a stop. Teachers outside the pool are left to the
    student. Where weights depend on the selection split, these teachers predict it here too.

    worker: NUMBER/WORKERS. Raises UserError before any long work, and where the student needs
    other teachers, data or settings. Raises RunError during the work.
    """
    number, workers = parse_worker(worker)
    reject_other_starts(config, world)
    quiet_libraries(world)
    student = read_student_run(config, world)
    reject_other_student(student)
    folder = worker_folder(student.run, number, workers)
    make_folder(folder, student.run)
    stop = StopFlag()
    with ExitStack() as stack:
        stack.enter_context(stop.listening())
        stack.enter_context(RunLog(folder, is_main=True, console=True))
        (folder / "run_summary.json").unlink(missing_ok=True)
        pool_worker = open_worker(student, number, workers, world, stop, stack)
        try:
            whole = fill_all(pool_worker, student)
        except StopRequestedError:
            tell("stopped; what was computed is kept, and other workers take over the rest")
            return folder
        why = "all predictions are in the store" if whole else f"{student.run} is finished"
        tell(f"done, {why}; this worker has computed {pool_worker.rows} rows")
        write_json(folder / "run_summary.json", {"finished": True, "rows": pool_worker.rows})
    return folder


def open_worker(
    student: StudentRun,
    number: int,
    workers: int,
    world: World,
    stop: StopFlag,
    stack: ExitStack,
) -> Worker:
    """The worker with its store, teachers and leases. `stack` closes all that is opened here.

    Raises UserError where the student in the run directory reads another store.
    """
    config, teachers, run = student.config, student.teachers, student.run
    store = StoreFolder(store_folder(config.store.path))
    reject_other_store(run, store.layout)
    keys = [teacher.key for teacher in teachers]
    stack.enter_context(store.hold(str(run), keys, student.accept_any))

    def progress_or_stop(_doing: str) -> None:
        if stop.signal is not None:
            raise StopRequestedError

    def check() -> bool:
        progress_or_stop("")
        reject_other_student(student)
        reject_other_store(run, store.layout)
        return not is_finished(run)

    alone = place(teachers, ["colocated"] * len(teachers), np.ones((len(teachers), 1)))
    source = StoredSource(
        teachers, alone, world, store,
        student.task.name, worker_folder(run, number, workers), student.accept_any,
        config.trust_remote_code, progress_or_stop,
    )  # fmt: skip
    stack.callback(source.close)
    asked = (student.splits.train, student.splits.selection, *student.splits.official.values())
    for split in asked:
        source.share_tokens(split, student.inputs)
    tell_requests(source, asked)
    pooled = counted(sum(student.pooled_N), "teacher")
    tell(f"worker {number} of {workers}: {pooled}, store {store.layout.root}")
    leases = Leases(store.layout, config.pool.lease_s)
    return Worker(source, leases, number, workers, check)


def fill_all(pool_worker: Worker, student: StudentRun) -> bool:
    """Compute all work items in their order.

    Returns True when all are in the store, and False when the student's run is finished before.
    Raises UserError for a teacher that fails its validation.
    """
    config, splits, teachers = student.config, student.splits, student.teachers
    source, rows, count = pool_worker.source, config.pool.item_rows, len(teachers)
    # Some ensembles need the selection split to determine which teacher predicts a row. The worker
    # determines this as the student does, so it needs the predictions of teachers outside the pool
    # too. In other ensembles the student validates those teachers.
    everyone = needs_selection(config)
    validating = [
        item
        for item in items_of_split(splits.selection, count, rows)
        if student.pooled_N[item.teacher] or (everyone and teachers[item.teacher].file is None)
    ]
    validations: list[Validation] = []
    logits_NBC: np.ndarray | None = None
    if needs_validation(config, splits.selection.examples):
        if not pool_worker.fill(validating):
            return False
        if everyone or all(student.pooled_N):
            overlap = student.examples.dev_in_training
            validations, logits_NBC = request_and_validate(
                source, student.task, splits.selection, rows, overlap
            )
            if config.validates:
                require_passed(student.task, validations, teachers)
    batches = BatchStream(
        splits.train, config.seed, config.global_batch_size, config.micro_batch_size, None,
        steps_of(config, student.examples), 0, 1,
    )  # fmt: skip
    ensemble = frozen_ensemble(config, student.task, teachers, validations, logits_NBC, splits)
    needed = partial(ensemble.needed, batches)
    items = items_of_training(batches, count, rows, needed)
    if not splits.selection.examples.has_gold:  # the student needs these before its first step
        items = validating + items
    elif not needs_validation(config, splits.selection.examples):
        items += validating
    for split in splits.official.values():
        items += items_of_split(split, count, rows)
    return pool_worker.fill([item for item in items if student.pooled_N[item.teacher]])


def reject_other_starts(config: RunConfig, world: World) -> None:
    """Raises UserError for `encoders`, for several processes, and without a teacher in the pool."""
    if config.encoders:
        raise UserError("encoders is a key of finetune; a pool needs teachers=[DIR, ...]")
    if not config.taught:
        raise UserError(
            "this run uses no teachers, so a worker has nothing to compute; give teachers=[DIR, "
            "...] and an ensemble other than none"
        )
    if not config.pooled:
        raise UserError(
            f"no teacher of this run is in the pool (placement={config.placement}), so a worker "
            "has nothing to compute; give worker and student placement=pool, or placement: pool in "
            "the entry of a teacher"
        )
    if world.size > 1:
        raise UserError(
            f"a worker is one process, and WORLD_SIZE={world.size}; start each worker without a "
            f"launcher: sead-dist teach ... --worker {world.rank + 1}/{world.size}"
        )


def make_folder(folder: Path, run: Path) -> None:
    """Make a worker's folder.

    Raises RunError where the worker may not write into the student's run directory, and UserError
    where that cannot be a folder.
    """
    remedy = "give worker and student one output_dir in which both may write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise rejection(
            f"output_dir={run}: a worker keeps its log in {folder}, which cannot be made "
            f"({error.strerror}); {remedy}",
            error,
        ) from None
    if not os.access(folder, os.W_OK):
        raise RunError(f"output_dir={run}: a worker may not write into {folder}; {remedy}")


def reject_other_store(run: Path, layout: Layout) -> None:
    """Raises UserError where the student in `run` reads another store than this worker fills.

    The student would wait for predictions that never come.
    """
    theirs = read_student_store(run)
    if theirs is not None and theirs[1] != store_id(layout):
        raise UserError(
            f"the student in {run} reads the store {theirs[0]}, and this worker would write to "
            f"another one, {layout.root} on {node_name()}; give both the same store=DIR on a disk "
            "that their machines share, or first start the student with this store"
        )


class Expected(TypedDict):
    """One teacher's entry in a student's manifest."""

    placement: str
    fingerprint: str
    numerics: str


def reject_other_student(student: StudentRun) -> None:
    """Raises UserError where the student needs other teachers, settings or data.

    Without a student in the run directory there is nothing to compare.
    """
    run, teachers = student.run, student.teachers
    expected = read_if_written(list[Expected], run / "teacher_manifest.json")
    if expected is None:  # the student has not written its manifest yet
        return
    remedy = "give worker and student the same keys and files, or give another output_dir"
    if len(expected) != len(teachers):
        raise UserError(
            f"this worker has {counted(len(teachers), 'teacher')}, the student in {run} has "
            f"{len(expected)}; {remedy}"
        )
    for teacher, entry, pooled in zip(teachers, expected, student.pooled_N, strict=True):
        if entry["placement"] == "pool" and not pooled:
            raise UserError(
                f"teacher {teacher.name}: the student in {run} waits for its predictions from the "
                "pool, and this worker does not have it in the pool; give both the same placement"
            )
        if entry["fingerprint"] != teacher.key.fingerprint:
            raise UserError(
                f"teacher {teacher.name}: the fingerprint of its weights and settings is "
                f"{teacher.key.fingerprint[:16]} here, and the student in {run} expects "
                f"{entry['fingerprint'][:16]}; {remedy}"
            )
        if entry["numerics"] != teacher.key.numerics and not student.accept_any:
            facts = differing_facts(teacher.key.numerics, entry["numerics"])
            raise UserError(
                f"teacher {teacher.name}: the student in {run} reads another numerics class than "
                f"this worker computes in ({facts}); run workers on machines like the student's "
                "with the same teacher_precision, or give both store.accept=any"
            )
    saved = Identity.read(run / "run.json")
    differences = saved.differences(student.identity)
    if differences:
        raise UserError(f"the student in {run} has other settings: {differences[0]}; {remedy}")
