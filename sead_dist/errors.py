"""The two ways a run can end badly, the exit code of each, and errors of files of others.

Every message is one line: what was wrong, the value, what is allowed, what to do.
"""

import errno
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# failures that no other configuration avoids: disk, permission, memory, limits of the machine
OF_ENVIRONMENT = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE),
        *(errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT),
        *(errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.EOPNOTSUPP),
    }
)


class UserError(Exception):
    """A person's mistake, found before any long work. The command exits with 2."""


class RunError(Exception):
    """A failure during a run (NaN logits, a full disk), or a failure of the machine at any time (a
    missing permission, too little memory). The command exits with 3."""


class LostRankError(RunError):
    """A rank did not start, is gone, or can no longer agree with the others. The rank that raises
    this error also prints it, because rank 0 may be the lost rank, or may not learn of it."""


def expect(name: str, given: object, kinds: Any, what: str) -> None:
    """Raises UserError where an argument of a call from Python is of none of these types. kinds:
    as for `isinstance`. what: what to give instead."""
    if not isinstance(given, kinds):
        raise UserError(f"{name} is of type {type_of(given)}; give {what}")


def type_of(given: object) -> str:
    """The type of a value and the start of the value, in one line: `int (3)`."""
    return f"{type(given).__name__} ({' '.join(reprlib.repr(given).split())})"


def rejection(message: str, error: BaseException) -> UserError | RunError:
    """The error to raise where a file or folder cannot be used. It is a RunError for a failure of
    the machine. Else it is a UserError (no such file, a file in place of a folder, other contents).
    """
    own = lacks_memory(error) or getattr(error, "errno", None) in OF_ENVIRONMENT
    return RunError(message) if own else UserError(message)


def run_error(error: Exception) -> RunError | None:
    """A RunError of one line for an error of the machine (a full disk, a folder that went away, too
    little memory). None for any other error, which is a bug."""
    if isinstance(error, OSError):
        return RunError(f"{error}; fix it, then give the same command again")
    if lacks_memory(error):
        what = next(iter(str(error).splitlines()), "") or type(error).__name__
        return RunError(
            f"not enough memory: {what}; lower micro_batch_size, or use a machine with more "
            "memory, then give the same command again"
        )
    return None


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, PyTorch on a GPU, or PyTorch on the CPU found no memory."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextmanager
def reading(path: Path | str, fix: str, name: str | None = None) -> Iterator[None]:
    """Use this around code that reads what others wrote. Any error inside becomes one line with the
    file's name, chained to the first error. Code that only uses the contents stays outside, so that
    a bug in it shows as a traceback.

    path: what is read. fix: what the person can do. name: what the message calls the file (default:
    path). Raises UserError, or RunError for failures of the machine.
    """
    try:
        if isinstance(path, Path) and path.exists() and not (path.is_file() or path.is_dir()):
            # reading a pipe that nobody fills would never end
            raise UserError(f"{name or path} is a pipe or a device, not a file; {fix}")
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        raise rejection(f"{name or path} cannot be read: {reason(error)}; {fix}", error) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise UserError(f"{name or path} cannot be read: {reason(error)}; {fix}") from error


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust raised it, as no Exception."""
    return type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What an exception of another library says, in one line of at most 300 characters."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "ValidationError":  # pydantic's, of many lines
        mistake = error.errors()[0]  # type: ignore[attr-defined]
        return one_line(f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}")[:300]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # a line that ends in a colon says nothing without the lines that it announces
    first = " ".join(lines) if lines and lines[0].endswith(":") else next(iter(lines), "")
    kind = type(error).__name__
    return one_line(f"{kind}: {first.rstrip('.')}" if first else kind)[:300]


def one_line(text: str) -> str:
    """The text in one line of printable characters; other characters are escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
