"""Removal from a prediction store by teacher, task, age and size: first a plan, then its
execution."""

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sead_dist.config.names import did_you_mean
from sead_dist.errors import UserError
from sead_dist.store.blocks import ValueBlock
from sead_dist.store.layout import BLOCK_SUFFIX, Hold, Layout, existing, find_holds
from sead_dist.store.maintenance import (
    Row,
    headers,
    is_teacher,
    key_sizes,
    maintenance_lock,
    remove_unused_keys,
    rows_of,
)


@dataclass(frozen=True)
class Removal:
    """A plan: what would be removed (rows, paths), and what was chosen but is kept, with the hold
    of a run that uses it.

    num_bytes: freed, with key blocks that nothing needs any more.
    """

    root: Path
    rows: tuple[Row, ...]
    paths: tuple[Path, ...]
    num_bytes: int
    kept: tuple[tuple[Row, Hold], ...]


@dataclass(frozen=True)
class Removed:
    """What was removed.

    kept: blocks that a run began to use after the plan was made. changed: planned blocks that were
    gone already, perhaps merged into another by a compaction; a new plan finds them.
    """

    num_blocks: int
    num_bytes: int
    kept: int
    changed: int


def plan_removal(
    folder: Path,
    *,
    teacher: str | None = None,
    task: str | None = None,
    older_than_s: float | None = None,
    keep_bytes: int | None = None,
) -> Removal:
    """Choose the blocks that meet every given condition. Removes nothing.

    teacher: its name as a run gave it, or the first digits (6 or more) of its fingerprint.
    older_than_s: seconds since it was written (a merged block counts as its newest part).
    keep_bytes: the oldest first, and only until the store is no larger than this. Raises UserError
    where no condition is given, or a teacher or task is not in the store.
    """
    if teacher is None and task is None and older_than_s is None and keep_bytes is None:
        raise UserError(
            "no condition for what to remove; give --teacher, --task, --older-than or --keep"
        )
    layout = existing(folder)
    blocks = headers(layout)
    tasks = {block.task for block in blocks}
    known = any(is_teacher(block, teacher) for block in blocks) if teacher else False
    check_known("teacher", teacher, known, {block.name for block in blocks})
    check_known("task", task, task in tasks, tasks)
    limit = time.time() - (older_than_s or 0.0)
    chosen = [
        block
        for block in sorted(blocks, key=lambda block: block.written_at)
        if (teacher is None or is_teacher(block, teacher))
        and (task is None or block.task == task)
        and (older_than_s is None or block.written_at < limit)
    ]
    holds, _ = find_holds(layout)
    holder = {one.folder: hold for one in chosen for hold in holds if hold.covers(one.folder)}
    free = [block for block in chosen if block.folder not in holder]
    kept = [block for block in chosen if block.folder in holder]
    going, num_bytes = _until_small(layout, blocks, free, keep_bytes)
    if keep_bytes is not None and len(going) < len(free):
        kept = []  # small enough without them
    return Removal(
        root=layout.root,
        rows=tuple(rows_of(layout, going)),
        paths=tuple(block.path for block in going if block.path is not None),
        num_bytes=num_bytes,
        kept=tuple((row, holder[row.folder]) for row in rows_of(layout, kept)),
    )


def check_known(kind: str, wanted: str | None, found: bool, known: set[str]) -> None:
    """Raises UserError for a requested teacher or task that was not found."""
    if wanted is not None and not found:
        held = ", ".join(sorted(known)) or "nothing"
        hint = did_you_mean(wanted, sorted(known), f"it holds {held}")
        raise UserError(f"no {kind} {wanted!r} is in the store; {hint}")


def _until_small(
    layout: Layout, blocks: list[ValueBlock], free: list[ValueBlock], keep_bytes: int | None
) -> tuple[list[ValueBlock], int]:
    """(the first blocks of `free` whose removal leaves at most keep_bytes (None: all of `free`),
    the bytes that they free)."""
    key_bytes = key_sizes(layout)
    users = Counter(block.keys for block in blocks)
    total = sum(key_bytes.values()) + sum(block.num_bytes for block in blocks)
    going: list[ValueBlock] = []
    freed = 0
    for block in free:
        if keep_bytes is not None and total - freed <= keep_bytes:
            break
        going.append(block)
        freed += block.num_bytes
        users[block.keys] -= 1
        if not users[block.keys]:
            freed += key_bytes.get(block.keys, 0)
    return going, freed


def remove(plan: Removal) -> Removed:
    """Execute a plan. Blocks that a run has begun to use since are kept.

    Raises UserError where a compaction or another removal is running.
    """
    layout = existing(plan.root)
    kept = changed = num_blocks = num_bytes = 0
    with maintenance_lock(layout), layout.lock("store.lock", exclusive=True):
        before = sum(key_sizes(layout).values())
        holds, _ = find_holds(layout)
        for path in plan.paths:
            if any(hold.covers(path.parent.name) for hold in holds):
                kept += 1
                continue
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                changed += 1
                continue
            num_blocks += 1
            num_bytes += size
        remove_unused_keys(layout)
        num_bytes += before - sum(key_sizes(layout).values())
        for folder in {path.parent for path in plan.paths}:
            if not list(folder.glob(f"*{BLOCK_SUFFIX}")):
                (folder / "teacher.json").unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()
    return Removed(num_blocks, num_bytes, kept, changed)
