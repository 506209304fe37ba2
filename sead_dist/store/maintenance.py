"""What a person does with a prediction store: list, verify, compact, remove. Returns data only."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sead_dist.store.blocks import read_description
from sead_dist.store.compaction import CompactResult, compact
from sead_dist.store.inventory import Bad, Row, headers, key_sizes, rows_of, scan
from sead_dist.store.key_blocks import read_key_block
from sead_dist.store.layout import (
    BLOCK_SUFFIX,
    Layout,
    existing,
    old_temporaries,
    set_aside,
)
from sead_dist.store.live import LiveRun, live_runs
from sead_dist.store.removal import Removal, Removed, plan_removal, remove
from sead_dist.store.tensor_file import BadBlockError

__all__ = [
    "Bad",
    "CompactResult",
    "Listing",
    "LiveRun",
    "Removal",
    "Removed",
    "Row",
    "VerifyResult",
    "compact",
    "list_store",
    "plan_removal",
    "remove",
    "verify",
]


@dataclass(frozen=True)
class Listing:
    """What a store holds; quarantined: files set aside; live: the runs that use it now."""

    rows: tuple[Row, ...]
    num_key_blocks: int
    key_bytes: int
    value_bytes: int
    quarantined: int
    live: tuple[LiveRun, ...]


@dataclass(frozen=True)
class VerifyResult:
    """unfinished: temporary files of dead writers, harmless; compact removes them."""

    num_key_blocks: int
    num_value_blocks: int
    num_bytes: int
    bad: tuple[Bad, ...]
    unfinished: int

    @property
    def ok(self) -> bool:
        return not self.bad


def list_store(folder: Path) -> Listing:
    """What the store holds, read from headers; raises UserError where `folder` is no store."""
    layout = existing(folder)
    blocks = headers(layout)
    keys = key_sizes(layout)
    return Listing(
        rows=tuple(rows_of(layout, blocks)),
        num_key_blocks=len(keys),
        key_bytes=sum(keys.values()),
        value_bytes=sum(block.num_bytes for block in blocks),
        quarantined=len(os.listdir(layout.quarantine)) if layout.quarantine.is_dir() else 0,
        live=tuple(live_runs(layout)[0]),
    )


def verify(folder: Path, repair: bool = False) -> VerifyResult:
    """Check every file in full; `repair` moves bad ones to quarantine/, to be computed again.

    Raises UserError where `folder` is no store.
    """
    layout = existing(folder)
    bad: list[Bad] = []
    keys = _verify_keys(layout, bad, repair)
    num_blocks = num_bytes = 0
    for path, block in scan(layout, "all"):
        num_blocks += 1
        if isinstance(block, BadBlockError):
            _note(layout, bad, path, block, repair)
            continue
        num_bytes += block.num_bytes
        if block.keys not in keys:
            with suppress(BadBlockError, OSError):  # it may be newer than the look above
                keys[block.keys] = len(read_key_block(layout.key_path(block.keys)))
        if keys.get(block.keys) != block.covers.num_keys:
            _note(layout, bad, path, f"its key block {block.keys} is missing or bad", repair)
    _verify_descriptions(layout, bad, repair)
    num_bytes += sum(key_sizes(layout).values())
    unfinished = len(old_temporaries(layout))
    return VerifyResult(len(keys), num_blocks, num_bytes, tuple(bad), unfinished)


def _note(layout: Layout, bad: list[Bad], path: Path, reason: object, repair: bool) -> None:
    if path.exists():
        moved = repair and set_aside(layout, path) is not None
        bad.append(Bad(path, str(reason), moved))


def _verify_keys(layout: Layout, bad: list[Bad], repair: bool) -> dict[str, int]:
    """The number of ids of each sound key block, by its hash."""
    lengths: dict[str, int] = {}
    for path in sorted(layout.keys.glob(f"*{BLOCK_SUFFIX}")):
        try:
            lengths[path.name.removesuffix(BLOCK_SUFFIX)] = len(read_key_block(path))
        except FileNotFoundError:
            continue
        except (BadBlockError, OSError) as error:
            _note(layout, bad, path, error, repair)
    return lengths


def _verify_descriptions(layout: Layout, bad: list[Bad], repair: bool) -> None:
    for path in sorted(layout.values.glob("*/teacher.json")):
        try:
            read_description(path)
        except FileNotFoundError:
            continue
        except BadBlockError as error:
            _note(layout, bad, path, error, repair)
