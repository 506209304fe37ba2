"""The task, data and keys of a call from Python, as a run's configuration.

A task or data in memory are written to the run directory. So a resume, `evaluate` and the command
line find them.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter

from sead_dist.config.load import merge, read_layers, resolve
from sead_dist.config.schema import RunConfig
from sead_dist.config.sections import Labels
from sead_dist.config.yaml_text import parse_yaml, to_yaml
from sead_dist.data.examples import ExampleSet, build_examples
from sead_dist.data.formats import text_rows
from sead_dist.data.loading import (
    SPLITS_OR_ROWS,
    TEXTS_OR_ROWS,
    Rows,
    read_rows,
    to_rows,
    to_table,
)
from sead_dist.data.splits import is_one_file
from sead_dist.data.tasks import TaskSpec, load_task, task_from
from sead_dist.data.text_files import readable
from sead_dist.errors import UserError, expect
from sead_dist.runs.claim import KEPT_DATA, has_progress, locked, try_lock
from sead_dist.runs.prediction import read_class_order, wanted_splits
from sead_dist.runtime.files import written_aside

# a folder, a file, a pandas DataFrame, a datasets.Dataset, rows, or a mapping of splits of these
Data = Any
# a shipped task's name, a YAML file of a task or of a configuration, or a task or configuration
# in memory
Task = str | os.PathLike[str] | TaskSpec | RunConfig
# the types of a value that names a file, a folder, a model or a shipped task
NAMES: Any = str | os.PathLike
# gives the tables to keep, by split
Tables = Callable[[], Mapping[str, pa.Table]]


@dataclass(frozen=True)
class GivenRun:
    """A run's configuration, and the tables and task in memory that are kept in its folder."""

    config: RunConfig
    tables: Tables | None
    task: TaskSpec | None

    @contextmanager
    def keeping(self, check: Callable[[Path], object]) -> Iterator[None]:
        """Within the block, data and task lie in the run directory. `check` gets it first."""
        if self.tables is None and self.task is None:
            yield
            return
        run = Path(self.config.output_dir)
        check(run)
        tables = {} if self.tables is None else self.tables()
        with kept(run, tables, self.task):
            yield


def given_run(task: Task, data: Data, keys: Mapping[str, Any]) -> GivenRun:
    """The run that a call of `distill` or `finetune` describes.

    The key `unlabeled` may also be unlabelled text itself: a file, a table, rows or texts. Raises
    UserError for a task, data or keys that do not fit.
    """
    text = keys.get("unlabeled")
    text = None if isinstance(text, Mapping) else listed(text)
    layer = as_layer({k: v for k, v in keys.items() if k != "unlabeled" or text is None})
    own = checked_task(task) if isinstance(task, TaskSpec) else None
    layers: list[Mapping[str, Any]]
    output = layer.get("output_dir", "")
    expect("output_dir", output, str, "a folder")
    if isinstance(task, TaskSpec):
        layers = [{"task": str(kept_task(Path(output)))}, layer]
    else:
        layers = [*task_layers(task), layer]
    config = resolve(layers)
    spec = own or load_task(config.task)
    told, tables = data_layer(data, spec, config)
    if text is not None:
        told, tables = with_text(told, tables, text, spec, config)
    return GivenRun(resolve([*layers, told]), tables, own)


def with_text(
    told: dict[str, Any], tables: Tables | None, text: Data, spec: TaskSpec, config: RunConfig
) -> tuple[dict[str, Any], Tables | None]:
    """The keys and tables of `data_layer` with those of unlabelled text."""
    if is_path(text):
        return {**told, "unlabeled": {"path": os.fspath(text)}}, tables
    if isinstance(text, int | float):
        name = "rest" if isinstance(text, bool) else "ratio"
        raise UserError(
            f"unlabeled={text} is neither keys nor text; give keys, such as {{{name!r}: {text}}}, "
            "or the text: a file, a table, or a list of texts"
        )
    others = tables or dict

    def all_tables() -> Mapping[str, pa.Table]:
        given = text_rows(text, spec) if are_texts(text) else text
        return {**others(), "unlabeled": to_table(given, "unlabeled", TEXTS_OR_ROWS)}

    kept_there = str(kept_file(Path(config.output_dir), "unlabeled"))
    return {**told, "unlabeled": {"path": kept_there}}, all_tables


def task_layers(task: str | os.PathLike[str] | RunConfig) -> list[Mapping[str, Any]]:
    """The keys that a task's name, a file or a configuration stand for."""
    if isinstance(task, RunConfig):
        return [task.model_dump(mode="json")]
    known = "a shipped name (sst2), a YAML file, a TaskSpec, or what load_config returns"
    expect("task", task, NAMES, known)
    name = os.fspath(task)
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        try:
            raw = parse_yaml(Path(name).read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError):
            return [{"task": name}]  # the mistake is raised again where the task is read
        if isinstance(raw, dict) and "text_a" in raw:
            return [{"task": name}]
    return read_layers([name])


