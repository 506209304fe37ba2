"""Where the stored rows of one table lie: in memory, or in mapped blocks.

U entries of the table, R rows of a request, M rows added at once, C classes.
"""

import numpy as np

from sead_dist.teachers.blocks import Bools, Floats, Integers


class Rows:
    """Logits [C] for some of U entries.

    An entry's logits are row `_row_U` of segment `_segment_U`. Segment 0 lies in memory and grows,
    the others are blocks, mapped or not. One block that holds all entries in order needs neither.
    A lookup may run in one thread beside an addition in another.
    """

    def __init__(self, num_entries: int, classes: int) -> None:
        self.present_U: Bools = np.zeros(num_entries, bool)
        self._whole: Floats | None = None
        self._segments: list[Floats] = [np.empty((0, classes), np.float32)]
        self._used = 0
        # Made when first needed: 8 bytes an entry, none for a whole block.
        self._segment_U = self._row_U = np.empty(0, np.int32)

    def lookup(self, entries_R: Integers) -> tuple[Floats, Bools]:
        """Logits [R, C] of the entries, NaN where there are none, and which are there [R]."""
        if self._whole is not None:
            return self._whole[entries_R], np.ones(len(entries_R), bool)
        classes = self._segments[0].shape[1]
        if not self._segment_U.size:
            nothing = np.full((len(entries_R), classes), np.nan, np.float32)
            return nothing, np.zeros(len(entries_R), bool)
        segment_R = self._segment_U[entries_R]
        row_R = self._row_U[entries_R]
        present_R: Bools = segment_R >= 0
        if not segment_R.any():
            return self._segments[0][row_R], present_R
        logits_RC = np.full((len(entries_R), classes), np.nan, np.float32)
        order_R = np.argsort(segment_R, kind="stable")
        used, starts = np.unique(segment_R[order_R], return_index=True)
        for segment, part in zip(used, np.split(order_R, starts[1:]), strict=True):
            if segment >= 0:
                logits_RC[part] = self._segments[segment][row_R[part]]
        return logits_RC, present_R

    def set_whole(self, logits_UC: Floats) -> None:
        """All entries in order."""
        self._whole = logits_UC
        self.present_U[:] = True

    def copy(self, entries_M: Integers, logits_MC: Floats) -> None:
        """Add entries, their logits copied to memory."""
        loose, end = self._segments[0], self._used + len(logits_MC)
        if end > len(loose):
            room = min(2 * end, max(end, len(self.present_U)))
            grown = np.empty((room, loose.shape[1]), np.float32)
            grown[: self._used] = loose[: self._used]
            self._segments[0] = loose = grown
        loose[self._used : end] = logits_MC
        self._point(entries_M, 0, np.arange(self._used, end))
        self._used = end

    def refer(self, entries_M: Integers, block_KC: Floats, rows_M: Integers) -> None:
        """Add entries that are the rows `rows_M` of a block, which stays where it is."""
        self._segments.append(block_KC)
        self._point(entries_M, len(self._segments) - 1, rows_M)

    def _point(self, entries_M: Integers, segment: int, rows_M: Integers) -> None:
        if not self._segment_U.size:
            self._row_U = np.zeros(len(self.present_U), np.int32)
            self._segment_U = np.full(len(self.present_U), -1, np.int32)
        # In this order, so that a lookup in another thread never follows half a pointer.
        self._row_U[entries_M] = rows_M
        self._segment_U[entries_M] = segment
        self.present_U[entries_M] = True
