"""Sets of example ids: sorted and unique rows of two int64, compared first word before second.

A ids that are looked for, B ids of a set, K ids of one of several sets, P ids that two sets share.
Ids are hashes, so first words are spread evenly. Whole sets are worked on piece by piece: beside a
hundred million ids themselves, little more than one piece of memory is needed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Places = npt.NDArray[np.int32]
Integers = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]

PIECE = 1 << 20


def positions(needles_A2: Ints, sorted_B2: Ints) -> Places:
    """Where each id stands in `sorted_B2`, [A], -1 where it does not.

    Needles may have any order; sorted ones are found ten times faster.
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
        # Ids that share their first word (rare: a hash) are told apart by the second.
        behind_A = same_A & (near_B2[at_A, 1] < second_A)
        if not behind_A.any():
            break
        place_A += behind_A
    found_A = same_A & (near_B2[at_A, 1] == second_A)
    return np.where(found_A, place_A + low, -1)


def common(ids_A2: Ints, ids_B2: Ints) -> tuple[Places, Places]:
    """The ids that two sets share: their places in the one [P] and in the other [P], increasing."""
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
    """The sorted unique ids [U, 2] and for each given id its entry among them [B]."""
    order = np.lexsort((ids_B2[:, 1], ids_B2[:, 0]))
    sorted_B2 = ids_B2[order]
    new_B = np.ones(len(order), bool)
    new_B[1:] = (sorted_B2[1:] != sorted_B2[:-1]).any(axis=1)
    entry_B = np.empty(len(order), np.int64)
    entry_B[order] = np.cumsum(new_B) - 1
    return np.ascontiguousarray(sorted_B2[new_B]), entry_B


def union(parts: Sequence[tuple[Ints, Bools]]) -> Iterator[Ints]:
    """The ids of all parts, sorted and unique, in pieces; of a set (ids_K2, mask_K) those where
    the mask is set."""
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
