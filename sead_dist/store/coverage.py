"""Which ids of its key block a value block has logits of.

K ids of the key block, M of them covered, P places that are asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sead_dist.store.ids import PIECE, Bools, Integers, Ints, Places

WORD = 64


@dataclass(frozen=True, eq=False)
class Coverage:
    """All of `num_keys` ids, or the M places of a list, or those of a bit map.

    rows_M: increasing places. words: uint64, one bit for each of the K ids, the lowest first.
    Rows of the block stand in the order of the places.
    """

    num_keys: int
    rows_M: Places | None = None
    words: npt.NDArray[np.uint64] | None = None

    @staticmethod
    def of(mask_K: Bools) -> "Coverage":
        """Of the ids where the mask is set, in the form that takes the fewest bytes."""
        num_rows, num_keys = int(np.count_nonzero(mask_K)), len(mask_K)
        if num_rows == num_keys:
            return Coverage(num_keys)
        if 4 * num_rows <= 8 * -(-num_keys // WORD):
            return Coverage(num_keys, rows_M=np.flatnonzero(mask_K).astype(np.int32))
        return Coverage(num_keys, words=pack(mask_K))

    @cached_property
    def num_rows(self) -> int:
        if self.rows_M is not None:
            return len(self.rows_M)
        if self.words is not None:
            return int(np.bitwise_count(self.words).sum(dtype=np.int64))
        return self.num_keys

    @property
    def whole(self) -> bool:
        return self.rows_M is None and self.words is None

    @property
    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What a file keeps of it."""
        if self.words is not None:
            return {"words": self.words}
        return {} if self.rows_M is None else {"rows": self.rows_M}

    def copy(self) -> "Coverage":
        """The same, apart from the file that it was read from."""
        rows = None if self.rows_M is None else self.rows_M.copy()
        return Coverage(self.num_keys, rows, None if self.words is None else self.words.copy())

    def trouble(self) -> str | None:
        """What is wrong with the list or the bit map, None where nothing is."""
        rows, words = self.rows_M, self.words
        if rows is not None:
            if rows[0] < 0 or rows[-1] >= self.num_keys or not (rows[1:] > rows[:-1]).all():
                return f"rows outside of its {self.num_keys} keys, or not increasing"
        elif words is not None:
            spare = -self.num_keys % WORD
            if len(words) * WORD != self.num_keys + spare or int(words[-1]) >> (WORD - spare):
                return f"a bit map that does not fit its {self.num_keys} keys"
        return None

    def pieces(self) -> Iterator[Places]:
        """The M places in order, in pieces of bounded size."""
        if self.rows_M is not None:
            for start in range(0, len(self.rows_M), PIECE):
                yield self.rows_M[start : start + PIECE]
            return
        for start in range(0, self.num_keys, PIECE):
            end = min(start + PIECE, self.num_keys)
            if self.words is None:
                yield np.arange(start, end, dtype=np.int32)
            else:
                bits = unpack(self.words[start // WORD : -(-end // WORD)], end - start)
                yield (np.flatnonzero(bits) + start).astype(np.int32)

    def add_to(self, mask_K: Bools) -> None:
        """Set the mask at every place that is covered."""
        for places in self.pieces():
            mask_K[places] = True

    def rows_at(self, places_P: Integers) -> Integers:
        """The block's row at each place, [P], -1 where it has none."""
        if self.rows_M is not None:
            at_P = np.searchsorted(self.rows_M, places_P)
            at_P[at_P == len(self.rows_M)] = 0
            return np.where(self.rows_M[at_P] == places_P, at_P, -1)
        if self.words is None:
            return places_P
        word_P, bit_P = np.divmod(places_P.astype(np.uint64), np.uint64(WORD))
        bits_P = self.words[word_P]
        below_P = bits_P & ((np.uint64(1) << bit_P) - np.uint64(1))
        row_P = self._before[word_P] + np.bitwise_count(below_P)
        return np.where((bits_P >> bit_P) & np.uint64(1), row_P, -1)

    @cached_property
    def _before(self) -> Ints:
        """For each word of the bit map the number of rows before it."""
        assert self.words is not None
        counts = np.bitwise_count(self.words).astype(np.int64)
        return np.cumsum(counts) - counts


def pack(mask_K: Bools) -> npt.NDArray[np.uint64]:
    """A bit for each K, in whole words."""
    bits = np.packbits(mask_K, bitorder="little")
    return np.pad(bits, (0, -len(bits) % (WORD // 8))).view("<u8").astype(np.uint64, copy=False)


def unpack(words: npt.NDArray[np.uint64], num_keys: int) -> Bools:
    bits = np.unpackbits(words.view(np.uint8), count=num_keys, bitorder="little")
    return bits.view(np.bool_)
