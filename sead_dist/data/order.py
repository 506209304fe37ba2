"""The order of rows: tokenised examples -> Batch, and the Cursor of the place where a run is.

The order is a pure function of the number of rows, seed, epoch and global batch size (invariant 1).
The number of ranks, prefetched rows and restarts do not change it. A global batch is a uniform
random sample of the epoch's rows. Lengths determine only how it is cut into micro-batches.

Shapes: B rows of a micro-batch, L tokens, U unique examples (entries), K text rows per example,
S steps of an epoch, G rows of a global batch, M micro-batches of a global batch.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sead_dist.data.examples import ExampleSet, entries
from sead_dist.data.tokens import TokenTable, tokenize
from sead_dist.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Cursor:
    """The place of the next step: batch `batch` of epoch `epoch`. All before it are trained."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class Split:
    """One example set as a run uses it. entry_B: each row's unique example. ids_U2: the ids of
    the unique examples. row_U: the first row of each. tokens: the student's."""

    examples: ExampleSet
    tokens: TokenTable
    ids_U2: np.ndarray
    entry_B: np.ndarray
    row_U: np.ndarray

    def __len__(self) -> int:
        return len(self.examples.labels_B)


def make_split(
    examples: ExampleSet, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Split:
    """Tokenise examples into a split. Equal examples become one entry."""
    ids_U2, entry_B = entries(examples.ids_B2)
    row_U = np.zeros(len(ids_U2), np.int64)
    # backwards, so that the first row of equal ones stands for them
    row_U[entry_B[::-1]] = np.arange(len(entry_B))[::-1]
    tokens = tokenize(tokenizer, examples, max_length)
    return Split(examples, tokens, ids_U2, entry_B, row_U)


def epoch_order(count: int, seed: int, epoch: int, global_batch: int) -> np.ndarray:
    """The rows of each step of an epoch, order_SG: a permutation of `count` rows, cut into batches.

    The last batch has -1 where it has no row.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    steps = -(-count // global_batch)
    order_SG = np.full(steps * global_batch, -1, np.int64)
    order_SG[:count] = random.permutation(count)
    return order_SG.reshape(steps, global_batch)


def cut_by_tokens(lengths_G: np.ndarray, parts: int) -> list[int]:
    """Cut rows that are sorted by length, longest first, into at most `parts` groups. Returns the
    number of rows of each group. The largest number of padded tokens in a group is minimal.

    Groups of equal tokens keep ranks equally busy, and waste less padding than groups of equal
    rows. (Our own: a search for the least bound on tokens for which `parts` groups suffice, where
    groups are filled from the longest row on.)
    """
    if len(lengths_G) == 0:
        return []

    def filled(bound: int) -> list[int]:
        counts: list[int] = []
        start = 0
        while start < len(lengths_G):
            counts.append(min(bound // max(int(lengths_G[start]), 1), len(lengths_G) - start))
            start += counts[-1]
        return counts

    longest = max(int(lengths_G[0]), 1)
    bounds = range(longest, longest * -(-len(lengths_G) // parts))
    place = bisect_left(bounds, True, key=lambda bound: len(filled(bound)) <= parts)
    return filled(longest + place)


def cut_into_micro_batches(
    rows_G: np.ndarray, lengths_G: np.ndarray, parts: int
) -> list[np.ndarray]:
    """rows_B of each of `parts` micro-batches of a global batch, longest rows first. The last ones
    have no rows where the batch has too few. The cut does not depend on the number of ranks."""
    by_length_G = rows_G[np.argsort(-lengths_G, kind="stable")]
    ends = np.cumsum(cut_by_tokens(-np.sort(-lengths_G), parts))
    cut = np.split(by_length_G, ends[:-1]) if len(ends) else []
    return [*cut, *[np.zeros(0, np.int64)] * (parts - len(cut))]


@dataclass(frozen=True)
class Batch:
    """A micro-batch. step: the global batch's number in the run; micro: which part of it.

    inputs: tensors [B*K, L]. labels_B: int64 (-1 unlabelled) or float32 (NaN unlabelled).
    valid_B: False for rows that only fill the shape. entries_B: the unique example of each row.
    routes_B: the teacher that each row names, where the run is routed.
    """

    step: int
    micro: int
    entries_B: "torch.Tensor"
    inputs: "dict[str, torch.Tensor]"
    labels_B: "torch.Tensor"
    valid_B: "torch.Tensor"
    routes_B: "torch.Tensor | None"


def make_batch(split: Split, rows_B: np.ndarray, step: int = 0, micro: int = 0) -> Batch:
    """The micro-batch of these rows (-1: a filler), padded to its own longest row."""
    import torch

    valid_B = rows_B >= 0
    # a filler is a copy of a valid row, or of the shortest row where there is none
    stand_in = rows_B[valid_B][0] if valid_B.any() else int(split.tokens.lengths_B().argmin())
    filled_B = np.where(valid_B, rows_B, stand_in)
    length = int(split.tokens.lengths_B()[filled_B].max())
    routes_B = split.examples.routes_B
    labels_B = split.examples.labels_B[filled_B]
    if labels_B.dtype == np.float64:
        labels_B = labels_B.astype(np.float32)
    return Batch(
        step=step,
        micro=micro,
        entries_B=torch.from_numpy(split.entry_B[filled_B].astype(np.int64)),
        inputs=split.tokens.pad(filled_B, length),
        labels_B=torch.from_numpy(labels_B.copy()),
        valid_B=torch.from_numpy(valid_B.copy()),
        routes_B=None if routes_B is None else torch.from_numpy(routes_B[filled_B].copy()),
    )


@dataclass(frozen=True)
class Step:
    """One global batch: this rank's micro-batches, and how many valid rows all ranks have."""

    number: int
    cursor_after: Cursor
    batches: list[Batch]
    valid_rows: int


class BatchStream:
    """The run's global batches in their order, and this rank's share of each.

    A global batch makes global_batch / micro_batch micro-batches of about equal padded tokens.
    Rank r takes micro-batches r, r + size, .... Every rank must do the same number of forwards. So
    ranks that would have fewer get micro-batches of one filler.

    epochs: passes over the split's rows; they count where max_steps is None.
    """

    def __init__(
        self,
        split: Split,
        seed: int,
        global_batch: int,
        micro_batch: int,
        epochs: int | None,
        max_steps: int | None,
        rank: int,
        size: int,
    ) -> None:
        if len(split) == 0:
            raise UserError(
                "the training split is empty; lower selection.fraction or give more rows"
            )
        self.split = split
        self.seed = seed
        self.global_batch = global_batch
        self.parts = global_batch // micro_batch
        self.rank, self.size = rank, size
        self.lengths_B = split.tokens.lengths_B()
        self.steps_per_epoch = -(-len(split) // global_batch)
        whole = (epochs or 1) * self.steps_per_epoch
        self.total_steps = whole if max_steps is None else max_steps
        self._order: tuple[int, np.ndarray] | None = None

    def order_SG(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(len(self.split), self.seed, epoch, self.global_batch)
            self._order = (epoch, order)
        return self._order[1]

    def cursor(self, step: int) -> Cursor:
        return Cursor(*divmod(step, self.steps_per_epoch))

    def rows(self, step: int) -> np.ndarray:
        """The rows of a global batch, in the order of the epoch."""
        at = self.cursor(step)
        rows_G = self.order_SG(at.epoch)[at.batch]
        return np.asarray(rows_G[rows_G >= 0])

    def micro_batches(self, step: int) -> list[np.ndarray]:
        """rows_B of each micro-batch of a step, over all ranks; the last ones may have none."""
        rows_G = self.rows(step)
        return cut_into_micro_batches(rows_G, self.lengths_B[rows_G], self.parts)

    def micro_count(self) -> int:
        """Micro-batches per step and rank."""
        return -(-self.parts // self.size)

    def step(self, number: int) -> Step:
        rows_MB = self.micro_batches(number)
        batches = []
        for turn in range(self.micro_count()):
            micro = turn * self.size + self.rank
            rows_B = rows_MB[micro] if micro < len(rows_MB) else rows_MB[0][:0]
            if len(rows_B) == 0:
                rows_B = np.array([-1])
            batches.append(make_batch(self.split, rows_B, number, micro))
        return Step(number, self.cursor(number + 1), batches, sum(map(len, rows_MB)))

    def windows(self, start: int, most_rows: int) -> Iterator[range]:
        """Ranges of steps from `start` on, each of at most `most_rows` rows (at least one step).

        A window ends with its epoch, because the store may hold later predictions by then.
        """
        per_window = max(1, most_rows // self.global_batch)
        while start < self.total_steps:
            epoch_end = (self.cursor(start).epoch + 1) * self.steps_per_epoch
            stop = min(start + per_window, epoch_end, self.total_steps)
            yield range(start, stop)
            start = stop

    def entries(self, steps: Sequence[int] | range) -> np.ndarray:
        """The unique examples of these steps, ascending."""
        rows = np.concatenate([self.rows(step) for step in steps])
        return np.unique(self.split.entry_B[rows])


def padding_waste(batches: Sequence[Batch]) -> tuple[int, int]:
    """(padding tokens, all tokens) of these micro-batches, fillers counted as padding."""
    used = total = 0
    for batch in batches:
        mask = batch.inputs["attention_mask"]
        choices = mask.shape[0] // batch.valid_B.shape[0]
        used += int((mask.reshape(-1, choices * mask.shape[1]).sum(1) * batch.valid_B).sum())
        total += mask.numel()
    return total - used, total


def micro_batch_seed(seed: int, step: int, micro: int) -> int:
    """The generator's seed before a micro-batch. It does not depend on the rank that computes it.

    (Our own mixing: three odd 64-bit multipliers, folded to 63 bits.)
    """
    mixed = (seed + 1) * 0x9E3779B97F4A7C15
    mixed ^= (step + 1) * 0xC2B2AE3D27D4EB4F
    mixed ^= (micro + 1) * 0x165667B19E3779F9
    return (mixed ^ (mixed >> 31)) & (2**63 - 1)
