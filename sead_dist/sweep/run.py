"""`sead-dist sweep`: workers do the runs of a sweep that are not finished yet.

A worker is a process, or a world of ranks that take part in every run together. The run directories
alone show which runs are finished, which failed, and which another worker is running. So several
workers on one folder share its runs, whether started by hand, by `jobs` or by a SLURM array.
"""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from sead_dist.errors import RunError, UserError
from sead_dist.runs.claim import reject_other_keys, try_lock
from sead_dist.runs.distillation import distill, keep_encoders
from sead_dist.runtime.console import clock, counted
from sead_dist.runtime.distributed import StopFlag, World, from_main
from sead_dist.runtime.run_log import is_finished, read_as, tell, tell_table, write_json
from sead_dist.runtime.surroundings import as_before, quiet_libraries
from sead_dist.sweep.checks import check_grid, steps_line
from sead_dist.sweep.grid import TEACHERS, Grid, Unit, make_grid
from sead_dist.sweep.page import render_page
from sead_dist.sweep.report import scores, title, write_sweep_report
from sead_dist.sweep.results import TaskData, failures, scores_of
from sead_dist.sweep.rounds import (
    again_lines,
    at_work,
    clear_lost,
    is_done,
    is_ready,
    lock_of,
    tidy,
    try_join,
    undo_others,
)
from sead_dist.teachers.teacher import device_model
from sead_dist.training.engine import own_accelerate

POLL_S = 2.0
# the program of a process that the key `jobs` starts; it calls `run_worker`
WORKER = "sead_dist.cli.sweep_worker"


@own_accelerate()
@as_before()
def run_sweep(words: Sequence[str], world: World) -> None:
    """Do the unfinished runs of the sweep that these words describe, and write its report.

    The process is left as it was (`runtime/surroundings.py`). A failure is written down, and the
    other runs go on. Raises UserError for mistakes, before any run starts, and RunError at the end
    where runs have failed.
    """
    quiet_libraries(world)
    unchecked = make_grid(words)
    data: dict[str, TaskData] = {}

    def check() -> Grid:
        fixed, found = check_grid(unchecked, world)
        data.update(found)
        for name, of in found.items():
            tell(steps_line(fixed, name, of))
        for name in fixed.unread:
            tell(f"{name}: no method needs a teacher, so no encoder is fine-tuned")
        for line in again_lines(fixed):
            tell(line)
        made = [unit.config.student.path for unit in fixed.units if unit.method == TEACHERS]
        if made:
            keep_encoders(fixed.output, [path for path in made if path is not None])
        return fixed

    grid = from_main(world, check)
    stop = StopFlag()
    try:
        with stop.listening():
            came_to_end = work(grid, world, stop) if grid.jobs == 1 else run_jobs(grid, stop)
    except BaseException:
        if world.is_main:
            # the report shows the runs so far; the error itself is raised below
            with suppress(UserError, OSError):
                report(grid, data, world.device)
        raise
    from_main(world, lambda: report(grid, data, world.device))
    from_main(world, lambda: report_end(grid, came_to_end))


def run_worker(words: Sequence[str], world: World) -> None:
    """The work of a process that `jobs` starts. It does runs, and writes no report: the process
    that started it does."""
    quiet_libraries(world)
    grid, _ = check_grid(make_grid(words), world)
    stop = StopFlag()
    with stop.listening():
        work(grid, world, stop)


def report(grid: Grid, data: dict[str, TaskData], device: torch.device) -> None:
    """Write OUTPUT/report. Only one worker does so at a time."""
    folder = grid.output / "report"
    with ExitStack() as stack:
        while not stack.enter_context(try_lock(folder / ".lock")):
            time.sleep(POLL_S / 10)
        # read under the lock, so that no report replaces one of more runs
        found = scores_of(grid, data, device_model(device))
        write_sweep_report(found, folder)
        render_page(found, folder)
    tell_table(title(found), ["task", *found["methods"]], scores(found, "*"))


