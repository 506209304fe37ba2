"""Which rank provides the logits of which (teacher, example).

The rank that provides them is called the owner. It looks a prediction up, or computes and writes
it. All other ranks receive it (invariant 8).

colocated: every rank holds the teacher and owns an equal share of the rows. partitioned: one rank
holds the whole teacher and owns all of its rows; further ranks hold it too and own a share, where
they would have too little to do otherwise. sharded: every rank holds an equal part of the teacher's
parameters and owns an equal share of the rows. pool: no rank holds the teacher; other processes put
its rows into the store, and each rank waits for an equal share of them.

Shapes: N teachers, R requested examples, W ranks, M examples of one rank, C classes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
import torch.distributed as dist
from rich.filesize import decimal

from sead_dist.errors import UserError
from sead_dist.runtime.distributed import World, gather_objects
from sead_dist.teachers.base import Request
from sead_dist.teachers.teacher import Teacher

# the share of a rank's free memory that teachers may take; the student gets the rest
TEACHER_SHARE = 0.5
# a rank may have so much more work than the mean before rows of a partitioned teacher are split
UNEVEN = 0.05


def free_bytes(device: torch.device) -> int:
    """Free memory for this rank: that of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(psutil.virtual_memory().available) // neighbours


def held_bytes(weights: int, placement: str, size: int) -> int:
    """Bytes of a teacher's weights that a rank which holds it keeps between forwards.

    During a forward a sharded teacher needs more: its largest layers, and all that is in no layer.
    """
    if placement == "pool":
        return 0
    return -(-weights // size) if placement == "sharded" else weights


def least_free(world: World) -> int:
    """Free bytes of the rank that has the fewest. Every rank calls this."""
    return min(gather_objects(world, free_bytes(world.device)))


def choose_placements(
    teachers: Sequence[Teacher], default: str, size: int, free: int
) -> tuple[list[str], str]:
    """(each teacher's placement, one line with the reason).

    size: the number of ranks. free: free bytes of the rank that has the fewest. default: the
    placement for entries that name none.

    With `auto`, a teacher that is larger than half of `free` is sharded, if there are several
    ranks. The others are colocated if all teachers together fit into that half, since work is then
    spread evenly; else they are partitioned.
    """
    if default != "auto":
        placements = [teacher.entry.placement or default for teacher in teachers]
        return placements, f"placement {default}, as configured"
    room = int(TEACHER_SHARE * free)

    def placed(others: str) -> list[str]:
        """The placements, with `others` for teachers that are small enough and whose entries name
        none."""
        return [
            teacher.entry.placement or ("sharded" if size > 1 and teacher.bytes > room else others)
            for teacher in teachers
        ]

    wishes = zip(teachers, placed("colocated"), strict=True)
    held = [held_bytes(teacher.bytes, wish, size) for teacher, wish in wishes]
    placements = placed("colocated" if sum(held) <= room else "partitioned")
    reason = (
        f"placement {', '.join(dict.fromkeys(placements))}: a rank with its part of every teacher "
        f"needs {decimal(sum(held))} for them, and {decimal(room)} may be used, half of what is "
        "free on the rank with the least"
    )
    return placements, reason


@dataclass(frozen=True)
class Placement:
    """Where the teachers of a run are: which rank provides which rows, and how passes are
    computed.

    names: each teacher's placement. together_N: whether a teacher is in parts, so that all ranks
    compute it together. share_NW: the part of its rows that each rank owns.
    """

    names: list[str]
    together_N: list[bool]
    share_NW: np.ndarray

    @property
    def word(self) -> str:
        """The placement of all teachers, or all different ones."""
        return ", ".join(dict.fromkeys(self.names))

    def awaits(self, n: int) -> bool:
        """Whether other processes compute teacher n, so that a rank waits for its rows."""
        return self.names[n] == "pool"

    def is_alone(self, n: int) -> bool:
        """Whether each rank that owns rows of teacher n computes them by itself."""
        return not self.awaits(n) and not self.together_N[n]

    def pick(self, numbers: Sequence[int]) -> "Placement":
        """The placement of these teachers alone."""
        names, together = [self.names[n] for n in numbers], [self.together_N[n] for n in numbers]
        return Placement(names, together, self.share_NW[list(numbers)])

    def owners(self, request: Request) -> np.ndarray:
        """The owner_NR: the rank that provides each (teacher, example). It is the same on every
        rank."""
        rows_R = request.split.row_U[request.entries_R]
        by_length_R = np.argsort(request.split.tokens.lengths_B()[rows_R], kind="stable")
        owner_NR = np.empty((len(self.share_NW), len(rows_R)), np.int64)
        for owner_R, share_W in zip(owner_NR, self.share_NW, strict=True):
            # dealt out by length, so that every rank gets equally many long rows
            owner_R[by_length_R] = deal(share_W, len(rows_R))
        return owner_NR


def place(teachers: Sequence[Teacher], names: Sequence[str], share_NW: np.ndarray) -> Placement:
    """The placement of these teachers. names: of each teacher. share_NW: as in `Placement`."""
    size = share_NW.shape[1]
    together = [
        # in a world of one rank, a teacher is in parts only for its offload
        name == "sharded" and (size > 1 or teacher.entry.offload)
        for teacher, name in zip(teachers, names, strict=True)
    ]
    return Placement(list(names), together, share_NW)


def check_placements(teachers: Sequence[Teacher], placements: Sequence[str]) -> None:
    """Raises UserError for an entry with keys that do not go with its placement."""
    for teacher, placement in zip(teachers, placements, strict=True):
        if teacher.answers is not None and placement == "sharded":
            raise UserError(
                f"teacher {teacher.name} is of kind {teacher.entry.kind}, and only a model can be "
                "sharded; give its entry placement: colocated"
            )
        if teacher.entry.offload and placement != "sharded":
            raise UserError(
                f"teacher {teacher.name}: offload=true is for placement=sharded, and its placement "
                f"is {placement}; give its entry placement: sharded, or leave offload out"
            )
        if teacher.entry.quantization is not None and placement == "sharded":
            raise UserError(
                f"teacher {teacher.name}: quantization={teacher.entry.quantization} cannot be "
                "split over ranks (placement=sharded); give its entry another placement, or "
                "dtype: bf16 in place of quantization"
            )


def share_rows(
    teachers: Sequence[Teacher],
    placements: Sequence[str],
    costs_N: Sequence[float],
    size: int,
    free: int,
) -> np.ndarray:
    """The share_NW: the part of each teacher's rows that each rank owns. A rank holds each teacher
    of which it owns a part.

    costs_N: what all rows of each teacher cost, in any one unit. free: bytes free on the smallest
    rank.

    Each partitioned teacher goes first to one rank as a whole: the costliest first, to the rank
    with the least work (Graham 1969, longest processing time). Then rows are moved while a rank has
    more than 1 + UNEVEN of the mean work. It gives rows to the idlest rank that has room for the
    teacher, until one of the two has the mean (our own; McNaughton 1959 cuts jobs in the same way).
    So no rank has more than 1 + UNEVEN of the mean, where memory allows it.
    """
    share_NW = np.full((len(teachers), size), 1 / size)
    mine = [n for n, placement in enumerate(placements) if placement == "partitioned"]
    common = sum(
        held_bytes(teacher.bytes, placement, size)
        for teacher, placement in zip(teachers, placements, strict=True)
        if placement != "partitioned"
    )
    load_W = np.zeros(size)
    for n in sorted(mine, key=lambda n: -costs_N[n]):
        home = int(load_W.argmin())
        share_NW[n] = 0.0
        share_NW[n, home] = 1.0
        load_W[home] += costs_N[n]
    mean = load_W.mean()
    while load_W.max() > (1 + UNEVEN) * mean:
        full = int(load_W.argmax())
        room = TEACHER_SHARE * free - common
        found = _next_move(teachers, mine, costs_N, share_NW, load_W, full, room)
        if found is None:
            break
        n, idle = found
        spare = min(load_W[full] - mean, mean - load_W[idle])
        part = min(spare / costs_N[n], share_NW[n, full])
        share_NW[n, full] -= part
        share_NW[n, idle] += part
        load_W[full] -= part * costs_N[n]
        load_W[idle] += part * costs_N[n]
    return share_NW


def _next_move(
    teachers: Sequence[Teacher],
    partitioned: Sequence[int],
    costs_N: Sequence[float],
    share_NW: np.ndarray,
    load_W: np.ndarray,
    full: int,
    room: float,
) -> tuple[int, int] | None:
    """(teacher, rank) of the next move: the idlest rank with room for one of the full rank's
    teachers, and the costliest such teacher. None where there is no such rank."""
    theirs = [n for n in partitioned if share_NW[n, full] > 0 and costs_N[n] > 0]
    # a rank that has the mean, up to rounding, takes no rows
    level = (1 - 1e-9) * load_W.mean()
    for idle in np.argsort(load_W, kind="stable"):
        if load_W[idle] >= level:
            return None
        held = sum(teachers[n].bytes for n in partitioned if share_NW[n, idle] > 0)
        for n in sorted(theirs, key=lambda n: -share_NW[n, full] * costs_N[n]):
            if share_NW[n, idle] > 0 or held + teachers[n].bytes <= room:
                return n, int(idle)
    return None


def describe_shares(
    teachers: Sequence[Teacher], placements: Sequence[str], share_NW: np.ndarray
) -> str:
    """One line: which ranks hold each partitioned teacher, and which part of its rows each owns."""
    lines = []
    for teacher, placement, share_W in zip(teachers, placements, share_NW, strict=True):
        if placement == "partitioned":
            parts = [f"{rank} ({share:.0%})" for rank, share in enumerate(share_W) if share > 0]
            lines.append(f"{teacher.name} on rank {', '.join(parts)}")
    return f"partitioned: {'; '.join(lines)}"


def deal(share_W: np.ndarray, rows: int) -> np.ndarray:
    """The rank of each of so many rows. Every rank gets its share, spread evenly over the rows."""
    exact_W = share_W * rows
    count_W = np.floor(exact_W).astype(np.int64)
    behind_W = np.argsort(count_W - exact_W, kind="stable")
    count_W[behind_W[: rows - count_W.sum()]] += 1
    rank_R = np.repeat(np.arange(len(share_W)), count_W)
    place_R = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in count_W])
    return np.asarray(rank_R[np.argsort(place_R, kind="stable")])


def exchange(
    mine: Sequence[np.ndarray],
    owner_NR: np.ndarray,
    needed_NR: np.ndarray,
    classes: int,
    world: World,
) -> np.ndarray:
    """Gather the logits of all ranks into logits_NRC. Every rank calls this.

    mine: for each teacher the logits_MC of the requested examples that this rank owns.
    """
    logits_NRC = np.zeros((*owner_NR.shape, classes), np.float32)
    own_MC = np.concatenate(mine)
    counts = [int(((owner_NR == rank) & needed_NR).sum()) for rank in range(world.size)]
    if world.size == 1 or max(counts) == 0:
        everyone = [own_MC] * world.size
    else:
        sent = torch.zeros(max(counts), classes, device=world.device)
        sent[: len(own_MC)] = torch.from_numpy(own_MC)
        got = [torch.empty_like(sent) for _ in range(world.size)]
        dist.all_gather(got, sent, group=world.exchange)
        everyone = [tensor.cpu().numpy() for tensor in got]
    for rank, count in enumerate(counts):
        logits_NRC[(owner_NR == rank) & needed_NR] = everyone[rank][:count]
    return logits_NRC
