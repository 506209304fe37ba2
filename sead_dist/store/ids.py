"""Sets of example ids: sorted and unique rows of two int64, ordered by the first word, then the
second.

A ids that are looked for, B ids of a set, K ids of one of several sets, P ids that two sets share.
Ids are hashes, so first words are spread evenly. Whole sets are processed in pieces. So a hundred
million ids need little more memory than the ids themselves and one piece.

A key block is a file of the sorted unique ids [K, 2] of one example set. It is named by the hash of
the ids. A key block whose content does not give its name is bad.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sead_dist.store.layout import BLOCK_SUFFIX, Layout, aside, set_aside
from sead_dist.store.tensor_file import (
    MAP_BYTES,
    BadBlockError,
    as_bytes,
    digest,
    header_of,
    read_tensors,
    write_tensors,
)

Ints = npt.NDArray[np.int64]
Places = npt.NDArray[np.int32]
Integers = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]

PIECE = 1 << 20


def positions(needles_A2: Ints, sorted_B2: Ints) -> Places:
    """The place of each id in `sorted_B2`, [A]; -1 where it is not in it.

    The ids may have any order. Sorted ones are found ten times faster.
    """
    place_A = np.full(len(needles_A2), -1, np.int32)
    if len(sorted_B2):
        for start in range(0, len(needles_A2), PIECE):
            piece = slice(start, start + PIECE)
            place_A[piece] = _find(needles_A2[piece], sorted_B2)
    return place_A


def _find(needles_A2: Ints, sorted_B2: Ints) -> Ints:
    needle_A, second_A = np.ascontiguousarray(needles_A2.T)
    low = int(np.searchsorted(sorted_B2[:, 0], needle_A.min(), "left"))
    high = int(np.searchsorted(sorted_B2[:, 0], needle_A.max(), "right"))
    if low == high:
        return np.full(len(needle_A), -1)
    near_B2 = sorted_B2[low:high]
    place_A = np.searchsorted(near_B2[:, 0], needle_A, "left")
    while True:
        at_A = np.minimum(place_A, len(near_B2) - 1)
        same_A = (place_A < len(near_B2)) & (near_B2[at_A, 0] == needle_A)
        # Of ids with the same first word (rare: it is a hash) the second word counts.
        behind_A = same_A & (near_B2[at_A, 1] < second_A)
        if not behind_A.any():
            break
        place_A += behind_A
    found_A = same_A & (near_B2[at_A, 1] == second_A)
    return np.where(found_A, place_A + low, -1)


def common(ids_A2: Ints, ids_B2: Ints) -> tuple[Places, Places]:
    """The ids that two sets share: their places in the first [P] and in the second [P],
    increasing."""
    if len(ids_A2) > len(ids_B2):
        in_B, in_A = common(ids_B2, ids_A2)
        return in_A, in_B
    place_A = positions(ids_A2, ids_B2)
    in_A = np.flatnonzero(place_A >= 0).astype(np.int32)
    return in_A, place_A[in_A]


def is_sorted_unique(ids_B2: Ints) -> bool:
    """Whether the ids increase strictly."""
    for start in range(0, len(ids_B2) - 1, PIECE):
        before, after = ids_B2[start : start + PIECE + 1][:-1], ids_B2[start + 1 :][:PIECE]
        ties = np.flatnonzero(after[:, 0] <= before[:, 0])
        same = after[ties, 0] == before[ties, 0]
        if not (same & (after[ties, 1] > before[ties, 1])).all():
            return False
    return True


def unique_ids(ids_B2: Ints) -> tuple[Ints, Ints]:
    """The sorted unique ids [U, 2], and for each given id its place among them [B]."""
    order = np.lexsort((ids_B2[:, 1], ids_B2[:, 0]))
    sorted_B2 = ids_B2[order]
    new_B = np.ones(len(order), bool)
    new_B[1:] = (sorted_B2[1:] != sorted_B2[:-1]).any(axis=1)
    entry_B = np.empty(len(order), np.int64)
    entry_B[order] = np.cumsum(new_B) - 1
    return np.ascontiguousarray(sorted_B2[new_B]), entry_B


def union(parts: Sequence[tuple[Ints, Bools]]) -> Iterator[Ints]:
    """The ids of all parts, sorted and unique, in pieces. A part (ids_K2, mask_K) gives those ids
    where its mask is set."""
    num_pieces = sum(len(ids_K2) for ids_K2, _ in parts) // PIECE + 1
    edges = [(number << 64) // num_pieces - (1 << 63) for number in range(1, num_pieces)]
    cuts = [
        [0, *np.searchsorted(ids_K2[:, 0], np.array(edges, np.int64)), len(ids_K2)]
        for ids_K2, _ in parts
    ]
    for number in range(num_pieces):
        held = [
            ids_K2[cut[number] : cut[number + 1]][mask_K[cut[number] : cut[number + 1]]]
            for (ids_K2, mask_K), cut in zip(parts, cuts, strict=True)
        ]
        yield unique_ids(np.concatenate(held))[0]


KEY_BLOCK = {"format": "1", "kind": "keys"}
HEADER_ROOM = 256


def read_key_block(path: Path, *, check: bool = True) -> Ints:
    """The ids [K, 2] of a key block. check: also check the name and the order of the ids. Raises
    BadBlockError, FileNotFoundError."""
    tensors, metadata = read_tensors(path)
    ids_K2 = tensors.get("ids")
    if metadata != KEY_BLOCK or ids_K2 is None:
        raise BadBlockError("not a key block of this format")
    if len(tensors) != 1 or ids_K2.dtype != np.int64 or ids_K2.ndim != 2 or ids_K2.shape[1] != 2:
        raise BadBlockError("not a key block: ids should be int64 [K, 2]")
    if not check:
        return ids_K2
    if digest("keys", ids_K2) != path.name.removesuffix(BLOCK_SUFFIX):
        raise BadBlockError("its content does not match its name: altered")
    if not is_sorted_unique(ids_K2):
        raise BadBlockError("its ids are not sorted and unique")
    return ids_K2


def ensure_key_block(layout: Layout, key_hash: str, ids_K2: Ints, sound: set[str]) -> str | None:
    """Make sure that the key block of these ids is there and whole. Returns what was wrong with a
    bad one; None if it was whole or missing.

    sound: the hashes of key blocks that this process has checked. Of a large one only the form is
    checked: the caller has the ids and does not read them from it.
    """
    path = layout.key_path(key_hash)
    if key_hash in sound and path.exists():
        return None
    trouble = None
    try:
        read_key_block(path, check=path.stat().st_size < MAP_BYTES)
    except (BadBlockError, FileNotFoundError) as error:
        if isinstance(error, BadBlockError):
            trouble = f"{path.name}: {error}"
            set_aside(layout, path)
        write_tensors(layout, path, {"ids": np.ascontiguousarray(ids_K2, np.int64)}, KEY_BLOCK)
    sound.add(key_hash)
    return trouble


def write_key_block(layout: Layout, pieces: Iterable[Ints]) -> str:
    """Write the key block of ids that come in sorted pieces. Returns its hash. Raises RunError."""
    with aside(layout, "keys") as (file, keep):
        file.write(bytes(HEADER_ROOM))
        num_keys = 0
        for piece in pieces:
            file.write(as_bytes(piece).data)
            num_keys += len(piece)
        shape = (num_keys, 2)
        file.seek(0)
        file.write(header_of({"ids": (np.dtype("<i8"), shape)}, KEY_BLOCK, HEADER_ROOM))
        file.flush()
        ids_K2 = np.memmap(file, "<i8", "r", offset=HEADER_ROOM, shape=shape)
        key_hash = digest("keys", ids_K2)
        keep(layout.key_path(key_hash))
    return key_hash
