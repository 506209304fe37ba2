"""How values are written: YAML in files, and KEY=VALUE overrides of the command line. In an
override a text (a path, a name) is what was typed, so that it may hold `#`, blanks, brackets and
digits alone; whatever is not a text is YAML.

    null       unsets the key, wherever a value may stand
    "text"     the text between the marks, as "null" or " a "
    [a, b]     a list where the key takes one: each value as if it stood alone, without the blanks
    {k: a}     a mapping where the key takes one: each value as its own key takes it
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from sead_dist.config.names import renamed_config
from sead_dist.config.schema import (
    RunConfig,
    Section,
    StoreConfig,
    StudentConfig,
    SweepConfig,
    TeacherConfig,
)
from sead_dist.errors import UserError, reading, reason

# more values than any configuration has: aliases of aliases stand for billions
MOST_VALUES = 100_000
# no seed, size or count is larger
LARGEST = 2**63
# a text given for one of these means its `path`
SHORT = (StoreConfig, StudentConfig, TeacherConfig)
PAIRS = {"[": "]", "{": "}"}


class _TwiceError(Exception):
    """A mapping has a key twice, of which only the last would count."""


class _Loader(yaml.SafeLoader):
    """YAML where `on`, `off`, `yes`, `no`, `010`, `1_0` and `1:30` are words, `1e-5` is a number
    (as in YAML 1.2), and a mapping has each key once."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise _mistake(node, reason(error)) from error
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise _mistake(node, "the number is too large")
        if isinstance(value, str) and "\0" in value:
            raise _mistake(node, "the text holds a NUL character")
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            # the number 1 and the text "1" are one name of a label
            merges = key.tag == "tag:yaml.org,2002:merge"
            name = key.value if merges else str(self.construct_object(key))
            line = key.start_mark.line + 1
            if name in first:
                before = f", first in line {first[name]}" if first[name] != line else ""
                raise _TwiceError(f"line {line}: the key {key.value!r} stands twice{before}")
            first[name] = line
        return node


