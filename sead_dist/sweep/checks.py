"""Checks of all runs of a sweep before the first: inputs, methods, data and earlier runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sead_dist.config.automatic import run_steps
from sead_dist.config.registered import NO_ENSEMBLE
from sead_dist.config.schema import METHOD_KEYS, RunConfig, TeacherConfig
from sead_dist.data.augmentation import run_rows
from sead_dist.data.splits import check_tokens, load_examples, route_of
from sead_dist.data.tasks import constant_score
from sead_dist.errors import UserError
from sead_dist.models.pretrained import TOKENIZER_FILES, load_tokenizer, locate
from sead_dist.models.student import check_start
from sead_dist.objectives.ensemble import check_method, check_selection
from sead_dist.runs.checks import check_inputs
from sead_dist.runs.claim import reject_other_keys, reject_other_teachers, teachers_of
from sead_dist.runs.without_gold import check_gold
from sead_dist.runtime.console import counted
from sead_dist.runtime.distributed import World
from sead_dist.runtime.run_log import is_finished, noted
from sead_dist.sweep.grid import TEACHERS, Grid, Unit
from sead_dist.sweep.results import TaskData
from sead_dist.training.deepspeed_config import zero_config
from sead_dist.training.engine import check_arithmetic, check_tracker
from sead_dist.training.identity import reject_other


def check_grid(grid: Grid, world: World) -> tuple[Grid, dict[str, TaskData]]:
    """Check all runs before the first one. Returns the grid with its numbers of steps fixed, and
    each task's data.

    Raises UserError for the first mistake.
    """
    check_jobs(grid, world)
    check_runs(grid)
    for unit in grid.units:
        check_tracker(unit.config.report_to)
        check_arithmetic(unit.config.precision, world.device)
        zero_config(unit.config, world.size)
    return prepare_grid(grid, [name for name in grid.tasks if grid.students(name)])


def check_jobs(grid: Grid, world: World) -> None:
    """Raises UserError where `jobs` is above 1 on several ranks or on a GPU."""
    if grid.jobs > 1 and (world.size > 1 or world.device.type != "cpu"):
        what = f"{world.size} ranks" if world.size > 1 else "a GPU"
        raise UserError(
            f"jobs={grid.jobs} is for one process without a GPU, and this sweep has {what}; leave "
            "jobs out, or start the same command several times: the processes share the runs"
        )


def prepare_grid(grid: Grid, tasks: Iterable[str]) -> tuple[Grid, dict[str, TaskData]]:
    """The grid with its numbers of steps fixed, and the data of these tasks.

    Raises UserError where the data are wrong, or the folders hold other runs.
    """
    data = {name: read_task(grid, name) for name in tasks}
    grid = fix_steps(grid, data)
    for unit in grid.units:
        reject_other_unit(grid, unit)
    for name, of in data.items():
        reject_other_data(grid, name, of)
    return grid, data


def check_runs(grid: Grid) -> None:
    """Check the inputs of all runs. Raises UserError for a mistake."""
    check_folder(grid.output)
    starts = {repr(unit.config.student): unit.config for unit in grid.units if not unit.needs}
    for config in starts.values():
        start = config.student
        # else the student takes a teacher's tokeniser, which is checked below
        if start.path is not None or start.tokenizer is not None or not config.teachers:
            check_start(start, config.trust_remote_code)
    for name, task in grid.tasks.items():
        students = grid.students(name)
        for unit in students:
            if unit.config.taught:
                check_method(unit.config, task.task_kind)
        teachers = [unit for unit in grid.units if (unit.task, unit.method) == (name, TEACHERS)]
        # Students of one arm differ in the seed alone. Arms without keys of their own, on all tasks
        # or on this one, differ in their methods' keys alone, which are checked above.
        own = {arm.name for arm in grid.arms if arm.keys}
        unlike: dict[tuple[str | None, str], Unit] = {}
        for unit in students:
            keys = unit.config.model_dump(exclude={"seed", "output_dir", "method", *METHOD_KEYS})
            unlike.setdefault((unit.method if unit.method in own else None, repr(keys)), unit)
        for unit in (*teachers[:1], *unlike.values()):
            check_inputs(with_made_teachers(unit.config, teachers))


def check_folder(output: Path) -> None:
    """Raises UserError where `output` is a file, or holds files: a sweep's folder holds folders."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output_dir={output} is a file; give a folder")
    for path in sorted(output.glob("[!.]*")):
        if not path.is_dir():
            raise UserError(
                f"output_dir={output} holds other files ({path.name!r}); give a new folder for the "
                "sweep"
            )


