"""Leases: which chunks of a pool's work are being computed now (STORE/claims/, one file each).

A lease is a file that is created exclusively and that its holder writes to several times in
`broken_s`. Whoever sees that it has not changed for so long, by the observer's own monotonic clock,
takes it away: times that other machines write down, in files or on them, are never looked at.
A lease only saves work. Two holders of one chunk write the same predictions. (Our own scheme.)
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sead_dist.errors import RunError
from sead_dist.store.layout import Layout, explain, unique_name

# the least and most seconds between a holder's signs of life, and how many it gives in broken_s
LEAST_BEAT_S, MOST_BEAT_S, BEATS = 0.02, 5.0, 10


class Lease:
    """A chunk that is ours; a thread says so for as long as the block lasts. taken_from: whose
    broken lease it was before, in words."""

    def __init__(self, path: Path, file: int, beat_s: float, taken_from: str | None) -> None:
        self.path, self._file, self._beat_s, self.taken_from = path, file, beat_s, taken_from
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="claim", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._file)):
                os.unlink(self.path)  # else somebody has taken it over
        os.close(self._file)

    def _go_on(self) -> None:
        beat = 0
        while not self._over.wait(self._beat_s):
            beat += 1
            # Through the open file: where the lease was taken away, nobody else's is written to.
            # On a full disk too, for the line keeps its length.
            with suppress(OSError):
                os.pwrite(self._file, f"{beat:012d}".encode(), 0)
                os.fsync(self._file)


@dataclass(frozen=True)
class Seen:
    """What a lease of another process held, and since when it has (our monotonic seconds)."""

    text: bytes
    since: float

    @property
    def holder(self) -> str:
        words = self.text.decode(errors="replace").split()
        return f"process {words[2]} on {words[1]}" if len(words) == 4 else "an unnamed process"


class Leases:
    """Takes leases in a store; remembers those of others that it has met."""

    def __init__(self, layout: Layout, broken_s: float) -> None:
        self.layout, self.broken_s = layout, broken_s
        self.beat_s = min(max(broken_s / BEATS, LEAST_BEAT_S), MOST_BEAT_S)
        self._seen: dict[str, Seen] = {}

    def take(self, name: str) -> Lease | None:
        """The lease on this chunk, or None while another process holds it. Raises RunError where
        none can be written."""
        path = self.layout.claims / name
        lease = self._create(path)
        if lease is None and self._is_broken(name, path):
            holder = f"{self._seen[name].holder}, silent for {self.broken_s:g} s"
            taken = self._take_away(name, path)
            if taken is not False:
                lease = self._create(path, holder if taken else None)
        return lease

    def clear(self, names: Sequence[str]) -> None:
        """Remove all leases on these chunks, which are done."""
        for name in {*names}.intersection(os.listdir(self.layout.claims)):
            with suppress(OSError):
                os.unlink(self.layout.claims / name)

    def _create(self, path: Path, taken_from: str | None = None) -> Lease | None:
        text = f"{0:012d} {socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}\n"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        except OSError as error:
            raise RunError(explain(self.layout.root, f"claims/{path.name}", error)) from error
        try:
            os.write(file, text.encode())
            os.fsync(file)
        except OSError as error:
            os.close(file)
            with suppress(OSError):
                os.unlink(path)
            raise RunError(explain(self.layout.root, f"claims/{path.name}", error)) from error
        return Lease(path, file, self.beat_s, taken_from)

    def _is_broken(self, name: str, path: Path) -> bool:
        """Whether a lease has not changed for too long since we have known it."""
        text, now = _text(path), time.monotonic()
        known = self._seen.get(name)
        if known is None or known.text != text:
            self._seen[name] = Seen(text, now)
            return False
        return now - known.since > self.broken_s

    def _take_away(self, name: str, path: Path) -> bool | None:
        """Remove a broken lease; False where it turns out to be another, live one, None where
        somebody else has removed it."""
        aside = self.layout.tmp / unique_name(name)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(explain(self.layout.root, f"claims/{name}", error)) from error
        broken = _text(aside) == self._seen.pop(name).text
        if not broken:  # a third process was quicker, and has a lease of its own by now
            with suppress(OSError):  # a fourth has one there already, or there are no second names
                os.link(aside, path)
        with suppress(OSError):
            os.unlink(aside)
        return broken


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
