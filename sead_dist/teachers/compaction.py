"""Compaction of a prediction store: one block for each teacher, task and split.

K ids of the key block that a merged block uses, M rows of a part, C classes.
The merged block gets its name before its parts go, so that a kill between leaves duplicates, which
the next compaction merges into a file of the same name.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sead_dist.teachers.blocks import (
    MAP_BYTES,
    BadBlockError,
    Ints,
    ValueBlock,
    digest,
    positions,
    read_key_block,
    read_value_block,
    unique_ids,
    write_value_block,
)
from sead_dist.teachers.inventory import (
    Bad,
    Group,
    alone,
    group_of,
    key_sizes,
    remove_unused_keys,
    scan,
    sizes,
)
from sead_dist.teachers.layout import (
    BLOCK_SUFFIX,
    Layout,
    existing,
    live_runs,
    old_temporaries,
    set_aside,
)


@dataclass(frozen=True)
class CompactResult:
    """bytes: value and key blocks; unfinished: temporary files of dead writers.

    left_for_live: large parts that live runs may have mapped, left for the next time; differing:
    rows that were stored twice with different bits (invariant 3 says none).
    """

    blocks_before: int
    blocks_after: int
    bytes_before: int
    bytes_after: int
    key_blocks_removed: int
    unfinished_removed: int
    left_for_live: int
    differing: int
    bad: tuple[Bad, ...]


def compact(folder: Path) -> CompactResult:
    """Merge each group into one block and drop what nothing needs; may be killed at any point.

    Safe beside readers and writers. Raises UserError where `folder` is no store or another
    compaction or removal is at work, RunError where the disk is full.
    """
    layout = existing(folder)
    with alone(layout):
        blocks_before, bytes_before = _usage(layout)
        runs, stale = live_runs(layout)
        bad: list[Bad] = []
        left = differing = 0
        for group, paths in sorted(_groups(layout, bad).items()):
            held = any(run.holds(group[0]) for run in runs)
            merged = _merge_group(layout, paths, held, bad)
            left, differing = left + merged[0], differing + merged[1]
        with layout.lock("store.lock", exclusive=True):
            keys_removed = remove_unused_keys(layout)
        unfinished = old_temporaries(layout)
        for path in (*unfinished, *stale):
            path.unlink(missing_ok=True)
        blocks_after, bytes_after = _usage(layout)
    return CompactResult(
        blocks_before=blocks_before,
        blocks_after=blocks_after,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        key_blocks_removed=keys_removed,
        unfinished_removed=len(unfinished),
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


def _groups(layout: Layout, bad: list[Bad]) -> dict[Group, list[Path]]:
    """The sound blocks of each group; bad ones go to quarantine/."""
    groups: dict[Group, list[Path]] = {}
    for path, block in scan(layout, check=True):
        if isinstance(block, BadBlockError):
            _put_aside(layout, bad, path, block)
        else:
            groups.setdefault(group_of(block), []).append(path)
    return groups


def _merge_group(layout: Layout, paths: list[Path], held: bool, bad: list[Bad]) -> tuple[int, int]:
    """Merge the blocks of one group; how many parts were left, how many rows differed."""
    parts: list[ValueBlock] = []
    keys: dict[str, Ints] = {}
    for path in paths:
        try:
            part = read_value_block(path, check=False)
            if part.keys not in keys:
                keys[part.keys] = read_key_block(layout.key_path(part.keys))
            if len(keys[part.keys]) != part.num_keys:
                raise BadBlockError(f"{part.num_keys} keys, its key block has another number")
            parts.append(part)
        except FileNotFoundError:
            _put_aside(layout, bad, path, "its key block is missing")
        except BadBlockError as error:
            _put_aside(layout, bad, path, error)
    if len(parts) < 2:
        return 0, 0
    merged, ids_K2, differing = _merged(parts, keys)
    kept_path = write_value_block(layout, merged, ids_K2, set())
    left = 0
    for part in parts:
        assert part.path is not None
        if part.path == kept_path:
            continue
        # A file that is removed on another machine fails under a mapping, where the folder is on
        # a network file system; small blocks are read, never mapped.
        if held and part.num_bytes >= MAP_BYTES:
            left += 1
        else:
            part.path.unlink(missing_ok=True)
    return left, differing


def _merged(parts: list[ValueBlock], keys: dict[str, Ints]) -> tuple[ValueBlock, Ints, int]:
    """The block that holds every row of the parts once (first part by name wins), and its ids."""
    key_hash, ids_K2 = _common_keys(parts, keys)
    logits_KC = np.empty((len(ids_K2), parts[0].logits_MC.shape[1]), np.float32)
    present_K = np.zeros(len(ids_K2), bool)
    place_of = {
        other: positions(other_ids, ids_K2)
        for other, other_ids in keys.items()
        if other != key_hash
    }
    differing = 0
    for part in parts:
        place_M = np.arange(part.num_keys) if part.rows_M is None else part.rows_M
        if part.keys != key_hash:
            place_M = place_of[part.keys][place_M]
        again_M = present_K[place_M]
        differs = logits_KC[place_M[again_M]] != part.logits_MC[again_M]
        differing += int(differs.any(axis=1).sum())
        logits_KC[place_M[~again_M]] = part.logits_MC[~again_M]
        present_K[place_M] = True
    rows_M = None if present_K.all() else np.flatnonzero(present_K).astype(np.int32)
    newest = max(parts, key=lambda part: part.written_at)
    merged = replace(
        newest,
        keys=key_hash,
        num_keys=len(ids_K2),
        runs=tuple(sorted({run for part in parts for run in part.runs})),
        logits_MC=logits_KC if rows_M is None else logits_KC[rows_M],
        rows_M=rows_M,
    )
    return merged, ids_K2, differing


def _common_keys(parts: list[ValueBlock], keys: dict[str, Ints]) -> tuple[str, Ints]:
    """The smallest key block of the group that has every id of the parts, else one of just those.

    So teachers that hold the same examples end with the same key block, whatever their history.
    """
    if len(keys) == 1:
        return next(iter(keys.items()))
    held = [
        keys[part.keys] if part.rows_M is None else keys[part.keys][part.rows_M] for part in parts
    ]
    union_K2, _ = unique_ids(np.concatenate(held))
    for key_hash, ids_K2 in sorted(keys.items(), key=lambda item: len(item[1])):
        if len(ids_K2) >= len(union_K2) and (positions(union_K2, ids_K2) >= 0).all():
            return key_hash, ids_K2
    return digest("keys", union_K2), union_K2
