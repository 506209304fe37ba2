"""The pool client: it waits for the rows that pool workers put into the store.

Shapes: U unique examples of a split, M examples of one rank.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sead_dist.errors import RunError
from sead_dist.runtime.run_log import tell
from sead_dist.store.layout import Layout, aside
from sead_dist.store.store import Table, TeacherKey

# seconds between two looks at the store; the pause is doubled, up to the second value, while no row
# arrives
FIRST_PAUSE_S, MOST_PAUSE_S = 0.05, 2.0
# Most seconds that one pause adds to the silence: after a longer pause this process was suspended.
MOST_COUNTED_S = 30.0
SAY_EVERY_S = 30.0


@dataclass(frozen=True)
class Awaited:
    """The rows of a teacher that a request needs. touched_U: True for the examples that this run
    has requested up to now."""

    name: str
    table: Table
    entries_M: np.ndarray
    touched_U: np.ndarray

    def missing(self) -> int:
        return int((~self.table.lookup(self.entries_M)[1]).sum())

    def arrived(self) -> int:
        """A number that grows when rows of this teacher arrive, also rows of another split."""
        return int(self.table.present_U.sum()) + self.table.blocks_seen

    def ahead(self) -> int:
        """The number of rows in the store that the student has not requested yet."""
        return int((self.table.present_U & ~self.touched_U).sum())


class PoolClient:
    """Waits for rows of teachers in the pool. progress_or_stop: is called at each look, and may
    raise StopRequestedError."""

    def __init__(
        self,
        layout: Layout,
        silent_s: float,
        progress_or_stop: Callable[[str], None],
    ) -> None:
        self.layout, self.silent_s = layout, silent_s
        self.progress_or_stop = progress_or_stop
        self._said_at: dict[str, float] = {}

    def wait(self, awaited: Sequence[Awaited], what: str) -> None:
        """Return when all rows of the teachers in the pool are in the store.

        Raises RunError, naming a teacher, when no row of any teacher has arrived for `silent_s`
        seconds.
        """
        silent, arrived, pause = 0.0, -1, FIRST_PAUSE_S
        looked_at = time.monotonic()
        while lacking := [one for one in awaited if one.missing()]:
            for one in awaited:
                one.table.refresh()
            now, before = time.monotonic(), arrived
            silent += min(now - looked_at, MOST_COUNTED_S)
            looked_at, arrived = now, sum(one.arrived() for one in awaited)
            if arrived > before:
                silent, pause = 0.0, FIRST_PAUSE_S
                continue
            if silent > self.silent_s:
                raise RunError(self._timeout_line(lacking[0], what))
            short = f"{lacking[0].missing()} of {len(lacking[0].entries_M)} rows"
            line = (
                f"waiting for the pool: {short} of {what} are missing in the store "
                f"{self.layout.root} for teacher {lacking[0].name}"
            )
            self._tell_seldom("waiting", line)
            self.progress_or_stop(line)
            time.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE_S)

    def tell_ahead(self, awaited: Sequence[Awaited], what: str) -> None:
        """Give a line from time to time: how many rows the pool is ahead of the student."""
        ahead = [(one.ahead(), one.name) for one in awaited]
        (least, slow), (most, fast) = min(ahead), max(ahead)
        line = f"{what}: the pool is {least} rows ahead"
        self._tell_seldom("ahead", line if least == most else f"{line} ({slow}) to {most} ({fast})")

    def _tell_seldom(self, kind: str, line: str) -> None:
        """Give a line, at most one of this kind in SAY_EVERY_S seconds."""
        now = time.monotonic()
        if now - self._said_at.get(kind, -SAY_EVERY_S) >= SAY_EVERY_S:
            self._said_at[kind] = now
            tell(line)

    def _timeout_line(self, one: Awaited, what: str) -> str:
        others = other_classes(self.layout, one.table.key)
        hint = "check its workers, or start one: sead-dist teach, with the keys of this run"
        if others:
            facts = differing_facts(one.table.key.numerics, others[0])
            hint = (
                f"the store holds predictions of it in another numerics class ({facts}): start "
                "workers on a machine like this one, or read these with store.accept=any"
            )
        return (
            f"teacher {one.name}: nothing has come from the pool for {self.silent_s:g} s "
            f"(pool.timeout_s), and {one.missing()} of {len(one.entries_M)} rows of {what} are "
            f"missing in the store {self.layout.root}; {hint}; then give the same command again"
        )


def store_id(layout: Layout) -> str:
    """The id of this store. It is made once, and is the same under every path by which a machine
    reaches the store.

    Raises RunError where it cannot be written.
    """
    path = layout.root / "id"
    if not path.exists():
        with aside(layout, "id") as (file, keep):
            file.write(f"{uuid.uuid4().hex}\n".encode())
            file.flush()
            try:
                os.link(file.name, path)
            except FileExistsError:
                pass  # another process was first, and its id stays
            except OSError:
                keep(path)  # no hard links there: of two ids the last one stays
    return path.read_text(encoding="ascii").strip()


def other_classes(layout: Layout, key: TeacherKey) -> list[str]:
    """The other numerics classes in which the store holds predictions of this teacher."""
    found: list[str] = []
    for path in sorted(layout.values.glob(f"{key.fingerprint[:16]}-*/teacher.json")):
        try:
            numerics = str(json.loads(path.read_bytes())["numerics"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if numerics != key.numerics:
            found.append(numerics)
    return found


def differing_facts(here: str, there: str) -> str:
    """The facts in which two numerics classes (canonical JSON) differ, with both values."""
    own, other = json.loads(here), json.loads(there)
    return ", ".join(
        f"{fact} {other.get(fact)!r}, here {own.get(fact)!r}"
        for fact in sorted({*own, *other})
        if own.get(fact) != other.get(fact)
    )
