"""The content of a prediction store: listed from headers, or verified.

K ids of a key block.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sead_dist.errors import UserError
from sead_dist.store.blocks import (
    Check,
    ValueBlock,
    read_description,
    read_value_block,
)
from sead_dist.store.ids import Bools, read_key_block, union
from sead_dist.store.layout import (
    BLOCK_SUFFIX,
    BusyError,
    Hold,
    Layout,
    existing,
    find_holds,
    old_temporaries,
    set_aside,
    unreadable,
    unwritable,
)
from sead_dist.store.tensor_file import BadBlockError

# the fewest digits of a fingerprint that name a teacher
MIN_PREFIX = 6


@dataclass(frozen=True)
class Row:
    """The predictions of one teacher for one task and split.

    num_rows: unique examples. num_bytes: of value blocks only, since key blocks are shared. newest:
    seconds since the epoch. folder: its name under values/.
    """

    teacher: str
    fingerprint: str
    numerics: str
    task: str
    split: str
    num_rows: int
    num_blocks: int
    num_bytes: int
    newest: float
    folder: str


@dataclass(frozen=True)
class Bad:
    """A bad file. moved: whether it was moved to quarantine/."""

    path: Path
    reason: str
    moved: bool


def note_bad(layout: Layout, bad: list[Bad], path: Path, reason: object, move: bool) -> None:
    """Add a file that is still there to `bad`. move: move it to quarantine/."""
    if path.exists():
        moved = move and set_aside(layout, path) is not None
        bad.append(Bad(path, str(reason), moved))


@contextmanager
def maintenance_lock(layout: Layout) -> Iterator[None]:
    """Only one compaction or removal runs at a time.

    Raises UserError where another one is running, and RunError where the store cannot be written.
    """
    try:
        with layout.lock("compact.lock", exclusive=True, wait=False):
            yield
    except BusyError:
        raise UserError(
            f"another compaction or removal is running in the prediction store {layout.root}; "
            "try again when it has ended"
        ) from None
    except OSError as error:
        raise unwritable(layout.root, error.filename or "maintenance", error) from error


def scan(layout: Layout, check: Check) -> Iterator[tuple[Path, ValueBlock | BadBlockError]]:
    """Every value block, or what is wrong with it. Files that vanish meanwhile are left out.

    Raises RunError for a file that this process may not read.
    """
    for path in sorted(layout.values.glob(f"*/*{BLOCK_SUFFIX}")):
        try:
            yield path, read_value_block(path, check)
        except FileNotFoundError:
            continue
        except BadBlockError as error:
            yield path, error
        except OSError as error:
            raise unreadable(path, error) from error


def headers(layout: Layout) -> list[ValueBlock]:
    """Every value block with a readable header, without its logits, which would fill the memory."""
    found = (block for _, block in scan(layout, "header") if isinstance(block, ValueBlock))
    return [
        replace(block, covers=block.covers.copy(), logits=block.logits.empty()) for block in found
    ]


def rows_of(layout: Layout, blocks: Iterable[ValueBlock]) -> list[Row]:
    """One row for each teacher folder, task and split, sorted by teacher name, task and split."""
    groups: dict[tuple[str, str, str], list[ValueBlock]] = defaultdict(list)
    for block in blocks:
        groups[block.folder, block.task, block.split].append(block)
    rows = [_row(layout, group) for group in groups.values()]
    return sorted(rows, key=lambda row: (row.teacher, row.folder, row.task, row.split))


def _row(layout: Layout, blocks: list[ValueBlock]) -> Row:
    newest = max(blocks, key=lambda block: block.written_at)
    return Row(
        teacher=newest.name,
        fingerprint=newest.teacher,
        numerics=newest.numerics,
        task=newest.task,
        split=newest.split,
        num_rows=_count_unique(layout, blocks),
        num_blocks=len(blocks),
        num_bytes=sum(block.num_bytes for block in blocks),
        newest=newest.written_at,
        folder=newest.folder,
    )


def _count_unique(layout: Layout, blocks: list[ValueBlock]) -> int:
    if len(blocks) == 1:
        return blocks[0].covers.num_rows
    masks: dict[tuple[str, int], Bools] = {}
    for block in blocks:
        num_keys = block.covers.num_keys
        block.covers.add_to(masks.setdefault((block.keys, num_keys), np.zeros(num_keys, bool)))
    if len(masks) == 1:
        return sum(int(np.count_nonzero(mask_K)) for mask_K in masks.values())
    parts = []
    for (key_hash, num_keys), mask_K in masks.items():
        with suppress(OSError, BadBlockError):  # `verify` reports it; here it counts nothing
            ids_K2 = read_key_block(layout.key_path(key_hash))
            if len(ids_K2) == num_keys:
                parts.append((ids_K2, mask_K))
    return sum(len(piece) for piece in union(parts)) if parts else 0


def sizes(paths: Iterable[Path]) -> dict[Path, int]:
    """Bytes of each file that is still there."""
    found: dict[Path, int] = {}
    for path in paths:
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_size
    return found


def key_sizes(layout: Layout) -> dict[str, int]:
    """Bytes of each key block, by its hash."""
    found = sizes(layout.keys.glob(f"*{BLOCK_SUFFIX}"))
    return {path.name.removesuffix(BLOCK_SUFFIX): size for path, size in found.items()}


def remove_unused_keys(layout: Layout) -> None:
    """Remove key blocks that no value block refers to. The caller holds store.lock exclusively."""
    used = {block.keys for block in headers(layout)}
    for key_hash in set(key_sizes(layout)) - used:
        layout.key_path(key_hash).unlink(missing_ok=True)


@dataclass(frozen=True)
class Listing:
    """The content of a store. quarantined: number of files set aside. holds: those of the runs
    that use it now."""

    rows: tuple[Row, ...]
    num_key_blocks: int
    key_bytes: int
    value_bytes: int
    quarantined: int
    holds: tuple[Hold, ...]


@dataclass(frozen=True)
class VerifyResult:
    """What a check found. unfinished: temporary files of dead writers; they are harmless, and
    `compact` removes them."""

    num_key_blocks: int
    num_value_blocks: int
    num_bytes: int
    bad: tuple[Bad, ...]
    unfinished: int

    @property
    def ok(self) -> bool:
        return not self.bad


def list_store(folder: Path) -> Listing:
    """The content of the store, read from headers. Raises UserError where `folder` is not a
    store."""
    layout = existing(folder)
    blocks = headers(layout)
    keys = key_sizes(layout)
    return Listing(
        rows=tuple(rows_of(layout, blocks)),
        num_key_blocks=len(keys),
        key_bytes=sum(keys.values()),
        value_bytes=sum(block.num_bytes for block in blocks),
        quarantined=len(os.listdir(layout.quarantine)) if layout.quarantine.is_dir() else 0,
        holds=tuple(find_holds(layout)[0]),
    )


def verify(folder: Path, repair: bool = False) -> VerifyResult:
    """Check every file in full. repair: move bad files to quarantine/, so that their rows are
    computed again.

    Raises UserError where `folder` is not a store.
    """
    layout = existing(folder)
    bad: list[Bad] = []
    keys = _verify_keys(layout, bad, repair)
    num_blocks = num_bytes = 0
    for path, block in scan(layout, "all"):
        num_blocks += 1
        if isinstance(block, BadBlockError):
            note_bad(layout, bad, path, block, repair)
            continue
        num_bytes += block.num_bytes
        if block.keys not in keys:
            with suppress(BadBlockError, OSError):  # it may be newer than the listing above
                keys[block.keys] = len(read_key_block(layout.key_path(block.keys)))
        if keys.get(block.keys) != block.covers.num_keys:
            note_bad(layout, bad, path, f"its key block {block.keys} is missing or bad", repair)
    _verify_descriptions(layout, bad, repair)
    num_bytes += sum(key_sizes(layout).values())
    unfinished = len(old_temporaries(layout))
    return VerifyResult(len(keys), num_blocks, num_bytes, tuple(bad), unfinished)


def _verify_keys(layout: Layout, bad: list[Bad], repair: bool) -> dict[str, int]:
    """The number of ids of each sound key block, by its hash."""
    lengths: dict[str, int] = {}
    for path in sorted(layout.keys.glob(f"*{BLOCK_SUFFIX}")):
        try:
            lengths[path.name.removesuffix(BLOCK_SUFFIX)] = len(read_key_block(path))
        except FileNotFoundError:
            continue
        except (BadBlockError, OSError) as error:
            note_bad(layout, bad, path, error, repair)
    return lengths


def _verify_descriptions(layout: Layout, bad: list[Bad], repair: bool) -> None:
    for path in sorted(layout.values.glob("*/teacher.json")):
        try:
            read_description(path)
        except FileNotFoundError:
            continue
        except BadBlockError as error:
            note_bad(layout, bad, path, error, repair)


def is_teacher(block: ValueBlock, wanted: str) -> bool:
    """Whether a block is of the teacher with this name, or with this start of a fingerprint."""
    prefix = len(wanted) >= MIN_PREFIX and block.teacher.startswith(wanted)
    return prefix or block.name == wanted