def checked_task(task: TaskSpec) -> TaskSpec:
    """The task, checked as its YAML file would be. Raises UserError for a mistake in it."""
    return task_from(dict(vars(task)), f"task {task.name!r}")


def class_order(labels: str | Sequence[str] | None) -> Labels:
    """The order of a model's classes. A text is read as on the command line.

    Raises UserError for labels that are neither names nor "task_order".
    """
    if labels is None or isinstance(labels, str):
        return read_class_order(labels)
    expect("labels", labels, Sequence, 'the names of the classes in order, or "task_order"')
    return [str(label) for label in labels]


def as_layer(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as in a YAML file: dotted keys are nested, and paths are text."""
    layer: dict[str, Any] = {}
    for key, given in keys.items():
        value: Any = as_plain(key, given)
        for part in reversed(key.split(".")):
            value = {part: value}
        layer = merge(layer, value)
    return layer


def as_plain(key: str, value: Any) -> Any:
    """The value of a key as in a YAML file. Raises UserError for another value, such as a table."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): as_plain(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(key, item) for item in value]
    expect(key, value, str | Number | BaseModel | None, "a text, a number, a list or a mapping")
    return value


def is_path(data: Data) -> bool:
    """Whether the data is a path, and not rows."""
    return isinstance(data, NAMES)


def are_texts(given: Any) -> bool:
    """Whether these are bare texts, or tuples of texts, and not rows with columns."""
    return isinstance(given, list | tuple) and bool(given) and not isinstance(given[0], Mapping)


def listed(given: Any) -> Any:
    """The values of a pandas Series (one column of texts) as a list; all else as it is."""
    is_series = hasattr(given, "iloc") and not hasattr(given, "columns")
    return given.tolist() if is_series else given


def is_folder(path: str) -> bool:
    """Whether the path is a folder of splits.

    A folder in which `datasets.save_to_disk` saved a single split is not one.
    """
    return not Path(path).is_file() and not (Path(path) / "state.json").is_file()


def split_names(spec: TaskSpec, data: Mapping[Any, Any]) -> dict[str, Any]:
    """By the task's split, the name of that split in these data."""
    names = {split: (split, *files) for split, files in spec.splits.items()}
    found = {
        split: next((name for name in allowed if name in data), None)
        for split, allowed in names.items()
    }
    return {split: name for split, name in found.items() if name is not None}


def data_layer(
    data: Data, spec: TaskSpec, config: RunConfig
) -> tuple[dict[str, Any], Tables | None]:
    """The keys that name the place of the rows, and the tables to write there; None without any.

    Raises UserError for data that lack a split of the task.
    """
    run, first = Path(config.output_dir), list(spec.splits)[1]
    if data is None:
        return {}, None
    # one table is divided into splits as one file is
    divided = is_one_file(spec, config.data.model_copy(update={"train": "given"}))
    names = split_names(spec, data) if isinstance(data, Mapping) else {}
    if divided and list(names) == ["train"] and len(data) == 1:
        data = data[names["train"]]
    if is_path(data):
        path = os.fspath(data)
        return {"data": {"path" if is_folder(path) else "train": path}}, None
    if not isinstance(data, Mapping):
        table = to_table(data, "data")
        others = spec.hub or config.data.validation or config.data.path
        if others is None and not divided:
            raise UserError(
                f"data is the training split alone, and task {spec.name!r} has "
                f"{', '.join(spec.splits)}; give data={{'train': ..., {first!r}: ...}}"
            )
        return {"data": {"train": str(kept_file(run, "train"))}}, lambda: {"train": table}
    if missing := [split for split in spec.splits if split not in names]:
        raise UserError(
            f"data has no split {missing[0]!r}; it has {', '.join(map(str, data))}, and task "
            f"{spec.name!r} needs {', '.join(spec.splits)}; give each under its name"
        )
    parts = {split: data[name] for split, name in names.items()}
    if all(is_path(part) for part in parts.values()) and set(parts) == {"train", first}:
        files = {"train": os.fspath(parts["train"]), "validation": os.fspath(parts[first])}
        return {"data": {"path": None, **files}}, None
    folder: dict[str, str | None] = {
        "path": str(run / KEPT_DATA),
        "train": None,
        "validation": None,
    }
    skip = config.data.skip_malformed
    return {"data": folder}, lambda: {
        key: split_table(key, part, spec, skip) for key, part in parts.items()
    }


def split_table(split: str, part: Data, spec: TaskSpec, skip_malformed: bool) -> pa.Table:
    """One split's rows, from a file or from memory."""
    if is_path(part):
        part = readable(read_rows(Path(os.fspath(part)), spec, skip_malformed))
    return to_table(part, f"data[{split!r}]")


def given_sets(spec: TaskSpec, data: Data, split: str | None) -> list[ExampleSet]:
    """The examples to score, one set for each split of `data`.

    split: the split to score; None stands for all official ones. Raises UserError where the task or
    the data lacks it.
    """
    parts = {split or list(spec.splits)[1]: data}
    if isinstance(data, Mapping):
        names = split_names(spec, data)
        parts = {key: data[names[key]] for key in wanted_splits(spec, split) if key in names}
    if not parts or not set(parts) <= set(spec.splits):
        held = f"; data has {', '.join(map(str, data))}" if isinstance(data, Mapping) else ""
        raise UserError(
            f"split={split!r} cannot be scored: task {spec.name!r} has {', '.join(spec.splits)}"
            f"{held}"
        )
    return [build_examples(spec, as_rows(spec, part, "data"), key) for key, part in parts.items()]


def as_rows(spec: TaskSpec, given: Any, name: str, skip_malformed: bool | None = None) -> Rows:
    """Rows of a file, of a table in memory, or of bare texts.

    name: the argument that gives them. skip_malformed: see `read_rows`.
    """
    given = listed(given)
    if is_path(given):
        return read_rows(Path(os.fspath(given)), spec, skip_malformed)
    if are_texts(given):
        return text_rows(given, spec, skip_malformed)
    return to_rows(given, spec, name, SPLITS_OR_ROWS if name == "data" else TEXTS_OR_ROWS)


def kept_file(run: Path, split: str) -> Path:
    """The file in which the rows of a split are kept."""
    return run / KEPT_DATA / f"{split}.parquet"


def kept_task(run: Path) -> Path:
    """The file in which a task is kept."""
    return run / KEPT_DATA / "task.yaml"


@contextmanager
def kept(run: Path, tables: Mapping[str, pa.Table], task: TaskSpec | None) -> Iterator[None]:
    """Within the block, these splits and this task lie in the run directory.

    No other process can change them meanwhile. Raises UserError where the folder holds a run with
    another task or other data, where another process writes there, and for a table that Parquet
    cannot hold.
    """
    with try_lock(run / KEPT_DATA / ".lock") as taken:
        if not taken:
            raise UserError(
                f"output_dir={run} is being written by another process; wait for it, stop it, or "
                "give another output_dir"
            )
        write_changed(run, tables, task)
        yield


def write_changed(run: Path, tables: Mapping[str, pa.Table], task: TaskSpec | None) -> None:
    """Write the tables and the task that differ from the kept ones.

    Raises UserError where a run in the folder has progress with the kept ones.
    """
    changed = [name for name, table in tables.items() if not holds(kept_file(run, name), table)]
    text = None if task is None else as_yaml(task)
    path = kept_task(run)
    other_task = text is not None and not (path.is_file() and path.read_text("utf-8") == text)
    if not changed and not other_task:
        return
    if any(has_progress(one) for one in (run, *run.glob("teacher-*"))):
        what = f"other {changed[0]} rows" if changed else "another task"
        raise UserError(
            f"output_dir={run} holds a run with {what}; give the task and data that it was started "
            "with, or another output_dir"
        )
    with locked(run):
        for name in changed:
            write_parquet(kept_file(run, name), tables[name])
        if text is not None and other_task:
            with written_aside(path) as aside:
                aside.write_text(text, encoding="utf-8")


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet. Raises UserError for a table that Parquet cannot hold."""
    try:
        with written_aside(path) as aside:
            pq.write_table(table, aside)
    except pa.ArrowException as error:
        line = str(error).splitlines()[0]
        raise UserError(
            f"data: the {path.stem} split cannot be written as Parquet: {line}; give each column "
            "values of one type"
        ) from error


def holds(path: Path, table: pa.Table) -> bool:
    """Whether a file has the rows of this table, and the names of its classes."""
    if not path.is_file():
        return False
    try:
        there = pq.read_table(path)
    except (pa.ArrowException, OSError):
        return False
    names = [(part.schema.metadata or {}).get(b"huggingface") for part in (there, table)]
    if names[0] != names[1] or there.column_names != table.column_names:
        return False
    # rows are compared as text, since a NaN is not equal to itself
    return repr(there.to_pylist()) == repr(table.to_pylist())


def as_yaml(task: TaskSpec) -> str:
    """The text of a task's YAML file. Keys with their default value are left out."""
    keys = TypeAdapter(TaskSpec).dump_python(task, mode="json", exclude_defaults=True)
    return to_yaml(keys, allow_unicode=True)
