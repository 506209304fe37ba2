"""Which rank answers for which (teacher, example): the owner looks up, computes and writes, and
the other ranks always receive (invariant 8).

colocated: every rank holds the teacher and owns an equal share of the rows. partitioned: one rank
holds the whole teacher and owns all of its rows. sharded: every rank holds an equal part of the
teacher's parameters and owns an equal share of the rows. pool: no rank holds the teacher; each
waits for an equal share of its rows, which other processes put into the store.

Shapes: N teachers, R requested examples, M examples of one rank, C classes.
"""

import os
from collections.abc import Sequence

import numpy as np
import psutil
import torch
import torch.distributed as dist

from sead_dist.distributed import World, gather_objects
from sead_dist.errors import UserError
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


def held_bytes(weights: int, placement: str, size: int) -> int:
    """Bytes of a teacher's weights that a rank which holds it keeps between forwards. A sharded
    teacher's largest layers, and what is in no layer, come on top while it computes."""
    if placement == "pool":
        return 0
    return -(-weights // size) if placement == "sharded" else weights


def choose_placements(
    teachers: Sequence[Teacher], default: str, world: World
) -> tuple[list[str], str]:
    """Each teacher's placement, and one line that says why.

    `auto`: a teacher too large for half of the smallest rank's free memory is sharded, where there
    are ranks to share it. The others are colocated while all together fit into that half, since
    then work is spread evenly, else partitioned.
    """
    if default != "auto":
        placements = [teacher.entry.placement or default for teacher in teachers]
        return placements, f"placement {default}, as asked"
    free = min(gather_objects(world, free_bytes(world.device)))
    room = int(TEACHER_SHARE * free)
    large = [world.size > 1 and teacher.bytes > room for teacher in teachers]
    wishes = [
        teacher.entry.placement or ("sharded" if is_large else "colocated")
        for teacher, is_large in zip(teachers, large, strict=True)
    ]
    held = [
        held_bytes(teacher.bytes, wish, world.size)
        for teacher, wish in zip(teachers, wishes, strict=True)
    ]
    chosen = "colocated" if sum(held) <= room else "partitioned"
    placements = [
        teacher.entry.placement or ("sharded" if is_large else chosen)
        for teacher, is_large in zip(teachers, large, strict=True)
    ]
    reason = (
        f"placement {', '.join(dict.fromkeys(placements))}: teachers take "
        f"{sum(teacher.bytes for teacher in teachers) / 2**20:.0f} MiB together, "
        f"{free / 2**20:.0f} MiB are free on the smallest rank"
    )
    return placements, reason


def is_split(teacher: Teacher, placement: str, world: World) -> bool:
    """Whether a teacher runs in parts: in a world of one only for the sake of its offload."""
    return placement == "sharded" and (world.size > 1 or teacher.entry.offload)


def check_placements(teachers: Sequence[Teacher], placements: Sequence[str]) -> None:
    """Raises UserError for an entry whose keys its placement cannot honour."""
    for teacher, placement in zip(teachers, placements, strict=True):
        if teacher.entry.offload and placement != "sharded":
            raise UserError(
                f"teacher {teacher.name}: offload=true is for placement=sharded, and it is "
                f"{placement}; give its entry placement: sharded, or leave offload out"
            )
        if teacher.entry.weights is not None and placement == "sharded":
            raise UserError(
                f"teacher {teacher.name}: weights={teacher.entry.weights} cannot be split over "
                "ranks (placement=sharded); give its entry another placement, or dtype: bf16"
            )


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


def exchange(
    mine: Sequence[np.ndarray],
    owner_NR: np.ndarray,
    asked_NR: np.ndarray,
    classes: int,
    world: World,
) -> np.ndarray:
    """Every rank's answers, put where they belong: logits_NRC. `mine`: logits_MC of each teacher,
    for the asked examples that this rank owns. Every rank calls this."""
    logits_NRC = np.zeros((*owner_NR.shape, classes), np.float32)
    own_MC = np.concatenate(mine)
    counts = [int(((owner_NR == rank) & asked_NR).sum()) for rank in range(world.size)]
    if world.size == 1 or max(counts) == 0:
        everyone = [own_MC] * world.size
    else:
        sent = torch.zeros(max(counts), classes, device=world.device)
        sent[: len(own_MC)] = torch.from_numpy(own_MC)
        got = [torch.empty_like(sent) for _ in range(world.size)]
        dist.all_gather(got, sent, group=world.exchange)
        everyone = [tensor.cpu().numpy() for tensor in got]
    for rank, count in enumerate(counts):
        logits_NRC[(owner_NR == rank) & asked_NR] = everyone[rank][:count]
    return logits_NRC
