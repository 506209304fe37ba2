"""Where the stored rows of one table lie: in memory, or in mapped blocks.

U entries of the table, R rows of a request, M rows added at once, C classes.
"""

import numpy as np

from sead_dist.store.coverage import Coverage
from sead_dist.store.ids import Bools, Integers
from sead_dist.store.logits import Floats, Logits


class Rows:
    """Logits [C] for some of U entries.

    A block whose key block is the table's own ids is read as it lies. Any other entry's logits are
    row `_row_U` of segment `_segment_U`: segment 0 lies in memory and grows, the others are blocks,
    mapped or not. A lookup may run in one thread beside an addition in another.
    """

    def __init__(self, num_entries: int, classes: int) -> None:
        self.present_U: Bools = np.zeros(num_entries, bool)
        self._classes = classes
        self._own: list[tuple[Coverage, Logits]] = []
        self._segments = [Logits(np.empty((0, classes), np.float32))]
        self._used = 0
        # Made when first needed: 8 bytes an entry, none where blocks are read as they lie.
        self._segment_U = self._row_U = np.empty(0, np.int32)

    @property
    def complete(self) -> bool:
        """Whether every entry is present."""
        return any(covers.whole for covers, _ in self._own) or bool(self.present_U.all())

    def lookup(self, entries_R: Integers) -> tuple[Floats, Bools]:
        """Logits [R, C] of the entries, NaN where there are none, and which are there [R].

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
        """Add what a block covers, where its key block is the table's own ids."""
        self._own.append((covers, logits))
        self._count(covers)

    def copy(self, entries_M: Integers, logits_MC: Floats) -> None:
        """Add entries, their logits copied to memory."""
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
        """Add entries that are the rows `rows_M` of a block, which stays where it is."""
        self._segments.append(logits)
        self._point(entries_M, len(self._segments) - 1, rows_M)

    def drop(self, logits: Logits) -> None:
        """Forget what lies in a block that was found bad."""
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
            # One byte for all of them; nobody adds to what is complete.
            self.present_U = np.broadcast_to(np.True_, self.present_U.shape)
        else:
            covers.add_to(self.present_U)

    def _point(self, entries_M: Integers, segment: int, rows_M: Integers) -> None:
        if not self._segment_U.size:
            self._row_U = np.zeros(len(self.present_U), np.int32)
            self._segment_U = np.full(len(self.present_U), -1, np.int32)
        # In this order, so that a lookup in another thread never follows half a pointer.
        self._row_U[entries_M] = rows_M
        self._segment_U[entries_M] = segment
        self.present_U[entries_M] = True
