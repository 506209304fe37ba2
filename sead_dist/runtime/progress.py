"""How far a piece of work is: a bar in a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic

from rich import progress as bars
from rich.console import Console


class Bar:
    """One row of a rich progress display."""

    def __init__(self, display: bars.Progress, task: bars.TaskID) -> None:
        self._display = display
        self._task = task

    def advance(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        self._display.advance(self._task, n)

    def update(self, **shown: object) -> None:
        """Set the values shown beside the bar, such as loss=0.41."""
        self._display.update(self._task, shown=_shown(shown))


class Lines:
    """Progress as plain lines: each 10%, but not more than one a second, and always the last."""

    def __init__(self, put: Callable[[str], None], description: str, total: int, done: int) -> None:
        self._put = put
        self._description = description
        self._total = total
        self._done = done
        self._tenth = self._tenths()
        self._last = monotonic()
        self._text = ""

    def _tenths(self) -> int:
        return 10 * self._done // max(self._total, 1)

    def advance(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        self._done += n
        finished = self._done - n < self._total <= self._done
        due = self._tenths() > self._tenth and monotonic() - self._last >= 1.0
        if finished or due:
            self._tenth = self._tenths()
            self._last = monotonic()
            percent = 100 * self._done // max(self._total, 1)
            line = f"{self._description}: {self._done}/{self._total} ({percent}%) {self._text}"
            self._put(line.rstrip())

    def update(self, **shown: object) -> None:
        """Set the values shown in the next line, such as loss=0.41."""
        self._text = _shown(shown)


@contextmanager
def shown_progress(
    console: Console, put: Callable[[str], None], description: str, total: int, done: int = 0
) -> Iterator[Bar | Lines]:
    """How far a piece of work is: a bar where the console is a terminal, else lines to `put`."""
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
    texts = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.values())
    return " ".join(f"{name}={text}" for name, text in zip(values, texts, strict=True))
