"""Compaction of a prediction store: one block for each teacher, task and split.

K ids of a key block. The merged block gets its name before its parts go, so that a kill between
leaves duplicates, which the next compaction removes.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sead_dist.store.block_reader import check_num_keys
from sead_dist.store.blocks import read_value_block
from sead_dist.store.ids import Bools, Ints
from sead_dist.store.inventory import Bad, alone, key_sizes, remove_unused_keys, scan, sizes
from sead_dist.store.key_blocks import read_key_block
from sead_dist.store.key_choice import Need, choose_keys
from sead_dist.store.layout import (
    BLOCK_SUFFIX,
    Layout,
    existing,
    old_temporaries,
    raise_format,
    set_aside,
)
from sead_dist.store.live import LiveRun, live_runs
from sead_dist.store.merging import Part, merge
from sead_dist.store.tensor_file import MAP_BYTES, BadBlockError


@dataclass(frozen=True)
class CompactResult:
    """bytes: value and key blocks.

    left_for_live: large parts that live runs may have mapped, left for the next time; differing:
    rows that were stored twice with different bits (invariant 3 says none).
    """

    blocks_before: int
    blocks_after: int
    bytes_before: int
    bytes_after: int
    left_for_live: int
    differing: int
    bad: tuple[Bad, ...]


def compact(folder: Path) -> CompactResult:
    """Merge what each teacher holds of a task and split into one block, and drop what nothing
    needs; may be killed at any point.

    Safe beside readers and writers. Raises UserError where `folder` is no store or another
    compaction or removal is at work, RunError where the disk is full.
    """
    layout = existing(folder)
    with alone(layout):
        blocks_before, bytes_before = _usage(layout)
        runs, stale = live_runs(layout)
        bad: list[Bad] = []
        left = differing = 0
        raise_format(layout)
        for _, folders in sorted(_groups(layout, bad).items()):
            parts_left, rows_differing = _compact_split(layout, folders, runs, bad)
            left, differing = left + parts_left, differing + rows_differing
        with layout.lock("store.lock", exclusive=True):
            remove_unused_keys(layout)
        for path in (*old_temporaries(layout), *stale):
            path.unlink(missing_ok=True)
        blocks_after, bytes_after = _usage(layout)
    return CompactResult(
        blocks_before=blocks_before,
        blocks_after=blocks_after,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        left_for_live=left,
        differing=differing,
        bad=tuple(bad),
    )


def _usage(layout: Layout) -> tuple[int, int]:
    blocks = sizes(layout.values.glob(f"*/*{BLOCK_SUFFIX}"))
    return len(blocks), sum(blocks.values()) + sum(key_sizes(layout).values())


def _put_aside(layout: Layout, bad: list[Bad], path: Path, reason: object) -> None:
    if path.exists():
        bad.append(Bad(path, str(reason), set_aside(layout, path) is not None))


def _groups(layout: Layout, bad: list[Bad]) -> dict[tuple[str, str], dict[str, list[Path]]]:
    """The blocks of each task and split, by teacher folder; unreadable ones go to quarantine/."""
    groups: dict[tuple[str, str], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, block in scan(layout, "header"):
        if isinstance(block, BadBlockError):
            _put_aside(layout, bad, path, block)
        else:
            groups[block.task, block.split][block.folder].append(path)
    return groups


@dataclass(frozen=True)
class _Teacher:
    """The sound parts of one teacher folder, and what they cover of each key block."""

    folder: str
    parts: list[Part]
    need: Need


def _compact_split(
    layout: Layout, folders: dict[str, list[Path]], runs: list[LiveRun], bad: list[Bad]
) -> tuple[int, int]:
    """Compact what all teachers hold of one task and split; how many parts were left, how many rows
    differed."""
    keys: dict[str, Ints] = {}
    found = (_look_at(layout, folder, paths, keys, bad) for folder, paths in folders.items())
    teachers = [teacher for teacher in found if teacher.parts]
    left = differing = 0
    chosen = choose_keys(layout, keys, [teacher.need for teacher in teachers])
    for teacher, key_hash in zip(teachers, chosen, strict=True):
        try:
            merged = merge(layout, teacher.parts, teacher.need.masks, key_hash, keys)
        except BadBlockError:
            continue  # altered or set aside since it was looked at: the next time
        differing += merged.differing
        held = any(run.holds(teacher.folder) for run in runs)
        for part in teacher.parts:
            if part.path == merged.path:
                continue
            # A file that is removed on another machine fails under a mapping, where the folder is
            # on a network file system; small blocks are read, never mapped.
            if held and part.about.num_bytes >= MAP_BYTES:
                left += 1
            else:
                part.path.unlink(missing_ok=True)
    return left, differing


def _look_at(
    layout: Layout, folder: str, paths: list[Path], keys: dict[str, Ints], bad: list[Bad]
) -> _Teacher:
    """What one teacher holds, checked; bad blocks go to quarantine/.

    The rows of a compacted block that is the only one are left alone.
    """
    parts: list[Part] = []
    masks: dict[str, Bools] = {}
    classes = 0
    for path in paths:
        try:
            block = read_value_block(path, "touched" if len(paths) == 1 else "all")
            if block.keys not in keys:
                keys[block.keys] = read_key_block(layout.key_path(block.keys))
            check_num_keys(block, len(keys[block.keys]))
        except FileNotFoundError:
            _put_aside(layout, bad, path, "its key block is missing")
            continue
        except BadBlockError as error:
            _put_aside(layout, bad, path, error)
            continue
        classes = block.logits.values_MC.shape[1]
        block.covers.add_to(masks.setdefault(block.keys, np.zeros(block.covers.num_keys, bool)))
        parts.append(Part.of(block))
    return _Teacher(folder, parts, Need(masks, classes))
