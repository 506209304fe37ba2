"""Rows of text files: TSV, CSV and JSON, whole or line by line.

Rows keep the file's own columns. An unquoted TSV is split on tabs and line feeds alone, since
GLUE's sentences hold bare quotation marks.
"""

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sead_dist.data.tasks import TASKS, TaskSpec
from sead_dist.errors import UserError, reason
from sead_dist.runtime.console import counted

Row = dict[str, Any]
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])
# .txt holds one text on each line; no split of a folder is such a file
TEXT_KINDS = (".tsv", ".csv", ".jsonl", ".json", ".txt")
_SKIP_HINT = (
    "fix the line, or skip such lines with data.skip_malformed=true (predict: --skip-malformed)"
)
# stands for a row that was skipped, so that later rows keep their numbers
MALFORMED: Row = {}
_log = logging.getLogger(__name__)


def readable(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """The rows that were not skipped."""
    return [row for row in rows if row is not MALFORMED]


def _fix(skip_malformed: bool | None) -> str:
    """What to do about a bad line. skip_malformed: None where no key can skip the line."""
    return "fix the line" if skip_malformed is None else _SKIP_HINT


def kind_of(path: Path) -> str:
    """The ending of a file's name without `.gz`: `.csv` for `train.csv` and for `train.csv.gz`."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def _text_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def is_array(path: Path) -> bool:
    """Whether a JSON file is one list, and not one row on each line."""
    first = next((line for line in _text_lines(path) if line.strip()), "")
    return first.lstrip().startswith("[")


def tsv_stream(path: Path, task: TaskSpec, skip_malformed: bool) -> Iterator[Row]:
    """The rows of a TSV file, one at a time. Raises UserError for a line that cannot be read. With
    `skip_malformed` MALFORMED stands for such a line."""

    def lines() -> Iterator[list[str]]:
        # each check of the whole file reads it once more
        return (line.removesuffix("\r").split("\t") for line in _text_lines(path))

    quoted = _quoting(lines, path, task)
    return _records(partial(_tsv_lines, lines, quoted), path, task, skip_malformed)


def json_stream(path: Path, task: TaskSpec, skip_malformed: bool) -> Iterator[Row]:
    """The rows of a JSONL file, one at a time; errors as of `tsv_stream`."""
    return _json_lines(_text_lines(path), path, skip_malformed)


def rows_of_text(
    content: bytes, path: Path, kind: str, task: TaskSpec, skip_malformed: bool | None
) -> list[Row]:
    """The rows of a text file's bytes, and errors, as of `tsv_stream`. kind: one of TEXT_KINDS.
    path: the file's name, for messages. skip_malformed: None where no key can set it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"data file {path}:{line} is not UTF-8: {reason(error)}; convert it"
        ) from error
    if kind == ".txt":
        return _plain_lines(text, path, task)
    if kind == ".tsv":
        split = [line.removesuffix("\r").split("\t") for line in text.split("\n")]
        quoted = _quoting(lambda: split, path, task)
        lines = partial(_tsv_lines, lambda: split, quoted)
        return list(_records(lines, path, task, skip_malformed))
    if kind == ".csv":
        numbered = list(_csv_lines(text, path, task))
        return list(_records(lambda: iter(numbered), path, task, skip_malformed))
    if text.lstrip().startswith("["):
        rows = _parse(text, f"data file {path}", None)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"data file {path}: expected a list of objects; fix the file")
        return rows
    return list(_json_lines(text.split("\n"), path, skip_malformed))


def _plain_lines(text: str, path: Path, task: TaskSpec) -> list[Row]:
    """A row for each line. Raises UserError for a task that reads more than one text from a row."""
    if task.reader != "plain" or len(task.fields) != 1:
        raise UserError(
            f"{path} has one text on each line, and task {task.name!r} reads "
            f"{', '.join(task.fields)}; give a TSV, CSV or JSONL file with these columns"
        )
    lines = text.removesuffix("\n").split("\n") if text else []
    return [{task.fields[0]: line.removesuffix("\r")} for line in lines]


