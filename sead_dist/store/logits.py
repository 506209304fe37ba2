"""The logits of a block: rows that are read where they lie, checked when they are first touched.

M rows of the block, C classes, R rows of a request, S chunks of rows.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from sead_dist.store.ids import Integers
from sead_dist.store.tensor_file import BadBlockError

Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.uint64]

CHUNK_BYTES = 1 << 16


class BadChunkError(BadBlockError):
    """Rows of a block that were altered since it was written, found while they were read."""

    def __init__(self, logits: "Logits", text: str) -> None:
        super().__init__(text)
        self.logits = logits


class Logits:
    """Logits [M, C] of a block, with the sum of each chunk, or without sums where all of it was
    checked before. path: of the block, None before it is written."""

    def __init__(
        self, values_MC: Floats, sums_S: Sums | None = None, path: Path | None = None
    ) -> None:
        self.values_MC, self.sums_S, self.path = values_MC, sums_S, path
        self._sound_S = np.zeros(0 if sums_S is None else len(sums_S), bool)
        self._all_sound = sums_S is None

    def empty(self) -> "Logits":
        """The same without its rows, which would fill the memory."""
        return Logits(np.empty((0, self.values_MC.shape[1]), np.float32))

    def take(self, rows_R: Integers) -> Floats:
        """The rows [R, C], copied; raises BadChunkError where a chunk of them was altered."""
        if not self._all_sound:
            chunk_R = rows_R // chunk_rows(self.values_MC.shape[1])
            self._check(np.unique(chunk_R[~self._sound_S[chunk_R]]))
        return self.values_MC.take(rows_R, axis=0)

    def bad_chunks(self) -> list[range]:
        """The rows of every chunk that was altered."""
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
    """Rows in a chunk."""
    return max(1, CHUNK_BYTES // (4 * classes))


def chunk_sum(values_MC: Floats) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(values_MC).data)


def chunk_sums(values_MC: Floats) -> Sums:
    """The sum of each chunk [S]."""
    step = chunk_rows(values_MC.shape[1])
    starts = range(0, len(values_MC), step)
    return np.array([chunk_sum(values_MC[at : at + step]) for at in starts], np.uint64)
