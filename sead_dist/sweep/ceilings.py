"""The scores of a sweep's teachers, and how much of their lead students with teachers keep. The
lead is that over students without teachers.

Arms that combine teachers differently have different ensembles. So each arm is compared with its
own.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sead_dist.errors import reading
from sead_dist.objectives.weightings import WEIGHTINGS
from sead_dist.runtime.run_log import is_finished, read_json
from sead_dist.sweep.grid import Grid


@dataclass(frozen=True)
class TeacherScores:
    """What a finished student's run records of its teachers, by a task's metric on the dev split.

    kind: how teachers are combined (`ensemble`). alone: the ensemble has one teacher. teachers: the
    score of each teacher that has predictions. ensemble: its score; None where no row has
    predictions of all teachers. whole: the scores are on all rows that the student is scored on.
    """

    task: str
    method: str
    seed: int
    kind: str
    alone: bool
    teachers: Mapping[str, float]
    ensemble: float | None
    whole: bool = True


def read_teacher_scores(grid: Grid, task: str, split: str, metric: str) -> list[TeacherScores]:
    """The records of all finished students of a task that had teachers. Raises UserError for a run
    without a readable scores.json."""
    found = []
    for unit in grid.students(task):
        if not unit.config.taught or not is_finished(unit.folder):
            continue
        path = unit.folder / "scores.json"
        with reading(path, "restore it, or train this run again"):
            scores = read_json(path)["splits"][split]
            teachers, ensemble = scores["teachers"], scores["ensemble"]
            found.append(
                TeacherScores(
                    task,
                    unit.method,
                    unit.config.seed,
                    kind=unit.config.ensemble,
                    alone=WEIGHTINGS[unit.config.ensemble].one_teacher,
                    teachers={
                        str(of["name"]): float(of["metrics"][metric])
                        for of in teachers
                        if of["metrics"]
                    },
                    ensemble=float(ensemble[metric]) if ensemble else None,
                    whole="ensemble_rows" not in scores
                    and not any("rows" in of for of in teachers),
                )
            )
    return found


def ceilings(found: Sequence[TeacherScores]) -> list[dict[str, Any]]:
    """For each task the score of each teacher and of each kind of ensemble, as recorded in the
    first run that has it. Kinds with equal scores on every task share a row."""
    kinds = {of.kind: of for of in found if not of.alone and of.ensemble is not None}
    tasks = list(dict.fromkeys(of.task for of in found))
    first: dict[tuple[str, str], float] = {}
    for of in found:
        for name, score in of.teachers.items():
            first.setdefault((of.task, name), score)
    by_kind: dict[tuple[str, str], float] = {}
    for of in found:
        if of.kind in kinds and of.ensemble is not None:
            by_kind.setdefault((of.task, of.kind), of.ensemble)
    alike: dict[tuple[float | None, ...], list[str]] = {}
    for kind in kinds:
        alike.setdefault(tuple(by_kind.get((task, kind)) for task in tasks), []).append(kind)
    for names in alike.values():
        for task in tasks:
            if (task, names[0]) in by_kind:
                first[task, f"ensemble ({', '.join(names)})"] = by_kind[task, names[0]]
    return [
        {"task": task, "who": who, "score": score}
        for task in tasks
        for (of, who), score in first.items()
        if of == task
    ]


def shares(
    found: Sequence[TeacherScores], cells: Iterable[Mapping[str, Any]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """For each task, how much of the gap over each arm without teachers each arm with teachers
    keeps. Only seeds with both scores count: a run may have ended after `cells` were read."""
    scores = {
        (of["task"], of["method"]): dict(zip(seeds, of["scores"], strict=True)) for of in cells
    }
    taught = dict.fromkeys((of.task, of.method) for of in found)
    rows = []
    for task, method in taught:
        mine = scores.get((task, method), {})
        own = [
            of for of in found if (of.task, of.method) == (task, method) and has_ensemble_score(of)
        ]
        own = [of for of in own if mine.get(of.seed) is not None]
        for (where, other), without in scores.items():
            common = [of for of in own if without.get(of.seed) is not None]
            if where == task and (task, other) not in taught and common:
                kept = mean_shares(common, mine, without)
                rows.append({"task": task, "method": method, "over": other, **kept})
    return rows


def has_ensemble_score(of: TeacherScores) -> bool:
    """Whether a run has an ensemble's score, on all rows that the student is scored on."""
    return of.whole and of.ensemble is not None


def mean_shares(
    common: Sequence[TeacherScores], mine: Mapping[int, Any], without: Mapping[int, Any]
) -> dict[str, float | None]:
    """Means over these runs' seeds. ensemble, best: the score of the run's own ensemble, and of the
    best of its teachers. of_ensemble, of_best: the share of the gap to each that the student keeps,
    above 1 where the student is better; None where there is no gap."""
    base = statistics.mean(without[of.seed] for of in common)
    gain = statistics.mean(mine[of.seed] for of in common) - base
    ensemble = statistics.mean(of.ensemble or 0.0 for of in common)
    best = statistics.mean(max(of.teachers.values()) for of in common)
    return {
        "ensemble": ensemble,
        "best": best,
        "of_ensemble": share(gain, ensemble - base),
        "of_best": share(gain, best - base),
    }


def share(gain: float, gap: float) -> float | None:
    """gain / gap; None where the gap is no more than rounding."""
    return gain / gap if gap > 1e-9 else None
