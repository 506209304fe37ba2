"""The steps of a sweep's runs: a comparison is fair where every method of a task takes as many.

Epochs are of the labelled rows, which all methods share. Where the length is left to the runs,
those that ask teachers take more steps, the more so with unlabelled text. The run with the most
steps keeps its keys; the others get its steps as max_steps, and pass over their rows more often.
Steps are counted with text that files of predictions do not answer, which their run leaves out. So
runs with files get as many steps as max_steps too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sead_dist.config.automatic import run_steps
from sead_dist.config.schema import RunConfig
from sead_dist.data.augmentation import rows_asked
from sead_dist.sweep.grid import Plan
from sead_dist.sweep.results import TaskData


def steps_of(config: RunConfig, data: TaskData) -> int:
    """Steps of a run by its own keys."""
    unlabelled = data.unlabelled_rows if config.has_text else 0
    return run_steps(config, data.train_rows, rows_asked(config, data.train_rows, unlabelled))


def needs_rows(plan: Plan, task: str) -> bool:
    """Whether the data must be read to say how many steps the runs of a task take."""
    students = [unit.config for unit in plan.students(task)]
    left = any(config.max_steps is None and config.num_train_epochs is None for config in students)
    unlike = len({config.taught for config in students}) > 1
    return plan.equal_steps and left and (unlike or any(map(may_leave_text_out, students)))


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
            if own < steps_of(most, of) or may_leave_text_out(unit.config):
                unit = replace(unit, config=as_long_as(unit.config, most, of))
        units.append(unit)
    return replace(plan, units=units, lengthened=lengthened)


def may_leave_text_out(config: RunConfig) -> bool:
    """Whether a run may have fewer rows than are counted here, and so fewer steps of its own."""
    left = config.max_steps is None and config.num_train_epochs is None
    files = [entry for entry in config.teachers if entry.predictions is not None]
    return left and config.taught and bool(files)


def as_long_as(config: RunConfig, longest: RunConfig, data: TaskData) -> RunConfig:
    """The same run with the steps of the longest."""
    return config.model_copy(update={"max_steps": steps_of(longest, data)})


def told_steps(plan: Plan, name: str, data: TaskData) -> str:
    """A line on the rows and the steps of a task's students."""
    configs = {unit.method: unit.config for unit in plan.students(name)}
    steps = {method: steps_of(config, data) for method, config in configs.items()}
    most = {
        method: f"{'at most ' if config.early_stopping_patience is not None else ''}{steps[method]}"
        for method, config in configs.items()
    }
    rows = f"{name}: {data.train_rows} labelled rows"
    if data.unlabelled_rows:
        rows += f", {data.unlabelled_rows} unlabelled ones for methods that ask teachers"
    if len(set(steps.values())) > 1:
        each = ", ".join(f"{method} {count}" for method, count in most.items())
        return f"{rows}; steps: {each} (equal_steps=off)"
    own = of_their_own(
        {method: of for (task, method), of in plan.lengthened.items() if task == name}
    )
    return f"{rows}; every method takes {next(iter(most.values()))} steps{own}"


def of_their_own(lengthened: Mapping[str, Any]) -> str:
    """Which methods take more steps than their own rows make."""
    if not lengthened:
        return ""
    each = ", ".join(f"{method} {steps}" for method, steps in lengthened.items())
    return f" (equal_steps=on; by their own rows: {each})"
