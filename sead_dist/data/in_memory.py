"""Data that are given from Python: data frames, data sets of `datasets`, and lists of rows.

They become Arrow tables, which have the same rows as the Parquet files that are written of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from sead_dist.data.loading import Rows, dataset_table, table_rows
from sead_dist.data.task_files import TaskSpec
from sead_dist.errors import UserError


def to_table(data: Any, where: str) -> pa.Table:
    """A pandas DataFrame, a `datasets.Dataset`, an Arrow table or a list of rows (mappings) as an
    Arrow table. Raises UserError, beginning with `where`, for anything else."""
    try:
        if isinstance(data, pa.Table):
            return data
        if hasattr(data, "with_format") and hasattr(data, "features"):
            if not hasattr(data, "num_rows"):  # IterableDataset
                raise UserError(f"{where} is a stream; give a whole data set, not a streamed one")
            return dataset_table(data)
        if hasattr(data, "iloc") and hasattr(data, "columns"):
            named = data.rename(columns=str)
            return pa.Table.from_pandas(named, preserve_index=False)
        if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
            names = dict.fromkeys(str(name) for row in data for name in row)
            return pa.table({name: pa.array([row.get(name) for row in data]) for name in names})
    except (pa.ArrowException, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{where} cannot be a table: {line}; give columns of one type") from error
    raise UserError(
        f"{where} is of type {type(data).__name__}; give a folder, a file, a pandas DataFrame, a "
        "datasets.Dataset, or a dict of splits of these"
    )


def to_rows(data: Any, task: TaskSpec, where: str) -> Rows:
    """The rows of such data, as those of a file: class numbers of a data set become its names."""
    return table_rows(to_table(data, where), task, where)


def text_rows(texts: Sequence[Any], task: TaskSpec) -> Rows:
    """Rows of bare texts: a text each, or where the task reads several columns a tuple of them, in
    the order of `task.fields`. Raises UserError where they do not fit the task."""
    columns = ", ".join(task.fields)
    if task.reader != "plain":
        raise UserError(f"task {task.name!r} reads nested rows; give rows, as its files have them")
    rows: Rows = []
    for number, given in enumerate(texts, 1):
        parts = (given,) if isinstance(given, str) else given
        if not isinstance(parts, tuple | list) or len(parts) != len(task.fields):
            raise UserError(
                f"text {number} is {given!r}, but task {task.name!r} reads {columns}; give "
                f"{'a text' if len(task.fields) == 1 else f'({columns})'} each, or rows"
            )
        rows.append(dict(zip(task.fields, parts, strict=True)))
    return rows
