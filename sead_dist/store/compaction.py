"""Compaction of a prediction store: one block for each teacher, task and split.

The merged block gets its name before its parts are removed. So a kill between the two leaves
duplicates, which the next compaction removes. The block is filled part by part in a mapped file, so
that only the page cache holds it in memory.

K ids of a key block, T teachers of a task and split, M rows of a merged block, P rows of a part, C
classes.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sead_dist.store.blocks import (
    ValueBlock,
    check_num_keys,
    describe_teacher,
    metadata_of,
    read_value_block,
)
from sead_dist.store.ids import (
    Bools,
    Integers,
    Ints,
    Places,
    positions,
    read_key_block,
    union,
    write_key_block,
)
from sead_dist.store.layout import (
    BLOCK_SUFFIX,
    Hold,
    Layout,
    existing,
    find_holds,
    old_temporaries,
    update_format,
)
from sead_dist.store.maintenance import (
    Bad,
    key_sizes,
    maintenance_lock,
    note_bad,
    remove_unused_keys,
    scan,
    sizes,
)
from sead_dist.store.rows import Coverage, Floats, Logits, chunk_rows, chunk_sums
from sead_dist.store.tensor_file import MAP_BYTES, BadBlockError, mapped_tensors

ID_BYTES = 16
# Key blocks that runs wrote are kept, since runs with the same examples then find every row in its
# place. They are replaced where the store is larger than this many times its smallest size.
SPARE = 1.2


@dataclass(frozen=True)
class Part:
    """A block that is to be merged, without its rows. about: the facts in its header."""

    path: Path
    about: ValueBlock
    num_rows: int
    compacted: bool

    @staticmethod
    def of(block: ValueBlock) -> "Part":
        assert block.path is not None
        about = replace(block, covers=Coverage(block.covers.num_keys), logits=block.logits.empty())
        return Part(block.path, about, block.covers.num_rows, block.compacted)


@dataclass(frozen=True)
class TeacherFolder:
    """The content of one teacher folder.

    parts: its sound blocks. masks: which ids of each key block they cover. classes: the width of
    its logits.
    """

    folder: str
    parts: list[Part]
    masks: Mapping[str, Bools]
    classes: int


@dataclass(frozen=True)
class CompactResult:
    """What a compaction did.

    blocks: value blocks. bytes: of value and key blocks. left_in_use: the number of large parts
    that are left for the next time, as runs that use the store may have mapped them. differing:
    rows that were stored twice with different bits (none, by invariant 3).
    """

    blocks_before: int
    blocks_after: int
    bytes_before: int
    bytes_after: int
    left_in_use: int
    differing: int
    bad: tuple[Bad, ...]


def compact(folder: Path) -> CompactResult:
    """Merge each teacher's blocks of a task and split into one, and remove what nothing needs.

    It may be killed at any point. It is safe while others read and write. Raises UserError where
    `folder` is not a store or another compaction or removal is running, and RunError where the disk
    is full.
    """
    layout = existing(folder)
    with maintenance_lock(layout):
        blocks_before, bytes_before = _usage(layout)
        holds, stale = find_holds(layout)
        bad: list[Bad] = []
        left = differing = 0
        update_format(layout)
        for _, folders in sorted(_groups(layout, bad).items()):
            parts_left, rows_differing = _compact_split(layout, folders, holds, bad)
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
        left_in_use=left,
        differing=differing,
        bad=tuple(bad),
    )


def _usage(layout: Layout) -> tuple[int, int]:
    blocks = sizes(layout.values.glob(f"*/*{BLOCK_SUFFIX}"))
    return len(blocks), sum(blocks.values()) + sum(key_sizes(layout).values())


def _groups(layout: Layout, bad: list[Bad]) -> dict[tuple[str, str], dict[str, list[Path]]]:
    """The blocks of each task and split, by teacher folder; unreadable ones go to quarantine/."""
    groups: dict[tuple[str, str], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, block in scan(layout, "header"):
        if isinstance(block, BadBlockError):
            note_bad(layout, bad, path, block, move=True)
        else:
            groups[block.task, block.split][block.folder].append(path)
    return groups


def _compact_split(
    layout: Layout, folders: dict[str, list[Path]], holds: list[Hold], bad: list[Bad]
) -> tuple[int, int]:
    """Compact the blocks of all teachers for one task and split. Returns how many parts were left
    and how many rows differed."""
    keys: dict[str, Ints] = {}
    found = (_read_folder(layout, folder, paths, keys, bad) for folder, paths in folders.items())
    teachers = [teacher for teacher in found if teacher.parts]
    left = differing = 0
    chosen = choose_keys(layout, keys, teachers)
    for teacher, key_hash in zip(teachers, chosen, strict=True):
        try:
            merged, rows_differing = merge(layout, teacher, key_hash, keys)
        except BadBlockError:
            continue  # altered or set aside meanwhile: left for the next time
        differing += rows_differing
        held = any(hold.covers(teacher.folder) for hold in holds)
        for part in teacher.parts:
            if part.path == merged:
                continue
            # On a network file system a mapping fails when another machine removes the file. Small
            # blocks are read and never mapped.
            if held and part.about.num_bytes >= MAP_BYTES:
                left += 1
            else:
                part.path.unlink(missing_ok=True)
    return left, differing


def _read_folder(
    layout: Layout, folder: str, paths: list[Path], keys: dict[str, Ints], bad: list[Bad]
) -> TeacherFolder:
    """The checked content of one teacher folder. Bad blocks go to quarantine/.

    The rows of a compacted block are not checked if it is the only block.
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
            note_bad(layout, bad, path, "its key block is missing", move=True)
            continue
        except BadBlockError as error:
            note_bad(layout, bad, path, error, move=True)
            continue
        classes = block.logits.values_MC.shape[1]
        block.covers.add_to(masks.setdefault(block.keys, np.zeros(block.covers.num_keys, bool)))
        parts.append(Part.of(block))
    return TeacherFolder(folder, parts, masks, classes)


