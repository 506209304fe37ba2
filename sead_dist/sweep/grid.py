"""A sweep is a list of runs: teachers first, then students of every task, arm and seed.

An arm is a method, with keys of its own if any. The sweep's own keys stand in configs/sweep.yaml.
All other keys are those of its runs.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sead_dist.config.load import (
    config_folder,
    merge,
    read_layers,
    resolve,
    run_plugins,
    shipped_files,
)
from sead_dist.config.mistakes import explain
from sead_dist.config.names import known_names
from sead_dist.config.schema import RunConfig, SweepConfig, TeacherConfig
from sead_dist.config.yaml_text import read_yaml
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.objectives.ensemble import method_problem
from sead_dist.reporting.hub import reject_push
from sead_dist.runs.checks import (
    reject_unused_text,
    teacher_layers,
    teacher_runs,
    without_teachers_text,
)
from sead_dist.sweep.arms import FINETUNE, Arm, keys_by_arm, read_arms, reference_of

TEACHERS = "teachers"
# folders of OUTPUT and of OUTPUT/TASK that belong to no task or method
TAKEN = ("report", "store", TEACHERS)
# the most seeds of a sweep that are given as a number
MOST_SEEDS = 1000
Layers = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Unit:
    """One run of a sweep. method: an arm's name, or TEACHERS where the run fine-tunes a teacher.
    needs: the run directories that must be finished before. A round is all methods of one task and
    seed."""

    task: str
    method: str
    config: RunConfig
    needs: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def round(self) -> tuple[str, int] | None:
        """(task, seed); None where the run fine-tunes a teacher."""
        return None if self.method == TEACHERS else (self.task, self.config.seed)

    @property
    def title(self) -> str:
        return f"{self.task} {self.method} {self.folder.name}"

    @property
    def failure(self) -> Path:
        """The file that holds the reason why this run failed when it was last tried."""
        return self.folder.with_name(f"{self.folder.name}.failed.json")


@dataclass(frozen=True)
class Grid:
    """All runs of a sweep. units: in the order in which they are run. unfit: (task, method) -> why
    the method is not run on the task. own_teachers: whether the sweep fine-tunes the teachers.
    equal_steps: whether all methods of a task take the same number of steps. methods: the names of
    the arms. reference: one of them, or None. unread: tasks whose encoders are not fine-tuned,
    because no method needs a teacher. lengthened: (task, method) -> the method's own number of
    steps, where it was given more (`checks.fix_steps`)."""

    output: Path
    words: tuple[str, ...]
    tasks: dict[str, TaskSpec]
    arms: list[Arm]
    reference: str | None
    seeds: list[int]
    units: list[Unit]
    unfit: dict[tuple[str, str], str]
    own_teachers: bool
    equal_steps: bool
    keep_models: bool
    jobs: int
    unread: tuple[str, ...] = ()
    lengthened: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        return [arm.name for arm in self.arms]

    def students(self, task: str, method: str | None = None) -> list[Unit]:
        """The students of a task, of one method or of all."""
        wanted = self.methods if method is None else [method]
        return [unit for unit in self.units if unit.task == task and unit.method in wanted]


def is_sweep(words: Sequence[str]) -> bool:
    """Whether these words describe a sweep rather than one run."""
    return any(key in layer for layer in read_layers(words) for key in SweepConfig.model_fields)


def make_grid(words: Sequence[str]) -> Grid:
    """The runs that these words describe. Only configurations and tasks are read, and plugins run.

    Raises UserError for any mistake in them.
    """
    own, run = split_layers(read_layers(words))
    reject_single(own, run)
    sweep = read_sweep(own)
    for layer in run:  # a task may be of a plugin's kind
        run_plugins(layer.get("plugins"))
    tasks = [load_task(given) for given in sweep.tasks]
    check_names("tasks", [task.name for task in tasks])
    equal = sweep.equal_steps == "on"
    arms = read_arms(sweep.methods, equal)
    check_names("methods", [arm.name for arm in arms])
    reference = reference_of(sweep.reference, arms)
    check_names("seeds", [str(seed) for seed in sweep.seeds])
    for name in sweep.per_task:
        if name not in [task.name for task in tasks]:
            known = known_names(name, [task.name for task in tasks])
            raise UserError(f"per_task: {name!r} is not a task of this sweep{known}")
    teachers: list[Unit] = []
    students: list[Unit] = []
    unfit: dict[tuple[str, str], str] = {}
    texts: list[str] = []
    unread: list[str] = []
    for given, task in zip(sweep.tasks, tasks, strict=True):
        per_task, by_arm = keys_by_arm(task.name, sweep.per_task.get(task.name, {}), arms, equal)
        layers = task_layers(given, task.name, run, per_task)
        common = resolve(layers)
        reject_push(common, "a sweep")
        texts += filter(None, [common.unlabeled.path])
        made = teacher_units(task.name, common, layers, named(sweep.finetune, task.name))
        fitting, reasons = fitting_arms(task, arms, layers, by_arm, made)
        unfit |= reasons
        if made and not any(reads_teachers(config) for _, config in fitting):
            unread.append(task.name)
            made = []
            fitting = [(arm, of.model_copy(update={"teachers": []})) for arm, of in fitting]
        teachers += made
        students += student_units(task.name, fitting, sweep.seeds, made)
    output = only_output(students, unfit)
    reject_text_without_teachers(texts, students)
    return Grid(
        output,
        tuple(words),
        {task.name: task for task in tasks},
        arms,
        reference,
        sweep.seeds,
        [*teachers, *students],
        unfit,
        own_teachers=bool(teachers),
        equal_steps=equal,
        keep_models=sweep.keep_models,
        jobs=sweep.jobs,
        unread=tuple(unread),
    )


def fitting_arms(
    task: TaskSpec,
    arms: Sequence[Arm],
    layers: Sequence[Mapping[str, Any]],
    by_arm: Mapping[str, Mapping[str, Any] | None],
    made: Sequence[Unit],
) -> tuple[list[tuple[str, RunConfig]], dict[tuple[str, str], str]]:
    """(arm, its configuration on a task) of the arms that can be run on it, and the reasons of the
    others, by task and arm. by_arm: more keys of an arm there; None leaves it out. made: the
    teachers that are fine-tuned on the task."""
    fitting: list[tuple[str, RunConfig]] = []
    unfit: dict[tuple[str, str], str] = {}
    for arm in arms:
        more = by_arm.get(arm.name, {})
        if more is None:
            unfit[task.name, arm.name] = "per_task leaves it out"
            continue
        own = named(merge(arm.keys, more), task.name)
        config = student_config(made, resolve([*layers, {"method": arm.method}, own]))
        reject_push(config, "a sweep")
        reason = method_problem(config, task.task_kind)
        if reason is not None:
            unfit[task.name, arm.name] = reason
        else:
            fitting.append((arm.name, config))
    return fitting, unfit


def only_output(students: Sequence[Unit], unfit: Mapping[tuple[str, str], str]) -> Path:
    """The folder of all students. Raises UserError where there are several, or no student."""
    outputs = {unit.folder.parent.parent.parent for unit in students}
    if len(outputs) != 1:
        found = " and ".join(sorted(map(str, outputs)))
        raise UserError(
            f"output_dir is {found}, and a sweep has one folder; give the same for all tasks"
            if found
            else f"no method can be run: {'; '.join(dict.fromkeys(unfit.values()))}; give another "
            "method"
        )
    return outputs.pop()


def reject_text_without_teachers(texts: Sequence[str], students: Sequence[Unit]) -> None:
    """Raises UserError where unlabelled text is given and no method of the sweep has teachers."""
    if texts and all(unit.config.unlabeled.path is None for unit in students):
        raise UserError(
            f"unlabeled.path={texts[0]}: unlabelled rows need teachers, and no method of this "
            "sweep has any; leave unlabeled.path out, or add a method with teachers, such as mean"
        )


def split_layers(layers: Layers) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """(the sweep's own keys, the layers of its runs)."""
    keys = SweepConfig.model_fields
    own: dict[str, Any] = {}
    for layer in layers:
        own = merge(own, {key: value for key, value in layer.items() if key in keys})
    return own, [{key: layer[key] for key in layer if key not in keys} for layer in layers]


def reject_single(own: Mapping[str, Any], run: Layers) -> None:
    """Raises UserError for a key of one run (`seed`) that the sweep has for all runs (`seeds`)."""
    # a task's file may stand beside `tasks`
    lacking = (("task", "tasks"),) if own.get("tasks") is None else ()
    for layer in run:
        for one, all_ in (("method", "methods"), ("seed", "seeds"), *lacking):
            if one in layer:
                raise UserError(
                    f"{one}={layer[one]} is a key of a single run, and this is a sweep; give "
                    f"{all_}=[{layer[one]}]"
                )


def read_sweep(own: Mapping[str, Any]) -> SweepConfig:
    """The sweep's own keys, over the defaults of sweep.yaml. Raises UserError for a mistake,
    naming the key, its value and what is allowed."""
    file = config_folder() / "sweep.yaml"
    raw = merge(read_yaml(file), own)
    for key in ("tasks", "methods"):
        if isinstance(raw[key], str | Mapping):
            raw[key] = [raw[key]]
    if raw["methods"] is None:
        raw["methods"] = sorted(shipped_files("methods"), key=lambda name: name != FINETUNE)
    if isinstance(raw["seeds"], int) and 0 < raw["seeds"] <= MOST_SEEDS:
        raw["seeds"] = list(range(raw["seeds"]))
    if not isinstance(raw["seeds"], list) or not raw["seeds"]:
        raise UserError(
            f"seeds={raw['seeds']} is not a number of seeds from 1 to {MOST_SEEDS}; give how many "
            "(seeds=5), or which (seeds=[0,3])"
        )
    try:
        return SweepConfig.model_validate(raw)
    except ValidationError as error:
        known = list(SweepConfig.model_fields)
        raise UserError(explain(error, known, SweepConfig.model_validate, raw)) from None


def check_names(key: str, names: Sequence[str]) -> None:
    """Check names that folders get. Raises UserError where two are equal, or one is reserved."""
    for n, name in enumerate(names):
        if name in names[:n]:
            raise UserError(f"{key} names {name!r} twice; give each once")
        if name in TAKEN:
            raise UserError(f"{key}: {name!r} is a folder that the sweep needs; give another name")


def task_layers(given: str, name: str, run: Layers, per_task: Mapping[str, Any]) -> Layers:
    """The layers of a task's runs: its shipped configuration, the run's keys, its own keys."""
    file = shipped_files("tasks").get(given)
    first = {} if file is None else read_yaml(file)
    return [first, *(named(layer, name) for layer in run), named(per_task, name), {"task": given}]


def named(value: Any, task: str) -> Any:
    """`value` with the task's name for {task} in all of its texts."""
    if isinstance(value, Mapping):
        return {key: named(inside, task) for key, inside in value.items()}
    if isinstance(value, list):
        return [named(inside, task) for inside in value]
    return value.replace("{task}", task) if isinstance(value, str) else value


def teacher_units(
    task: str, common: RunConfig, layers: Layers, finetune: Mapping[str, Any]
) -> list[Unit]:
    """The runs that fine-tune a task's teachers; none where its teachers are given."""
    if common.teachers and common.encoders:
        raise UserError(
            "teachers and encoders are both given; give teachers that are finished, or encoders to "
            "fine-tune"
        )
    folder = Path(common.output_dir) / task / TEACHERS
    # a pattern of encoders is that of the whole sweep
    config = resolve([*teacher_layers(layers), finetune, {"output_dir": common.output_dir}])
    config = config.model_copy(update={"output_dir": str(folder)})
    reject_unused_text(config)
    return [Unit(task, TEACHERS, one, ()) for one in teacher_runs(config)]


def student_config(made: Sequence[Unit], config: RunConfig) -> RunConfig:
    """A student's configuration, with its teachers (given or made) and the sweep's store. It has no
    folds, which are for teachers. A student without teachers has no unlabelled text, and no copies
    without gold labels.

    Raises UserError where its method needs teachers and there are none.
    """
    teachers = [TeacherConfig(path=str(unit.folder)) for unit in made] or config.teachers
    if config.uses_teachers and not teachers:
        raise UserError(
            f"method {config.method} needs teachers; give encoders=[ID or DIR, ...] to fine-tune "
            f"them, or teachers=[DIR, ...], or methods=[{FINETUNE}] alone"
        )
    store = config.store
    if store.path is None and not os.environ.get("SEAD_DIST_STORE"):
        store = store.model_copy(update={"path": str(Path(config.output_dir) / "store")})
    # the report compares the arms with one another
    baseline = None if config.baseline == "auto" else config.baseline
    given = {"teachers": teachers, "encoders": [], "folds": None, "store": store}
    return without_teachers_text(config.model_copy(update={**given, "baseline": baseline}))


def reads_teachers(config: RunConfig) -> bool:
    """Whether a student's run reads its teachers' files.

    They predict, lend their tokeniser, or share the mask token that copies are made with.
    """
    lent = config.student.path is None and config.student.tokenizer is None
    return config.taught or lent or config.uses_copies


def student_units(
    task: str,
    arms: Sequence[tuple[str, RunConfig]],
    seeds: Sequence[int],
    made: Sequence[Unit],
) -> list[Unit]:
    """The students of a task, in OUTPUT/TASK/ARM/seed-0, ... All arms of one seed come before the
    next seed, so that the finished runs of a stopped sweep can be compared."""
    needs = tuple(unit.folder for unit in made)
    return [
        Unit(
            task,
            arm,
            config.model_copy(
                update={
                    "seed": seed,
                    "output_dir": str(Path(config.output_dir) / task / arm / f"seed-{seed}"),
                }
            ),
            needs,
        )
        for seed in seeds
        for arm, config in arms
    ]