def report_end(grid: Grid, came_to_end: bool) -> None:
    """Log how the sweep ended. Raises RunError where runs have failed."""
    done = sum(is_finished(unit.folder) for unit in grid.units)
    of_all = f"{done} of {len(grid.units)} runs are done; report: {grid.output / 'report'}"
    failed = failures(grid)
    if failed:
        named = ", ".join(f"{of['task']} {of['method']} seed {of['seed']}" for of in failed[:4])
        more = ", ..." if len(failed) > 4 else ""
        raise RunError(
            f"{len(failed)} of {len(grid.units)} runs failed: {named}{more}; reason of the first: "
            f"{failed[0]['reason']}; remove the cause, and give the same command again ({of_all})"
        )
    if came_to_end:
        tell(of_all)
    else:
        tell(f"stopped: {of_all}; give the same command again to continue")


@dataclass
class Memory:
    """The state of a worker. before: the times (ns) of failures of earlier tries, by file. done:
    finished runs. failed: runs that failed in this worker or in one beside it. said: the last line
    that was logged. round: the one that it takes part in. joined: holds its part in it."""

    before: dict[Path, int]
    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    said: str = ""
    round: tuple[str, int] | None = None
    joined: ExitStack = field(default_factory=ExitStack)


def work(grid: Grid, world: World, stop: StopFlag) -> bool:
    """Do runs until none is left. False where a stop was requested before that."""
    memory = from_main(world, lambda: Memory(failure_times(grid)))
    with memory.joined:
        while not stop.agreed(world):
            with ExitStack() as held:
                index, waiting = from_main(world, lambda: choose(grid, memory, held))
                if index is not None:
                    run_unit(grid, index, memory, world, stop)
                elif not waiting:
                    return True
                else:
                    time.sleep(POLL_S)
    return False


def failed_at(unit: Unit) -> int | None:
    """The time (ns) of a run's failure; None for none. Another worker may remove the file."""
    try:
        return unit.failure.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def failure_times(grid: Grid) -> dict[Path, int]:
    """The time (ns) of each failure that is written down, by its file."""
    times = {unit.failure: failed_at(unit) for unit in grid.units}
    return {file: at for file, at in times.items() if at is not None}


def choose(grid: Grid, memory: Memory, held: ExitStack) -> tuple[int | None, int]:
    """(the next run or None, how many runs must be waited for). The lock of the next run is in
    `held` from now on. Runs that must be waited for are in other workers, or lack their teachers.

    Teachers and this worker's own round come first. Runs that failed in earlier tries come last, so
    that the others get their turn.
    """
    # a new or newer file is a failure since this worker started
    memory.failed |= {
        n
        for n, unit in enumerate(grid.units)
        if (at := failed_at(unit)) is not None and memory.before.get(unit.failure) != at
    }
    failed = {grid.units[n].folder for n in memory.failed}
    waiting = 0
    for n in sorted(range(len(grid.units)), key=lambda n: sort_key(grid.units[n], memory)):
        unit = grid.units[n]
        if n in memory.failed or failed.intersection(unit.needs):
            continue
        # another worker may undo a run, or remove a teacher's model, after it was done
        if is_done(grid, unit):
            if n not in memory.done:
                # another command in this folder may have done it
                reject_other_keys(unit.config)
                memory.done.add(n)
        elif not is_ready(grid, unit):
            waiting += 1
        elif take(grid, unit, memory, held):
            return n, waiting
        else:
            waiting += 1
    if waiting and memory.said != "waiting":
        memory.said = "waiting"
        tell(f"{counted(waiting, 'run')} left to other processes; waiting for them")
    return None, waiting


def sort_key(unit: Unit, memory: Memory) -> tuple[bool, bool]:
    """The key to sort runs by: failed ones last; before that teachers and the own round first."""
    return unit.failure in memory.before, unit.round not in (None, memory.round)


def take(grid: Grid, unit: Unit, memory: Memory, held: ExitStack) -> bool:
    """Try to take a run. True where its lock is in `held` and its round is joined now."""
    lock, share = ExitStack(), ExitStack()
    own = unit.round in (None, memory.round) or share.enter_context(try_join(unit))
    # it may have been finished just before
    if own and lock.enter_context(try_lock(lock_of(unit))) and not is_done(grid, unit):
        held.push(lock)
        if unit.round not in (None, memory.round):
            memory.joined.close()
            memory.joined.push(share)
            memory.round = unit.round
        return True
    lock.close()
    share.close()
    return False


