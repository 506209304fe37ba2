"""Printing of the lines, warnings and tables that other packages send to the logger `sead_dist`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Printed(logging.Handler):
    """A handler that prints a record as it is, or draws its table, on standard output.

    Warnings, and records with `aside`, go to standard error. The command handles a closed pipe.
    """

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
    """Within the block, this handler alone prints the logger's records.

    Afterwards the logger has its former state.
    """
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
