"""The results of a sweep so far, from its finished runs: all that report.json holds.

Shapes: B examples, C classes, S seeds, R resamples.
"""

import math
import re
import statistics
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sead_dist.config.names import renamed_record
from sead_dist.data.examples import ExampleSet
from sead_dist.data.significance import (
    Difference,
    Floats,
    compare,
    holm,
    mean_difference,
    resampled_scores,
    units_of,
)
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError, reading
from sead_dist.reporting.report import read_predictions
from sead_dist.runtime.console import counted
from sead_dist.runtime.redact import redact
from sead_dist.runtime.run_log import environment, is_finished, read_as, read_json
from sead_dist.sweep.arms import method_name
from sead_dist.sweep.ceilings import ceilings, read_teacher_scores, shares
from sead_dist.sweep.grid import TEACHERS, Grid, Unit
from sead_dist.sweep.published import FIGURES, NOTE


@dataclass(frozen=True)
class TaskData:
    """What a sweep needs of a task's data. dev: its first official split. train_rows: the labelled
    rows that students learn from. unlabelled_rows: the further rows of students with teachers.
    constant: the score of the majority baseline. fingerprints: the hash of all that a run reads, by
    its `rows_key`."""

    task: TaskSpec
    dev: ExampleSet
    train_rows: int
    unlabelled_rows: int
    constant: float
    fingerprints: dict[str, str]

    @property
    def metric(self) -> str:
        return self.task.metrics[0]

    @property
    def draws(self) -> int:
        """The seed of the bootstrap. Each task has its own, which never changes."""
        return zlib.crc32(self.task.name.encode())


@dataclass(frozen=True)
class Runs:
    """The finished students of one method on one task, and what they scored, by seed.

    resampled_SR: rows in the order of `scores`; None below two seeds.
    """

    task: str
    method: str
    scores: dict[int, float]
    summaries: Mapping[int, Mapping[str, Any]]
    resampled_SR: Floats | None


def read_runs(grid: Grid, data: TaskData, method: str) -> Runs:
    """The finished students of a method on a task. Raises UserError for a run directory whose
    files are missing or are of other data."""
    task, split = data.task.name, data.dev.split
    units = [unit for unit in grid.students(task, method) if is_finished(unit.folder)]
    scores = {unit.config.seed: score_in(unit.folder, split, data.metric) for unit in units}
    keys = dict[str, Any]
    summaries = {
        u.config.seed: renamed_record(read_as(keys, u.folder / "run_summary.json")) for u in units
    }
    resampled_SR = None
    if len(units) > 1:
        logits_SBC = [logits_of(unit, data.dev) for unit in units]
        kind = data.task.task_kind
        resampled_SR = resampled_scores(data.metric, kind, logits_SBC, data.dev, data.draws)
    return Runs(task, method, scores, summaries, resampled_SR)


def score_in(run: Path, split: str, metric: str) -> float:
    """The student's score in a finished run's scores.json. Raises UserError for one that is
    damaged."""
    path = run / "scores.json"
    with reading(path, "restore it, or train this run again"):
        return float(read_json(path)["splits"][split]["student"][metric])


def logits_of(unit: Unit, dev: ExampleSet) -> NDArray[Any]:
    """The student's logits_BC on the dev rows."""
    path = unit.folder / "predictions" / f"{dev.split}.parquet"
    predictions = read_predictions(path)
    if not np.array_equal(predictions.ids_B2, dev.ids_B2):
        raise UserError(
            f"{path} holds other rows than the {dev.split} split; give the data that the sweep was "
            "run on, or another output_dir"
        )
    return predictions.student_logits_BC


def versus(runs: Runs, reference: Runs, units: int) -> Difference | None:
    """The difference over the seeds that both have a score of. None below three seeds, because the
    spread of two is unsure. Draws on which a metric is undefined do not count."""
    theirs = {s: reference.scores.get(s, math.nan) for s in runs.scores}
    common = [s for s in runs.scores if math.isfinite(runs.scores[s] - theirs[s])]
    if len(common) < 3 or runs.resampled_SR is None or reference.resampled_SR is None:
        return None
    at, other = list(runs.scores), list(reference.scores)
    mine_SR = runs.resampled_SR[[at.index(s) for s in common]]
    theirs_SR = reference.resampled_SR[[other.index(s) for s in common]]
    defined_R = np.isfinite(mine_SR - theirs_SR).all(axis=0)
    if np.count_nonzero(defined_R) < 2:
        return None
    return compare(
        [runs.scores[s] for s in common],
        [reference.scores[s] for s in common],
        mine_SR[:, defined_R],
        theirs_SR[:, defined_R],
        units,
    )


