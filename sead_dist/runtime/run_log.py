"""The output of a run: metrics.jsonl, log.txt, JSON files, console lines and bars.

Every file that replaces another is written aside and renamed, so a reader (or a killed run)
sees the old file or the new one, never half of one.
"""

import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Self

from pydantic import TypeAdapter

from sead_dist.errors import UserError, reading, reason
from sead_dist.runtime.console import Bar, Lines, NotebookBar, PipedConsole, shown_progress, table
from sead_dist.runtime.files import open_own, written_aside, written_for_person
from sead_dist.runtime.redact import without_secrets

PROGRESS = "progress.json"
# names the repository that a run's model was uploaded to
PUSHED = "pushed.json"
# the logger of lines that this package does not print itself
_log = logging.getLogger("sead_dist")
# where `tell` puts lines: the log of the innermost open run, the list of `noted`, or the logger
_lines: ContextVar["RunLog | list[str] | None"] = ContextVar("lines", default=None)
PACKAGES = (
    *("sead_dist", "torch", "transformers", "accelerate", "datasets", "tokenizers"),
    *("safetensors", "deepspeed", "numpy", "scikit-learn", "scipy"),
)


def write_json(path: Path, obj: object) -> None:
    """Write `obj` as strict JSON, aside and renamed; NaN and infinity become null."""
    with written_aside(path) as aside:
        aside.write_text(_as_json(obj), "utf-8")


def write_json_for_person(path: Path, obj: object) -> None:
    """As `write_json`, for a file that a person names: links, devices and pipes stay."""
    with written_for_person(path) as aside:
        aside.write_text(_as_json(obj), "utf-8")


def _as_json(obj: object) -> str:
    return json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    with reading(path, "restore it or start a new run"):
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing; check that {path.parent} is a run directory"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{path} is not JSON ({reason(error)}); restore it or start a new run"
            ) from error


def read_as(kind: Any, path: Path, key: str | None = None) -> Any:
    """One JSON file, or what it holds under a key, as a value of this type.

    Raises:
        UserError: the file is missing, is not JSON, or holds something else.
    """
    found, check = read_json(path), TypeAdapter(kind)
    with reading(path, "restore it or start a new run"):
        return check.validate_python(found if key is None else found[key])


def read_if_written(kind: Any, path: Path) -> Any:
    """As `read_as`; None where the file is missing. Another process may write it meanwhile."""
    try:
        return read_as(kind, path)
    except UserError as error:
        # a later look at the path would find what was written after the read
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def is_finished(run: Path) -> bool:
    """Whether this run directory holds a run that came to its end."""
    summary = run / "run_summary.json"
    return summary.is_file() and bool(read_as(dict[str, Any], summary).get("finished"))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run directory's metrics.jsonl, oldest first.

    A last line that a killed run left unfinished is skipped. Without a file there are none.

    Raises:
        UserError: a line before the last is not a JSON object.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with reading(path, "remove it"):
        lines = path.read_bytes().split(b"\n")
    last = max((n for n, line in enumerate(lines) if line.strip()), default=-1)
    records = []
    for n, line in enumerate(lines[: last + 1]):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif n < last:
            raise UserError(f"{path} line {n + 1} is not a JSON object; fix or delete that line")
    return records


def environment() -> dict[str, Any]:
    """Describe what a run ran on: versions, platform, processors, threads, commit.

    Holds no environment variables, paths, user or host names.
    """
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # Not imported for this: a process that computes has loaded it. Others have no threads.
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "git_commit": _git_commit(Path(__file__)),
        "versions": versions,
    }


def tell(line: str, aside: bool = False, any_rank: bool = False) -> None:
    """Give a person one line.

    While a run is open, rank 0 puts the line into log.txt and on the run's console, and the other
    ranks drop it. Within `noted` the line is kept for the caller. Otherwise the line is logged to
    `sead_dist`, which the command line prints.

    aside: the line is always logged. The command line prints it on standard error, because standard
    output may hold the result of the command. any_rank: other ranks log the line instead of
    dropping it, as one that is aside.
    """
    lines = None if aside else _lines.get()
    if isinstance(lines, list):
        lines.append(line)
    elif lines is not None and lines.is_main:
        lines.write_line(line)
    elif lines is None or any_rank:
        _log.info("%s", line, extra={"aside": aside or lines is not None})


@contextmanager
def noted() -> Iterator[list[str]]:
    """Within the block, lines of `tell` are added to the list and go nowhere else."""
    notes: list[str] = []
    before = _lines.set(notes)
    try:
        yield notes
    finally:
        _lines.reset(before)


