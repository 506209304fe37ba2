"""The runs that use a store now: files in live/ that are locked as long as their process lives."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from sead_dist.errors import RunError
from sead_dist.store.layout import Layout, explain, unique_name


@dataclass(frozen=True)
class LiveRun:
    """A run that holds a store now: `teachers` are patterns of folder names under values/."""

    host: str
    pid: int
    run: str
    teachers: tuple[str, ...]

    def holds(self, teacher: str) -> bool:
        return any(fnmatchcase(teacher, pattern) for pattern in self.teachers)


@contextmanager
def hold(layout: Layout, run: str, teachers: Sequence[str]) -> Iterator[None]:
    """Mark the teacher folders as used by `run`, for as long as this process lives at most.

    The file is locked before it gets its name, so nobody ever sees it unlocked while we live.
    """
    name = unique_name("run") + ".json"
    about = {"host": socket.gethostname(), "pid": os.getpid(), "run": run}
    text = json.dumps({**about, "teachers": sorted(set(teachers)), "since": time.time()})
    aside, path = layout.tmp / name, layout.live / name
    try:
        file = open(aside, "x")  # noqa: SIM115 (open while held)
        file.write(text)
        file.flush()
    except OSError as error:
        raise RunError(explain(layout.root, name, error)) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            # A removal that is under way ends first; a later one sees this file.
            with layout.lock("store.lock", exclusive=False):
                os.replace(aside, path)
            yield
        finally:
            for left in (aside, path):
                with suppress(OSError):
                    left.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)


def live_runs(layout: Layout) -> tuple[list[LiveRun], list[Path]]:
    """The runs that hold the store now, and the files left by runs that are dead."""
    runs: list[LiveRun] = []
    stale: list[Path] = []
    for path in sorted(layout.live.glob("*.json")):
        try:
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    runs.append(_read_run(file.read()))
                else:
                    fcntl.flock(file, fcntl.LOCK_UN)
                    stale.append(path)
        except FileNotFoundError:
            continue
        except OSError:
            # A file we may not open says nothing about its run: leave everything to it.
            runs.append(_read_run(""))
    return runs, stale


def _read_run(text: str) -> LiveRun:
    try:
        about = json.loads(text)
        teachers = tuple(about["teachers"])
        return LiveRun(about["host"], about["pid"], about["run"], teachers)
    except (ValueError, LookupError, TypeError, RecursionError):
        return LiveRun("?", 0, "?", ("*",))
