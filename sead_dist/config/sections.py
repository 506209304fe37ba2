"""The sections of a run's configuration, and what all of them check.

Below each field stands what it is for: configs/base.yaml is made of these sentences and defaults.
Fields marked Operational may change on a resume; all others are the run's identity.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from sead_dist.config.registered import expected, names

Operational = "operational"
Precision = Literal["fp32", "bf16", "fp16"]
Placed = Literal["colocated", "partitioned", "sharded", "pool"]
Placement = Literal["auto", Placed]
# what is counted from one to it would have no end
MANY = 10**9
Labels = list[str] | Literal["task_order"] | None


def writable(text: str) -> bool:
    """Whether logs, plots, job scripts and file names take this text: no control characters, no
    bytes that are not UTF-8 (halves of surrogate pairs)."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text)


def allowed_name(name: Any, allowed: Sequence[str]) -> Any:
    """The name, where it is one of these; as a Literal of pydantic rejects others."""
    if name not in allowed:
        raise PydanticKnownError("literal_error", {"expected": expected(allowed)})
    return name


def one_of(what: str, *more: str) -> BeforeValidator:
    """A name that is registered by the time that a configuration is checked."""
    return BeforeValidator(lambda name: allowed_name(name, [*more, *names(what)]))


class Section(BaseModel):
    """A group of keys. Keys that are not known, infinities and NaN are rejected."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    # keys whose texts may hold line ends
    any_text: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`num_train_epochs: true` would be one epoch."""
        kind = str(cls.model_fields[info.field_name or ""].annotation)
        held = [*value, *value.values()] if isinstance(value, dict) else value
        held = held if isinstance(held, list) else [held]
        if re.search(r"\b(int|float)\b", kind) and any(isinstance(one, bool) for one in held):
            raise ValueError("input should be a number, not true or false")
        for one in held if info.field_name not in cls.any_text else []:
            if isinstance(one, str) and not writable(one):
                raise ValueError("expected a text without line ends or other control characters")
        return value


class DataConfig(Section):
    """Where a run's rows come from."""

    path: Annotated[str | None, Operational] = None
    """folder with the task's files (train.tsv, dev.jsonl, ...); null: the hub (operational: the
    data's fingerprint is compared instead)"""
    train: Annotated[str | None, Operational] = None
    """this file instead of the folder's train file; .tsv, .csv, .jsonl, .json, .parquet, .arrow,
    each also with .gz"""
    validation: Annotated[str | None, Operational] = None
    """this file instead of the folder's validation file"""
    revision: Annotated[str | None, Operational] = None
    """hub revision of the data set"""
    max_train_examples: Annotated[int | None, Field(gt=0)] = None
    """a sample of this many training rows, drawn by selection.seed; null: all"""
    validation_fraction: Annotated[float, Field(gt=0, lt=1), Operational] = 0.1
    """where data.train is the only file of a task that is not on the hub: share of its rows that
    become the validation split, by a hash; rows that share a text stay together (operational: the
    data's fingerprint is compared instead)"""
    skip_malformed: bool = False
    """true: lines that cannot be read, such as those with a wrong number of fields, are skipped,
    and a warning lists them"""


class UnlabeledConfig(Section):
    """Text without gold labels."""

    path: Annotated[str | None, Operational] = None
    """a file of unlabelled text with the task's columns; only the soft loss uses it, so a run
    without teachers cannot have it (operational: the data's fingerprint is compared instead)"""
    rest: Annotated[bool | None, Operational] = None
    """true | false: rows of the task's own train file that the sample left out are unlabelled text
    too, without their labels; null: true in a run with teachers (operational: the data's
    fingerprint is compared instead)"""
    ratio: Annotated[float | None, Field(gt=0)] = None
    """the most rows of unlabelled text, of `path` and `rest` together, per labelled row; null: no
    limit"""


Operation = Literal["mask", "ngram", "neighbor", "swap", "recombine"]