def cell(
    runs: Runs, difference: Difference | None, seeds: Sequence[int], own_steps: int | None
) -> dict[str, Any]:
    """One task and method: scores by seed, mean, spread, difference, cost.

    own_steps: the steps by the method's own rows, where equal_steps gave it more. seconds: of
    training without waiting for teachers, median over seeds. The wait is left out because the first
    run computes the teachers' predictions, and the others read them. teacher_forwards: those that
    the runs needed, computed or read.
    """
    found, summaries = list(runs.scores.values()), list(runs.summaries.values())
    spent = [of["train_s"] - of["teacher_wait_s"] for of in summaries]
    return {
        "task": runs.task,
        "method": runs.method,
        "scores": [runs.scores.get(seed) for seed in seeds],
        "mean": statistics.mean(found) if found else None,
        "spread": statistics.stdev(found) if len(found) > 1 else None,
        **described(difference),
        "p": None if difference is None else difference.p,
        "seconds": statistics.median(spent) if spent else None,
        "teacher_forwards": sum(of["teacher_forwards"] + of["store_hits"] for of in summaries),
        "steps": max((of["steps"] for of in summaries), default=None),
        "own_steps": own_steps,
        "labelled_rows": max(
            (of["train_rows"] - of["unlabelled_rows"] - of.get("copy_rows", 0) for of in summaries),
            default=None,
        ),
        "unlabelled_rows": max((of["unlabelled_rows"] for of in summaries), default=None),
    }


def described(difference: Difference | None) -> dict[str, Any]:
    """A difference as the report holds it. Without a difference every value is None."""
    if difference is None:
        return {"difference": None, "interval": None, "beyond_chance": None}
    return {
        "difference": difference.value,
        "interval": list(difference.interval),
        "beyond_chance": difference.beyond_chance,
    }


