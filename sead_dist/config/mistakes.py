"""One line, in YAML's words, about a mistake in the keys of a configuration or of a task's file."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sead_dist.config.names import RENAMED, nearest, new_name
from sead_dist.config.yaml_text import to_yaml
from sead_dist.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from sead_dist.config.schema import RunConfig


def explain(error: ValidationError, known: Sequence[str]) -> str:
    """The first mistake of a configuration as one line. known: the keys that it can have."""
    found = error.errors()
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    # pydantic puts the type that it tried, `list[str]`, among the parts of the name
    key = ".".join(part for part in map(str, first["loc"]) if "[" not in part)
    if first["type"] == "extra_forbidden":
        plain = ".".join(part for part in first["loc"] if isinstance(part, str))
        new = new_name(plain)
        if new is not None and (new in known or new not in RENAMED.values()):
            return f"the key {key!r} was renamed to {new}; give {new} instead"
        old = [key for key, new in RENAMED.items() if new in known]
        near = nearest(plain, [*known, *old])
        hint = "`sead-dist keys` lists all"
        if near is not None:
            hint = f"did you mean {RENAMED.get(near, near)!r}?"
        elif inside := [key for key in known if _is_in_group(key, plain)]:
            hint = f"did you mean {' or '.join(inside)}?"
        name, colon, value = str(first["loc"][-1]).partition(":")
        if colon:
            hint = f"write `{name}: {value.strip()}`, with a blank after the colon"
        return f"unknown key {key!r}; {hint}"
    no_value = first["input"] is None and first["type"] != "model_type"
    if first["type"] == "missing" and any(isinstance(part, int) for part in first["loc"]):
        return f"{key} is not set; give it in the entry: {{{first['loc'][-1]}: VALUE, ...}}"
    if no_value or first["type"] == "missing":
        return f"{key} is not set; give {key}=VALUE or set it in a YAML file"
    names = [part for part in first["loc"] if isinstance(part, str)]
    while names and ".".join(names) not in known:  # a class in `words` is not a key
        names.pop()
    where = f"; see `sead-dist keys {'.'.join(names)}`" if names else ""
    # the value of a section may be long or secret
    value = "" if isinstance(first["input"], Mapping) else f"={as_yaml(first['input'])}"
    inside = [name.removeprefix(f"{key}.") for name in known if name.startswith(f"{key}.")]
    if inside and first["type"] == "model_type":
        return f"{key}{value}: {_group_of(key, inside, first['input'])}{where}"
    return f"{key}{value}: {expected_value(first)}{where}"


def _is_in_group(key: str, name: str) -> bool:
    """Whether `key` is GROUP.`name`, in a group that a run has once. `teachers` and `encoders` have
    an entry for each model instead."""
    group, dot, last = key.rpartition(".")
    return dot != "" and last == name and group not in ("teachers", "encoders")


def _group_of(name: str, keys: Sequence[str], value: Any) -> str:
    """What to write instead, where a value was given to a whole group of keys."""
    as_path = isinstance(value, str) and "path" in keys
    meant = f"{name}.path={value}" if as_path else f"{name}.KEY=VALUE"
    return f"{name} is a group of keys ({', '.join(keys)}); write {meant}"


def as_yaml(value: Any) -> str:
    """A value as YAML writes it: true, not True."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_yaml(one)}' for key, one in value.items())}}}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)


def as_list(value: object) -> str:
    """The end of the message "expected a list": the value written as a list."""
    if not isinstance(value, str | int | float | Mapping):
        return ""
    given = list(value) if isinstance(value, Mapping) else [value]
    if isinstance(value, str) and "," in value:  # a,b,c is meant as three
        given = [part.strip() for part in value.split(",")]
    listed = to_yaml(given, default_flow_style=True, allow_unicode=True, width=10000)
    return f"; give {listed.strip()}"


def expected_value(mistake: "ErrorDetails") -> str:
    """What is wrong with a value, in YAML's words."""
    kind, value = mistake["type"], mistake["input"]
    if kind in ("list_type", "tuple_type"):
        return f"expected a list{as_list(value)}"
    if kind in ("dict_type", "model_type"):
        return "expected a mapping; give {KEY: VALUE}"
    if kind in ("bool_parsing", "bool_type"):
        return "expected true or false; give one of them"
    if kind.startswith("int_"):
        return "expected a whole number, such as 10"
    if kind in ("float_parsing", "float_type"):
        return "expected a number, such as 0.1"
    if kind == "string_type":
        if isinstance(value, list | tuple | Mapping):
            return "expected a text"
        typed = as_yaml(value) if isinstance(value, bool) else str(value)
        return f"expected a text; quote it: {typed!r} (YAML reads it as another type)"
    if kind == "too_short":
        least = mistake["ctx"]["min_length"]
        return f"expected more values; give at least {'one' if least == 1 else least}"
    message = mistake["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def check_repair(config: "RunConfig") -> None:
    """Raises UserError for a start that has nothing to repair."""
    given = f"repair.text={config.repair.text}"
    if config.student.layers is None and config.repair.teacher is None:
        raise UserError(
            f"{given} needs student.layers or repair.teacher, and neither is given; give "
            "student.layers (the start learns the hidden states of the whole model), "
            "repair.teacher=DIR (it learns those of another model), or leave repair out"
        )
    if config.student_init == "feature_teacher":
        raise UserError(
            f"{given} repairs the student's own start, and student_init=feature_teacher replaces "
            "this start; give student_init=own, or leave repair out"
        )
