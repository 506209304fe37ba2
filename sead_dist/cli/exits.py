"""What a command prints, and its end: the exit code, and the line that gives the reason.

Other packages send their lines, warnings and tables to the logger `sead_dist`.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sead_dist.errors import LostRankError, RunError, UserError, one_line, run_error

# seconds that another rank waits before it ends, so that rank 0 can print its line
GRACE_S = 1.0


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


def attempt(do: Callable[[], None], debug: bool = False) -> int | None:
    """Call `do`. Returns None on success, else the exit code.

    Rank 0 prints a mistake or failure in one line; other ranks print only that a rank was lost.
    Exit codes: 2 for a person's mistake, 3 for a failure during a run, 130 for an interrupt, 1 for
    a bug (its traceback is printed), 0 where standard output was closed. debug: whether the
    traceback of a mistake or failure is printed too.
    """
    try:
        with lines_shown():
            do()
        sys.stdout.flush()
    except (UserError, RunError) as error:
        if debug:
            show_traceback(error)
        if not _is_other_rank() or isinstance(error, LostRankError):
            print(f"sead-dist: {one_line(str(error))}", file=sys.stderr, flush=True)
        else:
            # a launcher ends all ranks once the first has ended; rank 0 must print its line before
            time.sleep(GRACE_S)
        return 2 if isinstance(error, UserError) else 3
    except BrokenPipeError:  # the reader has ended, as `| head -1` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        machines = run_error(error)  # a failure of the environment, where a traceback does not help
        if machines is not None:
            if debug:
                show_traceback(error)
            print(f"sead-dist: {machines}", file=sys.stderr)
            return 3
        traceback.print_exc()
        return 1
    return None


def _is_other_rank() -> bool:
    """Whether another rank 0 prints the same error. RANK and WORLD_SIZE may be wrong here."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    whole = rank.isdecimal() and size.isdecimal()
    return 0 < int(rank) < int(size) if whole else rank.isdecimal() and int(rank) > 0


def show_traceback(error: BaseException) -> None:
    """Print the whole traceback, including causes that an error hides."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = link.__cause__ is not None
        link = link.__cause__ or link.__context__
    traceback.print_exception(error)


def leave(code: int) -> None:
    """End the process at once. Busy threads and process groups cannot block this."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