class AugmentConfig(Section):
    """Changed copies of rows."""

    copies: int | Literal["auto"] | None = "auto"
    """the number of copies of each row; auto: with teachers as many as make copies and text
    together ten times the labelled rows, but none above 50,000 labelled rows; null: none"""
    operations: Annotated[list[Operation], Field(min_length=1)] | None = None
    """a list of mask (words are masked or left out), ngram (a few successive words are kept),
    neighbor (words are replaced by others near them in the student's own embedding table), and for
    pairs swap (the two texts change places) and recombine (the second text is that of another row,
    mostly a similar one); null: all that fit the task"""
    gold_labels: bool = False
    """true: copies of labelled rows keep the gold label where the operation keeps it (mask,
    neighbor, and swap where the task is symmetric)"""

    @field_validator("copies", mode="before")
    @classmethod
    def a_number_or_auto(cls, value: Any) -> Any:
        """In one line: a union of types would say one for each."""
        if value in (None, "auto") or (isinstance(value, int) and 0 < value <= MANY):
            return value
        raise ValueError("expected a number of copies of each row, from 1; or auto, or null")


class SelectionConfig(Section):
    """The rows that are held out to choose by."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the training rows that is held out for choices: teacher validation, weights of
    teachers, and the best checkpoint if there are at least 500 such rows"""
    seed: int = 0
    """determines which rows are held out and sampled; give teachers and students the same"""
    split: Literal["held_out", "dev"] = "held_out"
    """held_out | dev; dev: choices are made on the dev split, as in published figures, and every
    table has a note on it"""


class StudentConfig(Section):
    """The student's start."""

    path: str | None = None
    """hub id, id@revision or folder of the student's start (student=DIR is short for
    student.path=DIR); only its head may be new"""
    shape: str | None = None
    """instead of path, new weights of a shape: L6-H256-A8, L6-H384-A12, L12-H384-A12 or your own
    YAML file"""
    layers: list[int] | None = None
    """only these layers of student.path, e.g. [1,3,5,7,9,11]; for any model whose layers are one
    list (not ALBERT, T5)"""
    tokenizer: str | None = None
    """tokeniser's id or folder; null: of student.path, else of the first teacher"""

    @field_validator("layers", mode="before")
    @classmethod
    def check_layers(cls, layers: Any) -> Any:
        """Reject texts that are not numbers: pydantic reads 0-5 as -5."""
        for one in layers if isinstance(layers, list) else ():
            if isinstance(one, str) and not re.fullmatch(r"-?\d+", one.strip()):
                raise ValueError("expected the numbers of layers; give [0, 2, 4]")
        return layers


class RepairConfig(Section):
    """The repair of a start with few layers."""

    text: Annotated[str | None, Operational] = None
    """a file of plain text, one text a line; null: nothing is repaired (operational: the text's
    hash is compared instead)"""
    steps: Annotated[int, Field(gt=0, le=MANY)] = 5000
    """optimiser steps of the repair"""
    teacher: Annotated[str | None, Operational] = None
    """the model whose hidden states are learnt: a folder or hub id with the student's tokeniser;
    null: student.path with all its layers (operational: its hash is compared instead)"""
    folder: Annotated[str | None, Operational] = None
    """where repaired starts are kept; null: SEAD_DIST_REPAIRED or the user's cache"""


class StoreConfig(Section):
    """The prediction store."""

    path: Annotated[str | None, Operational] = None
    """folder of kept teacher predictions (store=DIR is short); null: SEAD_DIST_STORE or the user's
    cache"""
    accept: Literal["exact", "any"] = "exact"
    """exact | any; any: also read predictions computed on other hardware or versions"""


class PoolConfig(Section):
    """The pool's work items, and when a worker counts as dead."""

    item_rows: Annotated[int, Field(gt=0, le=MANY), Operational] = 2048
    """rows of one teacher that a worker takes at a time"""
    lease_s: Annotated[float, Field(gt=0), Operational] = 60
    """after this many seconds without a sign of life a worker counts as dead, and another one takes
    its work item"""
    timeout_s: Annotated[float, Field(gt=0), Operational] = 1800
    """after this many seconds without a new prediction the student's run ends; the error names the
    teacher"""


class HeartbeatConfig(Section):
    """When a rank counts as dead or as hanging."""

    timeout_s: Annotated[float, Field(gt=0), Operational] = 120
    """after this many seconds without a sign of life a process counts as dead (killed, stopped,
    node lost)"""
    hang_timeout_s: Annotated[float, Field(gt=0), Operational] = 1800
    """after this many seconds without progress in any process, one of them counts as hanging"""


class CardConfig(Section):
    """Entries of the model card that only a person can give."""

    license: Annotated[str | None, Field(min_length=1), Operational] = None
    """the model's licence, as the hub names it (apache-2.0, mit, other, ...); null: the card names
    none"""
    language: Annotated[str | None, Field(min_length=1), Operational] = None
    """the language of the texts (en, de, multilingual, ...); null: the card names none"""
