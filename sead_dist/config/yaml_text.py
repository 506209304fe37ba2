"""YAML as configurations are written in it."""

import re
from typing import Any

import yaml

from sead_dist.errors import UserError


class _TwiceError(Exception):
    """A mapping has a key twice, of which only the last would count."""


class _Loader(yaml.SafeLoader):
    """YAML where `on`, `off`, `yes`, `no`, `010`, `1_0` and `1:30` are words, `1e-5` is a number
    (as in YAML 1.2), and a mapping has each key once."""

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


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document. Raises UserError with the place of the first mistake, such as a key that
    stands twice in a mapping."""
    try:
        return yaml.load(text, _Loader)
    except _TwiceError as error:
        raise UserError(f"{where}, {error}; remove or rename one of them") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"{place} is not valid YAML: {problem}") from None
