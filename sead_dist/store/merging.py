"""Merges the blocks of one teacher, task and split into one compacted block, part by part.

K ids of the block's key block, M rows of the block, P rows of a part, C classes. The block is
filled in a mapped file, so that the memory it takes is the page cache's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sead_dist.store.blocks import (
    ValueBlock,
    describe_teacher,
    metadata_of,
    read_value_block,
)
from sead_dist.store.coverage import Coverage
from sead_dist.store.ids import Bools, Integers, Ints, Places, positions
from sead_dist.store.layout import BLOCK_SUFFIX, Layout
from sead_dist.store.logits import Floats, Logits, chunk_rows, chunk_sums
from sead_dist.store.tensor_file import BadBlockError, mapped_tensors


@dataclass(frozen=True)
class Part:
    """A block that is to be merged, without its rows; about: what its header says."""

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
class Merged:
    """The block that holds every row of the parts; differing: rows that were stored twice with
    other bits."""

    path: Path
    differing: int


def merge(
    layout: Layout,
    parts: Sequence[Part],
    masks: Mapping[str, Bools],
    key_hash: str,
    keys: Mapping[str, Ints],
) -> Merged:
    """One block of the rows of all parts (the first part that has a row wins), on the ids of
    `key_hash`. masks: which ids of each key block the parts cover.

    Raises BadBlockError where a part was altered or removed meanwhile, and RunError where the block
    cannot be written; the parts are left as they are.
    """
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
            return Merged(part.path, _count_differing(part, parts, places))
    return _write(layout, parts, covers, key_hash, places)


def _pieces(part: Part, places: Mapping[str, Places]) -> Iterator[tuple[Places, Floats]]:
    """The rows of a part, piece by piece: their places in the new key block [P] and logits [P, C].

    Raises BadBlockError.
    """
    try:
        block = read_value_block(part.path, "touched")
    except FileNotFoundError:
        raise BadBlockError(f"{part.path.name} went while it was merged") from None
    start = 0
    for place_P in block.covers.pieces():
        rows = np.arange(start, start + len(place_P))
        start += len(place_P)
        if block.keys in places:
            place_P = places[block.keys][place_P]
        yield place_P, block.logits.take(rows)


def _count_differing(kept: Part, parts: Sequence[Part], places: Mapping[str, Places]) -> int:
    """How many rows of the other parts differ from those of the block that has them all."""
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
) -> Merged:
    newest = max((part.about for part in parts), key=lambda about: about.written_at)
    classes = newest.logits.values_MC.shape[1]
    num_sums = -(-covers.num_rows // chunk_rows(classes))
    # In this order every tensor begins at a multiple of its items' size.
    shapes = {name: (array.dtype, array.shape) for name, array in covers.tensors.items()}
    sizes = {
        **{name: shape for name, shape in shapes.items() if name == "words"},
        "sums": (np.dtype("<u8"), (num_sums,)),
        **{name: shape for name, shape in shapes.items() if name != "words"},
        "logits": (np.dtype("<f4"), (covers.num_rows, classes)),
    }
    block = replace(
        newest,
        keys=key_hash,
        runs=tuple(sorted({run for part in parts for run in part.about.runs})),
        covers=covers,
        logits=newest.logits.empty(),
        path=None,
    )
    with mapped_tensors(layout, "merged", sizes, metadata_of(block, "")) as (tensors, finish):
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
    return Merged(path, differing)


def _fill(
    logits_MC: Floats, parts: Sequence[Part], covers: Coverage, places: Mapping[str, Places]
) -> int:
    """Put the rows of the parts where they belong; how many came twice with other bits."""
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
