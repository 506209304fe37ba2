"""YAML as configurations are written in it."""

import re
from pathlib import Path
from typing import Any

import yaml

from sead_dist.errors import UserError, reading, reason

# more values than any configuration has: aliases of aliases stand for billions
MOST_VALUES = 100_000
# no seed, size or count is larger
LARGEST = 2**63


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
        raise _mistake(node, f"aliases and all, there are over {MOST_VALUES} values")
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
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path, name: str | None = None) -> Any:
    """The YAML document in a file, whose `name` (default: its path) is in every error. Raises
    UserError, or RunError where the machine does not give the file."""
    name = name or str(path)
    with reading(path, "give a YAML file in UTF-8", name):
        return parse_yaml(path.read_text(encoding="utf-8"), name)


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
            raise UserError(f"{place} is not valid YAML: {problem}") from error
