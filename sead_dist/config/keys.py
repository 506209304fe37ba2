"""What stands in configs/base.yaml of every key of a run: its default and one sentence."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sead_dist.config.names import nearest, new_name
from sead_dist.errors import UserError

LINE = re.compile(r'( *)"?(\w+)"?:(?: +([^#\s][^#]*?))? *(?:# (.*))?')


@dataclass(frozen=True)
class Key:
    """A key, dotted; its default as YAML (None: it is a section); what it does."""

    name: str
    default: str | None
    text: str


def read_keys(path: Path) -> list[Key]:
    """The keys of a shipped YAML file with their comments, in its order."""
    found: list[Key] = []
    section = ""
    for line in path.read_text("utf-8").splitlines():
        match = LINE.fullmatch(line)
        if match is not None:
            indent, name, default, text = match.groups()
            section = section if indent else ""
            found.append(Key(f"{section}{name}", default, text or ""))
            if default is None:
                section = f"{name}."
        elif found and line.startswith(" ") and line.lstrip().startswith("# "):
            last = found.pop()
            found.append(Key(last.name, last.default, f"{last.text} {line.strip()[2:]}".strip()))
    return found


def find_keys(keys: Sequence[Key], asked: str | None) -> list[Key]:
    """All keys; or the one of this name, a section's, or those in whose name or sentence this text
    stands.

    Raises UserError where there is none.
    """
    if asked is None:
        return list(keys)
    name = new_name(asked) or asked
    exact = [key for key in keys if key.name == name or key.name.startswith(f"{name}.")]
    folded = name.casefold()
    found = exact or [key for key in keys if folded in f"{key.name} {key.text}".casefold()]
    if not found:
        near = nearest(name, [key.name for key in keys])
        hint = f"did you mean {near!r}?" if near else "`sead-dist keys` lists all"
        raise UserError(f"no key has {asked!r} in its name or its sentence; {hint}")
    return found


def as_line(key: Key) -> str:
    """`name: default`, and below it what the key does."""
    head = f"{key.name}:" if key.default is None else f"{key.name}: {key.default}"
    return f"{head}\n    {key.text}" if key.text else head
