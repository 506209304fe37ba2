"""Checkpoints: written aside, all ranks meet, rank 0 renames (invariant 6).

RUN/checkpoints/step-00000042/ holds student.safetensors, optimizer.pt and state.json, and where
weights are averaged average.safetensors; RUN/checkpoints/best-00000042/ the student that is to be
kept: so far the best on the selection split, or at the end the last or the average.
"""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sead_dist.config.automatic import DEFAULT_RULES
from sead_dist.config.names import renamed
from sead_dist.config.schema import RunConfig
from sead_dist.data.order import ORDER_RULES, Cursor
from sead_dist.errors import RunError, UserError, reading, reason
from sead_dist.models.inputs import INPUT_RULES
from sead_dist.models.student import START_RULES
from sead_dist.runtime.distributed import World, barrier, from_main, gather_objects, on_every_rank
from sead_dist.runtime.run_log import read_as, write_json
from sead_dist.training import averaging
from sead_dist.training.engine import Engine

# of state.json (1: without rules, start and best_loss)
FORMAT = 2
# versions of what else decides a student than what its identity names
RULES = {
    "order": ORDER_RULES,
    "start": START_RULES,
    "input": INPUT_RULES,
    "defaults": DEFAULT_RULES,
}
# of the second stage of a method that has two (1: its optimiser state is as old as the run)
STAGE_RULES = 2


def rules_of(config: RunConfig) -> dict[str, int]:
    """The versions of the rules that decide the student of this run."""
    return {**RULES, "stages": STAGE_RULES} if config.feature_loss == "tinybert" else RULES


