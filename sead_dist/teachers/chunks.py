"""The work of a pool in the student's order of use, cut into chunks: a teacher and a few examples.

Every worker of a run makes the same list. A (teacher, example) pair is in the first chunk that
needs it, and in no other of its split.

Shapes: N teachers, R examples of a chunk or window, U unique examples of a split.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sead_dist.data.order import BatchStream, Split
from sead_dist.store.store import TeacherKey
from sead_dist.store.tensor_file import digest
from sead_dist.teachers.base import Request


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows `entries_R` (ascending) of teacher number `teacher`; `what` names their place."""

    teacher: int
    split: Split
    entries_R: np.ndarray
    what: str

    def name(self, key: TeacherKey) -> str:
        """Of its content: equal on every machine, and for any run that needs the same rows."""
        return digest(key.fingerprint, key.numerics, self.split.ids_U2[self.entries_R])

    def request(self, teachers: int) -> Request:
        asked_NR = np.zeros((teachers, len(self.entries_R)), bool)
        asked_NR[self.teacher] = True
        return Request(self.split, self.entries_R, asked_NR, self.what)


def chunks_of_split(split: Split, teachers: int, rows: int) -> list[Chunk]:
    """All of a split, of every teacher."""
    entries_U = np.arange(len(split.ids_U2))
    what = split.examples.split
    return [
        Chunk(n, split, entries_U[start : start + rows], what)
        for start in range(0, len(entries_U), rows)
        for n in range(teachers)
    ]


def chunks_of_training(
    batches: BatchStream,
    teachers: int,
    rows: int,
    asked: Callable[[range, np.ndarray], np.ndarray | None],
) -> list[Chunk]:
    """The training rows, as the steps come to them; `asked` as in `stream`."""
    found: list[Chunk] = []
    due_NU = np.ones((teachers, len(batches.split.ids_U2)), bool)
    for steps in batches.windows(0, rows):
        if not due_NU.any():
            break  # later epochs read what the earlier ones needed
        entries_R = batches.entries(steps)
        asked_NR = asked(steps, entries_R)
        for n in range(teachers):
            new_R = due_NU[n, entries_R]
            if asked_NR is not None:
                new_R &= asked_NR[n]
            if new_R.any():
                # teachers that are asked the same share the array
                new = entries_R if new_R.all() else entries_R[new_R]
                due_NU[n, new] = False
                first, last = steps.start + 1, steps.stop
                what = f"steps {first}-{last}" if last > first else f"step {last}"
                found.append(Chunk(n, batches.split, new, what))
    return found