def choose_keys(
    layout: Layout, keys: dict[str, Ints], teachers: Sequence[TeacherFolder]
) -> list[str]:
    """The hash of the key block for each teacher, [T]. New key blocks are written and put into
    `keys`.

    Raises RunError.
    """
    chosen = [_own_keys(layout, keys, teacher) for teacher in teachers]
    held: dict[str, Bools] = {}
    for teacher in teachers:
        for key_hash, mask_K in teacher.masks.items():
            held[key_hash] = held[key_hash] | mask_K if key_hash in held else mask_K
    num_ids = _count(keys, held)
    values = sum(4 * one.classes * _count(keys, one.masks) for one in teachers)
    now = values + sum(ID_BYTES * len(keys[key_hash]) for key_hash in set(chosen))
    if now <= SPARE * (values + ID_BYTES * num_ids):
        return chosen
    return [_write_union(layout, keys, held)] * len(teachers)


def _count(keys: Mapping[str, Ints], masks: Mapping[str, Bools]) -> int:
    """How many different ids the masks hold."""
    if len(masks) == 1:
        return sum(int(np.count_nonzero(mask_K)) for mask_K in masks.values())
    return sum(len(piece) for piece in union([(keys[key], mask) for key, mask in masks.items()]))


def _own_keys(layout: Layout, keys: dict[str, Ints], teacher: TeacherFolder) -> str:
    """The smallest key block of a teacher that has every id it holds; else a new one of those
    ids."""
    if len(teacher.masks) == 1:
        return next(iter(teacher.masks))
    for key_hash in sorted(teacher.masks, key=lambda key_hash: len(keys[key_hash])):
        others = [(keys[key], mask_K) for key, mask_K in teacher.masks.items() if key != key_hash]
        if all((positions(ids_K2[mask_K], keys[key_hash]) >= 0).all() for ids_K2, mask_K in others):
            return key_hash
    return _write_union(layout, keys, teacher.masks)


def _write_union(layout: Layout, keys: dict[str, Ints], masks: Mapping[str, Bools]) -> str:
    """Write the key block of the ids that the masks hold, and put it into `keys`. Returns its
    hash."""
    key_hash = write_key_block(layout, union([(keys[key], mask) for key, mask in masks.items()]))
    keys.setdefault(key_hash, read_key_block(layout.key_path(key_hash), check=False))
    return key_hash


