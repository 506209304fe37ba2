"""A worker of the pool: takes chunk after chunk, whichever is open, until all are in the store."""

import time
from collections.abc import Callable, Sequence

from sead_dist.teachers.chunks import Chunk
from sead_dist.teachers.leases import Lease, Leases
from sead_dist.teachers.placement import TEACHER_SHARE, free_bytes
from sead_dist.teachers.source import StoredSource

# seconds between two looks while all that is left is others' work
MOST_PAUSE_S = 1.0


class Worker:
    """Worker `number` (from 1) of `workers`; their number only decides where each begins to look.

    source: computes in this process. check: called before every chunk; False where the work is no
    longer needed; may raise UserError and StopRequestedError. say: takes a line for each chunk.
    """

    def __init__(
        self,
        source: StoredSource,
        leases: Leases,
        number: int,
        workers: int,
        check: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self.source, self.claims, self.check, self.say = source, leases, check, say
        # where in the list the first chunk is looked for; from then on the oldest comes first
        self.turn = number - 1
        # how far from the front of the list a chunk may be preferred to those before it
        self.front = 2 * max(workers, len(source.teachers))
        self.room = int(TEACHER_SHARE * free_bytes(source.world.device))
        self.done = 0
        # computed since this process started
        self.rows = 0

    def fill(self, chunks: Sequence[Chunk]) -> bool:
        """Return True when all of the chunks are in the store, False where `check` ended it."""
        left = list(chunks)
        while left:
            if not self.check():
                return False
            taken = self.take(left)
            if taken is None:
                # others have all that is left: to see what they finish, or who dies
                self.drop_finished(left)
                time.sleep(min(self.claims.broken_s / 10, MOST_PAUSE_S))
                continue
            chunk, lease = taken
            with lease:
                self.compute(chunk)
            left.remove(chunk)
        # a worker killed between its block and its lease has left the lease
        self.claims.clear([self.name(chunk) for chunk in chunks])
        return True

    def take(self, left: list[Chunk]) -> tuple[Chunk, Lease] | None:
        """The first open chunk, the very first time from this worker's place in the front of the
        list. Where not all teachers fit into memory, those that are loaded come before others in
        the front. Chunks that are in the store leave the list."""
        front = left[: self.front]
        turn = self.turn % len(front)
        front = front[turn:] + front[:turn]
        if sum(teacher.bytes for teacher in self.source.teachers) > self.room:
            front.sort(key=lambda chunk: chunk.teacher not in self.source.models)
        for chunk in (*front, *left[self.front :]):
            if self.is_finished(chunk):
                left.remove(chunk)
                continue
            lease = self.claims.take(self.name(chunk))
            if lease is not None:
                self.turn = 0
                if lease.taken_from is not None:
                    name = self.source.teachers[chunk.teacher].name
                    self.say(f"{name}, {chunk.what}: taken over from {lease.taken_from}")
                return chunk, lease
        return None

    def name(self, chunk: Chunk) -> str:
        return chunk.name(self.source.teachers[chunk.teacher].key)

    def is_finished(self, chunk: Chunk) -> bool:
        """Whether all of its rows were in the store when this process last looked."""
        table = self.source.table(chunk.teacher, chunk.split)
        return bool(table.lookup(chunk.entries_R)[1].all())

    def drop_finished(self, left: list[Chunk]) -> None:
        """Look into the store again, and take from the list what is there."""
        for table in {self.source.table(chunk.teacher, chunk.split) for chunk in left}:
            table.refresh()
        left[:] = [chunk for chunk in left if not self.is_finished(chunk)]

    def compute(self, chunk: Chunk) -> None:
        """Bring the chunk's rows into the store: those that nobody else has brought meanwhile."""
        table = self.source.table(chunk.teacher, chunk.split)
        table.refresh()
        present_R = table.lookup(chunk.entries_R)[1]
        missing = int((~present_R).sum())
        if missing == 0:
            return
        self.make_room(chunk.teacher)
        began = time.perf_counter()
        self.source.submit(chunk.request(len(self.source.teachers))).result()
        spent_s = time.perf_counter() - began
        self.done += 1
        self.rows += missing
        name = self.source.teachers[chunk.teacher].name
        self.say(f"{name}, {chunk.what}: {missing} rows in {spent_s:.1f} s")

    def make_room(self, n: int) -> None:
        """Let go of teachers, those loaded first, while there is no room for teacher n."""
        models, teachers = self.source.models, self.source.teachers
        held = [one for one in models if one != n]
        while held and sum(teachers[one].bytes for one in (*held, n)) > self.room:
            del models[held.pop(0)]
