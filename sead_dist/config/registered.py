"""Names that a configuration may give to losses, ensembles, kinds of teacher and kinds of task.

Built-in names stand here as strings, so that a configuration is checked without torch. What they
name stands beside its own code, under the same names (a test holds this). A plugin adds its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sead_dist.errors import UserError

# a teacher that Transformers loads
MODEL = "model"
# a causal language model with a prompt: by Transformers, or behind an OpenAI-compatible interface
LANGUAGE_MODEL, ENDPOINT = "language_model", "endpoint"
# the ensemble that asks no teacher, and the one whose data name each row's teacher
NO_ENSEMBLE, ROUTED = "none", "routed"
BUILT_IN: dict[str, tuple[str, ...]] = {
    "loss": ("kl", "mse", "mse_centered"),
    "hard loss": ("cross_entropy", "squared_error"),
    "ensemble": (
        *(NO_ENSEMBLE, "single", "mean_logits", "mean_probabilities", "fixed", "score"),
        *("fitted", "confidence", "entropy", "answers", "random", ROUTED),
    ),
    "kind of teacher": (MODEL, LANGUAGE_MODEL, ENDPOINT),
    "kind of task": ("classification", "regression", "choice"),
}


class Added:
    """What was registered beside the built-in names. owners: what -> name -> the hash of the plugin
    that did it, '' for Python code without a plugin. files: hash -> path of each plugin."""

    def __init__(self) -> None:
        self.owners: dict[str, dict[str, str]] = {what: {} for what in BUILT_IN}
        self.files: dict[str, str] = {"": "this process"}
        self.loading = ""

    @contextmanager
    def by(self, plugin: str, path: str) -> Iterator[None]:
        """Inside, what is registered is this plugin's. Where it raises, nothing of it stays."""
        before, self.loading = self.loading, plugin
        self.files[plugin] = path
        try:
            yield
        except BaseException:
            self.forget(plugin)
            raise
        finally:
            self.loading = before

    def forget(self, plugin: str) -> None:
        """Give back the names that a plugin has registered."""
        self.files.pop(plugin, None)
        for owners in self.owners.values():
            for name in [name for name, owner in owners.items() if owner == plugin]:
                del owners[name]


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
        by = "built in" if owner is None else f"registered by {ADDED.files[owner]}"
        raise UserError(f"a {what} {name!r} is there already ({by}); give yours another name")
    ADDED.owners[what][name] = ADDED.loading


def expected(allowed: Sequence[str]) -> str:
    """Names as pydantic lists them: 'a', 'b' or 'c'."""
    *others, last = map(repr, allowed)
    return f"{', '.join(others)} or {last}" if others else last