def run_unit(grid: Grid, index: int, memory: Memory, world: World, stop: StopFlag) -> None:
    """Do one run. Where it fails, write down why.

    A UserError ends only this run, and on one rank so does a RunError. Every other error is raised
    again. On several ranks a RunError is one of these, because the ranks may no longer agree on
    what comes next.
    """
    unit = grid.units[index]
    if world.is_main:
        left = time_left(grid, at_work(grid))
        tell(f"\nrun {index + 1} of {len(grid.units)}: {unit.title} ({left})")
        memory.said = unit.title
        clear_lost(grid, unit)
    try:
        distill(unit.config, world, show_table=False, stop=stop)
    except Exception as error:
        if world.is_main:
            write_failure(unit, error)
            memory.failed.add(index)
        if isinstance(error, UserError) or (isinstance(error, RunError) and world.size == 1):
            return
        raise
    if world.is_main and is_finished(unit.folder):
        unit.failure.unlink(missing_ok=True)
        undo_others(grid, unit)
        tidy(grid, unit)


def write_failure(unit: Unit, error: Exception) -> None:
    """Log a run's failure, and write it down."""
    reason = str(error) or type(error).__name__
    tell(f"sead-dist: {unit.title} failed: {reason}")
    write_json(unit.failure, {"run": unit.title, "reason": reason})


def time_left(grid: Grid, workers: int) -> str:
    """What is left in words: "12 runs left, about 1.5 h". workers: how many runs are done now.

    A run takes the median of the finished runs of its task and method, a teacher that of the
    teachers of its task and encoder. Where there is none, it is not counted, and the line says "at
    least".
    """
    spent: dict[tuple[str, str, str], list[float]] = {}
    left = []
    for unit in grid.units:
        if is_finished(unit.folder):
            summary = read_as(dict[str, Any], unit.folder / "run_summary.json")
            spent.setdefault(alike(unit), []).append(float(summary["train_s"]))
        if not is_done(grid, unit):
            left.append(unit)
    line = f"{counted(len(left), 'run')} left"
    known = [spent[alike(unit)] for unit in left if alike(unit) in spent]
    if not known:
        return line
    about = "about" if len(known) == len(left) else "at least"
    return f"{line}, {about} {clock(sum(map(statistics.median, known)) / max(workers, 1))}"


def alike(unit: Unit) -> tuple[str, str, str]:
    """What runs that take as long have in common: task, method, and a teacher's encoder."""
    start = unit.config.student
    encoder = start.path or start.shape or ""
    return unit.task, unit.method, encoder if unit.method == TEACHERS else ""


def run_jobs(grid: Grid, stop: StopFlag) -> bool:
    """Start `jobs` workers and wait until they end. False where a stop was requested before that.

    Raises RunError where a worker failed and runs are left.
    """
    workers = [start_worker(grid) for _ in range(grid.jobs)]
    readers = [start_log_thread(worker, number) for number, worker in enumerate(workers)]
    try:
        stopping = False
        while any(worker.poll() is None for worker in workers):
            if stop.signal is not None and not stopping:
                stopping = True
                for worker in workers:
                    worker.terminate()
            time.sleep(POLL_S / 20)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
    for reader in readers:
        reader.join()
    # a failed run does not end its worker; so this is another failure
    bad = [worker.returncode for worker in workers if worker.returncode]
    if bad and stop.signal is None and not all(is_done(grid, unit) for unit in grid.units):
        raise RunError(
            f"{len(bad)} of {grid.jobs} workers of the sweep ended with exit code {bad[0]}; see "
            "their lines above, and give the same command again to continue"
        )
    return stop.signal is None


def start_worker(grid: Grid) -> subprocess.Popen[str]:
    """A process with its share of the threads."""
    threads = str(max(1, torch.get_num_threads() // grid.jobs))
    return subprocess.Popen(
        [sys.executable, "-m", WORKER, *grid.words, "jobs=1"],
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def start_log_thread(worker: subprocess.Popen[str], number: int) -> threading.Thread:
    """A thread that logs what a worker prints, with the worker's number before each line."""

    def read(output: IO[str]) -> None:
        for line in output:
            line = line.rstrip("\n")
            tell(f"[{number + 1}] {line}" if line.strip() else "")

    assert worker.stdout is not None
    thread = threading.Thread(target=read, args=(worker.stdout,), daemon=True)
    thread.start()
    return thread
