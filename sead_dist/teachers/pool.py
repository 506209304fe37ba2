"""The work of a pool: work items, leases on them, and the worker that computes them.

A work item is a teacher and a few examples, in the student's order of use. Every worker of a run
makes the same list. A (teacher, example) pair is in the first work item that needs it, and in no
other of its split.

A lease means that a work item is being computed now (STORE/leases/, one file each). Its file is
created exclusively, and its holder writes to it several times in `broken_s` seconds. A process that
finds no change for so long, by its own monotonic clock, removes the lease. Clock times of other
machines are never read. A lease only saves work: two holders of one work item write the same
predictions. (Our own scheme; docs/decisions/0018-pool.md gives the reasons against a library's.)

Shapes: N teachers, R examples of a work item or window, U unique examples of a split.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sead_dist.data.order import BatchStream, Split
from sead_dist.runtime.run_log import tell
from sead_dist.store.layout import Layout, unique_name, unwritable
from sead_dist.store.store import TeacherKey
from sead_dist.store.tensor_file import digest
from sead_dist.teachers.base import Request
from sead_dist.teachers.placement import TEACHER_SHARE, free_bytes
from sead_dist.teachers.source import StoredSource


@dataclass(frozen=True, eq=False)
class WorkItem:
    """Some rows of one teacher.

    teacher: its number. entries_R: the rows, ascending. what: the place in the run, for messages.
    """

    teacher: int
    split: Split
    entries_R: np.ndarray
    what: str

    def name(self, key: TeacherKey) -> str:
        """A name made from the content. It is the same on every machine, and for any run that needs
        the same rows."""
        return digest(key.fingerprint, key.numerics, self.split.ids_U2[self.entries_R])

    def request(self, teachers: int) -> Request:
        needed_NR = np.zeros((teachers, len(self.entries_R)), bool)
        needed_NR[self.teacher] = True
        return Request(self.split, self.entries_R, needed_NR, self.what)


def items_of_split(split: Split, teachers: int, rows: int) -> list[WorkItem]:
    """Work items for all rows of a split and all teachers."""
    entries_U = np.arange(len(split.ids_U2))
    what = split.examples.split
    return [
        WorkItem(n, split, entries_U[start : start + rows], what)
        for start in range(0, len(entries_U), rows)
        for n in range(teachers)
    ]


def items_of_training(
    batches: BatchStream,
    teachers: int,
    rows: int,
    needed: Callable[[range, np.ndarray], np.ndarray | None],
) -> list[WorkItem]:
    """Work items for the training rows, in the order of the steps. needed: as in `stream`."""
    found: list[WorkItem] = []
    due_NU = np.ones((teachers, len(batches.split.ids_U2)), bool)
    for steps in batches.windows(0, rows):
        if not due_NU.any():
            break  # later epochs need the same rows
        entries_R = batches.entries(steps)
        needed_NR = needed(steps, entries_R)
        for n in range(teachers):
            new_R = due_NU[n, entries_R]
            if needed_NR is not None:
                new_R &= needed_NR[n]
            if new_R.any():
                # teachers with the same rows share the array
                new = entries_R if new_R.all() else entries_R[new_R]
                due_NU[n, new] = False
                first, last = steps.start + 1, steps.stop
                what = f"steps {first}-{last}" if last > first else f"step {last}"
                found.append(WorkItem(n, batches.split, new, what))
    return found


# the least and most seconds between two writes to a lease, and the number of writes in broken_s
LEAST_BEAT_S, MOST_BEAT_S, BEATS = 0.02, 5.0, 10


class Lease:
    """This process's lease on a work item. A thread renews it while the `with` block runs.

    taken_from: the holder of the broken lease that was there before, in plain text; None: none was.
    """

    def __init__(self, path: Path, file: int, beat_s: float, taken_from: str | None) -> None:
        self.path, self._file, self._beat_s, self.taken_from = path, file, beat_s, taken_from
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file)):
                os.unlink(self.path)  # else another process has taken it over
        os.close(self._file)

    def _renew(self) -> None:
        beat = 0
        while not self._over.wait(self._beat_s):
            beat += 1
            # The open file is used, so that a lease which another process made under this name
            # stays as it is. It also works on a full disk, since the line keeps its length.
            with suppress(OSError):
                os.pwrite(self._file, f"{beat:012d}".encode(), 0)
                os.fsync(self._file)


@dataclass(frozen=True)
class Seen:
    """The text of another process's lease, and since when it is unchanged (our monotonic
    seconds)."""

    text: bytes
    since: float

    @property
    def holder(self) -> str:
        words = self.text.decode(errors="replace").split()
        return f"process {words[2]} on {words[1]}" if len(words) == 4 else "an unnamed process"


class Leases:
    """Takes leases in a store, and records the leases of other processes that it has read."""

    def __init__(self, layout: Layout, broken_s: float) -> None:
        self.layout, self.broken_s = layout, broken_s
        self.beat_s = min(max(broken_s / BEATS, LEAST_BEAT_S), MOST_BEAT_S)
        self._seen: dict[str, Seen] = {}

    def take(self, name: str) -> Lease | None:
        """The lease on this work item, or None while another process holds it. Raises RunError
        where no lease can be written."""
        path = self.layout.leases / name
        lease = self._create(path)
        if lease is None and self._is_broken(name, path):
            holder = (
                f"{self._seen[name].holder}, which did not renew its lease for {self.broken_s:g} s"
            )
            taken = self._take_away(name, path)
            if taken is not False:
                lease = self._create(path, holder if taken else None)
        return lease

    def clear(self, names: Sequence[str]) -> None:
        """Remove all leases on these work items, which are finished."""
        for name in {*names}.intersection(os.listdir(self.layout.leases)):
            with suppress(OSError):
                os.unlink(self.layout.leases / name)

    def _create(self, path: Path, taken_from: str | None = None) -> Lease | None:
        text = f"{0:012d} {socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}\n"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        except OSError as error:
            raise unwritable(self.layout.root, f"leases/{path.name}", error) from error
        try:
            os.write(file, text.encode())
            os.fsync(file)
        except OSError as error:
            os.close(file)
            with suppress(OSError):
                os.unlink(path)
            raise unwritable(self.layout.root, f"leases/{path.name}", error) from error
        return Lease(path, file, self.beat_s, taken_from)

    def _is_broken(self, name: str, path: Path) -> bool:
        """Whether a lease has been unchanged for too long since this process first read its present
        text."""
        text, now = _text(path), time.monotonic()
        known = self._seen.get(name)
        if known is None or known.text != text:
            self._seen[name] = Seen(text, now)
            return False
        return now - known.since > self.broken_s

    def _take_away(self, name: str, path: Path) -> bool | None:
        """Remove a broken lease. False: it was another lease by now, which is unbroken. None:
        another process has removed it."""
        aside = self.layout.tmp / unique_name(name)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unwritable(self.layout.root, f"leases/{name}", error) from error
        broken = _text(aside) == self._seen.pop(name).text
        if not broken:  # a third process was quicker, and has its own lease here
            with suppress(OSError):  # a fourth process has one here, or hard links fail
                os.link(aside, path)
        with suppress(OSError):
            os.unlink(aside)
        return broken


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# the longest pause in seconds while other processes hold all that is left
MOST_PAUSE_S = 1.0


class Worker:
    """Worker `number` (from 1) of `workers`. The numbers only determine where its first search
    begins and how long the front of the list is.

    source: computes in this process. check: called before each search for a work item; it returns
    False when the work is no longer needed, and may raise UserError and StopRequestedError.
    """

    def __init__(
        self,
        source: StoredSource,
        leases: Leases,
        number: int,
        workers: int,
        check: Callable[[], bool],
    ) -> None:
        self.source, self.leases, self.check = source, leases, check
        # the first search begins here in the front of the list; later ones begin with the oldest
        # item
        self.turn = number - 1
        # the length of the front: only within it may an item be preferred to those before it
        self.front = 2 * max(workers, len(source.teachers))
        self.room = int(TEACHER_SHARE * free_bytes(source.world.device))
        self.done = 0
        # rows computed since this process started
        self.rows = 0

    def fill(self, items: Sequence[WorkItem]) -> bool:
        """Compute until all items are in the store. Returns True then, and False where `check`
        ended it."""
        left = list(items)
        while left:
            if not self.check():
                return False
            taken = self.take(left)
            if taken is None:
                # others hold all that is left: look later what they have finished and whose leases
                # are broken
                self.drop_finished(left)
                time.sleep(min(self.leases.broken_s / 10, MOST_PAUSE_S))
                continue
            item, lease = taken
            with lease:
                self.compute(item)
            left.remove(item)
        # a worker that was killed between writing its block and removing its lease has left the
        # lease
        self.leases.clear([self.name(item) for item in items])
        return True

    def take(self, left: list[WorkItem]) -> tuple[WorkItem, Lease] | None:
        """The first open work item, with its lease; None where other processes hold all of them.

        The first search begins at this worker's own place in the front of the list. Where not all
        teachers fit into memory, the items of loaded teachers come first within the front. Items
        that are in the store are removed from the list.
        """
        front = left[: self.front]
        turn = self.turn % len(front)
        front = front[turn:] + front[:turn]
        if sum(teacher.bytes for teacher in self.source.teachers) > self.room:
            front.sort(key=lambda item: item.teacher not in self.source.models)
        for item in (*front, *left[self.front :]):
            if self.is_finished(item):
                left.remove(item)
                continue
            lease = self.leases.take(self.name(item))
            if lease is not None:
                self.turn = 0
                if lease.taken_from is not None:
                    name = self.source.teachers[item.teacher].name
                    tell(f"{name}, {item.what}: taken over from {lease.taken_from}")
                return item, lease
        return None

    def name(self, item: WorkItem) -> str:
        return item.name(self.source.teachers[item.teacher].key)

    def is_finished(self, item: WorkItem) -> bool:
        """Whether all rows of the item were in the store when this process last read it."""
        table = self.source.table(item.teacher, item.split)
        return bool(table.lookup(item.entries_R)[1].all())

    def drop_finished(self, left: list[WorkItem]) -> None:
        """Read the store again, and remove the items from the list that it has."""
        for table in {self.source.table(item.teacher, item.split) for item in left}:
            table.refresh()
        left[:] = [item for item in left if not self.is_finished(item)]

    def compute(self, item: WorkItem) -> None:
        """Put those rows of an item into the store that no other process has put there
        meanwhile."""
        table = self.source.table(item.teacher, item.split)
        table.refresh()
        present_R = table.lookup(item.entries_R)[1]
        missing = int((~present_R).sum())
        if missing == 0:
            return
        self.make_room(item.teacher)
        began = time.perf_counter()
        self.source.submit(item.request(len(self.source.teachers))).result()
        spent_s = time.perf_counter() - began
        self.done += 1
        self.rows += missing
        name = self.source.teachers[item.teacher].name
        tell(f"{name}, {item.what}: {missing} rows in {spent_s:.1f} s")

    def make_room(self, n: int) -> None:
        """Unload teachers, in the order of loading, until there is room for teacher n."""
        models, teachers = self.source.models, self.source.teachers
        held = [one for one in models if one != n]
        while held and sum(teachers[one].bytes for one in (*held, n)) > self.room:
            del models[held.pop(0)]
