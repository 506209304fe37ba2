"""Names that a configuration may give to losses, ensembles, kinds of teacher and kinds of task.

Built-in names stand here as strings, so that a configuration is checked without torch. What they
name stands beside its own code, under the same names (a test holds this). A plugin adds its
own: it is a person's own Python file, which is run before the configuration is checked.
"""

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from sead_dist.config.names import ATTRIBUTES
from sead_dist.errors import UserError, expect, one_line, reading, reason

# where a run directory keeps its plugins
PLUGINS = "plugins"
# a teacher that Transformers loads
MODEL = "model"
# a causal language model with a prompt: by Transformers, or behind an OpenAI-compatible interface
LANGUAGE_MODEL, ENDPOINT = "language_model", "endpoint"
# the ensemble without teachers, and the one whose data name each row's teacher
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


def take_name(what: str, name: str, given: object, kinds: Any, fix: str) -> None:
    """Take a name for what is being registered. kinds and fix: as of `expect`, of what it names.
    Raises UserError where the name is taken or no word, or names something of another type or with
    an attribute of an older version."""
    expect("name", name, str, f"the name of a {what}")
    if not name.isidentifier():
        raise UserError(f"{name!r} is not a name of a {what}; give letters, digits and _")
    if name in names(what):
        owner = ADDED.owners[what].get(name)
        by = "built in" if owner is None else f"registered by {ADDED.files[owner]}"
        raise UserError(f"the {what} {name!r} exists already ({by}); give yours another name")
    expect(f"the {what} {name!r}", given, kinds, fix)
    for old, new in ATTRIBUTES.items():
        if hasattr(given, old):
            raise UserError(f"the {what} {name!r} has {old}, which is called {new} now; rename it")
    ADDED.owners[what][name] = ADDED.loading


def expected(allowed: Sequence[str]) -> str:
    """Names as pydantic lists them: 'a', 'b' or 'c'."""
    *others, last = map(repr, allowed)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class Plugin:
    """A file that was run. sha256: of its bytes."""

    path: str
    source: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()


# by path; what a process has run stays, as an import does
LOADED: dict[str, Plugin] = {}


def load_plugins(paths: Sequence[str]) -> None:
    """Run each file, once in a process for each content.

    Raises UserError where a file is not there, raises, or registers a name that is taken.
    """
    stems = [Path(path).name for path in paths]
    for name in stems:
        if stems.count(name) > 1:
            raise UserError(
                f"plugins has two files named {name!r}, and a run keeps its plugins by file name; "
                "rename one"
            )
    for path in paths:
        load_plugin(path)


def load_plugin(path: str) -> None:
    """Run a plugin's file, so that it registers its own: once, and again where it was edited since.
    Raises UserError."""
    key = str(Path(path).absolute())
    if not os.path.isfile(path):
        raise UserError(f"plugins: {path} does not exist; give the path of a Python file")
    with reading(Path(path), "give the path of a Python file", f"plugin {path}"):
        plugin = Plugin(key, Path(path).read_bytes())
    # a run's own copy of a file that was run registers nothing new
    if plugin.sha256 not in ADDED.files:
        if key in LOADED:  # it was edited since
            ADDED.forget(LOADED.pop(key).sha256)
        run_file(path, plugin)
    LOADED[key] = plugin


def run_file(path: str, plugin: Plugin) -> None:
    """Run a plugin as a module of its own."""
    module = ModuleType(f"sead_dist_plugin_{Path(path).stem}_{plugin.sha256[:8]}")
    module.__file__ = plugin.path
    # data classes look their module up
    sys.modules[module.__name__] = module
    try:
        with ADDED.by(plugin.sha256, path):
            exec(compile(plugin.source, plugin.path, "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[module.__name__]
        if isinstance(error, UserError):
            raise UserError(f"plugin {path}: {error}") from error
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__)
                 if at.filename == plugin.path]  # fmt: skip
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = "" if line is None else f" in line {line}"
        raise UserError(
            f"plugin {path} cannot be run: {one_line(reason(error))}{where}; {plugin_fix(error)}"
        ) from error


def plugin_fix(error: BaseException) -> str:
    """What a person does about a plugin that raised this."""
    missing = error.name if isinstance(error, ImportError) else None
    if missing is None:
        return "correct the file"
    if missing.partition(".")[0] == "sead_dist":
        return "correct the import: docs/architecture.md lists the modules of this version"
    package = missing.partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return f"correct the import, or install another version of {package}"
    return f"install {package} for this Python, or put its code into the plugin"


def hashes(paths: Sequence[str]) -> dict[str, str]:
    """Each plugin's file name -> the hash of what was run."""
    found = {}
    for path in paths:
        loaded = LOADED.get(str(Path(path).absolute()))
        source = Path(path).read_bytes() if loaded is None else loaded.source
        found[Path(path).name] = hashlib.sha256(source).hexdigest()
    return found


def kept_paths(paths: Sequence[str], run: Path) -> list[str]:
    """Where the run directory keeps these plugins."""
    return [str(run / PLUGINS / Path(path).name) for path in paths]


def sources(paths: Sequence[str]) -> list[bytes]:
    """What was run of each plugin."""
    return [LOADED[str(Path(path).absolute())].source for path in paths]


def kept_plugins(run: Path) -> list[str]:
    """The plugins that a run directory of this user keeps, as its identity names them: a folder
    that is not a run may hold any code.

    Raises UserError for one that is not the file that ran.
    """
    record = run / "run.json"
    if not record.is_file() or record.stat().st_uid != os.getuid():
        return []
    with reading(record, "restore it, or give another folder"):
        named = json.loads(record.read_bytes())["identity"]["config"]
    kept = []
    for key, sha256 in named.items():
        if not key.startswith("plugin "):
            continue
        path = run / PLUGINS / key.removeprefix("plugin ")
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "gone"
        if not found.startswith(sha256):
            raise UserError(f"plugin {path} is not the file that the run used; restore it")
        kept.append(str(path))
    return sorted(kept)


def load_kept(run: Path) -> None:
    """Run the plugins that a run directory keeps."""
    load_plugins(kept_plugins(run))
