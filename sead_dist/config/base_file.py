"""Writes configs/base.yaml from the fields of RunConfig: `python -m sead_dist.config.base_file`."""

import textwrap

from sead_dist.config.keys import Key, all_keys, key_of, section_of
from sead_dist.config.load import config_folder
from sead_dist.config.schema import RunConfig, Section

HEAD = """\
# Every key of a run and its default. These come first; your YAML files are laid over them from
# left to right, then KEY=VALUE words of the command line. Keys marked (operational) may change
# when a run is resumed; all others are the run's identity, and a resume refuses when one of them
# differs. This file is made from the fields in sead_dist/config/run_keys.py, sections.py and
# teacher_entry.py: runs go by those, and a change here changes nothing.
"""
# where comments start, and how long a line may get
COLUMN, WIDTH = 24, 120


def base_yaml() -> str:
    """The text of configs/base.yaml: a block for each base class of RunConfig."""
    groups = [kind for kind in reversed(RunConfig.__mro__) if _has_keys(kind)]
    return HEAD + "".join(f"\n# {group.__doc__}\n{_block(group)}" for group in groups)


def _has_keys(kind: type) -> bool:
    return kind not in (Section, RunConfig) and issubclass(kind, Section)


def _block(group: type[Section]) -> str:
    lines: list[str] = []
    for name in group.__annotations__:
        field = group.model_fields[name]
        lines += _lines(key_of(name, field))
        inside = section_of(field)
        for key in all_keys(inside) if inside is not None else []:
            lines += _lines(key, "  ")
    return "".join(f"{line}\n" for line in lines)


def _lines(key: Key, indent: str = "") -> list[str]:
    """`name: default  # sentence`, over as many lines as the sentence takes."""
    head = f"{indent}{key.name}:" if key.default is None else f"{indent}{key.name}: {key.default}"
    if not key.text:
        return [head]
    first, *more = textwrap.wrap(key.text, WIDTH - COLUMN - 2, break_long_words=False)
    return [f"{head:<{COLUMN - 1}} # {first}", *(f"{'':{COLUMN}}# {line}" for line in more)]


if __name__ == "__main__":
    (config_folder() / "base.yaml").write_text(base_yaml(), encoding="utf-8")
