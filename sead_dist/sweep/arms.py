"""The arms of a sweep: a method, and any keys of the run that this arm alone has."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sead_dist.data.task_files import nearest
from sead_dist.errors import UserError

# what the others are compared with where nothing else is named
FINETUNE = "finetune"
# arms are compared on the same rows, and with the same teachers
COMMON_KEYS = (
    *("task", "seed", "output_dir", "data", "selection"),
    *("teachers", "encoders", "plugins"),
)
# what says how many steps a run takes
STEP_KEYS = (
    *("max_steps", "num_train_epochs", "early_stopping_patience", "global_batch_size"),
    *("unlabeled", "augment"),
)


@dataclass(frozen=True)
class Arm:
    """name: of its folders, and in the report; method: a shipped one or a file of keys; keys: of
    its runs, over all others."""

    name: str
    method: str
    keys: dict[str, Any] = field(default_factory=dict)


def read_arms(given: Sequence[str | Mapping[str, Any]], equal_steps: bool) -> list[Arm]:
    """The arms that `methods` lists: names of methods, or {name, method, keys of a run}.

    Raises UserError for what cannot be an arm, and for one that sets its own number of steps where
    all are to take as many.
    """
    arms = [read_arm(one) for one in given]
    for arm in arms:
        own = next((key for key in STEP_KEYS if key in arm.keys), None)
        if equal_steps and own is not None:
            raise UserError(
                f"methods: the arm {arm.name!r} sets {own}, and equal_steps=on gives all arms of a "
                "task as many steps; give equal_steps=off"
            )
    return arms


def read_arm(given: str | Mapping[str, Any]) -> Arm:
    """One entry of `methods`. Raises UserError."""
    if isinstance(given, str):
        return Arm(method_name(given), given)
    keys = {key: value for key, value in given.items() if key not in ("name", "method")}
    method = given.get("method")
    if not isinstance(method, str):
        raise UserError(
            f"methods: the arm {given.get('name')!r} has no method; give {{name: NAME, method: "
            "METHOD, KEY: VALUE, ...}"
        )
    name = given.get("name", method_name(method))
    if not isinstance(name, str) or re.fullmatch(r"\w[\w.+-]*", name) is None:
        raise UserError(
            f"methods: the arm's name {name!r} cannot be a folder's; give letters, digits, dots "
            "and hyphens, beginning with a letter or digit"
        )
    for key in COMMON_KEYS:
        if key in keys:
            raise UserError(
                f"methods: the arm {name!r} sets {key}, which is the same for all arms of a sweep; "
                "give it beside methods"
            )
    return Arm(name, method, keys)


def method_name(method: str) -> str:
    """A shipped method's name, or the stem of a person's own file."""
    return Path(method).stem


def reference_of(given: str | None, arms: Sequence[Arm]) -> str | None:
    """The arm that the others are compared with; None where nothing is named and no arm is called
    finetune. Raises UserError for a name that no arm has."""
    names = [arm.name for arm in arms]
    if given is None:
        return FINETUNE if FINETUNE in names else None
    if given not in names:
        raise UserError(f"reference={given} is no arm of this sweep{nearest(given, names)}")
    return given
