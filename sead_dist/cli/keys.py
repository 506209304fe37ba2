"""`sead-dist keys`: the keys of a run, then of a task's file, of a sweep and of a SLURM job."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import groupby

from pydantic import TypeAdapter

from sead_dist.config.keys import Key, all_keys, as_line, commented_keys, find_keys
from sead_dist.config.load import config_folder, shipped_files
from sead_dist.config.yaml_text import to_yaml
from sead_dist.data.tasks import TaskSpec

TASK = "in the YAML file of a task of your own"
SWEEP = "of `sead-dist sweep`, beside those of its runs"
SLURM = "of `sead-dist submit`, as options (--gpus-per-node 8) or in the YAML file of --slurm"


def print_keys(name: str | None) -> None:
    """Print all keys, or those that `find_keys` finds, under headings.

    Raises UserError where none is found.
    """
    known = [
        *all_keys(of_entries=True),
        *task_keys(),
        *commented_keys(config_folder() / "sweep.yaml", SWEEP),
        *commented_keys(shipped_files("slurm")["base"], SLURM),
    ]
    for group, keys in groupby(find_keys(known, name), lambda key: key.group):
        if group:
            print(f"# {group}")
        print("\n".join(as_line(key) for key in keys))


def task_keys() -> Iterator[Key]:
    """The keys of a task's file, from the fields of TaskSpec. A missing default is null."""
    properties = TypeAdapter(TaskSpec).json_schema()["properties"]
    for field in fields(TaskSpec):
        factory = field.default_factory
        value = field.default if factory is MISSING else factory()
        plain = None if value is MISSING else json.loads(json.dumps(value))
        default = to_yaml([plain], default_flow_style=True, width=1000).strip()[1:-1]
        meaning = " ".join(properties[field.name]["description"].split())
        yield Key(field.name, default, meaning, TASK)
