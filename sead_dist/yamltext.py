"""YAML as configurations are written in it."""

import re
from typing import Any

import yaml

from sead_dist.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML where `on`, `off`, `yes`, `no` are words and `1e-5` is a number (as in YAML 1.2)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """One YAML document. Raises UserError with the place of the first mistake."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UserError(f"{place} is not valid YAML: {problem}") from None