def _json_lines(lines: Iterable[str], path: Path, skip_malformed: bool | None) -> Iterator[Row]:
    skipped: list[int] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = _parse(line, f"{path}:{number}", skip_malformed)
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path}:{number}: {line.strip()[:60]!r} is not a JSON object; "
                        f"{_fix(skip_malformed)}"
                    )
            except UserError:
                if not skip_malformed:
                    raise
                skipped.append(number)
                row = MALFORMED
            yield row
    _log_skipped(path, skipped)


def _parse(text: str, where: str, skip_malformed: bool | None) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> Row:
        reject_twins([name for name, _ in pairs], where, "key")
        return dict(pairs)

    try:
        parsed = json.loads(text, object_pairs_hook=once)
        if "\\" in text:  # no tokeniser takes half of a pair: \\ud83d\\ude00
            json.dumps(parsed, ensure_ascii=False).encode()
        return parsed
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {reason(error)}; {_fix(skip_malformed)}") from error


def reject_twins(names: Sequence[str], where: str, what: str) -> None:
    """Raises UserError where two columns or keys have the same name: only the last would count."""
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise UserError(f"{where} has the {what} {twins[0]!r} twice; rename or remove one of them")


def _quoting(lines: Callable[[], Iterable[list[str]]], path: Path, task: TaskSpec) -> bool:
    """Whether the quotation marks of a TSV are removed. A warning says so, or gives the reason why
    they are kept. lines: begins again at each call."""
    broken = _broken_text(lines())
    if broken is not None:
        _log.warning(
            "%s: each line is a row, but lines %d to %d look like one text in quotation marks; "
            "name the file .csv to read them as one row",
            path,
            *broken,
        )
    marked = Marks.of(lines())
    if marked.quoted and task.name in TASKS:
        # official files have no quoting, and QQP's look as if they had
        _log.warning("%s: quotation marks are kept, as in %s's official files", path, task.name)
        return False
    if marked.quoted:
        _log.warning("%s: the file is quoted, so its quotation marks are removed", path)
    elif task.name not in TASKS and marked.any and marked.whole:
        _log.warning(
            "%s: quotation marks are kept: they enclose whole fields, but none inside a field is "
            'doubled (""); name the file .csv to remove them', path
        )  # fmt: skip
    return marked.quoted


def _broken_text(lines: Iterable[list[str]]) -> tuple[int, int] | None:
    """The first and the last line of a text in quotation marks that seems to span several lines of
    a file of one column. None for more columns: such lines have too few fields, and are
    rejected."""
    opened = None
    for number, fields in enumerate(lines, start=1):
        if len(fields) > 1:
            return None
        if fields[0].count('"') % 2:  # this line opens or closes a quotation
            if opened is not None and fields[0].endswith('"'):
                return opened, number
            opened = number if fields[0].startswith('"') else None
    return None


def _tsv_lines(
    lines: Callable[[], Iterable[list[str]]], quoted: bool
) -> Iterator[tuple[int, list[str]]]:
    """The lines of a TSV that are rows, with their numbers. lines: begins again at each call."""
    first = last = 0
    one_column = True
    for number, fields in enumerate(lines(), start=1):
        one_column = one_column and len(fields) == 1
        if fields != [""]:
            first, last = first or number, number
    for number, fields in enumerate(lines(), start=1):
        # in a file of one column, an empty line between rows is an empty text
        if fields != [""] or (one_column and first < number < last):
            yield number, [_unquoted(field) for field in fields] if quoted else fields


