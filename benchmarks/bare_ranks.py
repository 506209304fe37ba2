"""The loops that a person would write by hand, on every rank at once: rates, reading of weights."""

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import TEACHER_ROWS, load, pad, random_batches, rows_of
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from sead_dist.runtime.distributed import World, barrier, gather_objects

BATCH = 32


def slowest(world: World, do: Callable[[], None]) -> float:
    """Seconds until the last rank has done it, all beginning together."""
    barrier(world)
    began = time.perf_counter()
    do()
    return max(gather_objects(world, time.perf_counter() - began))


def give_back_memory() -> None:
    """What the allocator keeps of freed memory goes back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class Bare:
    """The bare loops over this rank's share of the rows."""

    def __init__(self, setting: dict[str, Any], world: World) -> None:
        self.world, self.student = world, setting["student"]
        texts, self.labels = rows_of(Path(setting["data"]) / "train.tsv")
        self.words = AutoTokenizer.from_pretrained(setting["student"])
        self.tokens = self.words(texts, truncation=True, max_length=128)["input_ids"]
        self.lengths_R = np.array([len(row) for row in self.tokens])

    def teacher_row_s(self, folder: str, rows: int | None = None) -> float:
        """Seconds of a row, all ranks working on rows of their own."""
        model = load(Path(folder), "fp32").eval()
        mine_R = np.arange(len(self.tokens))[self.world.rank :: self.world.size][:rows]
        mine_R = mine_R[np.argsort(-self.lengths_R[mine_R], kind="stable")]

        @torch.inference_mode()
        def forward() -> None:
            for start in range(0, len(mine_R), TEACHER_ROWS):
                model(**pad(self.tokens, mine_R[start : start + TEACHER_ROWS], self.words))

        return slowest(self.world, forward) / len(self.tokens)

    def student_row_s(self, rows: int | None = None) -> float:
        """Seconds of a row in training, gradients exchanged."""
        model = load(Path(self.student), "fp32").train()
        step_model = DistributedDataParallel(model) if self.world.size > 1 else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        labels = torch.tensor(self.labels)

        def epoch() -> None:
            for which_R in random_batches(len(self.lengths_R[:rows]), BATCH, 0):
                if len(which_R) < BATCH:
                    continue
                mine_R = which_R[self.world.rank :: self.world.size]
                logits = step_model(**pad(self.tokens, mine_R, self.words)).logits
                torch.nn.functional.cross_entropy(logits, labels[mine_R]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

        return slowest(self.world, epoch) / (len(self.tokens) // BATCH * BATCH)

    def warm_up(self, folders: list[str], shapes: list[str]) -> None:
        """A few batches of each, and the memory given back: neither side pays for being first."""
        for folder in dict(zip(shapes, folders, strict=True)).values():
            self.teacher_row_s(folder, 2 * TEACHER_ROWS)
        self.student_row_s(2 * BATCH)
        give_back_memory()

    def teachers_row_s(self, folders: list[str], shapes: list[str]) -> float:
        """Seconds of a row in all teachers: one of each shape is measured."""
        one_of = dict(zip(shapes, folders, strict=True))
        count = Counter(shapes)
        return sum(count[shape] * self.teacher_row_s(one_of[shape]) for shape in count)


def read_weights(folders: list[str], world: World) -> float:
    """Seconds in which every rank reads an equal share of the teachers once."""
    mine = folders[world.rank :: world.size]
    return slowest(world, lambda: [load(Path(folder), "fp32") for folder in mine] and None)
