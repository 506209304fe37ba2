"""Rounds of a sweep. A round is all methods of one task and seed, and one machine does it.

Methods are compared within a round, so its runs need the same teachers and the same arithmetic.
Processes of one machine share a round. Processes of other machines take other rounds.
"""

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sead_dist.config.schema import TeacherConfig
from sead_dist.errors import UserError
from sead_dist.runs.claim import open_lock, takes, try_lock, weights_now
from sead_dist.runtime.console import counted
from sead_dist.runtime.files import remove_folder
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


def at_work(grid: Grid) -> int:
    """How many runs processes do now, here or on other machines: those whose lock is held."""
    locks = [lock_of(unit) for unit in grid.units if not is_finished(unit.folder)]
    return sum(is_held(lock) for lock in locks if lock.is_file())


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock of this file."""
    handle = open_lock(lock)
    try:
        return not takes(handle, fcntl.LOCK_SH)
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
    """Whether a run can start: its teachers are finished, with their models where they predict."""
    made = grid.own_teachers and unit.config.taught
    return all(is_finished(need) and (has_model(need) or not made) for need in unit.needs)


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
    remove_folder(unit.folder / "model")
    if grid.own_teachers and _all_taught(grid, unit.task):
        for teacher in unit.needs:
            remove_folder(teacher / "model")


def again_lines(grid: Grid) -> Iterator[str]:
    """A line on each task whose teachers are made again because their models are gone, or whose
    finished students are done again because they had other teachers (`clear_lost`, `undo_others`).
    """
    for task in grid.tasks:
        made = [of for of in grid.units if (of.task, of.method) == (task, TEACHERS)]
        lost = [of for of in made if not is_done(grid, of)]
        gone = [of for of in lost if is_finished(of.folder)]
        students = grid.students(task)
        done = [of for of in students if is_finished(of.folder)]
        left = [of for of in students if of.config.taught and not is_finished(of.folder)]
        open_rounds = {of.round for of in left}
        had = {of.title: taught_by(of.folder) for of in done if made and of.round in open_rounds}
        had = {title: hashes for title, hashes in had.items() if hashes is not None}
        now = [None if of in lost else _weights_of(of) for of in made] if had else []
        undone = [title for title, hashes in had.items() if _differ(now, hashes or ())]
        unsure = [title for title in had if lost and title not in undone]
        parts = []
        if gone:
            parts.append(f"{counted(len(gone), 'teacher')} to be made again: no model is left")
        elif unsure:
            parts.append(f"{counted(len(lost), 'teacher')} to be made")
        begun = [of.title for of in left if gone and (of.folder / "run.json").is_file()]
        for what, titles in (
            ("what begins again", begun),
            ("done again, since the teachers that are there differ", undone),
            ("done again if the teachers differ then", unsure),
        ):
            parts += [f"{what}: {', '.join(titles)}"] if titles else []
        if parts:
            stay = len(done) - len(undone) - len(unsure)
            yield f"{task}: {'; '.join(parts)}; finished students that stay: {stay}"


def _weights_of(teacher: Unit) -> str | None:
    """The hash of the weights of a made teacher; None where its files cannot be read."""
    try:
        return weights_now(TeacherConfig(path=str(teacher.folder)))
    except UserError:
        return None


def _differ(now: Sequence[str | None], had: Sequence[str]) -> bool:
    """Whether a student had other teachers than those that are there. None: not known yet."""
    if len(now) != len(had):
        return True
    return any(one not in (None, old) for one, old in zip(now, had, strict=True))


def clear_lost(grid: Grid, unit: Unit) -> None:
    """Where a teacher's model is gone, remove its run, so that the teacher is made again. Remove
    unfinished students that used it too, because the new teacher may differ from the old one."""
    if unit.method != TEACHERS or not is_finished(unit.folder):
        return
    tell(f"{unit.title}: its model is gone, so it is made again")
    remove_folder(unit.folder)
    for student in grid.students(unit.task):
        if student.config.taught and not is_finished(student.folder):
            with try_lock(lock_of(student)) as taken:  # another process may be running it
                if taken:
                    remove_folder(student.folder)


def undo_others(grid: Grid, unit: Unit) -> None:
    """Remove the finished runs of this run's round that had other teachers, so that they are done
    again. Called when `unit` has just finished."""
    own = taught_by(unit.folder)
    if not grid.own_teachers or own is None:
        return
    for other in grid.units:
        if other.round != unit.round or other is unit or not is_finished(other.folder):
            continue
        if taught_by(other.folder) not in (None, own):
            with try_lock(lock_of(other)) as taken:
                if taken:
                    tell(f"{other.title}: it had other teachers, so it is done again")
                    remove_folder(other.folder)


def taught_by(run: Path) -> Sequence[str] | None:
    """The hashes of the weights of a finished run's teachers; None where it used none."""
    path = run / "teacher_manifest.json"
    if not path.is_file():
        return None
    return [str(teacher["weights_sha256"]) for teacher in read_as(list[dict[str, Any]], path)]
