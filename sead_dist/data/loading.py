"""Rows of a split, from local files or from the hub. The only file that imports `datasets`.

Rows keep the file's own columns; sead_dist.data.formats gives them meaning. An unquoted TSV is
split on tabs and line feeds alone, since GLUE's sentences hold bare quotation marks.
"""

import csv
import gzip
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from sead_dist.data.task_files import TASKS, TaskSpec, number_name
from sead_dist.errors import UserError, reading, reason

Rows = list[dict[str, Any]]
EXTENSIONS = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".arrow")
_SKIP_HINT = "fix the line, or pass over such lines with data.skip_malformed=true"
_log = logging.getLogger(__name__)


def load_split(
    task: TaskSpec,
    split: str,
    path: Path | None,
    file: Path | None,
    revision: str | None,
    skip_malformed: bool,
) -> Rows:
    """The rows of `split`: from `file`, else from the folder `path`, else from the hub.

    Raises UserError for a split that the task has not, a missing file or folder, a malformed
    file, a split without rows, and a hub that cannot be reached.
    """
    if split not in task.splits:
        raise UserError(f"task {task.name!r} has no split {split!r}; it has {_list(task.splits)}")
    if file is not None:
        rows, source = read_rows(file, task, skip_malformed), str(file)
    elif path is not None:
        files = find_files(task, split, path)
        rows = [row for found in files for row in read_rows(found, task, skip_malformed)]
        source = str(files[0])
    else:
        rows, source = _from_hub(task, split, revision), f"hub data set {task.hub}"
    if not rows:
        raise UserError(f"the {split} split has no rows in {source}; give a file that has some")
    return rows


def find_files(task: TaskSpec, split: str, path: Path) -> list[Path]:
    """The files of `split` in the folder `path`: one, or the numbered shards of one.

    A name counts if it is one of the task's names for the split, or such a name as `datasets`
    writes it (`train-00000-of-00002.parquet`, `glue-train.arrow`, a saved folder `train/`).
    """
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"data.path {path} {what}; give the folder that holds the split files")
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
        held = _list(sorted(file.name for file in path.iterdir())) or "nothing"
        raise UserError(
            f"no {split} file in {path}: looked for {_list(task.splits[split])} with "
            f"{_list(EXTENSIONS)}; the folder holds {held}; or give the file: data.{key}=FILE"
        )
    files = next(iter(found.values()))
    if (shard := re.search(r"-of-(\d+)", files[0].stem)) and len(files) != int(shard[1]):
        raise UserError(
            f"{path} has {len(files)} of the {int(shard[1])} files of {split}; add the rest"
        )
    return files