@dataclass(frozen=True)
class Identity:
    """What a resumed run must share with the run it continues. start: a hash of the files that the
    student starts from. rules: versions; what was written before there were any has all 1.
    copies: a hash of the copies of rows and of the embedding table that they were made with."""

    config: dict[str, Any]
    data: str
    teachers: list[dict[str, Any]]
    start: str = ""
    rules: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 1))
    copies: str = ""

    @classmethod
    def read(cls, record: Path) -> "Identity":
        """The identity in a run.json or state.json. Raises UserError where there is none."""
        saved: Identity = read_as(cls, record, "identity")
        with reading(record, "restore it, or give another output_dir"):
            _names(saved.teachers)
            return replace(saved, config=renamed(saved.config))

    def other_rules(self, other: "Identity") -> list[str]:
        """The rules that have another version in `other`. Where the two are of unlike methods, one
        may have rules that the other never has: the methods are the difference then."""
        alike = self.config.get("feature_loss") == other.config.get("feature_loss")
        names = {**self.rules, **other.rules} if alike else RULES
        return [name for name in names if self.rules.get(name, 1) != other.rules.get(name, 1)]

    def differences(self, other: "Identity") -> list[str]:
        """One phrase for each difference, `other` being what is asked for now."""
        found = [
            f"the rules of {name} were version {self.rules.get(name, 1)}, are version "
            f"{other.rules.get(name, 1)}"
            for name in self.other_rules(other)
        ]
        keys = [key for key in {**self.config, **other.config}]
        found += [
            f"{key} was {self.config.get(key)!r}, is {other.config.get(key)!r}"
            for key in keys
            if self.config.get(key) != other.config.get(key)
        ]
        if len(self.teachers) != len(other.teachers):
            found.append(f"teachers were {_names(self.teachers)}, are {_names(other.teachers)}")
        for number, (old, new) in enumerate(zip(self.teachers, other.teachers, strict=False)):
            found += [
                f"{key} of teacher {number + 1} was {_short(old[key])}, is {_short(new[key])}"
                for key in old
                if old[key] != new.get(key)
            ]
        if self.start != other.start:
            found.append(f"the student's start was {self.start[:12]}, is {other.start[:12]}")
        if self.data != other.data:
            found.append(
                f"the fingerprint of data and task was {self.data[:12]}, is {other.data[:12]}"
            )
        if self.copies != other.copies:
            before, now = (of.copies[:12] or "none" for of in (self, other))
            found.append(f"the hash of the copies of rows was {before}, is {now}")
        return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _names(teachers: list[dict[str, Any]]) -> str:
    said = [f"{entry['fingerprint'][:8]} ({'/'.join(entry['labels'])})" for entry in teachers]
    return ", ".join(said) or "none"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: `step` optimiser steps taken; cursor of the next batch; totals so far."""

    step: int = 0
    cursor: Cursor = field(default_factory=lambda: Cursor(0, 0))
    best_step: int | None = None
    best_metric: float | None = None
    best_loss: float | None = None
    world_size: int = 1
    totals: dict[str, float] = field(default_factory=dict)

    def add(self, **amounts: float) -> "TrainState":
        totals = {**self.totals}
        for name, amount in amounts.items():
            totals[name] = totals.get(name, 0.0) + amount
        return replace(self, totals=totals)


class Checkpointer:
    """Saves and finds the checkpoints of one run folder; `say` takes one-line notices."""

    def __init__(
        self,
        run: Path,
        identity: Identity,
        world: World,
        keep_last: int,
        say: Callable[[str], None],
    ) -> None:
        self.folder = run / "checkpoints"
        self.identity, self.world, self.keep_last, self.say = identity, world, keep_last, say

    def save(self, engine: Engine, state: TrainState) -> None:
        """Every rank calls this. Raises RunError on every rank when a file cannot be written; the
        checkpoints that were there stay."""
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
        """Seconds that a save takes now; nothing stays of it. Every rank calls this."""
        began = time.perf_counter()
        trial = self.folder / "trial"
        self._write_aside(trial, engine.save)
        spent_s = time.perf_counter() - began
        if self.world.is_main:
            shutil.rmtree(trial, ignore_errors=True)
        return max(gather_objects(self.world, spent_s))

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of this step is there. Every rank calls this."""
        return from_main(self.world, (self.folder / f"step-{step:08d}").is_dir)

    def save_best(self, engine: Engine, step: int) -> None:
        """Keep the student as it is now under its step's number. Every rank calls this."""
        self._write_aside(self.folder / f"best-{step:08d}", engine.save_weights)

    def save_average(self, engine: Engine, step: int) -> None:
        """Keep the student with its averaged weights under its last step's number. Every rank calls
        this."""
        self._write_aside(self.folder / f"best-{step:08d}", engine.save_average)

    def best_folder(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def _write_aside(self, final: Path, write: Callable[[Path], None]) -> None:
        aside = final.with_name(final.name + ".tmp")

        def prepare() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        def attempt() -> None:
            try:
                write(aside)
                if self.world.is_main:
                    for path in aside.iterdir():
                        _sync(path)
            except (OSError, RuntimeError, SafetensorError) as error:
                # torch and safetensors report a full disk in their own ways
                raise _cannot_save(final, error) from error

        try:
            from_main(self.world, prepare)
            on_every_rank(self.world, attempt)

            def rename() -> None:
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
                _sync(final.parent)

            from_main(self.world, rename)
        except (RunError, OSError) as error:
            barrier(self.world)
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            raise error if isinstance(error, RunError) else _cannot_save(final, error) from error

    def _prune(self, state: TrainState) -> None:
        """Remove old checkpoints, and the students that no checkpoint left names as its best."""
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

    def latest(self) -> tuple[Path, TrainState] | None:
        """The newest checkpoint that is whole, on every rank.

        Raises UserError when it belongs to a run with another identity, naming what differs.
        """

        def find() -> tuple[Path, TrainState] | None:
            for folder in sorted(self.folder.glob("step-*[0-9]"), reverse=True):
                record = self._read(folder)
                if record is not None:
                    saved = Identity.read(folder / "state.json")
                    refuse_other(self.folder.parent, saved, self.identity)
                    if record["format"] != FORMAT:
                        raise UserError(
                            f"{folder} has format {record['format']}, and this version of "
                            f"sead_dist reads format {FORMAT}; give another output_dir, or go on "
                            "with the version that wrote it"
                        )
                    state: TrainState = read_as(TrainState, folder / "state.json", "state")
                    return folder, state
            if any(self.folder.glob("step-*[0-9]")):
                self.say("no checkpoint can be used: starting over from step 0")
            return None

        return from_main(self.world, find)

    def _read(self, folder: Path) -> dict[str, Any] | None:
        """A checkpoint's record, or None, with a notice, where it is damaged."""
        try:
            record: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
            with safe_open(folder / "student.safetensors", framework="pt") as file:
                file.keys()
            torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu", mmap=True)
            if record.get("averaged"):
                with safe_open(folder / averaging.FILE, framework="pt") as file:
                    file.keys()
            step = record["state"]["best_step"]
            if step is not None and not self.best_folder(step).is_dir():
                raise OSError(f"{self.best_folder(step).name} is missing")
        except pickle.UnpicklingError:
            # never run what else it holds (invariant 9)
            self.say(f"checkpoint {folder.name}: optimizer.pt is not ours; trying an earlier one")
            return None
        except Exception as error:  # damaged bytes are whatever their readers say of them
            said = reason(error)
            self.say(f"checkpoint {folder.name} is damaged ({said}); trying an earlier one")
            return None
        return record


def refuse_other(run: Path, saved: Identity, asked: Identity) -> None:
    """Raises UserError when a run folder holds another run than the one asked for."""
    if names := saved.other_rules(asked):
        old = ", ".join(f"{name} {saved.rules.get(name, 1)}" for name in names)
        new = ", ".join(f"{name} {asked.rules.get(name, 1)}" for name in names)
        raise UserError(
            f"output_dir={run} holds a run of another version of sead_dist, with the rules {old}; "
            f"this version has {new}, under which the same settings make another student; give "
            "another output_dir, or go on with the version that began it"
        )
    different = saved.differences(asked)
    if different:
        raise UserError(
            f"output_dir={run} holds another run: {'; '.join(different[:4])}"
            + ("; ..." if len(different) > 4 else "")
            + "; give the same settings to resume it, or another output_dir"
        )


def teacher_identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a teacher's manifest that a resume compares."""
    labels = manifest["labels"]
    return {
        "fingerprint": manifest["fingerprint"],
        "labels": [labels] if isinstance(labels, str) else list(labels),
        "order": list(manifest["order"]),
        "weight": manifest["weight"],
        "numerics": manifest["numerics"],
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_save(final: Path, error: Exception) -> RunError:
    return RunError(
        f"checkpoint {final.name} cannot be written in {final.parent}: {reason(error)}; the last "
        "checkpoint is intact; free space or fix the folder, then give the same command again"
    )
