"""The heartbeat: ranks send each other signs of life and of progress. A run with a dead or hanging
rank ends, with a line that names the rank.

The signs go through the key-value store of the launcher's processes (a TCPStore), by a connection
of their own. They begin before the first collective and end after the last. A process group cannot
carry them: it may be broken, or a rank may wait in it. Each rank measures on its own monotonic
clock how long another rank's sign has not changed. Clocks of machines are never compared. (Our own
scheme.)
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from sead_dist.errors import LostRankError, RunError, UserError
from sead_dist.runtime.run_log import append_line

MOST_BEAT_S = 1.0
# Other ranks end so much later than the one that prints why: the launcher ends all ranks as soon as
# one has ended.
END_DELAY_S = 1.0
# the key of the line that says why the run ends, and its value until then
END_REASON, NONE_YET = "end reason", "none yet"
# the sign of a rank that has ended without an error
ENDED = "ended"


class StopRequestedError(Exception):
    """A stop was requested, so work that can be interrupted has ended. What it computed is kept."""


class Limits(Protocol):
    """timeout_s: after so many seconds without a sign of life a rank counts as dead.

    hang_timeout_s: after so many seconds in which no rank makes progress the run counts as hanging.
    """

    @property
    def timeout_s(self) -> float: ...
    @property
    def hang_timeout_s(self) -> float: ...


class Stop(Protocol):
    """Holds the signal of a stop."""

    signal: int | None


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def check(self, keys: list[str], /) -> bool: ...
    def has_extended_api(self) -> bool: ...


@dataclass(frozen=True)
class DefaultLimits:
    """The limits of a command without a configuration."""

    timeout_s: float = 120.0
    hang_timeout_s: float = 1800.0


@dataclass(frozen=True)
class Beat:
    """One sign of life. count: the number of the sign. moves: how many pieces of work the rank has
    done. place: how many of these are of the kind that every rank does in the same order. doing:
    what the rank is doing. stop: the signal to stop that it got, or None."""

    host: str
    pid: int
    count: int
    moves: int
    place: int
    doing: str
    stop: int | None


@dataclass
class Peer:
    """The last sign of another rank, and when it changed (monotonic seconds)."""

    beat: Beat | None
    changed_at: float
    moved_at: float
    ended: bool = False


class Heartbeat:
    """This rank's signs of life, and the check of the others'. Without a store it only counts.

    `run` and `stop` are those of the present run (`of_run`).
    """

    def __init__(self, rank: int, size: int, store: Store | None, limits: Limits) -> None:
        self.rank, self.size, self.store, self.limits = rank, size, store, limits
        self.run: Path | None = None
        self.stop: Stop | None = None
        self.count, self.moves, self.place, self.doing = 0, 0, 0, "starting"
        now = time.monotonic()
        others = [other for other in range(size) if other != rank]
        self.peers = {other: Peer(None, now, now) for other in others}
        self.moved_at = self.read_at = self.fetched_at = now
        # what the store held last, by key
        self.fetched: dict[str, str] = {}
        self.all_started = threading.Event()
        self.over = threading.Event()  # this rank's heartbeat has ended
        self.send_now = threading.Event()  # a sign is due at once
        self.threads: list[threading.Thread] = []
        # only the first thread that ends the process prints why
        self.ending = threading.Lock()

    @property
    def beat_s(self) -> float:
        return min(MOST_BEAT_S, self.limits.timeout_s / 10)

    def set_activity(self, doing: str) -> None:
        """Note what this rank is doing, without counting progress, and send that at once."""
        self.doing = doing
        self.send_now.set()

    def count_progress(self, doing: str) -> None:
        """Count progress that every rank makes in the same order. doing: what begins."""
        self.place += 1
        self._note(doing)

    def progress_or_stop(self, doing: str) -> None:
        """Count progress of work that this rank does alone, which a stop may interrupt.

        Raises StopRequestedError where there was a signal to stop.
        """
        self._note(doing)
        if self.stop is not None and self.stop.signal is not None:
            raise StopRequestedError

    def _note(self, doing: str) -> None:
        self.moves += 1
        self.doing = doing
        self.moved_at = time.monotonic()

    def own_beat(self) -> Beat:
        """This rank's sign, as it is now."""
        host, pid = socket.gethostname(), os.getpid()
        asked = None if self.stop is None else self.stop.signal
        return Beat(host, pid, self.count, self.moves, self.place, self.doing, asked)

    def beat(self) -> None:
        """Send a sign of life to the store."""
        assert self.store is not None
        if self.rank == 0 and self.count == 0:
            self.store.set(END_REASON, NONE_YET)
        self.count += 1
        self.store.set(str(self.rank), json.dumps(asdict(self.own_beat())))

    def fetch(self) -> None:
        """Fetch the last sign of every other rank."""
        assert self.store is not None
        keys = [END_REASON, *map(str, self.peers)]
        # `get` waits for a key that is not there yet
        keys = [key for key in keys if key in self.fetched or self.store.check([key])]
        if self.store.has_extended_api():
            found = self.store.multi_get(keys)
        else:
            found = [self.store.get(key) for key in keys]
        self.fetched.update((key, text.decode()) for key, text in zip(keys, found, strict=True))
        self.fetched_at = time.monotonic()
        if len(self.fetched) == self.size:
            self.all_started.set()

    def read_signs(self, now: float) -> None:
        """Use what was fetched: signs of life, the signal to stop of another rank, and the end
        of the run by another rank, which ends this process too."""
        if self.fetched.get(END_REASON, NONE_YET) != NONE_YET and not self.over.is_set():
            os._exit(3)
        if now - self.read_at > self.limits.timeout_s / 2:
            # this process was suspended, perhaps with all the others: measure from now on
            self.moved_at = self.fetched_at = now
            for peer in self.peers.values():
                peer.changed_at = peer.moved_at = now
        self.read_at = now
        for rank, peer in self.peers.items():
            text = self.fetched.get(str(rank))
            if text is None:
                continue
            if text == ENDED:
                peer.ended = True
                continue
            beat = Beat(**json.loads(text))
            if beat != peer.beat:
                peer.changed_at = now
                if peer.beat is None or beat.moves != peer.beat.moves:
                    peer.moved_at = now
                peer.beat, peer.ended = beat, False
            if beat.stop is not None and self.stop is not None and self.stop.signal is None:
                self.stop.signal = beat.stop

    def silent_ranks(self, now: float, silent_s: float) -> list[int]:
        """The ranks that have given no sign of life for `silent_s` seconds.

        Where rank 0 is silent and the store does not answer, only rank 0: it holds the store or is
        on its node.
        """
        silent = [
            rank
            for rank, peer in self.peers.items()
            if not peer.ended and now - peer.changed_at > silent_s
        ]
        return [0] if 0 in silent and now - self.fetched_at > silent_s else silent

    def end_reason(self, now: float) -> str | None:
        """Why this run cannot go on, or None."""
        silent_s, hang_s = self.limits.timeout_s, self.limits.hang_timeout_s
        dead = self.silent_ranks(now, silent_s)
        if dead:
            return self._end_line(dead[0], f"has given no sign of life for {silent_s:g} s", dead)
        at_work = [peer for peer in self.peers.values() if not peer.ended]
        moved_at = max([self.moved_at, *(peer.moved_at for peer in at_work)])
        # before a run and after it progress is not counted
        if self.run is not None and now - moved_at > hang_s:
            # the rank that is least far: the others wait for it
            places = {r: p.beat.place for r, p in self.peers.items() if p.beat and not p.ended}
            places[self.rank] = self.place
            first = min(places, key=lambda rank: places[rank])
            return self._end_line(first, f"hangs: no rank has made progress for {hang_s:g} s", [])
        return None

    def _end_line(self, rank: int, what: str, dead: list[int]) -> str:
        """The line that names a rank. dead: this rank and others of which the same holds; empty for
        a rank that is not dead."""
        beat = self.own_beat() if rank == self.rank else self.peers[rank].beat
        where = f" (process {beat.pid} on {beat.host})" if beat is not None else ""
        last = beat.doing if beat is not None else "not yet started"
        more, others = "", dead[1:]
        if others:
            ranks = "rank" if len(others) == 1 else "ranks"
            more = f"; the same holds for {ranks} {', '.join(map(str, others))}"
        saved = "" if self.run is None else "the last checkpoint is intact; "
        return (
            f"rank {rank}{where} {what}{more}; it was at: {last}; {saved}"
            "check that process and node, then give the same command again"
        )

    def end_if_rank_lost(self, error: RuntimeError) -> None:
        """End this process with a line where a collective broke because another rank is gone.

        error: that of the collective. Returns where all ranks still give signs of life.
        """
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        end = time.monotonic() + 8 * self.beat_s
        while self.threads and time.monotonic() < end:
            now = time.monotonic()
            self.read_signs(now)
            gone = [rank for rank, peer in self.peers.items() if peer.ended or self._vanished(peer)]
            gone = gone or self.silent_ranks(now, 5 * self.beat_s)
            if gone:
                self.end(self._end_line(gone[0], f"is gone ({reason[:120]})", gone), gone)
            time.sleep(self.beat_s / 4)

    def _vanished(self, peer: Peer) -> bool:
        """Whether the process of a rank on this machine has ended."""
        if peer.beat is None or peer.beat.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{peer.beat.pid}/stat").read_text(encoding="utf-8")
        except OSError:
            return Path("/proc/self").exists()
        return state.rpartition(")")[2].split()[0] in ("Z", "X")

    def end(self, line: str, gone: list[int]) -> None:
        """Print `line` on the lowest living rank, and end this process with exit code 3."""
        if not self.ending.acquire(blocking=False):
            time.sleep(END_DELAY_S + 2 * self.beat_s)  # another thread ends the process
        elif self.rank == min({self.rank, *self.peers} - set(gone)):
            print(f"sead-dist: {line}", file=sys.stderr, flush=True)
            if self.run is not None:
                with suppress(OSError, UserError):
                    append_line(self.run / "log.txt", line)
            # In a thread, because a store whose process is stopped does not return. Then the other
            # ranks end by what they measure themselves.
            sending = threading.Thread(target=self._send_end_reason, args=(line,), daemon=True)
            sending.start()
            sending.join(END_DELAY_S)
            time.sleep(2 * self.beat_s)
        else:
            time.sleep(END_DELAY_S)
        os._exit(3)

    def _send_end_reason(self, line: str) -> None:
        assert self.store is not None
        with suppress(RuntimeError):
            self.store.set(END_REASON, line)

    def start(self, wait_s: float) -> None:
        """Begin to send signs, wait until all ranks send them, and begin to check them.

        Raises RunError, naming the rank, where one does not start within `wait_s`, and where the
        store does not answer.
        """
        self.fetched_at = time.monotonic()
        end = self.fetched_at + wait_s
        self._begin(self._exchange)
        while not self.all_started.wait(0.1):
            now = time.monotonic()
            silent_s = self.limits.timeout_s
            started = {self.rank, *(rank for rank in self.peers if str(rank) in self.fetched)}
            if self.rank != 0 and now - self.fetched_at > silent_s:
                what = f"has given no sign of life for {silent_s:g} s; it was at: starting"
                raise self._lost(0, what, started)
            if now > end:
                first = min({*self.peers} - started)
                raise self._lost(first, f"has not started within {wait_s:g} s", started)
        now = time.monotonic()
        self.read_at = now
        self.read_signs(now)
        for peer in self.peers.values():
            peer.changed_at = peer.moved_at = now
        self._begin(self._watch)

    def _lost(self, rank: int, what: str, started: set[int]) -> RunError:
        """The error for a missing rank. The lowest rank that is there prints it."""
        self.over.set()
        line = f"rank {rank} {what}; check that process and node, then give the same command again"
        return LostRankError(line) if self.rank == min(started - {rank}) else RunError(line)

    def _begin(self, work: Callable[[], None]) -> None:
        self.threads.append(threading.Thread(target=work, name="heartbeat", daemon=True))
        self.threads[-1].start()

    def _exchange(self) -> None:
        """Send signs to the store and fetch them from it. This is a thread apart from `_watch`,
        because a store whose process is stopped does not return."""
        while not self.over.is_set():
            self.send_now.wait(self.beat_s if self.all_started.is_set() else 0.02)
            self.send_now.clear()
            with suppress(RuntimeError, ValueError):  # then no sign is fetched
                self.beat()
                self.fetch()

    def _watch(self) -> None:
        while not self.over.wait(self.beat_s):
            now = time.monotonic()
            self.read_signs(now)
            line = self.end_reason(now)
            if line is not None and not self.over.is_set():
                self.end(line, self.silent_ranks(now, self.limits.timeout_s))

    def finish(self) -> None:
        """End the heartbeat, and send the last sign, so that this rank does not count as dead."""
        if not self.threads or self.over.is_set():
            return
        self.over.set()
        self.send_now.set()
        for thread in self.threads:
            thread.join(2 * self.beat_s)
        if self.store is not None and not self.threads[0].is_alive():
            with suppress(RuntimeError):
                self.store.set(str(self.rank), ENDED)

    @contextmanager
    def of_run(self, run: Path, stop: Stop, limits: Limits) -> Iterator["Heartbeat"]:
        """Inside, a lack of progress counts too, and the signal to stop of one rank reaches
        all. Every rank enters it."""
        self.stop, self.limits = stop, limits
        self.moved_at = time.monotonic()
        self.run = run
        try:
            yield self
        finally:
            self.run, self.stop = None, None
