"""A KEY=VALUE word of the command line. A text (a path, a name) is what was typed, so that it may
hold `#`, blanks, brackets and digits alone; whatever is no text is YAML.

    null       unsets the key, wherever a value may stand
    "text"     the text between the marks, as "null" or " a "
    [a, b]     a list where the key takes one: each value as if it stood alone, without the blanks
    {k: a}     a mapping where the key takes one: each value as its own key takes it
"""

import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from sead_dist.config.schema import (
    RunConfig,
    Section,
    StoreConfig,
    StudentConfig,
    SweepConfig,
    TeacherConfig,
)
from sead_dist.config.yaml_text import parse_yaml
from sead_dist.errors import UserError

# a text given for one of these means its `path`
SHORT = (StoreConfig, StudentConfig, TeacherConfig)
PAIRS = {"[": "]", "{": "}"}


def read_word(key: str, text: str) -> Any:
    """The value that a word gives to a (dotted) key of a run or of a sweep.

    Raises UserError where brackets are not closed, or what is no text is not YAML.
    """
    first, *rest = key.split(".")
    own = RunConfig if first in RunConfig.model_fields else SweepConfig
    kind = inner(own, first)
    for part in rest:
        kind = inner(kind, part)
    return read_value(text, kind, f"the value of {key}")


def read_value(text: str, kind: Any, where: str) -> Any:
    """`text` as a value of this type (an annotation of a configuration's key; None: unknown)."""
    bare = text.strip()
    if bare == "null":
        return None
    item = item_of(kind)
    if item is not None and encloses(bare, "[", where):
        return [read_inside(part, item, where) for part in parts(bare[1:-1])]
    keyed = with_keys(kind) or with_keys(item)
    if keyed is not None and ":" in bare and encloses(bare, "{", where):
        return read_mapping(bare, keyed, where)
    if not takes_text(kind):
        return parse_yaml(text, where)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted else text


def read_inside(text: str, kind: Any, where: str) -> Any:
    """A value of a list or mapping; quotation marks are YAML's there."""
    return parse_yaml(text, where) if text[:1] in ("'", '"') else read_value(text, kind, where)


def read_mapping(text: str, kind: Any, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts(text[1:-1]):
        split = re.fullmatch(r"""(?s)(?:(["'])(.*?)\1\s*:|(.*?):(?:\s|$))(.*)""", part)
        key, value = ((split[2] or split[3] or "").strip(), split[4]) if split else (part, "")
        if key in found:
            raise UserError(f"{where}: the key {key!r} stands twice; remove or rename one of them")
        found[key] = read_inside(value.strip(), inner(kind, key), where) if value.strip() else None
    return found


def parts(text: str) -> Iterator[str]:
    """What commas divide outside of brackets and of quotation marks that begin a value."""
    depth, mark, part = 0, "", ""
    for letter in text:
        if mark:
            mark = "" if letter == mark else mark
        elif letter in "\"'" and (not part.strip() or re.search(r":\s*$", part)):
            mark = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and depth <= 0 and not mark:
            yield part.strip()
            part = ""
        else:
            part += letter
    if part.strip():  # YAML allows a comma at the end
        yield part.strip()


def encloses(text: str, bracket: str, where: str) -> bool:
    """Whether the text is one pair of these brackets: not in `[ab]*`, a pattern of folders.

    Raises UserError where the first one is not closed.
    """
    if not text.startswith(bracket):
        return False
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == bracket) - (letter == PAIRS[bracket])
        if depth == 0:
            return place == len(text) - 1
    raise UserError(
        f"{where}, {text!r}, has a {bracket} that is not closed; close it, or put a path in "
        "quotation marks"
    )


def options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def item_of(kind: Any) -> Any:
    """The type of a list's items where these are texts, or may be given as such; else None."""
    for option in options(kind):
        if get_origin(option) is list and takes_text(get_args(option)[0]):
            return get_args(option)[0]
    return None


def with_keys(kind: Any) -> Any:
    """This type, or the one of its options, whose values are mappings; None where there is none."""
    for option in options(kind):
        if get_origin(option) is dict or (isinstance(option, type) and issubclass(option, Section)):
            return option
    return None


def takes_text(kind: Any) -> bool:
    """Whether a text is a value of this type, or stands for one (student=DIR, teachers=DIR)."""
    return kind in SHORT or str in options(kind) or item_of(kind) is not None


def inner(kind: Any, key: str) -> Any:
    """The type of a key inside a value of this type; None where it has no such key."""
    kind = with_keys(kind)
    if get_origin(kind) is dict:
        held = get_args(kind)[1]
        # keys of a run, for some runs of a sweep
        return inner(RunConfig, key) if held is Any else held
    if kind is None or key not in kind.model_fields:
        return None
    return kind.model_fields[key].annotation
