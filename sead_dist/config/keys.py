"""Every key of a run: its default and its sentence, as the fields of RunConfig have them.

`python -m sead_dist.config.keys` writes configs/base.yaml of them.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from sead_dist.config.names import did_you_mean, new_name
from sead_dist.config.schema import Operational, RunConfig, Section
from sead_dist.config.yaml_text import to_yaml
from sead_dist.errors import UserError

HEAD = """\
# Every key of a run and its default. Your YAML files replace these values, from left to right. Then
# the KEY=VALUE overrides of the command line do. Keys marked (operational) may change when a run is
# resumed. All others are the run's identity: a run with another value of one of them is not
# resumed. This file is generated from the fields in sead_dist/config/schema.py, sections.py and
# teacher_entry.py. A run reads the fields, so a change of this file has no effect.
"""
# of a teacher's entry what an encoder's has too
OF_ENCODER = ("path", "revision")
# where comments start, and how long a line may get
COLUMN, WIDTH = 24, 120


@dataclass(frozen=True)
class Key:
    """A key, dotted; its default as YAML (None: it is a section); what it does. group: where it may
    stand, as a heading; "" for a run's."""

    name: str
    default: str | None
    text: str
    group: str = ""


def key_of(name: str, field: FieldInfo) -> Key:
    """A field as a key of this name; a default of null stands where it must be given."""
    text = " ".join((field.description or "").split())
    if Operational in field.metadata and "(operational" not in text:
        text += " (operational)"
    if section_of(field) is not None:
        return Key(name, None, text)
    # inside a list, as YAML ends a value that stands alone with a line of dots
    default = to_yaml([_default(field)], default_flow_style=True, width=1000)
    return Key(name, default.strip()[1:-1], text)


def all_keys(
    section: type[Section] = RunConfig, prefix: str = "", of_entries: bool = False
) -> Iterator[Key]:
    """The keys of a section and of those inside it, in the order of the fields. of_entries: also
    those of each entry of a list (`teachers.weight`)."""
    for name, field in section.model_fields.items():
        yield key_of(f"{prefix}{name}", field)
        inside = section_of(field) or (entry_of(field) if of_entries else None)
        for key in [] if inside is None else all_keys(inside, f"{prefix}{name}.", of_entries):
            if name != "encoders" or key.name.removeprefix("encoders.") in OF_ENCODER:
                yield key


def commented_keys(path: Path, group: str) -> list[Key]:
    """The keys of a shipped YAML file whose comments say what each does: `name: default  # text`,
    and more lines of comment below it."""
    keys: list[Key] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"(\w+): +(.*?) +# (.*)", line):
            keys.append(Key(found[1], found[2], found[3], group))
        elif more := re.fullmatch(r" +# (.*)", line):
            keys[-1] = replace(keys[-1], text=f"{keys[-1].text} {more[1]}")
    return keys


def defaults(section: type[Section] = RunConfig) -> dict[str, Any]:
    """The default of every key, None for one that must be given; a section is a mapping."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inside = section_of(field)
        found[name] = _default(field) if inside is None else defaults(inside)
    return found


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field is; None for a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def entry_of(field: FieldInfo) -> type[Section] | None:
    """The section that each entry of a list is; None for another value."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is list else ()
    return next((one for one in kinds if isinstance(one, type) and issubclass(one, Section)), None)


def _default(field: FieldInfo) -> Any:
    return None if field.is_required() else field.get_default(call_default_factory=True)


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
        hint = did_you_mean(name, [key.name for key in keys], "`sead-dist keys` lists all")
        raise UserError(f"no key has {asked!r} in its name or its sentence; {hint}")
    return found


def as_line(key: Key) -> str:
    """`name: default`, and below it what the key does."""
    head = f"{key.name}:" if key.default is None else f"{key.name}: {key.default}"
    return f"{head}\n    {key.text}" if key.text else head


def base_yaml() -> str:
    """The text of configs/base.yaml: a block for each base class of RunConfig."""
    bases = [kind for kind in reversed(RunConfig.__mro__) if issubclass(kind, Section)]
    groups = [kind for kind in bases if kind not in (Section, RunConfig)]
    return HEAD + "".join(f"\n# {group.__doc__}\n{_group_lines(group)}" for group in groups)


def _group_lines(group: type[Section]) -> str:
    lines: list[str] = []
    for name in group.__annotations__:
        field = group.model_fields[name]
        lines += _key_lines(key_of(name, field))
        inside = section_of(field)
        for key in all_keys(inside) if inside is not None else []:
            lines += _key_lines(key, "  ")
    return "".join(f"{line}\n" for line in lines)


def _key_lines(key: Key, indent: str = "") -> list[str]:
    """`name: default  # sentence`, over as many lines as the sentence takes."""
    head = f"{indent}{key.name}:" if key.default is None else f"{indent}{key.name}: {key.default}"
    if not key.text:
        return [head]
    first, *more = textwrap.wrap(key.text, WIDTH - COLUMN - 2, break_long_words=False)
    return [f"{head:<{COLUMN - 1}} # {first}", *(f"{'':{COLUMN}}# {line}" for line in more)]


if __name__ == "__main__":
    from sead_dist.config.load import config_folder

    (config_folder() / "base.yaml").write_text(base_yaml(), encoding="utf-8")
