"""What makes a run the same run: settings, data, teachers, start and rules.

It is read and compared without torch. So a finished run is found at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sead_dist.config.names import renamed
from sead_dist.config.rules import (
    ANSWER_RULES,
    DEFAULT_RULES,
    INPUT_RULES,
    ORDER_RULES,
    SPLIT_RULES,
    STAGE_RULES,
    START_RULES,
)
from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError, reading
from sead_dist.runtime.run_log import read_as

# the rules that determine the student of every run, with their versions
RULES = {
    "order": ORDER_RULES,
    "start": START_RULES,
    "input": INPUT_RULES,
    "defaults": DEFAULT_RULES,
}

# the rules for dividing rows; their version counts only where the rows differ
SPLITS = "splits"


def rules_of(config: RunConfig) -> dict[str, int]:
    """The versions of the rules that determine the student of this run."""
    stages = {"stages": STAGE_RULES} if config.feature_loss == "tinybert" else {}
    by_files = any(entry.predictions is not None for entry in config.teachers)
    unasked = config.routed or any(not entry.weight for entry in config.teachers)
    by_files &= unasked or config.feature_loss is not None
    return {**RULES, **stages, **({"answers": ANSWER_RULES} if by_files else {})}


# keys that a teacher's entry has only where they are set; any other key that is missing was unknown
# to the version that wrote the entry
LATER = {"calibrate"}


@dataclass(frozen=True)
class Identity:
    """What a resumed run must share with the run that it continues.

    start: a hash of the files that the student starts from. rules: the version of each; a record
    from before the versions has version 1 of all. copies: a hash of the copies of rows and of the
    embedding table that they were made with.
    """

    config: dict[str, Any]
    data: str
    teachers: list[dict[str, Any]]
    start: str = ""
    rules: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 1))
    copies: str = ""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        data: str,
        manifests: Sequence[Mapping[str, Any]],
        start: str,
        copies: str,
    ) -> "Identity":
        """The identity of a run that begins or resumes now. manifests: those of its teachers."""
        teachers = [teacher_identity(manifest) for manifest in manifests]
        found = cls(config.identity(), data, teachers, start, rules_of(config), copies)
        return found.with_data(data)

    def with_data(self, data: str) -> "Identity":
        """The same identity with the fingerprint of the rows that the run reads now, and the
        present version of the rules of splits."""
        return replace(self, data=data, rules={**self.rules, SPLITS: SPLIT_RULES})

    @classmethod
    def read(cls, record: Path) -> "Identity":
        """The identity in a run.json or state.json. Raises UserError where there is none."""
        saved: Identity = read_as(cls, record, "identity")
        with reading(record, "restore it, or give another output_dir"):
            _names(saved.teachers)
            return replace(saved, config=renamed(saved.config))

    def other_rules(self, other: "Identity") -> list[str]:
        """The names of the rules whose version differs in `other`. Rules that only some methods or
        teachers have are compared only if both runs have the same feature loss and teachers. The
        rules of splits are compared only if the data differ."""
        alike = self.config.get("feature_loss") == other.config.get("feature_loss")
        alike &= _fingerprints(self.teachers) == _fingerprints(other.teachers)
        names = dict.fromkeys({**self.rules, **other.rules} if alike else RULES)
        if self.data == other.data:
            names.pop(SPLITS, None)
        return [name for name in names if self.rules.get(name, 1) != other.rules.get(name, 1)]

    def differences(self, other: "Identity") -> list[str]:
        """One phrase for each difference. other: the run that is given now."""
        found = [
            f"the rules of {name} were version {self.rules.get(name, 1)}, are version "
            f"{other.rules.get(name, 1)}"
            for name in self.other_rules(other)
            if name != SPLITS
        ]
        keys = [key for key in {**self.config, **other.config}]
        found += [
            f"{key} was {self.config.get(key)!r}, is {other.config.get(key)!r}"
            for key in keys
            if self.config.get(key) != other.config.get(key)
        ]
        if len(self.teachers) != len(other.teachers):
            found.append(f"teachers were {_names(self.teachers)}, are {_names(other.teachers)}")
        for number, (old, new) in enumerate(zip(self.teachers, other.teachers, strict=False)):
            keys = [*old, *(LATER & (new.keys() - old.keys()))]
            found += [
                f"{key} of teacher {number + 1} was {_short(was)}, is {_short(now)}"
                for key in keys
                if (was := old.get(key)) != (now := new.get(key))
            ]
        if self.start != other.start:
            found.append(f"the student's start was {self.start[:12]}, is {other.start[:12]}")
        if self.data != other.data:
            found.append(
                f"the fingerprint of data and task was {self.data[:12]}, is {other.data[:12]}"
            )
        if self.copies != other.copies:
            before, now = (of.copies[:12] or "none" for of in (self, other))
            found.append(f"the hash of the copies of rows was {before}, is {now}")
        return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _fingerprints(teachers: list[dict[str, Any]]) -> list[str]:
    return [entry["fingerprint"] for entry in teachers]


def _names(teachers: list[dict[str, Any]]) -> str:
    said = [f"{entry['fingerprint'][:8]} ({'/'.join(entry['labels'])})" for entry in teachers]
    return ", ".join(said) or "none"


def reject_other(run: Path, saved: Identity, asked: Identity) -> None:
    """Raises UserError when a run directory holds another run than the one given."""
    if names := saved.other_rules(asked):
        if names == [SPLITS]:
            raise UserError(
                f"output_dir={run} holds a run of other rows: its files had other rows, or an "
                f"older version divided the same rows differently (rules splits "
                f"{saved.rules.get(SPLITS, 1)}, here {asked.rules.get(SPLITS, 1)}); give the files "
                "that it began with, or another output_dir; if the files are the same, resume with "
                "the version that began it"
            )
        old = ", ".join(f"{name} {saved.rules.get(name, 1)}" for name in names)
        new = ", ".join(f"{name} {asked.rules.get(name, 1)}" for name in names)
        raise UserError(
            f"output_dir={run} holds a run of another version of sead_dist, with the rules {old}; "
            f"this version has {new}, under which the same settings make another student; give "
            "another output_dir, or resume with the version that began it"
        )
    different = saved.differences(asked)
    if different:
        raise UserError(
            f"output_dir={run} holds another run: {'; '.join(different[:4])}"
            + ("; ..." if len(different) > 4 else "")
            + "; give the same settings to resume it, or another output_dir"
        )


def teacher_identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a teacher's manifest that a resume compares."""
    labels = manifest["labels"]
    return {
        "fingerprint": manifest["fingerprint"],
        "labels": [labels] if isinstance(labels, str) else list(labels),
        "order": list(manifest["order"]),
        "weight": manifest["weight"],
        "numerics": manifest["numerics"],
        "trained_rows": manifest.get("trained_rows", ""),
        **{key: manifest[key] for key in ("calibrate",) if key in manifest},
    }
