"""Rows of a split: of local files, of the hub, or of data that are given from Python. The only file
that imports `datasets`.

Rows keep the file's own columns; sead_dist.data.formats gives them meaning.
"""

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sead_dist.data.kinds import number_name
from sead_dist.data.tasks import TaskSpec
from sead_dist.data.text_files import (
    TEXT_KINDS,
    is_array,
    json_stream,
    kind_of,
    readable,
    reject_twins,
    rows_of_text,
    tsv_stream,
)
from sead_dist.errors import UserError, reading, reason, type_of

Rows = list[dict[str, Any]]
EXTENSIONS = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".arrow")
# files of a folder that `datasets.save_to_disk` wrote
SAVED = ("state.json", "dataset_dict.json")
# what a call from Python can be given as all data of a task, and as rows
SPLITS_OR_ROWS = (
    "a folder, a file, a pandas DataFrame, a datasets.Dataset, a list of rows, or a dict of splits "
    "of these"
)
# what pyarrow raises for values that it cannot hold; OverflowError: a whole number beyond 64 bits
NOT_ARROW = (pa.ArrowException, TypeError, ValueError, OverflowError)
TEXTS_OR_ROWS = "a file, a pandas DataFrame, a datasets.Dataset, or a list of texts or rows"


def split_chunks(
    task: TaskSpec,
    split: str,
    path: Path | None,
    file: Path | None,
    revision: str | None,
    skip_malformed: bool,
    size: int | None,
) -> Iterator[Rows]:
    """The rows of `split` in chunks, as of `row_chunks`: from `file`, else from the folder `path`,
    else from the hub.

    Raises UserError for a split that the task lacks, a missing file or folder, a malformed
    file, a split without rows, and a hub that cannot be reached.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name!r} has no split {split!r}; it has {_list(task.splits)}")
    if file is None and path is None:
        chunks, source = iter([_from_hub(task, split, revision)]), f"hub data set {task.hub}"
    else:
        files = [file] if file is not None else find_files(task, split, path or Path())
        source = str(files[0])
        chunks = (
            chunk for found in files for chunk in row_chunks(found, task, skip_malformed, size)
        )
        if size is None:  # a group may lie in two shards
            chunks = iter([[row for chunk in chunks for row in chunk]])
    read = 0
    for chunk in chunks:
        read += len(readable(chunk))
        yield chunk
    if not read:
        raise UserError(f"the {split} split has no rows in {source}; give a file that has some")


def source_of(task: TaskSpec, split: str, path: Path | None, file: Path | None) -> str:
    """What the rows of `split` come from, for a message."""
    if file is None and path is None:
        return f"hub data set {task.hub}"
    return str(file or find_files(task, split, path or Path())[0])


@contextmanager
def naming_source(source: str) -> Iterator[None]:
    """Add the source of rows to a UserError about them."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} ({source})") from error


def find_files(task: TaskSpec, split: str, path: Path) -> list[Path]:
    """The files of `split` in the folder `path`: one, or the numbered shards of one.

    A name counts if it is one of the task's names for the split, or such a name as `datasets`
    writes it (`train-00000-of-00002.parquet`, `glue-train.arrow`, a saved folder `train/`).
    """
    may_be_cut = task.hub is None and len(task.splits) == 2
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        one = f", or data.train={path} for a file of all rows" if path.is_file() else ""
        raise UserError(
            f"data.path {path} {what}; give the folder that holds the split files"
            f"{one if may_be_cut else ''}"
        )
    names = "|".join(map(re.escape, task.splits[split]))
    plain = re.compile(rf"(?:{names})(-\d+-of-\d+)?")
    cached = re.compile(rf"[\w.]+-(?:{names})(-\d+-of-\d+)?")  # as `datasets` names its cache
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        suffix, saved = kind_of(file), file.is_dir() and (file / "state.json").is_file()
        stem = Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem
        match = plain.fullmatch(file.name if saved else stem)
        if match is None and suffix == ".arrow":
            match = cached.fullmatch(stem)
        if match and (saved or suffix in EXTENSIONS):
            found.setdefault(re.sub(r"-\d+-of-\d+", "-*", file.name), []).append(file)
    if len(found) > 1:
        raise UserError(f"{path} has {_list(found)} for the {split} split; keep one of them")
    if not found:
        key = "train" if split == "train" else "validation"
        held_out = key == "validation" and may_be_cut
        alone = ", or data.train=FILE alone, of which a part is held out" if held_out else ""
        held = _list(sorted(file.name for file in path.iterdir())) or "nothing"
        raise UserError(
            f"no {split} file in {path}; expected {_list(task.splits[split])} with one of "
            f"{_list(EXTENSIONS)}; the folder holds {held}; add the file, or give data.{key}=FILE"
            f"{alone}"
        )
    files = next(iter(found.values()))
    if (shard := re.search(r"-of-(\d+)", files[0].stem)) and len(files) != int(shard[1]):
        raise UserError(
            f"{path} has {len(files)} of the {int(shard[1])} files of {split}; add the rest"
        )
    return files


