"""The heartbeat: ranks tell each other that they live and move, and a run with a dead or hanging
rank ends, naming it.

RUN/.ranks/rank-K.json is rank K's sign of life, written aside and renamed several times in
`timeout_s`. It goes by files because a process group that is broken cannot carry the news, and
because ranks of several machines share the run folder. An observer counts on its own monotonic
clock how long a file has not changed: clocks of machines are never compared. (Our own scheme.)
"""

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from sead_dist.errors import UserError
from sead_dist.runtime.distributed import StopFlag, StopRequestedError, World, from_main
from sead_dist.runtime.run_log import append_line

FOLDER = ".ranks"
MOST_BEAT_S = 1.0
# rank 0's line comes before the launcher ends everyone because another rank has ended
LAST_WORDS_S = 1.0


class Limits(Protocol):
    """After how many seconds without a sign of life, and without progress, a rank is given up."""

    @property
    def timeout_s(self) -> float: ...
    @property
    def hang_timeout_s(self) -> float: ...


@dataclass(frozen=True)
class Beat:
    """One sign of life. moves: pieces of work that the rank has come further, counted; place: those
    that every rank makes in the same order; doing: what it is at; stop: the signal that asked it
    to stop."""

    host: str
    pid: int
    count: int
    moves: int
    place: int
    doing: str
    stop: int | None


@dataclass
class Peer:
    """What this rank saw last of another one, and when that changed (monotonic seconds)."""

    beat: Beat | None
    changed_at: float
    moved_at: float
    ended: bool = False