def kind_of(path: Path) -> str:
    """What a file's name says it holds: `.csv` of `train.csv` and of `train.csv.gz`."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def read_bytes(path: Path) -> bytes:
    """The whole of a file, unpacked where it is packed with gzip."""
    packed = path.suffix.lower() == ".gz"
    return gzip.decompress(path.read_bytes()) if packed else path.read_bytes()


def read_rows(path: Path, task: TaskSpec, skip_malformed: bool = False) -> Rows:
    """The rows of one file (or of a folder that `datasets.save_to_disk` wrote).

    `task` says which columns a TSV without a header has. Raises UserError naming file and line.
    """
    kind = kind_of(path)
    with reading(path, "give a whole file, and no pipe", f"data file {path}"):
        try:
            if path.is_dir():
                return _from_saved_folder(path, task)
            if kind in (".parquet", ".arrow"):
                return _binary_rows(path, task)
            if kind in (".tsv", ".csv", ".jsonl", ".json"):
                return _text_rows(read_bytes(path).decode("utf-8-sig"), path, task, skip_malformed)
        except FileNotFoundError as error:
            raise UserError(f"data file {path} does not exist; give an existing file") from error
        except UnicodeDecodeError as error:
            line = reason(error)
            raise UserError(f"data file {path} is not UTF-8: {line}; convert it") from error
        except pa.ArrowException as error:
            line = reason(error)
            raise UserError(f"data file {path} is not a whole {kind} file: {line}") from error
    raise UserError(f"data file {path}: unknown kind {kind!r}; allowed: {_list(EXTENSIONS)}")


def _text_rows(text: str, path: Path, task: TaskSpec, skip_malformed: bool) -> Rows:
    if kind_of(path) == ".tsv":
        return _records(_tsv_lines(text, path, task), path, task, skip_malformed)
    if kind_of(path) == ".csv":
        return _records(_csv_lines(text, path), path, task, skip_malformed)
    if text.lstrip().startswith("["):
        rows = _parse(text, f"data file {path}")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"data file {path}: expected a list of objects; fix the file")
        return rows
    return _json_lines(text, path, skip_malformed)


def _json_lines(text: str, path: Path, skip_malformed: bool) -> Rows:
    rows, skipped = [], 0
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = _parse(line, f"{path}:{number}")
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: expected an object; {_SKIP_HINT}")
                rows.append(row)
            except UserError:
                if not skip_malformed:
                    raise
                skipped += 1
    _tell(path, skipped)
    return rows


def _parse(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twins([name for name, _ in pairs], where, "key")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=once)
        if "\\" in text:  # half a pair of \\ud83d\\ude00 is no text that a tokeniser takes
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {reason(error)}; {_SKIP_HINT}") from error


def _refuse_twins(names: Sequence[str], where: str, what: str) -> None:
    """Raises UserError where two columns or keys have one name: only the last would count."""
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise UserError(f"{where} has the {what} {twins[0]!r} twice; rename or remove one of them")


def _refuse_twin_fields(schema: Any, where: str) -> None:
    """The same of the columns of a table, and of what is nested in them."""
    _refuse_twins([field.name for field in schema], where, "column")
    kinds = [field.type for field in schema]
    for kind in kinds:
        if pa.types.is_struct(kind):
            _refuse_twin_fields(list(kind), where)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kinds.append(kind.value_type)


def _tsv_lines(text: str, path: Path, task: TaskSpec) -> Iterator[tuple[int, list[str]]]:
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
    quoted = is_quoted(lines)
    if quoted and task.name in TASKS:
        quoted = False  # official files have no quoting, and QQP's look as if they had
        _log.warning("%s: quotation marks stay, as in %s's official files", path, task.name)
    elif quoted:
        _log.warning("%s: its quotation marks are those of a quoted file, and are taken off", path)
    elif task.name not in TASKS and (marked := _marked(lines)) and _are_whole(marked):
        _log.warning(
            "%s: quotation marks stay, though all are around whole fields; in a quoted file some "
            'field has a doubled one (""): name it .csv to have them off', path
        )  # fmt: skip
    filled = [number for number, fields in enumerate(lines, start=1) if fields != [""]]
    # in a file of one column an empty line is an empty text, but around its rows
    one_column = all(len(fields) == 1 for fields in lines)
    texts = range(filled[0], filled[-1]) if filled and one_column else range(0)
    for number, fields in enumerate(lines, start=1):
        if fields != [""] or number in texts:
            yield number, [_unquoted(field) for field in fields] if quoted else fields


def is_quoted(lines: Sequence[Sequence[str]]) -> bool:
    """Whether a TSV is quoted as a CSV is: every field with a quotation mark is quoted whole, its
    own marks doubled, and some field has such a doubled mark. GLUE's sentences hold bare marks."""
    marked = _marked(lines)
    return _are_whole(marked) and any('""' in field[1:-1] for field in marked)


def _marked(lines: Sequence[Sequence[str]]) -> list[str]:
    return [field for fields in lines for field in fields if '"' in field]


def _are_whole(marked: Sequence[str]) -> bool:
    return all(re.fullmatch(r'"(?:[^"]|"")*"', field) for field in marked)


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


