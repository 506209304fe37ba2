"""Folders of models that a pattern names (`teachers=runs/*`): those that can teach, and for a run
or sweep that has begun, those that it began with."""

import fnmatch
import glob
import json
import logging
from collections.abc import Callable
from pathlib import Path

from sead_dist.errors import UserError

_log = logging.getLogger(__name__)


def folders_of(pattern: str, key: str, output: str | None) -> list[str]:
    """The folders that a pattern of `key` stands for in a run, or sweep, of this output folder.

    Raises UserError where there is none, or where one that the run began with is gone.
    """
    began = first_teachers(pattern, Path(output)) if key == "teachers" and output else []
    for folder in began:
        if not Path(folder).is_dir():
            raise UserError(
                f"{key}={pattern}: {output} began with {folder}, which is not there any more; put "
                "it back, or give another output_dir"
            )
    if began:
        for folder in able_folders(pattern, output, lambda _line: None):
            if folder not in began:
                _log.warning(
                    "%s=%s leaves out %s, which was not there when %s began; "
                    "another output_dir takes it in", key, pattern, folder, output
                )  # fmt: skip
        return began
    found = able_folders(pattern, output, lambda line: _log.warning("%s=%s %s", key, pattern, line))
    if not found:
        raise UserError(f"{key}={pattern} matches no folder; give paths that exist")
    return found


def able_folders(pattern: str, output: str | None, say: Callable[[str], None]) -> list[str]:
    """The folders that match, without the run's own output and runs that are not finished."""
    kept = []
    for folder in sorted(path for path in glob.glob(pattern) if Path(path).is_dir()):
        path = Path(folder)
        if output is not None and path.resolve() == Path(output).resolve():
            say(f"leaves out {folder}, the output of this run")
        elif (path / "run.json").is_file() and not (path / "model" / "config.json").is_file():
            say(f"leaves out {folder}, a run that is not finished")
        else:
            kept.append(folder)
    return kept


def first_teachers(pattern: str, output: Path) -> list[str]:
    """The teachers of this pattern with which the run in `output`, or the first run of the sweep
    there (TASK/METHOD/seed-0), began; none where nothing has begun."""
    for record in (output / "run.json", *sorted(output.glob("*/*/*/run.json"))):
        try:
            given = json.loads(record.read_bytes())["teachers_given"]
            paths = [entry["path"] for entry in given]
        except Exception:  # what it holds is looked at, and refused, by the run
            continue
        found = [path for path in dict.fromkeys(paths) if is_of(path, pattern)]
        if found:
            return found
    return []


def is_of(path: str, pattern: str) -> bool:
    """Whether glob would give this path for the pattern, were it there."""
    names, wanted = Path(path).parts, Path(pattern).parts
    return len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted))
