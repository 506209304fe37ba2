"""What a teacher source gives, and the stream that joins it to the student's batches.

Shapes: N teachers, B rows of a micro-batch, R requested examples, C classes (task order).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from sead_dist.data.order import Batch, BatchStream, Split, Step
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.teachers.feature_teacher import FeatureTeacher


@dataclass(frozen=True)
class Request:
    """Unique examples of a split whose logits are needed.

    entries_R: the examples, ascending. needed_NR: which teachers are to predict which example
    (None: all of them). what: the place in the run, for messages. step_of: gives the step (from 1)
    that first needs an entry; None where the request is not for steps.
    """

    split: Split
    entries_R: np.ndarray
    needed_NR: np.ndarray | None
    what: str
    step_of: Callable[[int], int] | None = None


class TeacherSource(Protocol):
    """Gives the logits of teachers. Every rank submits the same requests in the same order."""

    def submit(self, request: Request) -> Future[TeacherLogits]:
        """The logits_NRC and present_NR, in the order of the request. Their `result()` raises
        RunError."""
        ...


@dataclass(frozen=True)
class TaughtStep:
    """A step with its teachers' logits for each micro-batch.

    waited_s: the seconds spent on waiting for them. feature_teacher: set in steps that need its
    hidden states and attention. window: the steps for which the wait was, in the first of them.
    """

    step: Step
    teachers: list[TeacherLogits] | None
    waited_s: float
    feature_teacher: FeatureTeacher | None = None
    window: range | None = None

    def micro_batches(self) -> Iterator[tuple[Batch, TeacherLogits | None]]:
        """Each micro-batch with the outputs of its teachers.

        Layer outputs are computed when their micro-batch is reached. So those of only one
        micro-batch are in memory at a time.
        """
        for place, batch in enumerate(self.step.batches):
            said = None if self.teachers is None else self.teachers[place]
            if said is not None and self.feature_teacher is not None:
                said = replace(said, layer_outputs=self.feature_teacher.layer_outputs(batch))
            yield batch, said

    @property
    def feature_rows(self) -> int:
        """Forwards of the feature teacher in this step, over all ranks."""
        return 0 if self.feature_teacher is None else self.step.valid_rows


def rows_of(answer: TeacherLogits, entries_R: np.ndarray, entries_B: torch.Tensor) -> TeacherLogits:
    """The columns of a request's logits that a micro-batch needs."""
    where_B = torch.from_numpy(np.searchsorted(entries_R, entries_B.numpy()))
    # a filler repeats a valid row; a micro-batch of fillers alone may hold rows that were not
    # requested
    where_B = where_B.clamp(max=max(len(entries_R) - 1, 0))
    return TeacherLogits(answer.logits_NBC[:, where_B], answer.present_NB[:, where_B])


def no_logits(batch: Batch) -> TeacherLogits:
    """The logits of no teacher, for steps in which only the feature teacher gives outputs."""
    B = len(batch.valid_B)
    return TeacherLogits(torch.zeros(0, B, 0), torch.zeros(0, B, dtype=torch.bool))


def stream(
    batches: BatchStream,
    source: TeacherSource | None,
    start: int,
    prefetch_rows: int,
    depth: int,
    needed: Callable[[range, np.ndarray], np.ndarray | None],
    feature_teacher: FeatureTeacher | None = None,
) -> Iterator[TaughtStep]:
    """The steps from `start` on, each with its teachers' logits and the feature teacher's layer
    outputs.

    Teachers compute windows of up to `prefetch_rows` rows. They are `depth` windows ahead of the
    student (0: a window is computed when the student reaches it). A teacher's outputs depend on
    neither number (invariant 3).
    """
    if source is None:
        for number in range(start, batches.total_steps):
            step = batches.step(number)
            shows = feature_teacher is not None and number < feature_teacher.until
            parts = [no_logits(batch) for batch in step.batches] if shows else None
            yield TaughtStep(step, parts, 0.0, feature_teacher if shows else None)
        return
    windows = batches.windows(start, prefetch_rows)
    ahead: deque[tuple[range, np.ndarray, Future[TeacherLogits]]] = deque()

    def submit_next() -> None:
        steps = next(windows, None)
        if steps is None:
            return
        entries_R = batches.entries(steps)
        what = f"steps {steps.start + 1}-{steps.stop}"

        def step_of(entry: int) -> int:
            return 1 + next(number for number in steps if entry in batches.entries([number]))

        request = Request(batches.split, entries_R, needed(steps, entries_R), what, step_of)
        ahead.append((steps, entries_R, source.submit(request)))

    for _ in range(depth):
        submit_next()
    while True:
        submit_next()
        if not ahead:
            return
        steps, entries_R, pending = ahead.popleft()
        began = time.perf_counter()
        answer = pending.result()
        waited_s = time.perf_counter() - began
        for number in steps:
            step = batches.step(number)
            parts = [rows_of(answer, entries_R, batch.entries_B) for batch in step.batches]
            shows = feature_teacher is not None and number < feature_teacher.until
            window = steps if number == steps.start else None
            yield TaughtStep(step, parts, waited_s, feature_teacher if shows else None, window)
            waited_s = 0.0
