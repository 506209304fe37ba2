"""RunConfig and SweepConfig: the whole configuration of a run, and of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from sead_dist.config.plugins import hashes
from sead_dist.config.registered import NO_ENSEMBLE, ROUTED
from sead_dist.config.run_keys import MethodKeys, ModelKeys, OutputKeys, TaskKeys, TrainingKeys
from sead_dist.config.sections import (
    DataConfig,
    HeartbeatConfig,
    Operation,
    Operational,
    Precision,
    Section,
    StoreConfig,
    StudentConfig,
    writable,
)
from sead_dist.config.teacher_entry import TeacherConfig

__all__ = [
    "METHOD_KEYS",
    "DataConfig",
    "HeartbeatConfig",
    "Operation",
    "Operational",
    "Precision",
    "RunConfig",
    "Section",
    "StoreConfig",
    "StudentConfig",
    "SweepConfig",
    "TeacherConfig",
    "dump_config",
    "teacher_names",
    "writable",
]

# what a method's file may set: all methods share student, start, data and steps. A column is of the
# data.
METHOD_KEYS = tuple(key for key in MethodKeys.model_fields if key != "teacher_column")


# pydantic takes the fields of the last base first
class RunConfig(OutputKeys, TrainingKeys, MethodKeys, ModelKeys, TaskKeys):
    """The whole configuration of a run. `task` and `output_dir` must be given."""

    @property
    def taught(self) -> bool:
        """Whether teachers are asked. (Where none is, they may still lend a tokeniser.)"""
        return bool(self.teachers) and self.asks_teachers

    @property
    def asks_teachers(self) -> bool:
        """Whether the ensemble is one of teachers, be they given or not."""
        return self.ensemble != NO_ENSEMBLE

    @property
    def routed(self) -> bool:
        """Whether a column of the data names each row's teacher."""
        return self.ensemble == ROUTED

    @property
    def uses_rest(self) -> bool:
        """Whether rows that the sample left out serve as unlabelled text."""
        return self.taught and self.unlabeled.rest is not False

    @property
    def has_text(self) -> bool:
        """Whether there may be rows of unlabelled text."""
        left_over = self.uses_rest and self.data.max_train_examples is not None
        return self.unlabeled.path is not None or left_over

    @property
    def uses_copies(self) -> bool:
        """Whether copies of rows may be made: without teachers only under gold labels, and where
        all are files, which have no answers for copies, only a number that is asked for."""
        if self.augment.copies == "auto" and self.teachers and not self.asks_live:
            return False
        return self.augment.copies is not None and (self.taught or self.augment.gold_labels)

    @property
    def asks_live(self) -> bool:
        """Whether a teacher can answer any text, which a file of predictions cannot."""
        return any(entry.predictions is None for entry in self.teachers)

    @property
    def pooled(self) -> bool:
        """Whether a teacher is in the pool."""
        return "pool" in {entry.placement or self.placement for entry in self.teachers}

    @property
    def window_rows(self) -> int:
        """Most rows of training steps that are asked of the teachers at once. Of a pool no more
        than a work item, so that the student waits for little at a time."""
        rows = self.prefetch_rows
        return min(rows, self.pool.item_rows) if self.pooled else rows

    @property
    def validates(self) -> bool:
        """Whether teachers are validated before they teach."""
        return self.teacher_validation != "off"

    def warmup(self, steps: int) -> int:
        """Steps over which the learning rate rises, of so many: warmup_steps, below 1 a share."""
        return round(self.warmup_steps * steps if self.warmup_steps < 1 else self.warmup_steps)

    def identity(self) -> dict[str, Any]:
        """The keys a resume must find unchanged, flat (`data.max_train_examples`: 2000), and each
        plugin's hash. The keys of `augment` where no copies are made, and of `repair` where nothing
        is repaired, decide nothing and are left out."""
        held = {f"plugin {name}": sha256[:16] for name, sha256 in hashes(self.plugins).items()}
        keys = {**_identity(self, ""), **held}
        used = {"augment.": self.uses_copies, "repair.": self.repair.text is not None}
        unused = tuple(prefix for prefix, counts in used.items() if not counts)
        return {key: value for key, value in keys.items() if not key.startswith(unused)}


class SweepConfig(Section):
    """The keys of a sweep beside those of its runs; configs/sweep.yaml explains every one."""

    tasks: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    reference: str | None
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    equal_steps: Literal["on", "off"]
    keep_models: bool
    jobs: Annotated[int, Field(gt=0, le=1000)]
    finetune: dict[str, Any]
    per_task: dict[str, dict[str, Any]]


def teacher_names(entries: Sequence[TeacherConfig]) -> list[str]:
    """A short name for each teacher, all different."""
    names: list[str] = []
    for entry in entries:
        parts = [part for part in Path(entry.path).parts if part not in ("/", "model")]
        name = entry.name or (parts[-1] if parts else entry.path)
        if entry.name is None and entry.predictions is not None:
            name = name.partition(".")[0] or name
        twins = sum(1 for other in names if other == name or other.startswith(f"{name}#"))
        names.append(f"{name}#{twins + 1}" if twins else name)
    return names


def _identity(section: Section, prefix: str) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            keys.update(_identity(value, f"{prefix}{name}."))
        elif Operational not in field.metadata:
            plain = section.model_dump(mode="json")[name]
            keys[prefix + name] = plain
    return keys


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
