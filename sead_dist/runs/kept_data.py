"""Data and task that were given from Python, kept in the run's folder as files, so that a resume,
`evaluate` and the command line find them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from sead_dist.data.task_files import TaskSpec
from sead_dist.errors import UserError
from sead_dist.runs.claim import has_progress, locked, try_lock
from sead_dist.runtime.own_files import written_aside

# a name with a dot: what a start that is refused leaves is no other run
KEPT_DATA = ".data"


def kept_file(run: Path, split: str) -> Path:
    """Where the rows of a split are kept."""
    return run / KEPT_DATA / f"{split}.parquet"


def kept_task(run: Path) -> Path:
    """Where a task is kept."""
    return run / KEPT_DATA / "task.yaml"


@contextmanager
def kept(run: Path, tables: Mapping[str, pa.Table], task: TaskSpec | None) -> Iterator[None]:
    """While inside, these splits and this task lie in the run folder, and no other process keeps
    other ones there.

    Raises UserError where the folder holds a run that was started with others, or where another
    process is at work there, and for a table that Parquet cannot hold.
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
    """Write what is not kept yet. Raises UserError where a run has begun with something else."""
    changed = [name for name, table in tables.items() if not holds(kept_file(run, name), table)]
    text = None if task is None else as_yaml(task)
    path = kept_task(run)
    other_task = text is not None and not (path.is_file() and path.read_text("utf-8") == text)
    if not changed and not other_task:
        return
    if any(has_progress(one) for one in (run, *run.glob("teacher-*"))):
        what = f"{changed[0]} rows" if changed else "task"
        raise UserError(
            f"output_dir={run} holds a run with another {what}; give what it was started with, or "
            "another output_dir"
        )
    with locked(run):
        for name in changed:
            write_table(kept_file(run, name), tables[name])
        if text is not None and other_task:
            with written_aside(path) as aside:
                aside.write_text(text, encoding="utf-8")


def write_table(path: Path, table: pa.Table) -> None:
    try:
        with written_aside(path) as aside:
            pq.write_table(table, aside)
    except pa.ArrowException as error:
        line = str(error).splitlines()[0]
        raise UserError(f"data: the {path.stem} split cannot be Parquet: {line}") from error


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
    # as text: a NaN is equal to itself there
    return repr(there.to_pylist()) == repr(table.to_pylist())


def as_yaml(task: TaskSpec) -> str:
    """A task as a file of its own: the keys that are not as they would be without it."""
    keys = {f.name: plain(getattr(task, f.name)) for f in fields(task) if not left_out(task, f)}
    return str(yaml.safe_dump(keys, sort_keys=False, allow_unicode=True))


def left_out(task: TaskSpec, field: "Field[Any]") -> bool:
    value = getattr(task, field.name)
    if field.default_factory is not MISSING:
        return bool(value == field.default_factory())
    return bool(field.default is not MISSING and value == field.default)


def plain(value: Any) -> Any:
    """Tuples as the lists that YAML has."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