def tell_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Log a table to `sead_dist`, as Markdown. The command line draws it."""
    drawn = {"table": (title, columns, rows)}
    _log.info("%s\n%s", title, table(columns, rows), extra=drawn)


def steps_done(folder: Path) -> int:
    """The last step that a run in this folder took, saved or not; 0 where none is known."""
    try:
        return int(json.loads((folder / PROGRESS).read_text("utf-8"))["step"])
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return 0


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of the run."""
    handle = open_own(path, os.O_WRONLY | os.O_APPEND)
    with os.fdopen(handle, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


class RunLog:
    """The files and the console of one run directory. Ranks other than 0 write nothing.

    Within a `with` block of it, the run is open: `tell` writes to this log. Leaving the block
    closes the files, and `tell` writes where it did before.

    Args:
        folder: the run directory; made if it is missing.
        is_main: whether this is rank 0, the only one that writes.
        console: whether rank 0 prints lines on standard output; else it logs them to `sead_dist`.
    """

    def __init__(self, folder: Path, is_main: bool, console: bool) -> None:
        self.folder = folder
        self.is_main = is_main
        self._on_console = console
        self.console = PipedConsole(highlight=False, quiet=not (is_main and console))
        self._metrics: BinaryIO | None = None
        self._progress: int | None = None
        self._before: Token[RunLog | list[str] | None] | None = None
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _repair(self._metrics_path)
            self._metrics = self._open_metrics()

    def __enter__(self) -> Self:
        self._before = _lines.set(self)
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._before is not None
        _lines.reset(self._before)
        self.close()

    @property
    def _metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _open_metrics(self) -> BinaryIO:
        return os.fdopen(open_own(self._metrics_path, os.O_WRONLY | os.O_APPEND), "ab")

    def metrics(self, event: str, **values: object) -> None:
        """Append one record to metrics.jsonl and flush it; NaN and infinity become null."""
        if self._metrics is None:
            return
        record = _plain({"event": event, **values})
        self._metrics.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._metrics.flush()

    def step_done(self, step: int, total: int) -> None:
        """Note the step in progress.json, which a killed run leaves behind.

        The file changes at every step, so it is written in place: one line of a fixed length.
        """
        if self.is_main:
            if self._progress is None:
                self._progress = open_own(self.folder / PROGRESS, os.O_WRONLY)
            line = json.dumps({"step": step, "total": total})
            os.pwrite(self._progress, f"{line:<62}\n".encode(), 0)

    def truncate_after(self, step: int) -> None:
        """Drop the records of steps after `step`, which a resumed run will write again."""
        if self._metrics is None:
            return
        self._metrics.close()
        kept = [r for r in read_metrics(self.folder) if r.get("step", step) <= step]
        with written_aside(self._metrics_path) as aside:
            aside.write_text("".join(json.dumps(r) + "\n" for r in kept), "utf-8")
        self._metrics = self._open_metrics()

    def write_line(self, line: str) -> None:
        """Put one line on the console and, with the time, into log.txt. Rank 0 calls this."""
        line = without_secrets(line)
        append_line(self.folder / "log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}")
        self._print(line)

    @contextmanager
    def progress(
        self, description: str, total: int, done: int = 0
    ) -> Iterator[Bar | Lines | NotebookBar]:
        """Show how far a piece of work is: a bar in a terminal or a notebook, else lines.

        Args:
            description: what is being done, a few words.
            total: units of work in all.
            done: units done before, by the run that this one resumes.
        """
        where = (self.console, self._print, description, total, done, self.is_main)
        with shown_progress(*where) as shown:
            yield shown

    def close(self) -> None:
        """Close the files; later records are not written."""
        if self._progress is not None:
            os.close(self._progress)
            self._progress = None
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None

    def _print(self, line: str) -> None:
        if self._on_console:
            self.console.print(line, markup=False, soft_wrap=True)
        else:
            _log.info("%s", line)


def _plain(obj: object) -> Any:
    """Turn arrays, scalars and paths into what strict JSON can hold."""
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if hasattr(obj, "tolist"):  # NumPy arrays and scalars, tensors
        return _plain(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _repair(path: Path) -> None:
    """Cut the unfinished last line that a killed run left, or give it its missing line end."""
    if not path.exists():
        return
    with os.fdopen(open_own(path, os.O_RDWR), "rb+") as file:
        content = file.read()
        start = content.rfind(b"\n") + 1
        if start == len(content):
            return
        if _record(content[start:]) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(start)


def _git_commit(file: Path) -> str | None:
    """Return the commit (and "-dirty") of the checkout that tracks `file`, if one does."""
    git = ["git", "-C", str(file.parent)]
    try:
        # A virtual environment may lie inside some other project's checkout.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", file.name], check=True, capture_output=True
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
