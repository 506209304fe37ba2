"""Which rank answers for which (teacher, example): the owner looks up, computes and writes, and
the other ranks always receive (invariant 8).

colocated: every rank holds the teacher and owns an equal share of the rows. partitioned: one rank
holds the whole teacher and owns all of its rows.

Shapes: N teachers, R requested examples, W ranks.
"""

import os
from collections.abc import Sequence

import numpy as np
import psutil
import torch

from sead_dist.distributed import World, gather_objects
from sead_dist.teachers.base import Request
from sead_dist.teachers.roster import Teacher

# the share of a rank's free memory that teachers may take; the rest is the student's
TEACHER_SHARE = 0.5


def free_bytes(device: torch.device) -> int:
    """Memory this rank may count on: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available) // neighbours


def choose_placements(
    teachers: Sequence[Teacher], default: str, world: World
) -> tuple[list[str], str]:
    """Each teacher's placement, and one line that says why. `auto`: colocated while all teachers
    fit into half of the smallest rank's free memory, since then work is spread evenly."""
    whole = sum(teacher.bytes for teacher in teachers)
    free = min(gather_objects(world, free_bytes(world.device)))
    chosen = default
    reason = f"placement {default}, as asked"
    if default == "auto":
        chosen = "colocated" if whole <= TEACHER_SHARE * free else "partitioned"
        reason = (
            f"placement {chosen}: teachers take {whole / 2**20:.0f} MiB together, "
            f"{free / 2**20:.0f} MiB are free on the smallest rank"
        )
    return [teacher.entry.placement or chosen for teacher in teachers], reason


def home_ranks(teachers: Sequence[Teacher], placements: Sequence[str], size: int) -> list[int]:
    """The rank of each partitioned teacher: the costliest first, to the least loaded rank."""
    load = [0.0] * size
    homes = [0] * len(teachers)
    for index in sorted(range(len(teachers)), key=lambda n: -teachers[n].parameters):
        if placements[index] == "partitioned":
            homes[index] = load.index(min(load))
            load[homes[index]] += teachers[index].parameters
    return homes


def owners(
    request: Request, placements: Sequence[str], homes: Sequence[int], size: int
) -> np.ndarray:
    """owner_NR: the rank that answers for each (teacher, example). The same on every rank."""
    rows_R = request.split.row_U[request.entries_R]
    by_length_R = np.argsort(request.split.tokens.lengths_B()[rows_R], kind="stable")
    share_R = np.empty(len(rows_R), np.int64)
    # dealt out by length, so that every rank gets as many long rows
    share_R[by_length_R] = np.arange(len(rows_R)) % size
    return np.stack(
        [
            np.full(len(rows_R), homes[n]) if placement == "partitioned" else share_R
            for n, placement in enumerate(placements)
        ]
    )