def with_made_teachers(config: RunConfig, made: Sequence[Unit]) -> RunConfig:
    """The configuration as it can be checked before the run's teachers are made: without teachers.
    A student of a shape gets the tokeniser that the first teacher starts with."""
    if not config.teachers or not made:
        return config
    student, start = config.student, made[0].config.student
    if student.shape is not None and student.tokenizer is None:
        student = student.model_copy(update={"tokenizer": start.tokenizer or start.path})
    update = {"teachers": [], "ensemble": NO_ENSEMBLE, "student": student}
    return config.model_copy(update=update)


def read_task(grid: Grid, name: str) -> TaskData:
    """The data of a task. Raises UserError where they are wrong."""
    task, students = grid.tasks[name], [unit.config for unit in grid.students(name)]
    # the first one reads the data: if possible with text, and without the column of routes
    students.sort(key=lambda of: (not of.has_text, of.routed))
    with noted():
        examples = load_examples(students[0], task)
    check_tokens(examples, start_tokenizers(grid, name))
    dev = next(iter(examples.official.values()))
    if not dev.has_gold:
        raise UserError(
            f"{dev.split} of {name} has no gold labels, and a sweep compares methods by their "
            "scores against these; give it gold labels"
        )
    untaught = [u.method for u in grid.units if u.task == name and not u.config.taught]
    if untaught and not examples.labelled_rows:
        raise UserError(
            f"train of {name} has no gold labels, and {untaught[0]} has no teachers, so it has "
            f"nothing to learn from; leave {untaught[0]} out, and give finished teachers"
        )
    for config in students:
        check_gold(config, task, examples)
        check_selection(config, examples.selection.labels_B)
    return TaskData(
        task,
        dev,
        examples.labelled_rows,
        examples.unlabelled_rows,
        constant_score(task, dev),
        {rows_key(students[0]): examples.fingerprint(task)},
    )


def rows_key(config: RunConfig) -> str:
    """The keys that determine which rows a run reads, and which parts of them."""
    fold = None if config.fold is None else (config.folds, config.fold)
    rest = config.uses_rest
    return repr((config.data, config.unlabeled, rest, config.selection, route_of(config), fold))


def reject_other_unit(grid: Grid, unit: Unit) -> None:
    """Raises UserError where the unit's folder holds a run of other keys."""
    try:
        reject_other_keys(unit.config)
    except UserError as error:
        own = grid.lengthened.get((unit.task, unit.method))
        if own is None or "max_steps" not in str(error):
            raise
        raise UserError(
            f"{error} (max_steps={unit.config.max_steps} is the number of the longest method; with "
            f"equal_steps=off {unit.method} has its own number, {own})"
        ) from None


def reject_other_data(grid: Grid, name: str, data: TaskData) -> None:
    """Raises UserError where an earlier run in the folder had other data, or other teachers."""
    known = data.fingerprints
    for unit in grid.units:
        saved = reject_other_keys(unit.config) if unit.task == name else None
        if saved is None:
            continue
        key = rows_key(unit.config)
        if key not in known:
            with noted():
                examples = load_examples(unit.config, data.task)
            known[key] = examples.fingerprint(data.task)
        reject_other(unit.folder, saved, saved.with_data(known[key]))
        if unit.config.taught and grid.own_teachers:
            reject_other_encoders(unit)
        elif unit.config.taught and is_finished(unit.folder):
            reject_other_teachers(unit.config)


def reject_other_encoders(unit: Unit) -> None:
    """Raises UserError where a student had another number of teachers than the sweep fine-tunes.

    A teacher of another encoder is found by the keys of its own run. Only the names of folders
    count, so that the sweep's folder may be moved.
    """
    had = [Path(str(entry.get("path"))).name for entry in teachers_of(unit.folder)]
    now = [Path(entry.path).name for entry in unit.config.teachers]
    if had != now:
        raise UserError(
            f"output_dir={unit.folder} holds a run with {counted(len(had), 'teacher')} "
            f"({', '.join(had) or 'none'}), and encoders has {len(now)}; give the encoders that it "
            "began with, or another output_dir"
        )


