"""What a person reads on the console and in Markdown: tables, cells, sizes, ages and counts."""

import re
from collections.abc import Iterable, Sequence
from typing import IO

import numpy as np
from rich.console import Console
from rich.table import Table

from sead_dist.errors import UserError


class PipedConsole(Console):
    """A console that leaves a closed pipe to the command, as `print` does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


AGE_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


SIZE = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_age(text: str) -> float:
    """ "90m", "12h", "30d" in seconds."""
    return _parse("--older-than", text, AGE_S, "12h or 30d")


def parse_size(text: str, option: str = "--keep") -> int:
    """ "500MB", "1.5GB" in bytes (decimal units)."""
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
    """Write one cell: a dash for nothing, four decimals, from 100 on three."""
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
    console = PipedConsole(highlight=False, file=file)
    if not console.is_terminal:  # a log file has no width to fit into
        console = PipedConsole(highlight=False, width=max(console.width, 160), file=file)
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for n, column in enumerate(columns):
        drawn.add_column(column, justify="right" if n else "left", no_wrap=n > 0)
    for row in rows:
        drawn.add_row(*(number(value) for value in row))
    console.print(drawn, markup=False)


def clock(seconds: float) -> str:
    """ "41 s", "12.3 min", "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 2 * 3600 else f"{seconds / 3600:,.1f} h"


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
