"""RunConfig: every key of a run, its type and what is allowed.

Defaults live in configs/base.yaml alone. Keys marked Operational may change on a resume; all
others are the run's identity.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from sead_dist.config.plugins import hashes
from sead_dist.config.prompted import mistake, mistaken_words, with_kind
from sead_dist.config.registered import MODEL, NO_ENSEMBLE, ROUTED, expected, names

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


def one_of(what: str, *more: str) -> BeforeValidator:
    """A name that is registered by the time that a configuration is checked."""

    def check(name: Any) -> Any:
        allowed = [*more, *names(what)]
        if name not in allowed:
            raise PydanticKnownError("literal_error", {"expected": expected(allowed)})
        return name

    return BeforeValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    # keys whose texts may hold line ends
    any_text: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
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
    path: Annotated[str | None, Operational]
    train: Annotated[str | None, Operational]
    validation: Annotated[str | None, Operational]
    revision: Annotated[str | None, Operational]
    max_train_examples: Annotated[int | None, Field(gt=0)]
    validation_fraction: Annotated[float, Field(gt=0, lt=1), Operational]
    skip_malformed: bool


class UnlabeledConfig(Section):
    path: Annotated[str | None, Operational]
    rest: Annotated[bool | None, Operational]
    ratio: Annotated[float | None, Field(gt=0)]


Operation = Literal["mask", "ngram", "neighbor", "swap", "recombine"]


class AugmentConfig(Section):
    copies: int | Literal["auto"] | None
    operations: Annotated[list[Operation], Field(min_length=1)] | None
    gold_labels: bool

    @field_validator("copies", mode="before")
    @classmethod
    def a_number_or_auto(cls, value: Any) -> Any:
        """In one line: a union of types would say one for each."""
        if value in (None, "auto") or (isinstance(value, int) and 0 < value <= MANY):
            return value
        raise ValueError("give how many copies each row has, from 1, or auto, or null")


class SelectionConfig(Section):
    fraction: Annotated[float, Field(gt=0, lt=1)]
    seed: int
    split: Literal["held_out", "dev"]


class StudentConfig(Section):
    path: str | None
    shape: str | None
    layers: list[int] | None
    tokenizer: str | None


class TeacherConfig(Section):
    path: str
    name: Annotated[str | None, Field(min_length=1, max_length=200)] = None
    kind: Annotated[str, one_of("kind of teacher")] = MODEL
    placement: Placed | None = None
    offload: bool = False
    labels: Labels = None
    revision: str | None = None
    dtype: Precision | None = None
    quantization: Literal["int8"] | None = None
    max_length: Annotated[int | None, Field(gt=0, le=MANY)] = None
    weight: Annotated[float, Field(ge=0)] = 1.0
    # of a language model
    prompt: Annotated[str | None, Field(min_length=1)] = None
    words: dict[str, list[str]] | None = None
    chat: bool = False
    shots: Annotated[int, Field(ge=0, le=1000)] = 0
    contextual_calibration: bool = False
    endpoint: str | None = None
    concurrency: Annotated[int, Field(gt=0, le=1000)] = 8
    max_requests: Annotated[int | None, Field(gt=0, le=MANY)] = None

    any_text: ClassVar[frozenset[str]] = frozenset({"prompt", "words"})

    _kind_of_its_keys = model_validator(mode="before")(with_kind)

    @field_validator("words")
    @classmethod
    def words_that_can_be_told_apart(
        cls, words: dict[str, list[str]] | None
    ) -> dict[str, list[str]] | None:
        if words is not None and (problem := mistaken_words(words)):
            raise ValueError(problem)
        return words

    @model_validator(mode="after")
    def keys_of_its_kind(self) -> "TeacherConfig":
        fields = type(self).model_fields
        given = {key: value for key, value in self if value != fields[key].default}
        if problem := mistake(self.kind, given):
            raise ValueError(problem)
        return self

    @property
    def is_model(self) -> bool:
        """Whether it is a classifier that Transformers loads, not of another kind."""
        return self.kind == MODEL


class StoreConfig(Section):
    path: Annotated[str | None, Operational]
    accept: Literal["exact", "any"]


# what a method's preset may set: all methods share student, start, data and steps
METHOD_KEYS = (
    *("ensemble", "teacher", "loss", "temperature", "alpha", "alpha_end"),
    *("feature_loss", "feature_loss_weight", "feature_stage_ratio", "student_init"),
)


class PoolConfig(Section):
    item_rows: Annotated[int, Field(gt=0, le=MANY), Operational]
    lease_s: Annotated[float, Field(gt=0), Operational]
    timeout_s: Annotated[float, Field(gt=0), Operational]


class HeartbeatConfig(Section):
    timeout_s: Annotated[float, Field(gt=0), Operational]
    hang_timeout_s: Annotated[float, Field(gt=0), Operational]


class CardConfig(Section):
    license: Annotated[str | None, Field(min_length=1), Operational]
    language: Annotated[str | None, Field(min_length=1), Operational]


class RunConfig(Section):
    """The whole configuration of a run; every key is explained in configs/base.yaml."""

    task: str
    # a name for the keys that its preset sets, which count themselves
    method: Annotated[str | None, Operational]
    output_dir: Annotated[str, Operational]
    seed: Annotated[int, Field(ge=0)]
    # what they hold counts, not where they lie
    plugins: Annotated[list[str], Operational]
    data: DataConfig
    unlabeled: UnlabeledConfig
    augment: AugmentConfig
    selection: SelectionConfig
    student: StudentConfig
    # identity of the teachers is their manifest (weights, labels), not how they are written here
    teachers: Annotated[list[TeacherConfig], Operational]
    encoders: list[TeacherConfig]
    placement: Annotated[Placement, Operational]
    teacher_precision: Precision
    prefetch_rows: Annotated[int, Field(gt=0, le=MANY), Operational]
    teacher_validation: Annotated[Literal["on", "off", "fp32"], Operational]
    baseline: Annotated[str | None, Operational]
    trust_remote_code: Annotated[bool, Operational]
    store: StoreConfig
    pool: PoolConfig
    ensemble: Annotated[str, one_of("ensemble")]
    teacher: str | None
    teacher_column: str | None
    loss: Annotated[str, one_of("loss", "auto")]
    temperature: Annotated[float, Field(gt=0)]
    alpha: Annotated[float, Field(ge=0, le=1)]
    alpha_end: Annotated[float | None, Field(ge=0, le=1)]
    feature_loss: Literal["distilbert", "tinybert", "minilm"] | None
    feature_loss_weight: Annotated[float, Field(gt=0)]
    feature_stage_ratio: Annotated[float, Field(gt=0, lt=1)]
    student_init: Literal["own", "feature_teacher"]
    num_train_epochs: Annotated[int | None, Field(gt=0, le=MANY)]
    max_steps: Annotated[int | None, Field(gt=0, le=MANY)]
    global_batch_size: Annotated[int, Field(gt=0, le=MANY)]
    micro_batch_size: Annotated[int, Field(gt=0, le=MANY)]
    max_length: Annotated[int, Field(gt=1, le=MANY)]
    optim: Literal["adamw", "sgd"]
    learning_rate: Annotated[float | None, Field(gt=0)]
    lr_scheduler_type: Literal["linear", "cosine", "constant"]
    warmup_steps: Annotated[float, Field(ge=0, le=MANY)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(ge=0)]
    precision: Precision
    deterministic: bool
    deepspeed: Annotated[str | None, Operational]
    final_checkpoint: Literal["auto", "best", "last", "average"]
    average_share: Annotated[float, Field(gt=0, le=1)]
    eval_steps: Annotated[int | None, Field(gt=0, le=MANY), Operational]
    save_steps: Annotated[int | None, Field(ge=0, le=MANY), Operational]
    save_total_limit: Annotated[int, Field(ge=1, le=MANY), Operational]
    keep_training_state: Annotated[bool, Operational]
    preemption_notice_s: Annotated[float | None, Field(gt=0), Operational]
    heartbeat: HeartbeatConfig
    report_to: Annotated[str | None, Operational]
    prediction_texts: Annotated[bool, Operational]
    push_to_hub: Annotated[bool, Operational]
    hub_model_id: Annotated[str | None, Operational]
    hub_private_repo: Annotated[bool | None, Operational]
    card: CardConfig

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
        """Whether copies of rows may be made: without teachers only under gold labels."""
        return self.augment.copies is not None and (self.taught or self.augment.gold_labels)

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
        plugin's hash. Where no copies are made the keys of `augment` decide nothing, and are left
        out."""
        held = {f"plugin {name}": sha256[:16] for name, sha256 in hashes(self.plugins).items()}
        keys = {**_identity(self, ""), **held}
        if not self.uses_copies:
            return {key: value for key, value in keys.items() if not key.startswith("augment.")}
        return keys


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