def _mistake(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node is with all aliases written out; an error where these are too many."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = MOST_VALUES  # found again while it is counted, it holds itself
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    count = 1 + sum(_count(part, counted) for part in parts)
    if count > MOST_VALUES:
        raise _mistake(node, f"with all aliases written out, there are over {MOST_VALUES} values")
    counted[id(node)] = count
    return count


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(*_FLOAT)


class _Dumper(yaml.SafeDumper):
    """Texts stand in quotation marks where `_Loader` or a reader of YAML 1.1 would read them as
    something else."""


_Dumper.add_implicit_resolver(*_FLOAT)


class _LineDumper(_Dumper):
    """Texts with line ends stand in one line, in double quotation marks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if len(data.splitlines()) > 1 or data.endswith("\n") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_LineDumper.add_representer(str, _LineDumper.represent_str)


def to_yaml(value: Any, dumper: type[_Dumper] = _Dumper, **style: Any) -> str:
    """A value as YAML that `parse_yaml` reads back. style: as for `yaml.dump`."""
    return str(yaml.dump(value, Dumper=dumper, sort_keys=False, **style))


def to_flow(value: Any) -> str:
    """A list or mapping as one line of YAML, which a file and an override read back."""
    style = {"default_flow_style": True, "allow_unicode": True, "width": sys.maxsize}
    return to_yaml(value, _LineDumper, **style).strip()


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return to_yaml(config.model_dump(mode="json"))


def read_yaml(path: Path, name: str | None = None) -> Any:
    """The YAML document in a file, whose `name` (default: its path) is in every error. Raises
    UserError, or RunError where the machine does not give the file."""
    name = name or str(path)
    with reading(path, "give a YAML file in UTF-8", name):
        return parse_yaml(path.read_text(encoding="utf-8"), name)


def read_run_config(run: Path) -> dict[str, Any]:
    """The keys in a run directory's config.yaml, old ones under their present names; none where
    the file holds none. Raises UserError where it cannot be read."""
    keys = read_yaml(run / "config.yaml")
    return renamed_config(keys) if isinstance(keys, dict) else {}


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document. Raises UserError with the place of the first mistake, such as a key that
    stands twice in a mapping."""
    with reading(where, "fix it"):
        try:
            return yaml.load(text, _Loader)
        except _TwiceError as error:
            raise UserError(f"{where}, {error}; remove or rename one of them") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{where}, line {mark.line + 1}" if mark is not None else where
            said = getattr(error, "problem", None) or getattr(error, "reason", None)
            problem = said or "it cannot be read"
            # the parser finds some mistakes of a line only at the start of the next one
            exact = isinstance(error, yaml.constructor.ConstructorError)
            here_only = exact or mark is None or mark.line == 0
            fix = "correct it" if here_only else "correct this line or the one before it"
            raise UserError(f"{place} is not valid YAML: {problem}; {fix}") from error


def read_word(key: str, text: str) -> Any:
    """The value that an override gives to a (dotted) key of a run or of a sweep.

    Raises UserError where brackets are not closed, or what is not a text is not YAML.
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
    """`{key: value, ...}` as such a mapping. Raises UserError for a key that stands twice."""
    found: dict[str, Any] = {}
    for part in parts(text[1:-1]):
        key, value = _key_and_value(part, where)
        if key in found:
            raise UserError(f"{where}: the key {key!r} stands twice; remove or rename one of them")
        found[key] = read_inside(value, inner(kind, key), where) if value else None
    return found


def _key_and_value(part: str, where: str) -> tuple[str, str]:
    """The two sides of the colon in `key: value`; the value is empty where there is none."""
    part = part.removeprefix("? ")  # YAML writes it before a long or an empty key
    quoted = part[:1] in ("'", '"')
    for place, letter in _unquoted(part):
        if letter == ":" and (quoted or not part[place + 1 : place + 2].strip()):
            key = part[:place].strip()
            key = str(parse_yaml(key, where)) if quoted else key
            return key, part[place + 1 :].strip()
    return part, ""


def parts(text: str) -> Iterator[str]:
    """What commas divide outside of brackets and of quotation marks that begin a value."""
    depth, begin = 0, 0
    for place, letter in _unquoted(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            yield text[begin:place].strip()
            begin = place + 1
    if text[begin:].strip():  # YAML allows a comma at the end
        yield text[begin:].strip()


def _unquoted(text: str) -> Iterator[tuple[int, str]]:
    """The places and letters outside of quotation marks. Marks stand around a whole value. As in
    YAML, '...' holds ' as '', and "..." holds " behind a backslash."""
    mark, before, escaped = "", "", False  # before: the last letter outside that is not a blank
    for place, letter in enumerate(text):
        if escaped:
            escaped = False
        elif (mark == '"' and letter == "\\") or (mark == "'" and text[place : place + 2] == "''"):
            escaped = True
        elif letter == mark:
            mark, before = "", letter
        elif not mark and letter in "\"'" and before in ("", "[", "{", ",", ":"):
            mark = letter
        elif not mark:
            # YAML writes "? " before a long or an empty key
            opens_key = before in ("", "{", ",") and text[place : place + 2] == "? "
            before = letter if letter.strip() and not opens_key else before
            yield place, letter


def encloses(text: str, bracket: str, where: str) -> bool:
    """Whether the text is one pair of these brackets: not in `[ab]*`, a pattern of folders.

    Raises UserError where the first one is not closed.
    """
    if not text.startswith(bracket):
        return False
    # where a quotation mark is not closed (Q: 'tis), it is a letter like others
    for letters in (_unquoted(text), enumerate(text)):
        depth = 0
        for place, letter in letters:
            depth += (letter == bracket) - (letter == PAIRS[bracket])
            if depth == 0:
                return place == len(text) - 1
    raise UserError(
        f"{where}, {text!r}, has a {bracket} that is not closed; close it, or put a path in "
        "quotation marks"
    )


def options(kind: Any) -> tuple[Any, ...]:
    """The types that a union allows; another type is its only option."""
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
