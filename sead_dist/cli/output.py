"""What commands print: lines, warnings and tables that the packages below tell the logger
`sead_dist`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Printed(logging.Handler):
    """Prints a record as it is, on standard output; on standard error a warning, and what is told
    `aside`. A table is drawn. A closed pipe is left to the command."""

    def emit(self, record: logging.LogRecord) -> None:
        table = getattr(record, "table", None)
        if table is not None:
            from sead_dist.runtime.console import print_table  # it needs NumPy

            print_table(*table)
            return
        aside = record.levelno >= logging.WARNING or getattr(record, "aside", False)
        print(record.getMessage(), file=sys.stderr if aside else None, flush=True)


@contextmanager
def lines_shown() -> Iterator[None]:
    """Inside, what is told is printed, by nobody else; afterwards the logger is as it was."""
    logger = logging.getLogger("sead_dist")
    if any(isinstance(handler, Printed) for handler in logger.handlers):
        yield
        return
    shown, level, propagate = Printed(), logger.level, logger.propagate
    logger.addHandler(shown)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(shown)
        logger.setLevel(level)
        logger.propagate = propagate
