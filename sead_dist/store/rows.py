"""Stored rows: which ids a block covers, its logits, and where the rows of one table lie.

K ids of a key block, M rows of a block (ids that it covers) or rows added at once, P places of a
request, C classes, R rows of a request, S chunks of rows, U entries of a table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from sead_dist.store.ids import PIECE, Bools, Integers, Ints, Places
from sead_dist.store.tensor_file import BadBlockError

WORD = 64


@dataclass(frozen=True, eq=False)
class Coverage:
    """Which of `num_keys` ids a block covers: all, the M places of a list, or those of a bit map.

    rows_M: increasing places. words: uint64, one bit for each of the K ids, the lowest first. Rows
    of the block are in the order of the places.
    """

    num_keys: int
    rows_M: Places | None = None
    words: npt.NDArray[np.uint64] | None = None

    @staticmethod
    def of(mask_K: Bools) -> "Coverage":
        """The coverage of the ids where the mask is set, in the form that takes the fewest
        bytes."""
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
        """The tensors that a file holds for it."""
        if self.words is not None:
            return {"words": self.words}
        return {} if self.rows_M is None else {"rows": self.rows_M}

    def copy(self) -> "Coverage":
        """A copy that does not depend on the file it was read from."""
        rows = None if self.rows_M is None else self.rows_M.copy()
        return Coverage(self.num_keys, rows, None if self.words is None else self.words.copy())

    def trouble(self) -> str | None:
        """What is wrong with the list or the bit map; None if nothing is."""
        rows, words = self.rows_M, self.words
        if rows is not None:
            if rows[0] < 0 or rows[-1] >= self.num_keys or not (rows[1:] > rows[:-1]).all():
                return (
                    f"its list of rows is not increasing, or is outside of its {self.num_keys} keys"
                )
        elif words is not None:
            spare = -self.num_keys % WORD
            if len(words) * WORD != self.num_keys + spare or int(words[-1]) >> (WORD - spare):
                return f"its bit map does not fit its {self.num_keys} keys"
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
        """Set the mask at every covered place."""
        for places in self.pieces():
            mask_K[places] = True

    def rows_at(self, places_P: Integers) -> Integers:
        """The block's row at each place, [P]; -1 where it has none."""
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
    """The mask as one bit for each of the K ids, in whole words."""
    bits = np.packbits(mask_K, bitorder="little")
    return np.pad(bits, (0, -len(bits) % (WORD // 8))).view("<u8").astype(np.uint64, copy=False)


def unpack(words: npt.NDArray[np.uint64], num_keys: int) -> Bools:
    """The mask_K that `pack` was given, with `num_keys` values."""
    bits = np.unpackbits(words.view(np.uint8), count=num_keys, bitorder="little")
    return bits.view(np.bool_)


Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.uint64]

CHUNK_BYTES = 1 << 16


class BadChunkError(BadBlockError):
    """Rows of a block were altered since it was written. This was found while they were read."""

    def __init__(self, logits: "Logits", text: str) -> None:
        super().__init__(text)
        self.logits = logits


class Logits:
    """Logits [M, C] of a block.

    sums_S: the sum of each chunk; None where the whole block was checked before. path: of the
    block; None before it is written.
    """

    def __init__(
        self, values_MC: Floats, sums_S: Sums | None = None, path: Path | None = None
    ) -> None:
        self.values_MC, self.sums_S, self.path = values_MC, sums_S, path
        self._sound_S = np.zeros(0 if sums_S is None else len(sums_S), bool)
        self._all_sound = sums_S is None

    def empty(self) -> "Logits":
        """The same without rows, which would fill the memory."""
        return Logits(np.empty((0, self.values_MC.shape[1]), np.float32))

    def take(self, rows_R: Integers) -> Floats:
        """A copy of the rows [R, C]. Raises BadChunkError where one of their chunks was altered."""
        if not self._all_sound:
            chunk_R = rows_R // chunk_rows(self.values_MC.shape[1])
            self._check(np.unique(chunk_R[~self._sound_S[chunk_R]]))
        return self.values_MC.take(rows_R, axis=0)

    def bad_chunks(self) -> list[range]:
        """The rows of every altered chunk."""
        if self.sums_S is None:
            return []
        return [self._rows_of(s) for s in range(len(self.sums_S)) if not self._is_sound(s)]

    def _check(self, chunks_S: Integers) -> None:
        for chunk in chunks_S.tolist():
            if not self._is_sound(chunk):
                rows = self._rows_of(chunk)
                raise BadChunkError(self, f"its rows {rows.start} to {rows.stop} are altered")
            self._sound_S[chunk] = True
        self._all_sound = bool(self._sound_S.all())

    def _rows_of(self, chunk: int) -> range:
        step = chunk_rows(self.values_MC.shape[1])
        return range(chunk * step, min((chunk + 1) * step, len(self.values_MC)))

    def _is_sound(self, chunk: int) -> bool:
        assert self.sums_S is not None
        rows = self._rows_of(chunk)
        return chunk_sum(self.values_MC[rows.start : rows.stop]) == int(self.sums_S[chunk])


def chunk_rows(classes: int) -> int:
    """The number of rows in a chunk."""
    return max(1, CHUNK_BYTES // (4 * classes))


def chunk_sum(values_MC: Floats) -> int:
    """The checksum (XXH3, 64 bits) of the bytes of a chunk."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(values_MC).data)


def chunk_sums(values_MC: Floats) -> Sums:
    """The sum of each chunk [S]."""
    step = chunk_rows(values_MC.shape[1])
    starts = range(0, len(values_MC), step)
    return np.array([chunk_sum(values_MC[at : at + step]) for at in starts], np.uint64)


class Rows:
    """Logits [C] for some of U entries.

    A block whose key block is the table's own ids is read in place. The logits of any other entry
    are row `_row_U` of segment `_segment_U`. Segment 0 is in memory and grows. The other segments
    are blocks. One thread may look rows up while another adds some.
    """

    def __init__(self, num_entries: int, classes: int) -> None:
        self.present_U: Bools = np.zeros(num_entries, bool)
        self._classes = classes
        self._own: list[tuple[Coverage, Logits]] = []
        self._segments = [Logits(np.empty((0, classes), np.float32))]
        self._used = 0
        # Made when first needed: they take 8 bytes an entry, and blocks that are read in place need
        # none.
        self._segment_U = self._row_U = np.empty(0, np.int32)

    @property
    def complete(self) -> bool:
        """Whether every entry is present."""
        return any(covers.whole for covers, _ in self._own) or bool(self.present_U.all())

    def lookup(self, entries_R: Integers) -> tuple[Floats, Bools]:
        """(logits [R, C] of the entries, NaN where there are none; which entries are there [R]).

        Raises BadChunkError where a block that should hold some was altered.
        """
        for covers, logits in self._own:
            if covers.whole:
                return logits.take(entries_R), np.ones(len(entries_R), bool)
        logits_RC = np.full((len(entries_R), self._classes), np.nan, np.float32)
        present_R = np.zeros(len(entries_R), bool)
        for covers, logits in self._own:
            row_R = covers.rows_at(entries_R)
            here = np.flatnonzero((row_R >= 0) & ~present_R)
            logits_RC[here] = logits.take(row_R[here])
            present_R[here] = True
        if self._segment_U.size:
            self._look_in_segments(entries_R, logits_RC, present_R)
        return logits_RC, present_R

    def _look_in_segments(self, entries_R: Integers, logits_RC: Floats, present_R: Bools) -> None:
        segment_R = np.where(present_R, -1, self._segment_U[entries_R])
        row_R = self._row_U[entries_R]
        if len(segment_R) and segment_R[0] >= 0 and (segment_R == segment_R[0]).all():
            logits_RC[:] = self._segments[segment_R[0]].take(row_R)
            present_R[:] = True
            return
        order_R = np.argsort(segment_R, kind="stable")
        used, starts = np.unique(segment_R[order_R], return_index=True)
        for segment, part in zip(used, np.split(order_R, starts[1:]), strict=True):
            if segment >= 0:
                logits_RC[part] = self._segments[segment].take(row_R[part])
                present_R[part] = True

    def lay(self, covers: Coverage, logits: Logits) -> None:
        """Add all that a block covers. Its key block must be the table's own ids."""
        self._own.append((covers, logits))
        self._count(covers)

    def copy(self, entries_M: Integers, logits_MC: Floats) -> None:
        """Add entries with a copy of their logits."""
        loose, end = self._segments[0].values_MC, self._used + len(logits_MC)
        if end > len(loose):
            room = min(2 * end, max(end, len(self.present_U)))
            grown = np.empty((room, self._classes), np.float32)
            grown[: self._used] = loose[: self._used]
            self._segments[0] = Logits(grown)
            loose = grown
        loose[self._used : end] = logits_MC
        self._point(entries_M, 0, np.arange(self._used, end))
        self._used = end

    def refer(self, entries_M: Integers, logits: Logits, rows_M: Integers) -> None:
        """Add entries that are the rows `rows_M` of a block, without a copy."""
        self._segments.append(logits)
        self._point(entries_M, len(self._segments) - 1, rows_M)

    def drop(self, logits: Logits) -> None:
        """Remove the rows of a block that was found bad."""
        self._own = [(covers, other) for covers, other in self._own if other is not logits]
        bad = [number for number, other in enumerate(self._segments) if other is logits]
        self._segment_U[np.isin(self._segment_U, bad)] = -1
        self.present_U = np.zeros(len(self.present_U), bool)
        for covers, _ in self._own:
            self._count(covers)
        if self._segment_U.size:
            self.present_U |= self._segment_U >= 0

    def _count(self, covers: Coverage) -> None:
        if covers.whole:
            # One byte for all entries: nothing is added to a complete table.
            self.present_U = np.broadcast_to(np.True_, self.present_U.shape)
        else:
            covers.add_to(self.present_U)

    def _point(self, entries_M: Integers, segment: int, rows_M: Integers) -> None:
        if not self._segment_U.size:
            self._row_U = np.zeros(len(self.present_U), np.int32)
            self._segment_U = np.full(len(self.present_U), -1, np.int32)
        # In this order, so that a lookup in another thread finds the row before the segment.
        self._row_U[entries_M] = rows_M
        self._segment_U[entries_M] = segment
        self.present_U[entries_M] = True