def _csv_lines(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: not CSV: {error}; fix the line, or name it .tsv"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _records(
    lines: Iterator[tuple[int, list[str]]], path: Path, task: TaskSpec, skip_malformed: bool
) -> Rows:
    """Rows of a file with a header, or of one in the task's official column order without."""
    numbered = list(lines)
    header = list(task.columns)
    if numbered and _has_header([fields for _, fields in numbered], task):
        header = numbered.pop(0)[1]
        _refuse_twins(header, str(path), "column")
    rows, skipped = [], 0
    for number, fields in numbered:
        if len(fields) == len(header):
            rows.append(dict(zip(header, fields, strict=True)))
        elif skip_malformed:
            skipped += 1
        else:
            raise UserError(
                f"{path}:{number}: {len(fields)} fields where {len(header)} are expected "
                f"({_list(header)}); {_SKIP_HINT}"
            )
    _tell(path, skipped)
    return rows


def _has_header(lines: list[list[str]], task: TaskSpec) -> bool:
    """Whether the first line names columns. It does not where the first line of the official width
    holds a label in the official place: a name of another column is never taken for data."""
    if {*task.fields, task.label_column, *task.renames} & set(lines[0]):
        return True
    if task.label_column not in task.columns:
        return True
    place = task.columns.index(task.label_column)
    wide = next((fields for fields in lines if len(fields) == len(task.columns)), None)
    return wide is None or not task.task_kind.is_label(task, wide[place])


def _tell(path: Path, skipped: int) -> None:
    if skipped:
        _log.warning("%s: passed over %d malformed lines", path, skipped)


def _binary_rows(path: Path, task: TaskSpec) -> Rows:
    packed = path.suffix.lower() == ".gz"
    with pa.BufferReader(read_bytes(path)) if packed else pa.memory_map(str(path)) as source:
        if kind_of(path) == ".parquet":
            # reading the table would refuse twins in words of its own
            _refuse_twin_fields(pq.read_schema(source), f"data file {path}")
            source.seek(0)
            table = pq.read_table(source)
        else:
            try:
                table = pa.ipc.open_stream(source).read_all()  # what `datasets` writes
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_file(source).read_all()
        # a length beyond the end of a buffer would be followed
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
            f"could not reach split {hub_split!r} of hub data set {name!r} ({config}): "
            f"{reason(error)}; give data.path, a folder of files"
        ) from error
    return table_rows(dataset_table(loaded), task, f"hub data set {name!r}")


def reach_hub(name: str, revision: str | None) -> None:
    """Raises at once where the hub cannot be reached; `datasets` would try for half a minute. With
    HF_HUB_OFFLINE it does not try, and what it has kept serves."""
    if constants.HF_HUB_OFFLINE:
        return
    with suppress(HfHubHTTPError):  # the hub answered; what is wrong is said when rows are loaded
        HfApi().dataset_info(name, revision=revision, timeout=10)


def dataset_table(dataset: Any) -> Any:
    """The Arrow table of a data set of `datasets`, with the names of its ClassLabels."""
    # Through the Arrow format a row mapping (a selection, a shuffle) is applied first.
    table = dataset.with_format("arrow")[:]
    metadata = dataset.features.arrow_schema.metadata
    return table.replace_schema_metadata(metadata)


def table_rows(table: Any, task: TaskSpec, where: str) -> Rows:
    """Rows of an Arrow table; numbers of a ClassLabel become its names, which decide.

    The order of a data set's class names need not be the task's, and some may be of no row.
    """
    _refuse_twin_fields(table.schema, where)
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
    """Whether the names of a ClassLabel say what its numbers mean. Names that are numbers do where
    a file may hold each of them (`datasets` sorts them as texts: 0, 1, 10, 2). Of a class that is
    not the task's, a row that has it is refused by its name."""
    if all(task.task_kind.is_label(task, name) for name in names):
        return True
    return task.task_kind.head_of_labels and any(number_name(name) is None for name in names)


def _list(names: Any) -> str:
    return ", ".join(names)