def start_tokenizers(grid: Grid, task: str) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenisers of a task's runs, by path. Made teachers have those of their encoders."""
    sources: dict[str, TeacherConfig] = {}
    for unit in [unit for unit in grid.units if unit.task == task]:
        start = unit.config.student.tokenizer or unit.config.student.path
        given = [] if grid.own_teachers or not unit.config.taught else unit.config.teachers
        given = [entry for entry in given if entry.is_model]
        for entry in (*([TeacherConfig(path=start)] if start else []), *given):
            sources.setdefault(entry.path, entry)
    trust = grid.units[0].config.trust_remote_code
    return {
        path: load_tokenizer(locate(path, entry.revision, marks=TOKENIZER_FILES), trust)
        for path, entry in sources.items()
    }


def steps_of(config: RunConfig, data: TaskData) -> int:
    """Steps of a run by its own keys."""
    unlabelled = data.unlabelled_rows if config.has_text else 0
    return run_steps(config, data.train_rows, run_rows(config, data.train_rows, unlabelled))


def needs_rows(grid: Grid, task: str) -> bool:
    """Whether the number of steps of a task's runs depends on its data."""
    students = [unit.config for unit in grid.students(task)]
    left = any(config.max_steps is None and config.num_train_epochs is None for config in students)
    unlike = len({config.taught for config in students}) > 1
    return grid.equal_steps and left and (unlike or any(map(may_leave_text_out, students)))


def fix_steps(grid: Grid, data: Mapping[str, TaskData]) -> Grid:
    """The grid in which all students of a task take as many steps as the longest one, where
    equal_steps is on. Only then is their comparison fair. Tasks without `data` do not change. The
    result depends on grid and data alone, so that all workers of a sweep get the same.

    Epochs are of the labelled rows, which all methods share. Where no key sets the length, runs
    with teachers take more steps, and runs with unlabelled text even more. The run with the most
    steps keeps its keys. The others get its steps as max_steps, and use their rows more often.
    Steps are counted with all of the text. A run with files of predictions leaves out text without
    predictions, so it gets max_steps too.
    """
    if not grid.equal_steps:
        return grid
    units, lengthened = [], {}
    longest = {
        name: max(steps_of(unit.config, of) for unit in grid.students(name))
        for name, of in data.items()
    }
    for unit in grid.units:
        if unit.task in longest and unit.method in grid.methods:
            own, most = steps_of(unit.config, data[unit.task]), longest[unit.task]
            if own < most:
                lengthened[unit.task, unit.method] = own
            if own < most or may_leave_text_out(unit.config):
                config = unit.config.model_copy(update={"max_steps": most})
                unit = replace(unit, config=config)
        units.append(unit)
    return replace(grid, units=units, lengthened=lengthened)


def may_leave_text_out(config: RunConfig) -> bool:
    """Whether a run may have fewer rows, and so fewer steps, than are counted here."""
    left = config.max_steps is None and config.num_train_epochs is None
    files = [entry for entry in config.teachers if entry.predictions is not None]
    return left and config.taught and bool(files)


def steps_line(grid: Grid, name: str, data: TaskData) -> str:
    """A line on the rows and the steps of a task's students."""
    configs = {unit.method: unit.config for unit in grid.students(name)}
    steps = {method: steps_of(config, data) for method, config in configs.items()}
    most = {
        method: f"{'at most ' if config.early_stopping_patience is not None else ''}{steps[method]}"
        for method, config in configs.items()
    }
    rows = f"{name}: {data.train_rows} labelled rows"
    if data.unlabelled_rows:
        rows += f", {data.unlabelled_rows} unlabelled ones for methods with teachers"
    if len(set(steps.values())) > 1:
        each = ", ".join(f"{method} {count}" for method, count in most.items())
        return f"{rows}; steps: {each} (equal_steps=off)"
    more = [f"{method} {of}" for (task, method), of in grid.lengthened.items() if task == name]
    own = f" (equal_steps=on; fewer by their own rows: {', '.join(more)})" if more else ""
    return f"{rows}; every method takes {next(iter(most.values()))} steps{own}"