class Marks(NamedTuple):
    """What holds of the fields with a quotation mark.

    any: there are such fields. whole: each is quoted as a whole, and the marks inside it are
    doubled. doubled: at least one has a doubled mark inside.
    """

    any: bool
    whole: bool
    doubled: bool

    @classmethod
    def of(cls, lines: Iterable[Sequence[str]]) -> "Marks":
        found, whole, doubled = False, True, False
        for field in (field for fields in lines for field in fields if '"' in field):
            found = True
            whole = whole and re.fullmatch(r'"(?:[^"]|"")*"', field) is not None
            doubled = doubled or '""' in field[1:-1]
        return cls(found, whole, doubled)

    @property
    def quoted(self) -> bool:
        """Whether a TSV is quoted as a CSV is. GLUE's sentences hold bare marks."""
        return self.whole and self.doubled


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if field.startswith('"') else field


def _delimiter(text: str, path: Path, task: TaskSpec) -> str:
    """The delimiter of a CSV: a semicolon, if it divides the first line into names of the task's
    columns and a comma does not (spreadsheets of some countries write it); else a comma. Raises
    UserError where tabs divide it into such names."""
    known = {*task.fields, task.label_column, *task.renames}
    first = text.partition("\n")[0].removesuffix("\r")
    by_comma, by_semicolon, by_tab = (
        {name.strip('"') for name in first.split(mark)} for mark in (",", ";", "\t")
    )
    if known & by_tab - by_comma:
        raise UserError(
            f"data file {path}: tabs divide its columns ({first.replace(chr(9), ', ')}), but a "
            ".csv has commas; name it .tsv"
        )
    if known & by_comma or not known & by_semicolon:
        return ","
    _log.warning("%s: its columns are divided by semicolons", path)
    return ";"


def _csv_lines(text: str, path: Path, task: TaskSpec) -> Iterator[tuple[int, list[str]]]:
    mark = _delimiter(text, path, task)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
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
    lines: Callable[[], Iterator[tuple[int, list[str]]]],
    path: Path,
    task: TaskSpec,
    skip_malformed: bool | None,
) -> Iterator[Row]:
    """The rows of a file. The header names its columns. Without a header they have the task's
    official order. lines: begins again at each call."""
    header, numbered = list(task.columns), lines()
    skipped: list[int] = []
    if _has_header(lines, task):
        header = next(numbered)[1]
        reject_twins(header, str(path), "column")
    for number, fields in numbered:
        if len(fields) == len(header):
            yield dict(zip(header, fields, strict=True))
        elif skip_malformed:
            skipped.append(number)
            yield MALFORMED
        else:
            raise UserError(
                f"{path}:{number}: {counted(len(fields), 'field')} where {len(header)} are "
                f"expected ({', '.join(header)}); {_fix(skip_malformed)}"
            )
    _log_skipped(path, skipped)


def _has_header(lines: Callable[[], Iterator[tuple[int, list[str]]]], task: TaskSpec) -> bool:
    """Whether the first line is a header. It is one if it names a column of the task. Else the
    first line of the official width counts: if it holds a label in the official place, there is no
    header. So a header with other names is never read as data."""
    first = next(lines(), None)
    if first is None:
        return False
    if {*task.fields, task.label_column, *task.renames} & set(first[1]):
        return True
    if task.label_column not in task.columns:
        return True
    place = task.columns.index(task.label_column)
    wide = next((fields for _, fields in lines() if len(fields) == len(task.columns)), None)
    return wide is None or not task.task_kind.is_label(task, wide[place])


def _log_skipped(path: Path, skipped: Sequence[int]) -> None:
    """Log which lines were skipped."""
    if skipped:
        listed = listed_numbers(skipped)
        _log.warning("%s: skipped %s: %s", path, counted(len(skipped), "malformed line"), listed)


def listed_numbers(numbers: Sequence[int]) -> str:
    """The numbers as a list for a message, at most a hundred of them."""
    more = f" and {len(numbers) - 100} more" if len(numbers) > 100 else ""
    return ", ".join(map(str, numbers[:100])) + more
