"""The two ways a run can end badly, and the exit code of each.

Every message is one line: what was wrong, the value, what is allowed, what to do.
"""


class UserError(Exception):
    """A person's mistake, found before any long work: the command exits with 2."""


class RunError(Exception):
    """A failure during a run (NaN logits, a full disk): the command exits with 3."""
