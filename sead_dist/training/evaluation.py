"""Score a student on a split, with the figures that model cards show.

Shapes: B rows, C classes, R rows of an evaluation batch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from sead_dist.data.examples import score
from sead_dist.data.kinds import TaskKind
from sead_dist.data.order import Split, make_batch
from sead_dist.data.tasks import TaskSpec
from sead_dist.objectives.losses import hard_loss, known
from sead_dist.runtime.distributed import World, gather_objects

ROWS_PER_BATCH = 32
Forward = Callable[[dict[str, torch.Tensor], int], torch.Tensor]


@dataclass(frozen=True)
class EvalResult:
    """The scores of a student on a split.

    loss: mean hard loss of the labelled rows. runtime_s: of forwards, without tokenising.
    logits_BC: float32 in row order, the same on every rank.
    """

    task: str
    split: str
    step: int
    num_examples: int
    metrics: dict[str, float]
    loss: float
    runtime_s: float
    logits_BC: np.ndarray

    def card(self, prefix: str = "eval") -> dict[str, float]:
        """The figures under the keys that Hugging Face's Trainer uses."""
        steps = -(-self.num_examples // ROWS_PER_BATCH)
        return {
            **{f"{prefix}_{name}": value for name, value in self.metrics.items()},
            f"{prefix}_loss": self.loss,
            f"{prefix}_runtime": round(self.runtime_s, 4),
            f"{prefix}_samples_per_second": round(self.num_examples / self.runtime_s, 3),
            f"{prefix}_steps_per_second": round(steps / self.runtime_s, 3),
            f"{prefix}_samples": self.num_examples,
        }


def student_logits(
    model: torch.nn.Module,
    forward: Forward,
    split: Split,
    world: World,
    batch_rows: int = ROWS_PER_BATCH,
    advance: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The student's logits_BC for every row, in eval mode. All ranks call this.

    batch_rows: rows of a forward. advance: is called after each forward with the number of rows
    that all ranks did in it. Rows are sorted by length and cut into batches, whatever the number of
    ranks. Every rank does the same number of forwards.
    """
    by_length_B = np.argsort(split.tokens.lengths_B(), kind="stable")
    count = -(-len(by_length_B) // batch_rows)
    turns = -(-count // world.size)
    mine: list[tuple[np.ndarray, np.ndarray]] = []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for turn in range(turns):
            start = (turn * world.size + world.rank) * batch_rows
            rows_R = by_length_B[start : start + batch_rows]
            needed_R = rows_R if len(rows_R) else np.array([-1])
            batch = make_batch(split, needed_R)
            logits_RC = forward(batch.inputs, split.tokens.choices).float().cpu().numpy()
            mine.append((rows_R, logits_RC[: len(rows_R)]))
            if advance is not None:
                done = turn * world.size * batch_rows
                advance(min(world.size * batch_rows, len(by_length_B) - done))
    model.train(was_training)
    logits_BC = np.zeros((len(split), mine[0][1].shape[1]), np.float32)
    for pieces in gather_objects(world, mine):
        for rows_R, logits_RC in pieces:
            logits_BC[rows_R] = logits_RC
    return logits_BC


def mean_loss(kind: TaskKind, logits_BC: np.ndarray, labels_B: np.ndarray) -> float:
    """Mean hard loss of the labelled rows; NaN where there are none."""
    labels = torch.from_numpy(labels_B)
    labels = labels.float() if kind.has_float_labels else labels
    losses_B = hard_loss(torch.from_numpy(logits_BC), labels, kind.hard_loss)
    return float(losses_B[known(labels)].mean())


def evaluate(
    task: TaskSpec, model: torch.nn.Module, forward: Forward, split: Split, world: World, step: int
) -> EvalResult:
    """The student's metrics and loss on a split, the same on every rank. A split without labels has
    no metrics, and its loss is NaN."""
    began = time.perf_counter()
    logits_BC = student_logits(model, forward, split, world)
    runtime_s = time.perf_counter() - began
    return EvalResult(
        task=task.name,
        split=split.examples.split,
        step=step,
        num_examples=len(split),
        metrics=score(task, logits_BC, split.examples),
        loss=mean_loss(task.task_kind, logits_BC, split.examples.labels_B),
        runtime_s=runtime_s,
        logits_BC=logits_BC,
    )