def read_bytes(path: Path) -> bytes:
    """The whole of a file, unpacked where it is packed with gzip."""
    packed = path.suffix.lower() == ".gz"
    return gzip.decompress(path.read_bytes()) if packed else path.read_bytes()


def read_rows(path: Path, task: TaskSpec, skip_malformed: bool | None = None) -> Rows:
    """The rows of one file (or of a folder that `datasets.save_to_disk` wrote).

    `task` says which columns a TSV without a header has. skip_malformed: whether lines that cannot
    be read are skipped; MALFORMED stands for each. None where no key can set it. Raises UserError
    naming file and line.
    """
    kind = kind_of(path)
    with _reading_data(path, kind):
        if path.is_dir() and not any((path / name).is_file() for name in SAVED):
            raise UserError(f"data file {path} is a folder; give a file")
        if not path.exists():
            raise FileNotFoundError
        if path.is_dir():
            return _from_saved_folder(path, task)
        if kind in (".parquet", ".arrow"):
            return _binary_rows(path, task)
        if kind in TEXT_KINDS:
            return rows_of_text(read_bytes(path), path, kind, task, skip_malformed)
    allowed = _list((*EXTENSIONS, ".txt"))
    raise UserError(f"data file {path}: unknown kind {kind!r}; allowed: {allowed}")


@contextmanager
def _reading_data(path: Path, kind: str) -> Iterator[None]:
    with reading(path, "give a complete file", f"data file {path}"):
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"data file {path} does not exist; give an existing file") from error
        except UnicodeDecodeError as error:
            line = reason(error)
            raise UserError(f"data file {path} is not UTF-8: {line}; convert it") from error
        except pa.ArrowException as error:
            line = reason(error)
            raise UserError(
                f"data file {path} is not a complete {kind} file: {line}; write it again"
            ) from error


def row_chunks(
    path: Path, task: TaskSpec, skip_malformed: bool, size: int | None
) -> Iterator[Rows]:
    """The rows of `read_rows` in chunks. Of a TSV, JSONL or Parquet file that is not packed, at
    most `size` rows are in memory at a time. Of other files, and where size is None, all rows are
    one chunk. A file without rows gives no chunk."""
    kind = kind_of(path)
    streamed = {".tsv": tsv_stream, ".jsonl": json_stream}
    plain = size is not None and path.is_file() and path.suffix.lower() == kind
    with _reading_data(path, kind):
        plain = plain and not (kind == ".jsonl" and is_array(path))
    if plain and kind in (*streamed, ".parquet"):
        with _reading_data(path, kind):
            if kind == ".parquet":
                yield from _parquet_chunks(path, task, size or 1)
            else:
                rows = streamed[kind](path, task, skip_malformed)
                while chunk := list(islice(rows, size)):
                    yield chunk
    elif rows_at_once := read_rows(path, task, skip_malformed):
        yield rows_at_once


def _parquet_chunks(path: Path, task: TaskSpec, size: int) -> Iterator[Rows]:
    _reject_twin_fields(pq.read_schema(path), f"data file {path}")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(size):
            table = pa.Table.from_batches([batch], file.schema_arrow)
            table.validate(full=True)
            yield table_rows(table, task, f"data file {path}")


def _reject_twin_fields(schema: Any, where: str) -> None:
    """Raises UserError where two columns, or two fields nested in a column, have one name."""
    reject_twins([field.name for field in schema], where, "column")
    kinds = [field.type for field in schema]
    for kind in kinds:
        if pa.types.is_struct(kind):
            _reject_twin_fields(list(kind), where)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kinds.append(kind.value_type)


def _binary_rows(path: Path, task: TaskSpec) -> Rows:
    packed = path.suffix.lower() == ".gz"
    with pa.BufferReader(read_bytes(path)) if packed else pa.memory_map(str(path)) as source:
        if kind_of(path) == ".parquet":
            # before the table is read, which fails on twins with a message of its own
            _reject_twin_fields(pq.read_schema(source), f"data file {path}")
            source.seek(0)
            table = pq.read_table(source)
        else:
            try:
                table = pa.ipc.open_stream(source).read_all()  # what `datasets` writes
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_file(source).read_all()
        # otherwise a wrong length makes pyarrow read beyond the end of a buffer
        table.validate(full=True)
        return table_rows(table, task, f"data file {path}")