def shared_tasks(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks that every shown method has a score of. A method without scores is not shown."""
    scored = {(of["task"], of["method"]) for of in cells if of["mean"] is not None}
    shown = {method for _, method in scored}
    tasks = dict.fromkeys(of["task"] for of in cells)
    return [task for task in tasks if shown and all((task, method) in scored for method in shown)]


def mean_over_tasks(
    method: str,
    cells: Sequence[Mapping[str, Any]],
    differences: Mapping[str, Difference],
    shared: Sequence[str],
) -> dict[str, Any]:
    """A method over the tasks that are shared, and its difference over them."""
    own = [of for of in cells if of["method"] == method and of["task"] in shared]
    scores = [of["mean"] for of in own if of["mean"] is not None]
    known = [differences[task] for task in shared if task in differences]
    over = mean_difference(known) if known and len(known) == len(shared) else None
    return {
        "method": method,
        "score": statistics.mean(scores) if scores else None,
        "tasks": len(scores),
        **described(over),
    }


def remarks(grid: Grid, tasks: Collection[str]) -> list[dict[str, Any]]:
    """The remarks of the finished students' cards, each once, with the seeds that have it."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for unit in grid.units:
        if unit.task in tasks and unit.method != TEACHERS and is_finished(unit.folder):
            path = unit.folder / "scores.json"
            with reading(path, "restore it, or train this run again"):
                for line in read_json(path).get("remarks") or ():
                    key = (unit.task, unit.method, str(redact(without_figures(line))))
                    seeds.setdefault(key, []).append(unit.config.seed)
    return [
        {"task": task, "method": method, "seeds": ", ".join(map(str, of)), "remark": line}
        for (task, method, line), of in seeds.items()
    ]


def without_figures(line: str) -> str:
    """A remark without the figures behind its colon, which differ from seed to seed."""
    return re.sub(r": [a-z0-9_]+ [-+]?\d.*", "", line)


def failures(grid: Grid) -> list[dict[str, Any]]:
    """The runs that failed when they were last tried."""
    return [
        {**place(unit), "reason": redact(str(read_as(dict[str, Any], unit.failure).get("reason")))}
        for unit in grid.units
        if unit.failure.is_file() and not is_finished(unit.folder)
    ]


def place(unit: Unit) -> dict[str, Any]:
    """Which run it is: task, method, seed."""
    return {"task": unit.task, "method": unit.method, "seed": unit.config.seed}


def missing(grid: Grid, failed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The places of the students that are neither finished nor failed."""
    excused = [{key: of[key] for key in ("task", "method", "seed")} for of in failed]
    students = [unit for unit in grid.units if unit.method != TEACHERS]
    return [
        place(unit)
        for unit in students
        if place(unit) not in excused and not is_finished(unit.folder)
    ]


def compared(
    grid: Grid, data: Mapping[str, TaskData]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Difference]], int]:
    """(a cell for each task and method, with Holm's p; by method, each task's difference from the
    reference; the largest number of ranks of a run)."""
    cells: list[dict[str, Any]] = []
    differences: dict[str, dict[str, Difference]] = {method: {} for method in grid.methods}
    ranks = 0
    for task, of in data.items():
        runs = {
            method: read_runs(grid, of, method)
            for method in grid.methods
            if (task, method) not in grid.unfit
        }
        for method, found in runs.items():
            difference = None
            if grid.reference in runs and method != grid.reference:
                difference = versus(found, runs[grid.reference], int(units_of(of.dev).max()) + 1)
            if difference is not None:
                differences[method][task] = difference
            own_steps = grid.lengthened.get((task, method))
            cells.append(cell(found, difference, grid.seeds, own_steps))
            ranks = max([ranks, *(s["world_size"] for s in found.summaries.values())])
    add_holm(cells, differences)
    return cells, differences, ranks


def task_facts(task: str, of: TaskData) -> dict[str, Any]:
    """What the report shows of a task's data."""
    return {
        "name": task,
        "metric": of.metric,
        "dev_rows": len(of.dev),
        "train_rows": of.train_rows,
        "unlabelled_rows": of.unlabelled_rows,
        "constant": of.constant,
    }


def scores_of(grid: Grid, data: Mapping[str, TaskData], device: str) -> dict[str, Any]:
    """All that report.json holds; scores are fractions. data: of each task that has students.

    Raises UserError for a finished run whose files are missing or are of other data.
    """
    cells, differences, ranks = compared(grid, data)
    shared = shared_tasks(cells)
    taught = [
        found
        for task, of in data.items()
        for found in read_teacher_scores(grid, task, of.dev.split, of.metric)
    ]
    failed = failures(grid)
    return {
        "title": f"{counted(len(data), 'task')}, {counted(len(grid.methods), 'method')}, "
        f"{counted(len(grid.seeds), 'seed')}",
        "command": ["sead-dist", "sweep", *(redact(word) for word in grid.words)],
        "made_with": {**versions(), "device": device},
        "ranks": ranks,
        "seeds": grid.seeds,
        "methods": grid.methods,
        "reference": grid.reference,
        "arms": [
            {"name": arm.name, "method": method_name(arm.method), "keys": redact(arm.keys)}
            for arm in grid.arms
        ],
        "equal_steps": grid.equal_steps,
        "selected_on_dev": any(unit.config.selection.split == "dev" for unit in grid.units),
        "tasks": [task_facts(task, of) for task, of in data.items()],
        "cells": cells,
        "mean_tasks": shared,
        "means": [mean_over_tasks(name, cells, differences[name], shared) for name in grid.methods],
        "ceilings": ceilings(taught),
        "shares": shares(taught, cells, grid.seeds),
        "published": [
            {"task": of.task, "who": of.who, "metric": of.metric, "score": of.score, "note": NOTE}
            for of in FIGURES
            if of.task in data
        ],
        "remarks": remarks(grid, data),
        "failed": failed,
        "missing": missing(grid, failed),
        "not_applicable": [
            {"task": task, "method": method, "reason": reason}
            for (task, method), reason in grid.unfit.items()
        ],
    }


def add_holm(
    cells: Sequence[dict[str, Any]], differences: Mapping[str, Mapping[str, Difference]]
) -> None:
    """Add `p_holm` to every compared cell: its p by Holm's correction for all of them."""
    found = [(of, differences[of["method"]].get(of["task"])) for of in cells]
    ps = [(of, one.p_among) for of, one in found if one is not None and one.p_among is not None]
    for (of, _), p in zip(ps, holm([p for _, p in ps]), strict=True):
        of["p_holm"] = p


def versions() -> dict[str, str | None]:
    """The versions that a report names."""
    found = environment()["versions"]
    return {name: found.get(name) for name in ("sead_dist", "torch", "transformers")}
