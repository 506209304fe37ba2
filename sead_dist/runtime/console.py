"""Text for the console and for Markdown: tables, cells, sizes, ages and counts. Also the progress
of a piece of work: a bar in a terminal or a notebook, plain lines elsewhere.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from time import monotonic
from typing import IO

import numpy as np
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from sead_dist.errors import UserError


class PipedConsole(Console):
    """A console that raises BrokenPipeError on a closed pipe, as `print` does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# title, columns, rows
TitledTable = tuple[str, Sequence[str], Sequence[Sequence[object]]]
AGE_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
SIZE = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_age(text: str) -> float:
    """Seconds of an age: "90m", "12h", "30d"."""
    return _parse("--older-than", text, AGE_S, "12h or 30d")


def parse_size(text: str, option: str = "--keep") -> int:
    """Bytes of a size: "500MB", "1.5GB", "80GiB"."""
    return int(_parse(option, text, SIZE, "500MB or 10GB"))


def _parse(option: str, text: str, units: dict[str, float] | dict[str, int], such: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", text.strip())
    folded = {unit.casefold(): amount for unit, amount in units.items()}
    if match is None or match[2].casefold() not in folded:
        raise UserError(
            f"{option} {text!r} is not a number with a unit of {', '.join(units)}; give e.g. {such}"
        )
    return float(match[1]) * folded[match[2].casefold()]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table: the first column to the left, the others centred."""
    rule = [":---", *(":---:" for _ in columns[1:])]
    lines = (columns, rule, *([number(value) for value in row] for row in rows))
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )


def number(value: object) -> str:
    """Write one cell: a dash for None; a float with four decimals, from 100 on with three."""
    if value is None:
        return "-"
    if isinstance(value, (float, np.floating)):
        real = float(value)
        return f"{real:.3f}" if abs(real) >= 100 else f"{real:.4f}"
    return str(value)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    file: IO[str] | None = None,
) -> None:
    """Print a table on the console, or into a file: the first column to the left, the others to
    the right."""
    # in a notebook rich would show what is for the file
    in_notebook = None if file is None else False
    console = PipedConsole(highlight=False, file=file, force_jupyter=in_notebook)
    if not console.is_terminal:  # a log file has no width to fit into
        width = max(console.width, 160)
        console = PipedConsole(highlight=False, file=file, force_jupyter=in_notebook, width=width)
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for n, column in enumerate(columns):
        drawn.add_column(column, justify="right" if n else "left", no_wrap=n > 0)
    for row in rows:
        drawn.add_row(*(number(value) for value in row))
    console.print(drawn, markup=False)


def clock(seconds: float) -> str:
    """A duration for people: "41 s", "12.3 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"


def counted(number: int, what: str, form: str = "") -> str:
    """A number with its noun: 1 row, 2 rows. form: of the number, as in an f-string (2,000)."""
    return f"{number:{form}} {what}" if number == 1 else f"{number:{form}} {what}s"


def counted_rows(number: int, what: str) -> str:
    """`2 rows that ...`, or `1 row that ...`. what: the words for several rows or copies."""
    if number == 1:
        what = re.sub(
            r"\b(row|cop)(?:s|ies)\b", lambda of: of[1].replace("cop", "copy"), what, count=1
        )
        what = what.replace("which share ", "which shares ")
    return f"{number} {what}"


class Bar:
    """One row of a rich progress display."""

    def __init__(self, display: bars.Progress, task: bars.TaskID) -> None:
        self._display = display
        self._task = task

    def advance(self, n: int = 1, left_s: float | None = None) -> None:
        """Count `n` more units as done. left_s is unused: rich has its own estimate."""
        self._display.advance(self._task, n)

    def update(self, **shown: object) -> None:
        """Set the values shown beside the bar, such as loss=0.41."""
        self._display.update(self._task, shown=_shown(shown))


class Lines:
    """Progress as plain lines: one at each 10%, at most one a second, the first one after 30 s at
    the latest, and always the last. A line before the end also gives the time for the rest."""

    FIRST_S = 30.0

    def __init__(self, put: Callable[[str], None], description: str, total: int, done: int) -> None:
        self._put = put
        self._description = description
        self._total = total
        self._done = done
        self._tenth = self._tenths()
        self._began = self._last = monotonic()
        self._start = done
        self._printed = False
        self._text = ""

    def _tenths(self) -> int:
        return 10 * self._done // max(self._total, 1)

    def advance(self, n: int = 1, left_s: float | None = None) -> None:
        """Count `n` more units as done. left_s: the time for the rest; None: as at the mean speed
        so far."""
        self._done += n
        now = monotonic()
        finished = self._done - n < self._total <= self._done
        due = self._tenths() > self._tenth and now - self._last >= 1.0
        if finished or due or (not self._printed and now - self._began >= self.FIRST_S):
            self._tenth, self._last, self._printed = self._tenths(), now, True
            percent = 100 * self._done // max(self._total, 1)
            line = f"{self._description}: {self._done}/{self._total} ({percent}%) {self._text}"
            if left_s is None:
                step_s = (now - self._began) / max(self._done - self._start, 1)
                left_s = (self._total - self._done) * step_s
            self._put(line.rstrip() + (f" left={clock(left_s)}" if left_s > 0 else ""))

    def update(self, **shown: object) -> None:
        """Set the values shown in the next line, such as loss=0.41."""
        self._text = _shown(shown)


class NotebookBar:
    """A bar in a notebook. tqdm draws it as text where the notebook has no widgets. rich would draw
    nothing there."""

    def __init__(self, description: str, total: int, done: int) -> None:
        from tqdm.auto import tqdm

        # bars on standard error have a red ground, and standard output has nothing else
        self._bar = tqdm(desc=description, total=total, initial=done, file=sys.stdout)

    def advance(self, n: int = 1, left_s: float | None = None) -> None:
        """Count `n` more units as done. left_s is unused: tqdm has its own estimate."""
        self._bar.update(n)

    def update(self, **shown: object) -> None:
        """Set the values shown beside the bar, such as loss=0.41."""
        self._bar.set_postfix_str(_shown(shown), refresh=False)

    def close(self) -> None:
        """Stop drawing. The bar stays on the page."""
        self._bar.close()


@contextmanager
def shown_progress(
    console: Console,
    put: Callable[[str], None],
    description: str,
    total: int,
    done: int = 0,
    in_notebooks: bool = True,
) -> Iterator[Bar | Lines | NotebookBar]:
    """How far a piece of work is: a bar where the console is a terminal, else lines to `put`.

    in_notebooks: whether a notebook shows a bar, even where the console is quiet."""
    if in_notebooks and console.is_jupyter:
        with closing(NotebookBar(description, total, done)) as bar:
            yield bar
        return
    if console.quiet or not console.is_terminal:
        yield Lines(put, description, total, done)
        return
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[shown]}", markup=False),
    )
    with bars.Progress(*columns, console=console) as display:
        yield Bar(display, display.add_task(description, total=total, completed=done, shown=""))


def _shown(values: Mapping[str, object]) -> str:
    texts = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    return " ".join(f"{name}={text}" for name, text in texts.items())
