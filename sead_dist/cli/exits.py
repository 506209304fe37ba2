"""How a command ends: its exit code, and the line that says why."""

import os
import sys
import time
import traceback
from collections.abc import Callable

from sead_dist.cli.output import lines_shown
from sead_dist.errors import LostRankError, RunError, UserError, one_line, run_error

# seconds that another rank waits before it ends, so that rank 0 can print its line
GRACE_S = 1.0


def attempt(do: Callable[[], None], debug: bool = False) -> int | None:
    """None when `do` went well, else its exit code, the reason told in one line: 2 a person's
    mistake, 3 a failure during a run, 130 an interrupt, 1 a bug. debug: its traceback too."""
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
            # a launcher ends all ranks with the first: rank 0 has to say its line before
            time.sleep(GRACE_S)
        return 2 if isinstance(error, UserError) else 3
    except BrokenPipeError:  # `| head -1` has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        machines = run_error(error)  # no traceback helps
        if machines is not None:
            if debug:
                show_traceback(error)
            print(f"sead-dist: {machines}", file=sys.stderr)
            return 3
        traceback.print_exc()
        return 1
    return None


def _is_other_rank() -> bool:
    """Whether there is a rank 0 that tells the same. (What is wrong may be the rank itself.)"""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    whole = rank.isdecimal() and size.isdecimal()
    return 0 < int(rank) < int(size) if whole else rank.isdecimal() and int(rank) > 0


def show_traceback(error: BaseException) -> None:
    """The whole of it: also what stands behind an error that hides its cause."""
    link: BaseException | None = error
    while link is not None:
        link.__suppress_context__ = link.__cause__ is not None
        link = link.__cause__ or link.__context__
    traceback.print_exception(error)


def leave(code: int) -> None:
    """End at once: other threads and process groups may be in the middle of something."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
