"""Measuring rates on this machine, within a time that was set.

Batches are of random tokens at a few lengths, models are the run's own. Each figure is the median
of a few turns after one that is not counted.

Shapes: R rows of a batch, L tokens, K measured lengths.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sead_dist.data.tokens import TokenTable
from sead_dist.runtime.memory import forget_peak, held, peak
from sead_dist.teachers.inference import Cut, batches_of
from sead_dist.teachers.rates import Rate, operations
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.whole import load_whole

# a batch's time is measured at the ends of these that hold the task's lengths, and between
GRID = (8, 16, 32, 64, 128, 256, 512)
TURNS = 3
# a batch of so few rows shows what a batch costs whatever its rows
FEW_ROWS = 4


def grid(lengths: np.ndarray, most: int) -> list[int]:
    """The lengths to measure for rows of these lengths, none over `most`."""
    low = max((length for length in GRID if length <= lengths.min()), default=GRID[0])
    high = min((length for length in GRID if length >= lengths.max()), default=GRID[-1])
    return sorted({min(length, most) for length in GRID if low <= length <= high})


class Stopwatch:
    """Times batches until a moment on the monotonic clock, and passes over those that would not be
    done by then; the first, which must be a small one, is always timed."""

    def __init__(self, device: torch.device, until: float) -> None:
        self.device, self.until = device, until
        self.speed: float | None = None
        # what the first batch of each shape took longer than the others
        self.firsts: list[float] = []

    def time(self, do: Callable[[], None], work: float) -> float | None:
        """Median seconds of `do`, which does `work` operations; None where there is no time."""
        left = self.until - time.monotonic()
        expected = 0.0 if self.speed is None else work / self.speed
        if self.speed is not None and expected * (TURNS + 1) > left:
            return None
        first = self._once(do)
        # where the expectation was too good, one turn has to do
        turns = TURNS if first * TURNS <= self.until - time.monotonic() else 1
        taken = statistics.median(self._once(do) for _ in range(turns))
        self.firsts.append(first - taken)
        self.speed = max(work / taken, self.speed or 0.0)
        return taken

    @property
    def shape_s(self) -> float:
        """Seconds that the first batch of a shape takes longer; the very first of all, which wakes
        up much else, apart."""
        return max(0.0, statistics.median(self.firsts[1:])) if self.firsts[1:] else 0.0

    def _once(self, do: Callable[[], None]) -> float:
        began = time.perf_counter()
        do()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


def measure_batches(
    watch: Stopwatch,
    lengths_K: Sequence[int],
    rows_of: Callable[[int], int],
    batch: Callable[[int, int], Callable[[], None]],
    work: Callable[[int], float],
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """(measured lengths, seconds of a row at each, seconds of a batch apart from its rows).
    batch(rows, length) gives what to time, work(length) the operations of a row. Where time is
    short, batches have fewer rows, then the longest lengths are left out."""
    first = lengths_K[0]
    few = min(FEW_ROWS, rows_of(first))
    few_s = watch.time(batch(few, first), few * work(first))
    assert few_s is not None
    measured: dict[int, tuple[int, float]] = {}
    for length in lengths_K:
        rows = rows_of(length)
        taken = watch.time(batch(rows, length), rows * work(length))
        while taken is None and rows > few:
            rows = max(few, rows // 4)
            taken = watch.time(batch(rows, length), rows * work(length))
        if taken is None:
            break
        measured[length] = (rows, taken)
    rows, taken = measured.setdefault(first, (few, few_s))
    batch_s = (few_s * rows - taken * few) / (rows - few) if rows > few else 0.0
    # a hiccup in one of the two must not make rows free
    batch_s = min(max(0.0, batch_s), 0.9 * min(taken for _, taken in measured.values()))
    row_s_K = tuple((taken - batch_s) / rows for rows, taken in measured.values())
    return tuple(measured), row_s_K, batch_s


def random_inputs(
    model: PreTrainedModel, rows: int, length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs [R, L] of random words; the last row is one token long, as in a teacher's batch."""
    words = int(getattr(model.config, "vocab_size", 100))
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, 1:] = 0
    ids = torch.randint(min(3, words - 1), words, (rows, length))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def random_pack(
    model: PreTrainedModel, rows: int, length: int, device: torch.device, pack_from: int
) -> dict[str, Any]:
    """A pack with so many rows of random words."""
    words = int(getattr(model.config, "vocab_size", 100))
    ids = np.random.default_rng(0).integers(min(3, words - 1), words, rows * length)
    ends = np.arange(rows + 1, dtype=np.int64) * length
    tokens = TokenTable(ids.astype(np.int32), None, ends, 1, 0, 0, np.zeros(0, np.int64))
    cut = Cut(length, None, pack_from)
    return next(batches_of(tokens, np.arange(rows), device, cut, model.config))[1]


def full_batch(teacher: Teacher, device: torch.device, length: int) -> int:
    """The rows of a teacher's batch of texts of this length."""
    return int(teacher.cut.full_rows(np.array([length]), device.type)[0])


def measure_teacher(
    teacher: Teacher,
    device: torch.device,
    trust_remote_code: bool,
    lengths_K: Sequence[int],
    until: float,
) -> Rate:
    """The rate of a teacher's forward, loaded as a run loads it.

    Raises UserError where its weights cannot be read.
    """
    held_before = held(device) if forget_peak(device) else None
    began = time.perf_counter()
    model = load_whole(teacher, device, trust_remote_code, {})
    load_s = time.perf_counter() - began
    pack_from = teacher.cut.pack_from

    def batch(rows: int, length: int) -> Callable[[], None]:
        if pack_from is None:
            inputs = random_inputs(model, rows, length, device)
        else:
            inputs = random_pack(model, rows, length, device, pack_from)

        @torch.inference_mode()
        def forward() -> None:
            model(**inputs).logits.float().cpu()

        return forward

    watch = Stopwatch(device, until)
    found = measure_batches(
        watch,
        lengths_K,
        partial(full_batch, teacher, device),
        batch,
        lambda length: operations(model.config, length, trust_remote_code),
    )
    work_bytes = beyond(device, held_before, teacher.bytes)
    return Rate(*found, once_s=load_s, shape_s=watch.shape_s, work_bytes=work_bytes)


def beyond(device: torch.device, held_before: int | None, known: int) -> int | None:
    """Bytes of the peak since then that are neither those nor `known`; None where not measured."""
    most = peak(device)
    if held_before is None or most is None:
        return None
    return max(0, most - held_before - known)
