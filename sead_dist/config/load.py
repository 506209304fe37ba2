"""Where a run's keys come from: the defaults, the method's preset, YAML files from left to right,
then KEY=VALUE overrides. Later ones replace earlier ones.
"""

import fnmatch
import glob
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sead_dist.config.keys import all_keys, defaults
from sead_dist.config.mistakes import check_repair, explain
from sead_dist.config.names import RENAMED, did_you_mean, known_names
from sead_dist.config.registered import load_plugins
from sead_dist.config.schema import METHOD_KEYS, RunConfig
from sead_dist.config.yaml_text import parse_yaml, read_word, read_yaml
from sead_dist.errors import UserError, reading

_log = logging.getLogger(__name__)

# the method of a run with teachers that sets neither `method` nor a key of one; the defaults are
# this method's keys
DEFAULT_METHOD = "sead"
# file in the folder of `finetune`, or of a sweep, with the paths of its encoders
FIRST_ENCODERS = ".encoders.json"
# keys of which an entry has one; it determines the kind of teacher
WHOLE_ENTRY = ("path", "model", "predictions", "endpoint")
# a scalar given for one of these keys means its `path`
SHORTHAND = ("store", "student")


def config_folder() -> Path:
    """The folder of the shipped configs; in a checkout it is a link to `configs/`."""
    return Path(__file__).parent.parent / "configs"


def find_config(name: str) -> Path:
    """A config by path, or by name among the shipped ones (`sst2`, `configs/tasks/sst2.yaml`)."""
    if os.path.isfile(name):
        return Path(name)
    shipped = config_folder()
    inside = Path(name).parts[1:] if Path(name).parts[:1] == ("configs",) else Path(name).parts
    for folder in ("", "tasks", "students"):
        for suffix in ("", ".yaml"):
            path = shipped / folder / Path(*inside[:-1], inside[-1] + suffix) if inside else shipped
            if os.path.isfile(path):
                return path
    if os.path.isdir(name):
        run = Path(name) / "config.yaml"
        what = (
            f"its file {run}" if run.is_file() else f"a YAML file, or KEY=VALUE (data.path={name}?)"
        )
        raise UserError(f"config {name!r} is a folder; give {what}")
    known = shipped_files("tasks")
    hint = did_you_mean(Path(name).stem, known, f"shipped tasks: {', '.join(known)}")
    raise UserError(f"config {name!r} is neither a file nor a shipped config; {hint}")


