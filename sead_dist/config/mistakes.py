"""One line, in YAML's words, about a mistake in the keys of a configuration or of a task's file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sead_dist.config.names import RENAMED, nearest, new_name
from sead_dist.config.yaml_text import parse_yaml, to_flow
from sead_dist.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from sead_dist.config.schema import RunConfig


# a part of a key's name, or the number of a list's entry
Place = Sequence[str | int]
# forms of a list, each with a list of that form
FORMS = (([0.0, 1.0], "[NUMBER, NUMBER]"), (["A", "B"], "[TEXT, TEXT]"))


def explain(
    error: ValidationError,
    known: Sequence[str],
    check: Callable[[Any], object],
    keys: Mapping[str, Any],
) -> str:
    """The first mistake of a configuration as one line. known: the keys that it can have. check:
    what raised the error for these keys."""
    found = error.errors()
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    key = ".".join(map(str, place_of(first)))
    if first["type"] == "extra_forbidden":
        return _unknown_key(key, first["loc"], known)
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
    said = expected_value(first, lambda kept: fits(check, keys, place_of(first), kept))
    return f"{key}{value}: {said}{where}"


def _unknown_key(key: str, place: Place, known: Sequence[str]) -> str:
    """What is wrong with a key that is not known: what it was renamed to, or is near to."""
    plain = ".".join(part for part in place if isinstance(part, str))
    # inside an entry of a list, a key is written without the list's name
    entry = f"{place[0]}." if any(isinstance(part, int) for part in place) else ""
    new = new_name(plain)
    if new is not None and (new in known or new not in RENAMED.values()):
        new = new.removeprefix(entry)
        return f"the key {key!r} was renamed to {new}; give {new} instead"
    old = [key for key, new in RENAMED.items() if new in known]
    near = nearest(plain, [name for name in [*known, *old] if name.startswith(entry)])
    hint = f"`{' '.join(['sead-dist keys', entry[:-1]]).strip()}` lists all"
    if near is not None:
        hint = f"did you mean {RENAMED.get(near, near).removeprefix(entry)!r}?"
    elif inside := [key for key in known if _is_in_group(key, plain)]:
        hint = f"did you mean {' or '.join(inside)}?"
    name, colon, value = str(place[-1]).partition(":")
    if colon:
        hint = f"write `{name}: {value.strip()}`, with a blank after the colon"
    return f"unknown key {key!r}; {hint}"


def place_of(mistake: "ErrorDetails") -> Place:
    """Where the value stands: names of keys and numbers of entries."""
    # pydantic puts the type that it tried, `list[str]`, among the parts of the name
    place = [part for part in mistake["loc"] if "[" not in str(part)]
    # a tuple lacks a value: its place is the tuple's
    lacks_value = mistake["type"] == "missing" and isinstance(mistake["input"], list | tuple)
    return place[:-1] if lacks_value else place


def fits(check: Callable[[Any], object], keys: Any, place: Place, value: Any) -> bool:
    """Whether `check` finds no mistake at this place of the keys where this value stands there."""
    try:
        check(with_value(keys, place, value))
    except ValidationError as error:
        return all(list(place_of(one))[: len(place)] != list(place) for one in error.errors())
    except UserError:
        return False
    return True


def with_value(keys: Any, place: Place, value: Any) -> Any:
    """A copy of the keys with this value at a place."""
    if not place or not isinstance(keys, Mapping | list | tuple):
        return value
    first, rest = place[0], place[1:]
    if not isinstance(keys, Mapping):
        entries = list(keys)
        entries[int(first)] = with_value(entries[int(first)], rest, value)
        return entries
    # pydantic names a key that is a number by its text
    name = next((key for key in keys if str(key) == str(first)), first)
    return {**keys, name: with_value(keys.get(name), rest, value)}


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


def as_list(value: object, fits: Callable[[Any], bool]) -> str:
    """The end of the message "expected a list": a list that fits the key, of what was given, or of
    the form that it has; nothing where none fits."""
    # a list of numbers takes some texts as numbers that are not meant (0-5 is -5 to pydantic)
    numbers = fits(FORMS[0][0]) and not fits(FORMS[1][0])
    for meant in _meant_lists(value):
        if fits(meant) and not (numbers and any(isinstance(one, str) for one in meant)):
            return f"; give {to_flow(meant)}"
    return next((f"; give {form}" for example, form in FORMS if fits(example)), "")


def _meant_lists(value: object) -> Iterator[list[Any]]:
    """The lists that a value may stand for."""
    if isinstance(value, Mapping):
        yield from (list(value), list(value.values()))
    elif isinstance(value, str) and "," in value:  # a,b,c is meant as three
        texts = [part.strip() for part in value.split(",")]
        with suppress(UserError):
            yield [parse_yaml(text, "") for text in texts]
        yield texts
    elif isinstance(value, str | int | float):
        yield from ([value], [as_yaml(value) if isinstance(value, bool) else str(value)])


def expected_value(mistake: "ErrorDetails", fits: Callable[[Any], bool]) -> str:
    """What is wrong with a value, in YAML's words. fits: whether the key takes another value."""
    kind, value = mistake["type"], mistake["input"]
    if listed := _expected_list(mistake, fits):
        return listed
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
        typed = as_yaml(value) if isinstance(value, bool | None) else str(value)
        return f"expected a text; quote it: {typed!r} (YAML reads it as another type)"
    message = mistake["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _expected_list(mistake: "ErrorDetails", fits: Callable[[Any], bool]) -> str | None:
    """What is wrong with a list; None where the mistake is not about a list."""
    kind, value = mistake["type"], mistake["input"]
    if kind in ("list_type", "tuple_type"):
        return f"expected a list{as_list(value, fits)}"
    if kind == "too_short":
        least = mistake["ctx"]["min_length"]
        return f"expected more values; give at least {'one' if least == 1 else least}"
    if kind == "too_long":
        return f"expected {mistake['ctx']['max_length']} values{as_list(None, fits)}"
    if kind == "missing" and isinstance(value, list | tuple):
        return f"expected more values{as_list(None, fits)}"
    return None


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