def merge(
    layout: Layout, teacher: TeacherFolder, key_hash: str, keys: Mapping[str, Ints]
) -> tuple[Path, int]:
    """Merge all parts into one block on the ids of `key_hash`. Of a row in several parts the first
    is used. Returns its path, and how many rows were stored twice with other bits.

    Raises BadBlockError where a part was altered or removed meanwhile, and RunError where the block
    cannot be written. The parts stay as they are.
    """
    parts, masks = teacher.parts, teacher.masks
    places = {other: positions(keys[other], keys[key_hash]) for other in masks if other != key_hash}
    mask_K = np.zeros(len(keys[key_hash]), bool)
    for other, mask in masks.items():
        if other == key_hash:
            mask_K |= mask
        else:
            mask_K[places[other][mask]] = True
    covers = Coverage.of(mask_K)
    del mask_K
    for part in parts:
        if part.compacted and part.about.keys == key_hash and part.num_rows == covers.num_rows:
            return part.path, _count_differing(part, parts, places)
    return _write(layout, parts, covers, key_hash, places)


def _pieces(part: Part, places: Mapping[str, Places]) -> Iterator[tuple[Places, Floats]]:
    """The rows of a part, piece by piece: their places in the new key block [P] and logits [P, C].

    Raises BadBlockError.
    """
    try:
        block = read_value_block(part.path, "touched")
    except FileNotFoundError:
        raise BadBlockError(f"{part.path.name} was removed while it was merged") from None
    start = 0
    for place_P in block.covers.pieces():
        rows = np.arange(start, start + len(place_P))
        start += len(place_P)
        if block.keys in places:
            place_P = places[block.keys][place_P]
        yield place_P, block.logits.take(rows)


def _count_differing(kept: Part, parts: Sequence[Part], places: Mapping[str, Places]) -> int:
    """How many rows of the other parts differ from those in the block that has all rows."""
    block = read_value_block(kept.path, "touched")
    differing = 0
    for part in parts:
        if part is not kept:
            for place_P, logits_PC in _pieces(part, places):
                same_PC = block.logits.take(block.covers.rows_at(place_P)) == logits_PC
                differing += int((~same_PC).any(axis=1).sum())
    return differing


def _write(
    layout: Layout,
    parts: Sequence[Part],
    covers: Coverage,
    key_hash: str,
    places: Mapping[str, Places],
) -> tuple[Path, int]:
    newest = max((part.about for part in parts), key=lambda about: about.written_at)
    classes = newest.logits.values_MC.shape[1]
    shape_MC = (covers.num_rows, classes)
    num_sums = -(-covers.num_rows // chunk_rows(classes))
    block = replace(
        newest,
        keys=key_hash,
        runs=tuple(sorted({run for part in parts for run in part.about.runs})),
        covers=covers,
        # arrays of the final shape, without memory
        logits=Logits(
            np.broadcast_to(np.float32(0), shape_MC), np.broadcast_to(np.uint64(0), num_sums)
        ),
        path=None,
    )
    shapes = {name: (array.dtype, array.shape) for name, array in block.tensors.items()}
    with mapped_tensors(layout, "merged", shapes, metadata_of(block, "")) as (tensors, finish):
        for name, array in covers.tensors.items():
            tensors[name][:] = array
        logits_MC = tensors["logits"]
        differing = _fill(logits_MC, parts, covers, places)
        tensors["sums"][:] = chunk_sums(logits_MC)
        block = replace(block, logits=Logits(logits_MC, tensors["sums"]))
        content = block.content_hash
        path = layout.values / block.folder / (content + BLOCK_SUFFIX)
        with layout.lock("store.lock", exclusive=False):
            describe_teacher(layout, block)
            finish(path, metadata_of(block, content))
    return path, differing


def _fill(
    logits_MC: Floats, parts: Sequence[Part], covers: Coverage, places: Mapping[str, Places]
) -> int:
    """Put the rows of the parts in their places. Returns how many came twice with other bits."""
    written_M = np.zeros(len(logits_MC), bool)
    differing = 0
    for part in parts:
        for place_P, logits_PC in _pieces(part, places):
            row_P: Integers = covers.rows_at(place_P)
            again_P = written_M[row_P]
            if again_P.any():
                differs = logits_MC[row_P[again_P]] != logits_PC[again_P]
                differing += int(differs.any(axis=1).sum())
                row_P, logits_PC = row_P[~again_P], logits_PC[~again_P]
            logits_MC[row_P] = logits_PC
            written_M[row_P] = True
    return differing
