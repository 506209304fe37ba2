"""How much longer a sweep takes, by what its finished runs took."""

import statistics
from typing import Any

from sead_dist.runtime.console import clock, counted
from sead_dist.runtime.run_log import is_finished, read_as
from sead_dist.sweep.grid import Plan, Unit
from sead_dist.sweep.rounds import is_done


def time_left(plan: Plan, workers: int) -> str:
    """What is left in words: "12 runs left, about 1.5 h". workers: processes at work now.

    A run takes the median of the finished ones of its task and method. Where there is none, it
    takes that of its task's other students. Where there are none either, nothing is said of it.
    """
    spent: dict[tuple[str, str], list[float]] = {}
    left = []
    for unit in plan.units:
        if is_finished(unit.folder):
            summary = read_as(dict[str, Any], unit.folder / "run_summary.json")
            spent.setdefault((unit.task, unit.method), []).append(float(summary["train_s"]))
        if not is_done(plan, unit):
            left.append(unit)
    told = f"{counted(len(left), 'run')} left"
    expected = [of_run(unit, plan, spent) for unit in left]
    known = [seconds for seconds in expected if seconds is not None]
    if not known:
        return told
    about = "about" if len(known) == len(left) else "at least"
    return f"{told}, {about} {clock(sum(known) / workers)}"


def of_run(unit: Unit, plan: Plan, spent: dict[tuple[str, str], list[float]]) -> float | None:
    """Seconds that a run will take; None where nothing like it is finished."""
    own = spent.get((unit.task, unit.method), [])
    if not own and unit.method in plan.methods:
        own = [s for method in plan.methods for s in spent.get((unit.task, method), [])]
    return statistics.median(own) if own else None