def _from_saved_folder(path: Path, task: TaskSpec) -> Rows:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        raise UserError(f"data file {path} holds several splits; give it as data.path")
    return table_rows(dataset_table(saved), task, f"data file {path}")


def _from_hub(task: TaskSpec, split: str, revision: str | None) -> Rows:
    if task.hub is None:
        raise UserError(f"task {task.name!r} is not on the hub; give data.path, a folder of files")
    name, config = task.hub
    hub_split = task.splits[split][0]
    import datasets

    try:
        reach_hub(name, revision)
        try:
            loaded = datasets.load_dataset(name, config, split=hub_split, revision=revision)
        except RuntimeError as error:
            # A data set that is still a script, which `datasets` 4 and later do not run: the hub
            # keeps its rows as Parquet on a branch of that name, one folder per configuration.
            if revision is not None or "script" not in str(error):
                raise
            loaded = datasets.load_dataset(
                name, data_dir=config, split=hub_split, revision="refs/convert/parquet"
            )
    except Exception as error:  # the libraries below raise a dozen kinds
        raise UserError(
            f"split {hub_split!r} of hub data set {name!r} ({config}) cannot be loaded: "
            f"{reason(error)}; give data.path, a folder of files"
        ) from error
    return table_rows(dataset_table(loaded), task, f"hub data set {name!r}")


def reach_hub(name: str, revision: str | None) -> None:
    """Raises at once where the hub cannot be reached; `datasets` would try for half a minute. With
    HF_HUB_OFFLINE no request is sent: `datasets` then uses what it has kept."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return
    with suppress(HfHubHTTPError):  # the hub answered; loading the rows shows what is wrong
        HfApi().dataset_info(name, revision=revision, timeout=10)


def dataset_table(dataset: Any) -> Any:
    """The Arrow table of a data set of `datasets`, with the names of its ClassLabels."""
    # Through the Arrow format a row mapping (a selection, a shuffle) is applied first.
    table = dataset.with_format("arrow")[:]
    metadata = dataset.features.arrow_schema.metadata
    return table.replace_schema_metadata(metadata)


def table_rows(table: Any, task: TaskSpec, where: str) -> Rows:
    """Rows of an Arrow table, in which numbers of a ClassLabel become its names.

    The names count because their order need not be the task's. Some names may occur in no row.
    """
    _reject_twin_fields(table.schema, where)
    rows: Rows = table.to_pylist()
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    columns = {task.label_column, *(o for o, t in task.renames.items() if t == task.label_column)}
    for column in columns:
        feature = metadata.get("info", {}).get("features", {}).get(column)
        names = feature.get("names") if isinstance(feature, dict) else None
        if names and names_decide(task, names):
            for row in rows:
                if isinstance(row[column], int) and 0 <= row[column] < len(names):
                    row[column] = names[row[column]]
    return rows


def names_decide(task: TaskSpec, names: Sequence[str]) -> bool:
    """Whether the names of a ClassLabel say what its numbers mean. Names do where a file may
    hold each of them, numbers too (`datasets` sorts these as texts: 0, 1, 10, 2). Else they do
    where one is not a number. Then a class that the task lacks is rejected by its name."""
    if all(task.task_kind.is_label(task, name) for name in names):
        return True
    return task.task_kind.head_of_labels and any(number_name(name) is None for name in names)


def to_table(data: Any, where: str, allowed: str = SPLITS_OR_ROWS) -> pa.Table:
    """A pandas DataFrame, a `datasets.Dataset`, an Arrow table or a list of rows (mappings) as an
    Arrow table. Raises UserError for anything else: `where` is its start, `allowed` its end."""
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
            rows = [{str(name): value for name, value in row.items()} for row in data]
            names = dict.fromkeys(name for row in rows for name in row)
            return pa.table(
                {name: _column(name, [row.get(name) for row in rows]) for name in names}
            )
    except NOT_ARROW as error:
        line = " ".join(str(error).split())
        raise UserError(f"{where} cannot be a table: {line}; give columns of one type") from error
    raise UserError(f"{where} is of type {type_of(data)}; give {allowed}")


def _column(name: str, values: Sequence[Any]) -> pa.Array:
    """A column of an Arrow table. Raises ValueError, with the column's name, for values that Arrow
    cannot hold."""
    try:
        return pa.array(values)
    except NOT_ARROW as error:
        raise ValueError(f"column {name!r}: {error}") from error


def to_rows(data: Any, task: TaskSpec, where: str, allowed: str = SPLITS_OR_ROWS) -> Rows:
    """The rows of data as `to_table` takes them. Class numbers of a data set become its names."""
    return table_rows(to_table(data, where, allowed), task, where)


def _list(names: Any) -> str:
    return ", ".join(names)