def shipped_files(folder: str, kind: str = "yaml") -> dict[str, Path]:
    """The files of one kind in a folder of the shipped configs, sorted by name."""
    files = (config_folder() / folder).glob(f"*.{kind}")
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def read_method(method: str) -> dict[str, Any]:
    """The keys that a method sets: a shipped one by name, or a person's own YAML file.

    Raises UserError for an unknown name, and for keys that a method may not set.
    """
    known = shipped_files("methods")
    path = known.get(method, Path(method))
    if not os.path.isfile(path):
        raise UserError(
            f"method={method} is neither a shipped method nor a YAML file"
            f"{known_names(method, known)}"
        )
    keys = read_yaml(path)
    old = [key for key in keys if key in RENAMED] if isinstance(keys, dict) else []
    if old:
        new = RENAMED[old[0]]
        raise UserError(
            f"method={method}: the key {old[0]!r} was renamed to {new}; give {new} instead"
        )
    if not isinstance(keys, dict):
        raise UserError(f"method={method} holds no keys; expected a YAML mapping; write KEY: VALUE")
    others = [str(key) for key in keys if key not in METHOD_KEYS]
    if others:
        raise UserError(
            f"method={method}: {others[0]} is not a key of a method; a method's file may set "
            f"{', '.join(METHOD_KEYS)}; give other keys as KEY=VALUE or in another YAML file"
        )
    return keys


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` merged in. Values other than mappings replace the old ones."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if key in SHORTHAND and (value is None or isinstance(value, str)):
            value = {"path": value}
        if isinstance(below, dict) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _override(word: str) -> dict[str, Any]:
    key, _, text = word.partition("=")
    group, _, place = key.strip().partition(".")
    if group in ("teachers", "encoders") and place:
        name, said = place.rpartition(".")[2], text or "VALUE"
        known = {one.name for one in all_keys(of_entries=True)}
        if f"{group}.{name}" not in known:
            entry = said if name.isdigit() else "{path: DIR, KEY: VALUE}"
        elif name in WHOLE_ENTRY:
            entry = f"{{{name}: {said}}}"
        else:
            entry = f"{{path: DIR, {name}: {said}}}"
        raise UserError(
            f"{key.strip()}: KEY=VALUE sets the whole list {group}, not a part of an entry; write "
            f"{group}='[{entry}]'"
        )
    value = read_word(key.strip(), text) if text else None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return {} if value is None else dict(value)


def _as_entries(raw: Any, key: str, output: str | None = None) -> Any:
    """A string, glob or list of strings and mappings as a list of teacher mappings."""
    items = [raw] if isinstance(raw, str | Mapping) else raw
    if not isinstance(items, list):
        return items
    entries: list[Any] = []
    for item in items:
        if isinstance(item, str) and glob.has_magic(item) and not Path(item).exists():
            entries += [{"path": folder} for folder in folders_of(item, key, output)]
        elif isinstance(item, str):
            entries.append({"path": item})
        elif isinstance(item, Mapping):
            entries.append(item)
        else:  # 007 would be the folder 7
            raise UserError(
                f"{key}: {item!r} is not a text in YAML; put the path in quotation marks"
            )
    return entries


def folders_of(pattern: str, key: str, output: str | None) -> list[str]:
    """The folders that a pattern of `key` matches, for a run or sweep with this output folder.

    Raises UserError where there are none, or where one that the run began with is missing.
    """
    first = _first_teachers if key == "teachers" else _first_encoders
    began = first(pattern, Path(output)) if output else []
    for folder in began:
        if not Path(folder).is_dir():
            raise UserError(
                f"{key}={pattern}: the run in {output} began with {folder}, which does not exist "
                "any more; restore it, or give another output_dir"
            )
    if began:
        for folder in _able_folders(pattern, output)[0]:
            if folder not in began:
                _log.warning(
                    "%s=%s leaves out %s, which did not exist when the run in %s began; give "
                    "another output_dir to include it", key, pattern, folder, output
                )  # fmt: skip
        return began
    found, left_out = _able_folders(pattern, output)
    for line in left_out:
        _log.warning("%s=%s leaves out %s", key, pattern, line)
    if not found:
        raise UserError(f"{key}={pattern} matches no folder; give paths that exist")
    return found


def _able_folders(pattern: str, output: str | None) -> tuple[list[str], list[str]]:
    """(the folders that match, lines on those left out: the run's own output and unfinished
    runs)."""
    kept, left_out = [], []
    for folder in sorted(path for path in glob.glob(pattern) if Path(path).is_dir()):
        path = Path(folder)
        if output is not None and path.resolve() == Path(output).resolve():
            left_out.append(f"{folder}, the output of this run")
        elif (path / "run.json").is_file() and not (path / "model" / "config.json").is_file():
            left_out.append(f"{folder}, a run that is not finished")
        else:
            kept.append(folder)
    return kept, left_out


def _first_teachers(pattern: str, output: Path) -> list[str]:
    """The teachers of this pattern that the run in `output` began with, or else the first run of
    the sweep there (TASK/METHOD/seed-0). Empty where nothing has begun."""
    for record in (output / "run.json", *sorted(output.glob("*/*/*/run.json"))):
        try:
            given = json.loads(record.read_bytes())["teachers_given"]
            paths = [entry["path"] for entry in given]
        except Exception:  # the run itself raises an error for a bad record
            continue
        found = [path for path in dict.fromkeys(paths) if _is_of(path, pattern)]
        if found:
            return found
    return []


def _first_encoders(pattern: str, output: Path) -> list[str]:
    """The encoders of this pattern that `finetune` or the sweep in `output` began with."""
    try:
        kept = json.loads((output / FIRST_ENCODERS).read_bytes()) if has_teachers(output) else []
        paths = [str(path) for path in kept]
    except (OSError, ValueError, TypeError):  # an older version kept none
        return []
    return [path for path in dict.fromkeys(paths) if _is_of(path, pattern)]


def has_teachers(output: Path) -> bool:
    """Whether `finetune`, or a sweep, has begun a teacher in `output`."""
    return any([*output.glob("teacher-*/run.json"), *output.glob("*/teachers/teacher-*/run.json")])


def _is_of(path: str, pattern: str) -> bool:
    """Whether glob would give this path for the pattern if the path existed."""
    names, wanted = Path(path).parts, Path(pattern).parts
    return len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted))


def _at_home(value: Any) -> Any:
    """The value with the home folder for `~/` at the start of each text (YAML keeps it)."""
    if isinstance(value, str) and value.startswith("~/"):
        return os.path.expanduser(value)
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    return [_at_home(inner) for inner in value] if isinstance(value, list) else value


def _shape_shorthand(student: Any) -> Any:
    """`student=L6-H256-A8` and `student=FILE.yaml` mean shapes."""
    path = student.get("path") if isinstance(student, dict) else None
    if isinstance(path, str) and student.get("shape") is None and names_shape(path):
        return {**student, "path": None, "shape": path}
    return student


def names_shape(path: str) -> bool:
    """Whether a student or encoder is a shape: a YAML file, or a name like the shipped ones."""
    like_shipped = re.fullmatch(r"L\d+-H\d+(-A\d+)?", path) is not None
    return path.endswith((".yaml", ".yml")) or (like_shipped and not Path(path).exists())


def load_config(words: Sequence[str]) -> RunConfig:
    """The configuration of these files and KEY=VALUE overrides, in their order, over the defaults.
    Raises UserError naming the key, its value and what is allowed."""
    return resolve(read_layers(words))


def read_layers(words: Sequence[str]) -> list[Mapping[str, Any]]:
    """The keys of each file, then of each KEY=VALUE override. Later ones replace earlier ones."""
    layers: list[Mapping[str, Any]] = []
    for place, word in enumerate(words):
        if "=" in word:
            continue
        if not os.path.exists(word) and word in {key.name for key in all_keys()}:
            value = words[place + 1].lstrip("=") if place + 1 < len(words) else "VALUE"
            raise UserError(f"{word} is a key, and has no value; write {word}={value}")
        path = find_config(word)
        with reading(path, "give a YAML file, or KEY=VALUE", f"config {word!r}"):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"config {word!r} is not a text file; give a YAML file, or KEY=VALUE "
                    f"(student={word}?)"
                ) from error
        layer = parse_yaml(text, str(path))
        if not isinstance(layer, Mapping):
            raise UserError(
                f"config {word!r} holds no keys; expected a YAML mapping; write KEY: VALUE"
            )
        if "model_type" in layer:
            shape = path.suffix in (".yaml", ".yml")
            given = word if shape else path.parent
            raise UserError(
                f"config {word!r} is the {'shape' if shape else 'config'} of a model; give "
                f"student={given}, or for finetune encoders=[{given}]"
            )
        # the file of a task means task=FILE
        layers.append({"task": str(path)} if "text_a" in layer else layer)
    return layers + [_override(word) for word in words if "=" in word]


def resolve(layers: Sequence[Mapping[str, Any]]) -> RunConfig:
    """The configuration of these keys over those of the method and the defaults."""
    merged = defaults()
    methods = [layer["method"] for layer in layers if layer.get("method") is not None]
    layers = [_of_method(layer, str(methods[-1])) if methods else layer for layer in layers]
    preset = [read_method(str(methods[-1]))] if methods else []
    for layer in (*preset, *layers):
        merged = merge(merged, layer)
    merged = _at_home(merged)
    for key in ("teachers", "encoders"):
        merged[key] = _as_entries(merged.get(key) or [], key, merged.get("output_dir"))
    merged["student"] = _shape_shorthand(merged["student"])
    unsaid = all(layer.get(key) is None for layer in layers for key in ("method", *METHOD_KEYS))
    if merged["teachers"] and unsaid:
        merged["method"] = DEFAULT_METHOD
    merged["plugins"] = run_plugins(merged.get("plugins"))
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        known = [key.name for key in all_keys(of_entries=True)]
        raise UserError(explain(error, known, RunConfig.model_validate, merged)) from None
    student = config.student
    if student.shape is not None and (student.path is not None or student.layers is not None):
        ignored = "student.path" if student.path is not None else "student.layers"
        raise UserError(
            f"student.shape={student.shape} gives the student new weights, so {ignored} would be "
            "ignored; give one of the two"
        )
    if config.early_stopping_patience is not None and config.final_checkpoint == "average":
        raise UserError(
            "final_checkpoint=average averages a run's last steps, and with "
            f"early_stopping_patience={config.early_stopping_patience} these are not known in "
            "advance; leave out final_checkpoint (then the best student is kept) or "
            "early_stopping_patience"
        )
    if config.repair.text is not None:
        check_repair(config)
    if config.fold is not None and config.fold >= (config.folds or 0):
        there = "folds is null" if config.folds is None else f"the last fold is {config.folds - 1}"
        raise UserError(
            f"fold={config.fold} does not exist: {there}; give folds={max(config.fold + 1, 2)} or "
            "more, or leave fold out"
        )
    if config.global_batch_size % config.micro_batch_size:
        raise UserError(
            f"micro_batch_size={config.micro_batch_size} does not divide "
            f"global_batch_size={config.global_batch_size}; "
            f"choose a divisor, e.g. micro_batch_size={_largest_divisor(config)}"
        )
    return config


def _of_method(layer: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    """The layer without the keys of a method, where it is the config.yaml of a run of another
    method (such a file holds all of these keys). Any other layer as it is."""
    if layer.get("method") in (None, method) or not all(key in layer for key in METHOD_KEYS):
        return layer
    left = ", ".join(METHOD_KEYS)
    other = layer["method"]
    _log.warning("method=%s: a file's keys for method=%s are not used: %s", method, other, left)
    return {key: value for key, value in layer.items() if key not in METHOD_KEYS}


def usual_values(config: RunConfig) -> dict[str, Any]:
    """The value of each key that is not given, flat: from the fields' defaults and the method's
    file."""
    return _flat(merge(defaults(), {} if config.method is None else read_method(config.method)))


def _flat(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in keys.items():
        inside = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        found |= {f"{prefix}{key}": value} if inside is None else inside
    return found


def run_plugins(given: Any) -> Any:
    """Run the files that the key `plugins` names. Returns its value, as a list where it can be one.
    Raises UserError for a file that cannot be run."""
    paths = [given] if isinstance(given, str) else given or []
    if isinstance(paths, list) and all(isinstance(path, str) for path in paths):
        load_plugins(paths)
    return paths


def _largest_divisor(config: RunConfig) -> int:
    pairs = [
        (size, config.global_batch_size // size)
        for size in range(1, math.isqrt(config.global_batch_size) + 1)
        if config.global_batch_size % size == 0
    ]
    return max(size for pair in pairs for size in pair if size <= config.micro_batch_size)
