"""Whether other processes had the processors while a model was timed, and timing it again then."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sead_dist.teachers.rates import Rate

STAT = Path("/proc/stat")
# of this process's threads, those that may have shared a processor
SHARED = 0.1
# processor time is counted in hundredths of a second: shorter spans say nothing
SHORTEST_S = 0.2


def used_seconds() -> float | None:
    """Seconds that all processors of this machine have worked since it started; None where the
    system does not say."""
    try:
        fields = STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Others:
    """What other processes do from now on."""

    def __init__(self) -> None:
        self.began, self.used, self.own = time.monotonic(), used_seconds(), time.process_time()

    def in_the_way(self, device: torch.device) -> bool:
        """Whether they left this process fewer processors than it has threads. Of a GPU it is not
        known. Ranks of one machine, which a run has too, are no others."""
        used, wall = used_seconds(), time.monotonic() - self.began
        if device.type == "cuda" or used is None or self.used is None or wall < SHORTEST_S:
            return False
        threads, ranks = torch.get_num_threads(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        others = (used - self.used - (time.process_time() - self.own)) / wall
        crowd = others - threads * (ranks - 1) + threads - (os.cpu_count() or 1)
        return crowd > SHARED * threads


def timed_quietly(measure: Callable[[float], Rate], until: float, device: torch.device) -> Rate:
    """What `measure(until)` finds; again where others were in the way and there is time, and marked
    where they still were."""
    others = Others()
    first = measure(until)
    if not others.in_the_way(device):
        return first
    now = time.monotonic()
    if now + (now - others.began) <= until:
        others = Others()
        again = measure(until)
        if not others.in_the_way(device):
            return again
        first = min(first, again, key=lambda rate: rate.row_s_K[0])
    return replace(first, busy=True)
