"""The two ways a run can end badly, and the exit code of each.

Every message is one line: what was wrong, the value, what is allowed, what to do.
"""

import errno

# what no other words would change: disk, permission, memory, limits of the machine
OF_ENVIRONMENT = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE),
        *(errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT),
        *(errno.EAGAIN, errno.EBUSY, errno.ENOLCK, errno.EOPNOTSUPP),
    }
)


class UserError(Exception):
    """A person's mistake, found before any long work: the command exits with 2."""


class RunError(Exception):
    """A failure during a run (NaN logits, a full disk), or of what it stands on (a permission, too
    little memory), whenever it is found: the command exits with 3."""


def refusal(message: str, error: BaseException) -> UserError | RunError:
    """The error to raise for one of a file or folder: the environment's failure, else a person's
    mistake (no such file, a file where a folder should be, other contents)."""
    own = lacks_memory(error) or getattr(error, "errno", None) in OF_ENVIRONMENT
    return RunError(message) if own else UserError(message)


def run_error(error: Exception) -> RunError | None:
    """What an error of the machine says in one line (a full disk, a folder that went away, too
    little memory); None for any other, which is a bug."""
    if isinstance(error, OSError):
        return RunError(f"{error}; mend it, then give the same command again")
    if lacks_memory(error):
        what = next(iter(str(error).splitlines()), "") or type(error).__name__
        return RunError(
            f"memory does not suffice: {what}; lower micro_batch, or run where there is more, then "
            "give the same command again"
        )
    return None


def lacks_memory(error: BaseException) -> bool:
    """Whether Python, PyTorch on a GPU, or PyTorch on the CPU found no memory."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)
