"""Old names of keys and files, and their present names; and the known name nearest to a wrong one.

An old key is rejected with its present name. Files with old names are read.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# of a run, dotted as on the command line
RENAMED = {
    "epochs": "num_train_epochs",
    "global_batch": "global_batch_size",
    "micro_batch": "micro_batch_size",
    "warmup": "warmup_steps",
    "schedule": "lr_scheduler_type",
    "optimizer": "optim",
    "evaluate.every_steps": "eval_steps",
    "checkpoint.every_steps": "save_steps",
    "checkpoint.keep_last": "save_total_limit",
    "tracker": "report_to",
    "grace_s": "preemption_notice_s",
    "watch.silent_s": "heartbeat.timeout_s",
    "watch.hang_s": "heartbeat.hang_timeout_s",
    "gate": "teacher_validation",
    "drift": "teacher_validation",
    "graduate": "final_checkpoint",
    "guide": "teacher",
    "route": "teacher_column",
    "internals": "feature_loss",
    "inner_weight": "feature_loss_weight",
    "inner_share": "feature_stage_ratio",
    "start": "student_init",
    "transfer.path": "unlabeled.path",
    "transfer.ratio": "unlabeled.ratio",
    "select.fraction": "selection.fraction",
    "select.seed": "selection.seed",
    "select.on": "selection.split",
    "look_ahead": "prefetch_rows",
    "pool.chunk_rows": "pool.item_rows",
    "pool.claim_s": "pool.lease_s",
    "pool.silent_s": "pool.timeout_s",
    "teachers.weights": "teachers.quantization",
    "encoders.weights": "encoders.quantization",
}
VALUES: dict[tuple[str, str | float], str] = {
    ("start", "guide"): "feature_teacher",
    ("select.on", "select"): "held_out",
    ("drift", "on"): "fp32",
    **{
        (f"{entries}.{key}", "refuse"): "reject"
        for entries in ("teachers", "encoders")
        for key in ("unknown", "duplicates")
    },
    # warmup=1 was a share, all steps; warmup_steps=1 is one step. So an old run's identity has a
    # value that no present run has, and a command or a file gets a share just below 1.
    ("warmup", 1.0): "all steps",
    ("warmup", "1"): "0.999999999",
    ("warmup", "1.0"): "0.999999999",
}
# of the records in run_summary.json and metrics.jsonl, and of the sums in a checkpoint
RECORDS = {
    "internals": "feature_loss",
    "loss_inner": "loss_feature",
    "transfer_rows": "unlabelled_rows",
    "live_rows": "feature_rows",
}
# of what a plugin registers
ATTRIBUTES = {
    "asked": "needed",
    "asks_all": "needs_all",
    "asks_selection": "needs_selection",
}
# in a run directory
FILES = {"examination.json": "teacher_validation.json"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to `name`, by `letters_apart` without regard to capitals.

    At most two letters may differ, and less than half of the letters of the longer of the two
    names. None where no name is so near.
    """
    near: dict[str, int] = {}
    for other in known:
        apart = letters_apart(name.casefold(), other.casefold())
        if apart <= 2 and 2 * apart < max(len(name), len(other)):
            near[other] = apart
    return min(near, key=near.__getitem__, default=None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the nearest known one, else `otherwise`."""
    near = nearest(name, known)
    return otherwise if near is None else f"did you mean {near!r}?"


def known_names(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, and all of them."""
    known = list(known)
    meant = did_you_mean(name, known, "")
    return f"; {meant} known: {', '.join(known)}" if meant else f"; known: {', '.join(known)}"


def letters_apart(one: str, other: str) -> int:
    """How many letters to change, leave out or add, or neighbours to swap, to make `other` of `one`
    (the edit distance by optimal string alignment); 3 for more than two."""
    if abs(len(one) - len(other)) > 2:
        return 3
    # row[j]: the distance of the first i letters of `one` to the first j letters of `other`
    two_before: list[int] = []
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i in range(1, len(one) + 1):
        two_before, before, row = before, row, [i]
        for j in range(1, len(other) + 1):
            changed = before[j - 1] + (one[i - 1] != other[j - 1])
            least = min(before[j] + 1, row[j - 1] + 1, changed)
            # two neighbours are swapped
            if i > 1 and j > 1 and one[i - 2] == other[j - 1] and one[i - 1] == other[j - 2]:
                least = min(least, two_before[j - 2] + 1)
            row.append(least)
    return min(row[-1], 3)


def new_name(key: str) -> str | None:
    """The present name of a (dotted) key or section that was renamed; None for any other.

    The keys of an old section may lie in several places now: "a and b".
    """
    if key in RENAMED:
        return RENAMED[key]
    inside = [new for old, new in RENAMED.items() if old.startswith(f"{key}.")]
    sections = {new.rpartition(".")[0] or new for new in inside}
    return " and ".join(sorted(sections)) if inside and sections != {key} else None


def renamed(keys: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """Flat keys of a run, as its identity holds them, under their present names and values. inside:
    the section whose keys these are (`teachers.`), if any."""
    names = {key: RENAMED.get(inside + key, inside + key).removeprefix(inside) for key in keys}
    return {names[key]: _value(inside + key, value) for key, value in keys.items()}


def renamed_config(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run directory's config.yaml, in sections, under their present names and
    values."""
    keys, found = dict(keys), dict[str, Any]()
    if keys.pop("drift", None) == "on" and keys.get("gate") != "off":
        keys["gate"] = "fp32"
    for key, value in keys.items():
        if isinstance(value, Mapping) and any(old.startswith(f"{key}.") for old in RENAMED):
            for part, inner in value.items():
                _put(found, f"{key}.{part}", inner)
        elif key in ("teachers", "encoders") and isinstance(value, list):
            found[key] = [renamed(e, f"{key}.") if isinstance(e, Mapping) else e for e in value]
        else:
            _put(found, key, value)
    return found


def _put(keys: dict[str, Any], name: str, value: Any) -> None:
    """Put the value of an old (dotted) key into `keys`, under its present section and name."""
    if name == "warmup" and value == 1:  # a file holds a number, an override a text
        value = float(_value(name, "1"))
    section, dot, part = RENAMED.get(name, name).rpartition(".")
    within = keys.setdefault(section, {}) if dot else keys
    within[part] = _value(name, value)


def renamed_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of run_summary.json or metrics.jsonl, or the sums in a checkpoint, under the present
    names."""
    return {RECORDS.get(name, name): value for name, value in record.items()}


def renamed_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of an older version's command, with the overrides under the keys' present names."""
    off = any(word.strip() == "gate=off" for word in words)
    found = [_renamed_word(word) for word in words if not (word.startswith("drift=") and off)]
    # gate and drift are one key now: drift=off left the gate on, and drift=on is more than gate=on
    left_out = set() if off else {"teacher_validation=off"}
    if "teacher_validation=fp32" in found:
        left_out.add("teacher_validation=on")
    return tuple(word for word in found if word not in left_out)


def _renamed_word(word: str) -> str:
    key, equals, value = word.partition("=")
    prefix, bare = "", key
    if key.startswith("finetune."):
        prefix, bare = "finetune.", key.removeprefix("finetune.")
    elif key.startswith("per_task."):
        head = key.split(".", 2)
        prefix, bare = ".".join(head[:2]) + ".", head[2] if len(head) > 2 else ""
    return f"{prefix}{RENAMED.get(bare, bare)}{equals}{_value(bare, value)}" if equals else word


def _value(key: str, value: Any) -> Any:
    return VALUES.get((key, value), value) if isinstance(value, str | float) else value
