"""The steps of a sweep's runs: a comparison is fair where every method of a task takes as many.

Methods that ask no teacher have fewer rows where there is unlabelled text, and so fewer steps in as
many epochs. The run with the most steps keeps its keys; the others get its steps as max_steps, and
pass over their rows more often.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sead_dist.config.schema import RunConfig
from sead_dist.sweep.grid import Plan
from sead_dist.sweep.results import TaskData


def epoch_steps(config: RunConfig, data: TaskData) -> int:
    """Steps of one pass over the rows that a run has."""
    rows = data.train_rows + (data.unlabelled_rows if config.has_text else 0)
    return -(-rows // config.global_batch_size)


def steps_of(config: RunConfig, data: TaskData) -> int:
    """Steps of a run by its own keys, as `data.order.BatchStream` counts them."""
    return config.max_steps or config.num_train_epochs * epoch_steps(config, data)


def needs_rows(plan: Plan, task: str) -> bool:
    """Whether the data must be read to say how many steps the runs of a task take."""
    students = [unit.config for unit in plan.students(task)]
    counted = any(config.max_steps is None for config in students)
    return plan.equal_steps and counted and len({of.has_text for of in students}) > 1


def fix_steps(plan: Plan, data: Mapping[str, TaskData]) -> Plan:
    """The plan with as many steps for all students of a task as the longest has, where equal_steps
    asks for it. Tasks that `data` lacks stay as they are. A function of plan and data alone, so
    that all workers of a sweep find the same."""
    if not plan.equal_steps:
        return plan
    units, lengthened = [], {}
    longest = {
        name: max((unit.config for unit in plan.students(name)), key=lambda c: steps_of(c, of))
        for name, of in data.items()
    }
    for unit in plan.units:
        if unit.task in longest and unit.method in plan.methods:
            of, most = data[unit.task], longest[unit.task]
            own = steps_of(unit.config, of)
            if own < steps_of(most, of):
                lengthened[unit.task, unit.method] = own
                unit = replace(unit, config=as_long_as(unit.config, most, of))
        units.append(unit)
    return replace(plan, units=units, lengthened=lengthened)


def as_long_as(config: RunConfig, longest: RunConfig, data: TaskData) -> RunConfig:
    """The same run with the steps of the longest. It is scored on the selection split as often too:
    else the best student would be chosen among more of them."""
    every = config.eval_steps or epoch_steps(longest, data)
    return config.model_copy(update={"max_steps": steps_of(longest, data), "eval_steps": every})


def told_steps(plan: Plan, name: str, data: TaskData) -> str:
    """A line on the rows and the steps of a task's students."""
    steps = {unit.method: steps_of(unit.config, data) for unit in plan.students(name)}
    rows = f"{name}: {data.train_rows} labelled rows"
    if data.unlabelled_rows:
        rows += f", {data.unlabelled_rows} unlabelled ones for methods that ask teachers"
    if len(set(steps.values())) > 1:
        each = ", ".join(f"{method} {count}" for method, count in steps.items())
        return f"{rows}; steps: {each} (equal_steps=off)"
    own = of_their_own(
        {method: of for (task, method), of in plan.lengthened.items() if task == name}
    )
    return f"{rows}; every method takes {next(iter(steps.values()))} steps{own}"


def of_their_own(lengthened: Mapping[str, Any]) -> str:
    """Which methods take more steps than their own rows make."""
    if not lengthened:
        return ""
    each = ", ".join(f"{method} {steps}" for method, steps in lengthened.items())
    return f" (equal_steps=on; by their own rows: {each})"
