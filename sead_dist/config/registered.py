"""Names that a configuration may give to losses, ensembles, kinds of teacher and kinds of task.

Built-in names stand here as strings, so that a configuration is checked without torch. What they
name stands beside its own code, under the same names (a test holds this). A plugin adds its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sead_dist.errors import UserError

BUILT_IN: dict[str, tuple[str, ...]] = {
    "loss": ("kl", "mse"),
    "hard loss": ("cross_entropy", "squared_error"),
    "ensemble": (
        *("none", "single", "mean_logits", "mean_probabilities", "fixed", "score"),
        *("confidence", "entropy", "answers", "random", "routed"),
    ),
    "kind of teacher": ("model",),
    "kind of task": ("classification", "regression", "choice"),
}
# the ensemble that asks no teacher, and the one whose data name each row's teacher
NO_ENSEMBLE, ROUTED = "none", "routed"


class Added:
    """What was registered beside the built-in names: what -> name -> the plugin that did it. Python
    code that registers without a plugin stands as ''."""

    def __init__(self) -> None:
        self.owners: dict[str, dict[str, str]] = {what: {} for what in BUILT_IN}
        self.loading = ""

    @contextmanager
    def by(self, plugin: str) -> Iterator[None]:
        """Inside, what is registered is this plugin's. What it registered before is forgotten."""
        for owners in self.owners.values():
            for name in [name for name, owner in owners.items() if owner == plugin]:
                del owners[name]
        before, self.loading = self.loading, plugin
        try:
            yield
        finally:
            self.loading = before

    def of(self, plugin: str) -> list[tuple[str, str]]:
        """(what, name) of all that a plugin registered."""
        return [
            (what, name)
            for what, owners in self.owners.items()
            for name, owner in owners.items()
            if owner == plugin
        ]


ADDED = Added()


def names(what: str) -> list[str]:
    """The names that are known, built-in ones first."""
    return [*BUILT_IN[what], *ADDED.owners[what]]


def claim_name(what: str, name: str) -> None:
    """Take a name for what is being registered. Raises UserError where it is taken or no word."""
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{name!r} is no name of a {what}; give letters, digits and _")
    if name in names(what):
        owner = ADDED.owners[what].get(name)
        by = "built in" if owner is None else f"registered by {owner or 'this process'}"
        raise UserError(f"a {what} {name!r} is there already ({by}); give yours another name")
    ADDED.owners[what][name] = ADDED.loading


def expected(allowed: Sequence[str]) -> str:
    """Names as pydantic lists them: 'a', 'b' or 'c'."""
    *others, last = map(repr, allowed)
    return f"{', '.join(others)} or {last}" if others else last
