"""Rounds of a sweep. A round is all methods of one task and seed, and one machine does it.

Methods are compared within a round, so its runs need the same teachers and the same arithmetic.
Processes of one machine share a round. Processes of other machines take other rounds.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sead_dist.runs.claim import open_lock, takes, try_lock
from sead_dist.runtime.console import counted
from sead_dist.runtime.run_log import is_finished, read_as, tell
from sead_dist.sweep.grid import TEACHERS, Grid, Unit


def lock_of(unit: Unit) -> Path:
    """The lock of one run."""
    return unit.folder.with_name(f".{unit.folder.name}.lock")


@contextmanager
def try_join(unit: Unit, machine: str | None = None) -> Iterator[bool]:
    """Whether this process takes part in the run's round. It does so where no process of another
    machine does. Its part ends with the block, or with the process.

    machine: the name of this machine. Raises UserError or RunError where the folder cannot be made.
    """
    name = (machine or socket.gethostname()).encode()
    handle = open_lock(unit.folder.parent.parent / f".{unit.folder.name}.round")
    try:
        if takes(handle, fcntl.LOCK_EX):
            os.ftruncate(handle, 0)
            os.pwrite(handle, name, 0)
        # from an exclusive lock to a shared one; a machine that comes between writes its own name
        yield takes(handle, fcntl.LOCK_SH) and os.pread(handle, 1024, 0) == name
    finally:
        os.close(handle)


def has_model(run: Path) -> bool:
    """Whether a run has left a model."""
    return (run / "model").is_dir()


def is_done(grid: Grid, unit: Unit) -> bool:
    """Whether nothing is left to do for a run. A teacher that has students to teach is done only
    with its model."""
    if not is_finished(unit.folder):
        return False
    return unit.method != TEACHERS or has_model(unit.folder) or _all_taught(grid, unit.task)


def is_ready(grid: Grid, unit: Unit) -> bool:
    """Whether a run can start: its teachers are finished, with their models where it asks them."""
    made = grid.own_teachers and unit.config.taught
    return all(is_finished(need) and (has_model(need) or not made) for need in unit.needs)


def remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that a kill never leaves a part under its name."""
    aside = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.is_dir():
        folder.replace(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _all_taught(grid: Grid, task: str) -> bool:
    """Whether all students of the task are finished: those of the grid, and those that another
    command has begun in this folder."""
    own = [student.folder for student in grid.students(task)]
    begun = [run.parent for folder in own for run in folder.parent.parent.glob("*/seed-*/run.json")]
    return all(is_finished(folder) for folder in {*own, *begun})


def tidy(grid: Grid, unit: Unit) -> None:
    """Where models are not kept, remove the model of a finished student. After the last student of
    a task, remove the models of its teachers."""
    if grid.keep_models or unit.method == TEACHERS:
        return
    remove(unit.folder / "model")
    if grid.own_teachers and _all_taught(grid, unit.task):
        for teacher in unit.needs:
            remove(teacher / "model")


def told_again(grid: Grid) -> Iterator[str]:
    """A line on each task whose teachers are made again, because their models are gone. It also
    says which students are done again with them (`clear_lost`, `undo_others`)."""
    for task in grid.tasks:
        made = [of for of in grid.units if (of.task, of.method) == (task, TEACHERS)]
        gone = [of for of in made if is_finished(of.folder) and not is_done(grid, of)]
        if not gone:
            continue
        taught = [of for of in grid.students(task) if of.config.taught]
        done = {of.title: of.round for of in taught if is_finished(of.folder)}
        left = [of for of in taught if of.title not in done]
        begun = [of.title for of in left if (of.folder / "run.json").is_file()]
        open_rounds = {of.round for of in left}
        undone = [title for title, round_ in done.items() if round_ in open_rounds]
        line = f"{task}: {counted(len(gone), 'teacher')} to be made again: no model is left"
        if begun:
            line += f"; what begins again: {', '.join(begun)}"
        if undone:
            line += f"; done again if its teachers differ then: {', '.join(undone)}"
        yield f"{line}; finished students that stay: {len(done) - len(undone)}"


def clear_lost(grid: Grid, unit: Unit) -> None:
    """Where a teacher's model is gone, remove its run, so that the teacher is made again. Remove
    unfinished students that asked it too, because the new teacher may differ from the old one."""
    if unit.method != TEACHERS or not is_finished(unit.folder):
        return
    tell(f"{unit.title}: its model is gone, so it is made again")
    remove(unit.folder)
    for student in grid.students(unit.task):
        if student.config.taught and not is_finished(student.folder):
            with try_lock(lock_of(student)) as taken:  # another process may be running it
                if taken:
                    remove(student.folder)


def undo_others(grid: Grid, unit: Unit) -> list[Unit]:
    """Remove the finished runs of this run's round that had other teachers, so that they are done
    again. Called when `unit` has just finished. Returns the removed runs."""
    own = taught_by(unit.folder)
    if not grid.own_teachers or own is None:
        return []
    undone = []
    for other in grid.units:
        if other.round != unit.round or other is unit or not is_finished(other.folder):
            continue
        if taught_by(other.folder) not in (None, own):
            with try_lock(lock_of(other)) as taken:
                if taken:
                    tell(f"{other.title}: it had other teachers, so it is done again")
                    remove(other.folder)
                    undone.append(other)
    return undone


def taught_by(run: Path) -> Sequence[str] | None:
    """The hashes of the weights of a finished run's teachers; None where it asked none."""
    path = run / "teacher_manifest.json"
    if not path.is_file():
        return None
    return [str(teacher["weights_sha256"]) for teacher in read_as(list[dict[str, Any]], path)]
