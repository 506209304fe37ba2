"""When a run saves its state where no number of steps says so."""

import time
from collections.abc import Callable

SAVE_EVERY_S = 60.0
# most of a run's time that saving by the clock may take
SAVE_SHARE = 0.02


class SaveClock:
    """Says when a state is due: a minute after the last one, or so much later that saving takes at
    most 2% of the time. Clocks of ranks differ, so rank 0's decides (invariant 8)."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = now()
        self._cost_s = 0.0

    def due(self) -> bool:
        """Whether a state should be saved after this step."""
        return self._now() - self._last >= max(SAVE_EVERY_S, self._cost_s / SAVE_SHARE)

    def save(self, write: Callable[[], None]) -> None:
        """Save by `write`, and remember how long that took."""
        began = self._now()
        write()
        self._last = self._now()
        self._cost_s = self._last - began
