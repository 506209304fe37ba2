"""The arms of a sweep. An arm is a method, with keys of its own for all tasks or for one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sead_dist.config.names import known_names
from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError

# the arm that the others are compared with by default
FINETUNE = "finetune"
# arms are compared on the same rows, and with the same teachers
COMMON_KEYS = (
    *("task", "seed", "output_dir", "data", "selection"),
    *("teachers", "encoders", "plugins"),
)
# keys that determine how many steps a run takes
STEP_KEYS = (
    *("max_steps", "num_train_epochs", "early_stopping_patience", "global_batch_size"),
    *("unlabeled", "augment"),
)


@dataclass(frozen=True)
class Arm:
    """One arm. name: of its folders, and in the report. method: a shipped one, or a file of keys.
    keys: those of its runs, which replace all other keys."""

    name: str
    method: str
    keys: dict[str, Any] = field(default_factory=dict)


def read_arms(given: Sequence[str | Mapping[str, Any]], equal_steps: bool) -> list[Arm]:
    """The arms that `methods` lists: names of methods, or {name, method, keys of a run}.

    Raises UserError for what cannot be an arm, for an arm that sets a key common to all arms, and
    for one that sets its own number of steps where all take the same.
    """
    arms = [read_arm(one) for one in given]
    for arm in arms:
        check_keys("methods", arm.name, arm.keys, equal_steps)
    return arms


def check_keys(where: str, name: str, keys: Mapping[str, Any], equal_steps: bool) -> None:
    """Raises UserError for a key that is common to all arms, and with `equal_steps` for a key that
    determines the number of steps."""
    for key in COMMON_KEYS:
        if key in keys:
            raise UserError(
                f"{where}: the arm {name!r} sets {key}, which is the same for all arms of a sweep; "
                "set it outside methods"
            )
    own = next((key for key in STEP_KEYS if key in keys), None)
    if equal_steps and own is not None:
        raise UserError(
            f"{where}: the arm {name!r} sets {own}, and equal_steps=on gives all arms of a "
            "task the same number of steps; give equal_steps=off"
        )


def keys_by_arm(
    task: str, given: Mapping[str, Any], arms: Sequence[Arm], equal_steps: bool
) -> tuple[dict[str, Any], dict[str, Mapping[str, Any] | None]]:
    """What `per_task` gives for a task: (the keys for all arms, each arm's own keys by its name).
    None in place of an arm's keys: the arm is not run on the task. Raises UserError."""
    keys, where = dict(given), f"per_task.{task}.methods"
    by_arm = keys.pop("methods", None) or {}
    if not isinstance(by_arm, Mapping):
        raise UserError(
            f"{where}={by_arm} is not a list of arms with keys; give {{ARM: {{KEY: VALUE}}}}"
        )
    names = [arm.name for arm in arms]
    for name, own in by_arm.items():
        if name not in names:
            raise UserError(
                f"{where}: {name!r} is not an arm of this sweep{known_names(name, names)}"
            )
        if own is not None and not isinstance(own, Mapping):
            raise UserError(
                f"{where}.{name}={own} has no keys; give {{KEY: VALUE}}, or null to leave it out"
            )
        check_keys(where, name, own or {}, equal_steps)
    return keys, dict(by_arm)


def read_arm(given: str | Mapping[str, Any]) -> Arm:
    """One entry of `methods`. Raises UserError."""
    if isinstance(given, str):
        return Arm(method_name(given), given)
    keys = {key: value for key, value in given.items() if key not in ("name", "method")}
    method = given.get("method")
    if not isinstance(method, str):
        unknown = [key for key in keys if key not in RunConfig.model_fields]
        meant = f"{unknown[0]!r} is not a key, and " if unknown else ""
        raise UserError(
            f"methods: {meant}the arm {given.get('name')!r} has no method; give {{name: NAME, "
            "method: METHOD, KEY: VALUE, ...}"
        )
    name = given.get("name", method_name(method))
    if not isinstance(name, str) or re.fullmatch(r"\w[\w.+-]*", name) is None:
        raise UserError(
            f"methods: the arm's name {name!r} cannot be a folder's name; give letters, digits, "
            "dots and hyphens, beginning with a letter or digit"
        )
    return Arm(name, method, keys)


def method_name(method: str) -> str:
    """A shipped method's name, or the stem of a person's own file."""
    return Path(method).stem


def reference_of(given: str | None, arms: Sequence[Arm]) -> str | None:
    """The arm that the others are compared with. None where no arm is given and none is called
    finetune. Raises UserError for a name that no arm has."""
    names = [arm.name for arm in arms]
    if given is None:
        return FINETUNE if FINETUNE in names else None
    if given not in names:
        raise UserError(f"reference={given} is not an arm of this sweep{known_names(given, names)}")
    return given