class Heartbeat:
    """This rank's signs of life, and its eye on the others; in a world of one it only counts."""

    def __init__(self, run: Path, world: World, stop: StopFlag, limits: Limits) -> None:
        self.run, self.world, self.stop, self.limits = run, world, stop, limits
        self.beat_s = min(MOST_BEAT_S, limits.timeout_s / 10)
        self.count, self.moves, self.place, self.doing = 0, 0, 0, "starting"
        now = time.monotonic()
        others = [rank for rank in range(world.size) if rank != world.rank]
        self.peers = {rank: Peer(None, now, now) for rank in others}
        self.moved_at = self.looked_at = now

    def path(self, rank: int) -> Path:
        return self.run / FOLDER / f"rank-{rank}.json"

    def move(self, doing: str) -> None:
        """This rank is at `doing` now; every rank comes to it in its turn."""
        self.place += 1
        self._note(doing)

    def progress_or_stop(self, doing: str) -> None:
        """This rank has come further with work of its own, where a stop may be taken at once.

        Raises StopRequestedError.
        """
        self._note(doing)
        if self.stop.signal is not None:
            raise StopRequestedError

    def _note(self, doing: str) -> None:
        self.moves += 1
        self.doing = doing
        self.moved_at = time.monotonic()

    def own(self) -> Beat:
        host, pid, asked = socket.gethostname(), os.getpid(), self.stop.signal
        return Beat(host, pid, self.count, self.moves, self.place, self.doing, asked)

    def beat(self) -> None:
        """Give a sign of life. Where it cannot be written, the others will take this rank for dead:
        it could not save either."""
        self.count += 1
        path = self.path(self.world.rank)
        aside = path.with_suffix(".aside")
        with suppress(OSError):
            aside.write_text(json.dumps(asdict(self.own())), encoding="utf-8")
            os.replace(aside, path)

    def look(self, now: float) -> None:
        """Read the others' signs of life, and hear of a stop that was asked of one of them."""
        if now - self.looked_at > self.limits.timeout_s / 2:
            # this process was itself suspended, perhaps with all the others: count again
            self.moved_at = now
            for peer in self.peers.values():
                peer.changed_at = peer.moved_at = now
        self.looked_at = now
        for rank, peer in self.peers.items():
            try:
                beat = Beat(**json.loads(self.path(rank).read_text(encoding="utf-8")))
            except FileNotFoundError:
                peer.ended = peer.beat is not None
                continue
            except (OSError, ValueError, TypeError):
                continue
            if beat != peer.beat:
                peer.changed_at = now
                if peer.beat is None or beat.moves != peer.beat.moves:
                    peer.moved_at = now
                peer.beat, peer.ended = beat, False
            if beat.stop is not None and self.stop.signal is None:
                self.stop.signal = beat.stop

    def dead(self, now: float, silent_s: float) -> list[int]:
        """The ranks that have given no sign of life for so long."""
        return [
            rank
            for rank, peer in self.peers.items()
            if not peer.ended and now - peer.changed_at > silent_s
        ]

    def verdict(self, now: float) -> str | None:
        """Why this run cannot go on, or None."""
        silent_s, hang_s = self.limits.timeout_s, self.limits.hang_timeout_s
        dead = self.dead(now, silent_s)
        if dead:
            return self._end_line(dead[0], f"has given no sign of life for {silent_s:g} s", dead)
        at_work = [peer for peer in self.peers.values() if not peer.ended]
        if now - max([self.moved_at, *(peer.moved_at for peer in at_work)]) > hang_s:
            # the others went on until they had to wait for it
            places = {r: p.beat.place for r, p in self.peers.items() if p.beat and not p.ended}
            places[self.world.rank] = self.place
            first = min(places, key=lambda rank: places[rank])
            return self._end_line(first, f"hangs: no rank has moved for {hang_s:g} s", [])
        return None

    def _end_line(self, rank: int, what: str, dead: list[int]) -> str:
        beat = self.own() if rank == self.world.rank else self.peers[rank].beat
        where = f" (process {beat.pid} on {beat.host})" if beat is not None else ""
        last = beat.doing if beat is not None else "not yet started"
        more = f"; so have ranks {', '.join(map(str, dead[1:]))}" if len(dead) > 1 else ""
        return (
            f"rank {rank}{where} {what}{more}; it was at: {last}; the last checkpoint is intact: "
            "see to that process or node, then give the same command again"
        )

    def explain(self, error: RuntimeError) -> None:
        """Called when a collective broke: end the run if that is because a rank is gone."""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        end = time.monotonic() + 8 * self.beat_s
        while self.peers and time.monotonic() < end:
            now = time.monotonic()
            self.look(now)
            gone = [rank for rank, peer in self.peers.items() if peer.ended or self._vanished(peer)]
            gone = gone or self.dead(now, 5 * self.beat_s)
            if gone:
                self.end(self._end_line(gone[0], f"is gone ({reason[:120]})", gone), gone)
            time.sleep(self.beat_s / 4)

    def _vanished(self, peer: Peer) -> bool:
        """Whether a process of this machine is no more."""
        if peer.beat is None or peer.beat.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{peer.beat.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return Path("/proc/self").exists()
        return state.rpartition(")")[2].split()[0] in ("Z", "X")

    def end(self, line: str, gone: list[int]) -> None:
        """Say why, on the lowest rank that lives, and end this process with exit code 3."""
        lowest = min({self.world.rank, *self.peers} - set(gone))
        said = self.run / FOLDER / "verdict.txt"
        if self.world.rank == lowest and not said.exists():
            with suppress(OSError):  # a rank that ends because of this one has nothing to add
                said.write_text(line, encoding="utf-8")
            print(f"sead-dist: {line}", file=sys.stderr, flush=True)
            with suppress(OSError, UserError):
                append_line(self.run / "log.txt", line)
        else:
            time.sleep(LAST_WORDS_S)
        os._exit(3)

    def watch_peers(self, over: threading.Event) -> None:
        """Beat and look until `over`."""
        while not over.wait(self.beat_s):
            now = time.monotonic()
            self.beat()
            self.look(now)
            line = self.verdict(now)
            if line is not None and not over.is_set():
                self.end(line, self.dead(now, self.limits.timeout_s))


@contextmanager
def running_heartbeat(
    run: Path, world: World, stop: StopFlag, limits: Limits
) -> Iterator[Heartbeat]:
    """The watch of this rank over a run, for as long as the block lasts. Every rank enters it."""
    heartbeat = Heartbeat(run, world, stop, limits)
    if world.size == 1:
        yield heartbeat
        return
    from_main(world, lambda: clear(run / FOLDER))
    over = threading.Event()
    thread = threading.Thread(target=heartbeat.watch_peers, args=(over,), name="watch", daemon=True)
    heartbeat.beat()
    thread.start()
    try:
        yield heartbeat
    finally:
        over.set()
        thread.join()
        heartbeat.path(world.rank).unlink(missing_ok=True)
        with suppress(OSError):  # the last one removes it
            heartbeat.path(world.rank).parent.rmdir()


def clear(folder: Path) -> None:
    """An empty folder in the place of what a killed run left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
