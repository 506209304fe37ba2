"""Plugins: a person's own Python files, run before the configuration is checked. They register
losses, ensembles, kinds of teacher and kinds of task, whose names are allowed from then on.
"""

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sead_dist.config.registered import ADDED
from sead_dist.errors import UserError, one_line, reading, reason

# where a run directory keeps its plugins
FOLDER = "plugins"


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
                f"plugins has two files of the name {name!r}, and a run keeps both under it; "
                "rename one"
            )
    for path in paths:
        load_plugin(path)


def load_plugin(path: str) -> None:
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
            f"plugin {path} cannot be run: {one_line(reason(error))}{where}; correct the file"
        ) from error


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
    return [str(run / FOLDER / Path(path).name) for path in paths]


def keep_plugins(paths: Sequence[str], run: Path) -> None:
    """Keep what was run of these plugins in the run directory."""
    for path, kept in zip(paths, kept_paths(paths, run), strict=True):
        Path(kept).parent.mkdir(exist_ok=True)
        source = LOADED[str(Path(path).absolute())].source
        if not Path(kept).is_file() or Path(kept).read_bytes() != source:
            Path(kept).unlink(missing_ok=True)  # what a link leads to is not ours
            Path(kept).write_bytes(source)


def kept_plugins(run: Path) -> list[str]:
    """The plugins that a run directory of this user keeps, as its identity names them: a folder
    that is no run may hold any code.

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
        path = run / FOLDER / key.removeprefix("plugin ")
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "gone"
        if not found.startswith(sha256):
            raise UserError(f"plugin {path} is not the file that the run had; restore it")
        kept.append(str(path))
    return sorted(kept)


def load_kept(run: Path) -> None:
    """Run the plugins that a run directory keeps."""
    load_plugins(kept_plugins(run))
