"""Checkpoints: all ranks write aside, then agree, then rank 0 renames the folder (invariant 6).

RUN/checkpoints/step-00000042/ holds student.safetensors, optimizer.pt and state.json, and
average.safetensors if weights are averaged. RUN/checkpoints/best-00000042/ holds the student that
is to be kept: the best so far on the selection split, or at the end the last or the average.
"""

import json
import pickle
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sead_dist.config.names import renamed_record
from sead_dist.data.order import Cursor
from sead_dist.errors import RunError, UserError, reason
from sead_dist.runtime.distributed import World, barrier, from_main, gather_objects, on_every_rank
from sead_dist.runtime.files import put_folder, sync
from sead_dist.runtime.run_log import RunLog, read_as, steps_done, tell, write_json
from sead_dist.training.engine import AVERAGE_FILE, Engine
from sead_dist.training.identity import Identity, reject_other

# the format of state.json (1: without rules, start and best_loss)
FORMAT = 2
# without save_steps a state is saved so often, for at most this share of the time
SAVE_EVERY_S, SAVE_SHARE = 60.0, 0.02


@dataclass(frozen=True)
class TrainState:
    """The state of a run after `step` optimiser steps.

    cursor: of the next batch. totals: sums so far. lowest_loss: the lowest loss on the selection
    split at the steps that count for early_stopping_patience. lowest_step: the step of that loss.
    losses_without_fall: how many such losses have followed it.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=lambda: Cursor(0, 0))
    best_step: int | None = None
    best_metric: float | None = None
    best_loss: float | None = None
    lowest_loss: float | None = None
    lowest_step: int | None = None
    losses_without_fall: int = 0
    world_size: int = 1
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, **amounts: float) -> "TrainState":
        totals = {**self.totals}
        for name, amount in amounts.items():
            totals[name] = totals.get(name, 0.0) + amount
        return replace(self, totals=totals)


class Checkpointer:
    """Saves and finds the checkpoints of one run directory."""

    def __init__(self, run: Path, identity: Identity, world: World, keep_last: int) -> None:
        self.folder = run / "checkpoints"
        self.identity, self.world, self.keep_last = identity, world, keep_last

    def save(self, engine: Engine, state: TrainState) -> None:
        """Save a checkpoint. Every rank calls this. Raises RunError on every rank where a file
        cannot be written; earlier checkpoints stay."""
        record = {
            "format": FORMAT,
            "state": {**asdict(state), "world_size": self.world.size},
            "identity": asdict(self.identity),
            "averaged": engine.average.count if engine.average is not None else 0,
        }

        def write(folder: Path) -> None:
            engine.save(folder)
            if self.world.is_main:
                write_json(folder / "state.json", record)

        self._write_aside(self.folder / f"step-{state.step:08d}", write)
        if self.world.is_main:
            self._prune(state)

    def measure(self, engine: Engine) -> float:
        """Seconds that a save takes now. Its files are removed. Every rank calls this."""
        began = time.perf_counter()
        trial = self.folder / "trial"
        self._write_aside(trial, engine.save)
        spent_s = time.perf_counter() - began
        if self.world.is_main:
            shutil.rmtree(trial, ignore_errors=True)
        return max(gather_objects(self.world, spent_s))

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of this step. Every rank calls this."""
        return from_main(self.world, (self.folder / f"step-{step:08d}").is_dir)

    def save_best(self, engine: Engine, step: int, averaged: bool = False) -> None:
        """Save the student under the number of its step, with its present or its averaged weights.
        Every rank calls this."""
        self._write_aside(self.best_folder(step), partial(engine.save_weights, averaged=averaged))

    def best_folder(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def _write_aside(self, final: Path, write: Callable[[Path], None]) -> None:
        # all ranks write into it, so its name is not random
        aside = final.with_name(final.name + ".tmp")

        def prepare() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        def attempt() -> None:
            try:
                write(aside)
                if self.world.is_main:
                    for path in aside.iterdir():
                        sync(path)
            except (OSError, RuntimeError, SafetensorError) as error:
                # torch and safetensors report a full disk in their own ways
                raise _cannot_save(final, error) from error

        try:
            from_main(self.world, prepare)
            on_every_rank(self.world, attempt)

            from_main(self.world, lambda: put_folder(aside, final))
        except (RunError, OSError) as error:
            barrier(self.world)
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise error if isinstance(error, RunError) else _cannot_save(final, error) from error

    def _prune(self, state: TrainState) -> None:
        """Remove old checkpoints, and the students that no remaining checkpoint names as its
        best."""
        steps = sorted(self.folder.glob("step-*[0-9]"))
        for old in steps[: -self.keep_last]:
            shutil.rmtree(old, ignore_errors=True)
        needed = {state.best_step}
        for kept in steps[-self.keep_last :]:
            with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
                needed.add(
                    json.loads((kept / "state.json").read_text("utf-8"))["state"]["best_step"]
                )
        names = {self.best_folder(step) for step in needed if step is not None}
        for old in self.folder.glob("best-*[0-9]"):
            if old not in names:
                shutil.rmtree(old, ignore_errors=True)

    def is_empty(self) -> bool:
        """Whether there is no checkpoint yet, whole or damaged. One rank may call this alone."""
        return not any(self.folder.glob("step-*[0-9]"))

    def latest(self) -> tuple[Path, TrainState] | None:
        """The newest whole checkpoint and its state, the same on every rank; None where there is
        none.

        Raises UserError for a checkpoint of a run with another identity, with the differences, and
        for one of another format.
        """

        def find() -> tuple[Path, TrainState] | None:
            for folder in sorted(self.folder.glob("step-*[0-9]"), reverse=True):
                record = self._read(folder)
                if record is not None:
                    saved = Identity.read(folder / "state.json")
                    reject_other(self.folder.parent, saved, self.identity)
                    if record["format"] != FORMAT:
                        raise UserError(
                            f"{folder} has format {record['format']}, and this version of "
                            f"sead_dist reads format {FORMAT}; give another output_dir, or resume "
                            "with the version that wrote it"
                        )
                    state: TrainState = read_as(TrainState, folder / "state.json", "state")
                    return folder, replace(state, totals=renamed_record(state.totals))
            if any(self.folder.glob("step-*[0-9]")):
                tell("no checkpoint can be used: the run starts again at step 0")
            return None

        return from_main(self.world, find)

    def resume(self, engine: Engine, log: RunLog, total_steps: int) -> TrainState:
        """The state to start from: that of the newest checkpoint, which the engine loads, or a new
        one. Lines of later steps are removed from the log."""
        found, taken = self.latest(), steps_done(self.folder.parent)
        if found is None:
            if taken > 0:
                tell(f"starting at step 0: nothing was saved; {taken} steps are repeated")
            log.truncate_after(0)
            return TrainState(world_size=self.world.size)
        folder, state = found
        engine.load(folder)
        log.truncate_after(state.step)
        repeated = taken - state.step
        lost = f"; {repeated} steps taken after it are repeated" if repeated > 0 else ""
        tell(f"resuming at step {state.step} of {total_steps} ({folder.name}){lost}")
        return state

    def _read(self, folder: Path) -> dict[str, Any] | None:
        """A checkpoint's record. None where it is damaged, with a notice."""
        try:
            record: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
            with safe_open(folder / "student.safetensors", framework="pt") as file:
                file.keys()
            torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
            if record.get("averaged"):
                with safe_open(folder / AVERAGE_FILE, framework="pt") as file:
                    file.keys()
            step = record["state"]["best_step"]
            if step is not None and not self.best_folder(step).is_dir():
                raise OSError(f"{self.best_folder(step).name} is missing")
        except pickle.UnpicklingError:
            # code in it is never run (invariant 9)
            tell(f"checkpoint {folder.name} is skipped: sead_dist did not write its optimizer.pt")
            return None
        except Exception as error:  # damaged bytes raise whatever their readers raise
            said = reason(error)
            tell(f"checkpoint {folder.name} is damaged ({said}); trying an earlier one")
            return None
        return record


class SaveClock:
    """When a state is due: a minute after the last one, or later if saving would take more than
    2% of the time. The clocks of ranks differ, so only rank 0's is used (invariant 8)."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._last = now()
        self._cost_s = 0.0

    def due(self) -> bool:
        """Whether a state should be saved after this step."""
        return self._now() - self._last >= max(SAVE_EVERY_S, self._cost_s / SAVE_SHARE)

    def save(self, write: Callable[[], None]) -> None:
        """Save with `write`, and keep the time that it took."""
        began = self._now()
        write()
        self._last = self._now()
        self._cost_s = self._last - began


def _cannot_save(final: Path, error: Exception) -> RunError:
    return RunError(
        f"checkpoint {final.name} cannot be written in {final.parent}: {reason(error)}; the last "
        "checkpoint is intact; free space or fix the folder, then give the same command again"
    )
