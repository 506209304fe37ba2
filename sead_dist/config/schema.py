"""RunConfig and SweepConfig: the whole configuration of a run, and of a sweep.

The keys outside sections stand in groups, in the order of configs/base.yaml, which is made of the
defaults and sentences of these fields: `keys.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from sead_dist.config.registered import NO_ENSEMBLE, ROUTED, hashes
from sead_dist.config.sections import (
    MANY,
    AugmentConfig,
    CardConfig,
    DataConfig,
    HeartbeatConfig,
    Operation,
    Operational,
    Placement,
    PoolConfig,
    Precision,
    RepairConfig,
    Section,
    SelectionConfig,
    StoreConfig,
    StudentConfig,
    UnlabeledConfig,
    one_of,
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
    "teacher_names",
    "writable",
]


class TaskKeys(Section):
    """What is learnt, from which rows."""

    task: str
    """a task's name (sst2, mrpc, ...) or the path of your own task's YAML file"""
    method: Annotated[str | None, Operational] = None
    """finetune | single | mean | confidence | entropy | random | routed | distilbert | tinybert |
    minilm | sead, or your own YAML file of these keys: ensemble, teacher, loss, temperature, alpha,
    alpha_end, feature_loss, feature_loss_weight, feature_stage_ratio, student_init; null: only
    these keys count, and their defaults are those of sead (operational: these keys are compared
    instead)"""
    output_dir: Annotated[str, Operational]
    """the run directory (operational: a run may be moved)"""
    seed: Annotated[int, Field(ge=0)] = 0
    """determines the order of the rows, dropout and new weights"""
    plugins: Annotated[list[str], Operational] = Field(default_factory=list)
    """your own Python files, which register losses, ensembles, kinds of teacher and of task
    (operational: their contents are compared instead)"""
    data: DataConfig = DataConfig()
    unlabeled: UnlabeledConfig = UnlabeledConfig()
    augment: AugmentConfig = AugmentConfig()
    """changed copies of training rows and of unlabelled text, which the teachers label; drawn by
    selection.seed"""
    selection: SelectionConfig = SelectionConfig()


class ModelKeys(Section):
    """The student, its teachers, and where these run."""

    student: StudentConfig = StudentConfig()
    repair: RepairConfig = RepairConfig()
    """before the task a start with few layers learns the hidden states of the whole model, once for
    all tasks and seeds"""
    teachers: Annotated[list[TeacherConfig], Operational] = Field(default_factory=list)
    """paths, ids, id@revision, a glob, or {path, name, kind, placement, offload, labels,
    revision, dtype, quantization, max_length, weight, calibrate}. kind: of a plugin; model: a
    classifier that Transformers loads. calibrate: on | off: whether a temperature is fitted on the
    selection split. Or {predictions, name, weight, calibrate, kind, labels, id, column,
    confidence, annotator, abstain, unknown, duplicates, smoothing}: a file of predictions
    (docs/teachers.md). Or a language model: {model, prompt, words: {CLASS: [WORD, ...]}, chat,
    shots, contextual_calibration}, behind an OpenAI-compatible interface also {endpoint: URL,
    concurrency, max_requests} (docs/language_models.md). offload: true: a sharded teacher's weights
    lie in the CPU's memory. quantization: int8: 8-bit weights (needs the extra `quantize`)
    (operational: their weights, labels, prompts and words are compared instead)"""
    encoders: list[TeacherConfig] = Field(default_factory=list)
    """for `finetune` only: the model that each teacher starts from, given as in `teachers`"""
    folds: Annotated[int | None, Field(gt=1, le=1000)] = None
    """for `finetune` only: the labelled rows are divided into this many folds, and teacher i of
    `encoders` is trained without fold i. The student's targets for a row then come only from
    teachers that were not trained on it (not with ensemble single, random or routed). null: all
    teachers are trained on all rows"""
    fold: Annotated[int | None, Field(ge=0)] = None
    """the fold, from 0, that a run leaves out; finetune sets it"""
    placement: Annotated[Placement, Operational] = "auto"
    """auto | colocated | partitioned | sharded | pool: where teachers run, unless their entry
    has a placement"""
    teacher_precision: Precision = "fp32"
    """fp32 | bf16 | fp16: the precision in which teachers compute"""
    prefetch_rows: Annotated[int, Field(gt=0, le=MANY), Operational] = 16384
    """the most rows that teachers compute ahead of the student"""
    teacher_validation: Annotated[Literal["on", "off", "fp32"], Operational] = "on"
    """on | off | fp32; on: each teacher is checked on the selection split before it teaches; off:
    no check; fp32: a teacher in bf16, fp16 or 8 bits is also compared with itself in fp32, on up to
    2,000 rows"""
    baseline: Annotated[str | None, Operational] = "auto"
    """auto | the folder of a run of method=finetune on the same rows | null. Log and card compare
    the teachers and this student with that fine-tuned student. auto: it is trained first, in the
    run directory, if that takes at most a tenth of the time; null: no comparison with it"""
    trust_remote_code: Annotated[bool, Operational] = False
    """true: run modelling code that comes with a checkpoint"""
    store: StoreConfig = StoreConfig()
    pool: PoolConfig = PoolConfig()
    """for teachers with placement pool, whose predictions `sead-dist teach` computes in processes
    of its own"""

    @field_validator("encoders")
    @classmethod
    def encoders_are_models(cls, entries: list[TeacherConfig]) -> list[TeacherConfig]:
        if any(entry.predictions is not None for entry in entries):
            raise ValueError("a file of predictions cannot be fine-tuned; give models")
        return entries


class MethodKeys(Section):
    """The weights of teachers, and the losses. A method's file may set all but teacher_column."""

    ensemble: Annotated[str, one_of("ensemble")] = "mean_probabilities"
    """none | single | mean_logits | mean_probabilities | fixed | score | fitted | confidence |
    entropy | answers | random | routed, or a plugin's: how teachers are weighted. none: no
    teachers, the labels alone; single: one teacher; mean_*: equal weights; fixed: the teachers'
    `weight`; score: by the score on the selection split; fitted: weights fitted to the gold labels
    of the selection split; random: one teacher per micro-batch; routed: the one that teacher_column
    names; confidence, entropy, answers: other weights for each example (docs/method.md)"""
    teacher: str | None = None
    """the name of the teacher that `single` and a feature loss use; null: the one with the best
    score on the selection split"""
    teacher_column: str | None = None
    """the column of the data that names each example's teacher, for `routed`"""
    loss: Annotated[str, one_of("loss", "auto")] = "auto"
    """kl: cross-entropy to soft targets times T^2 | mse: squared error of logits (or scores) |
    mse_centered: the same, after the mean of its row is subtracted from each logit | auto: mse for
    scores, else kl; or a plugin's"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T, of teachers and student in the soft loss"""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """labelled rows: alpha * soft + (1 - alpha) * hard"""
    alpha_end: Annotated[float | None, Field(ge=0, le=1)] = None
    """alpha at the last step; it changes linearly up to there; null: alpha is constant"""
    feature_loss: Literal["distilbert", "tinybert", "minilm"] | None = None
    """distilbert | tinybert | minilm: a loss over the teacher's hidden states or attention beside
    the soft one"""
    feature_loss_weight: Annotated[float, Field(gt=0)] = 1.0
    """the factor of the feature loss"""
    feature_stage_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """tinybert: the share of the steps, from the first on, that use the feature loss alone; the
    later steps use the soft and the hard loss alone"""
    student_init: Literal["own", "feature_teacher"] = "own"
    """own | feature_teacher; feature_teacher: before the first step the student gets the
    embeddings and evenly spaced layers of the feature teacher, if their shapes fit"""


class TrainingKeys(Section):
    """How long and how the student is trained."""

    num_train_epochs: Annotated[int | None, Field(gt=0, le=MANY)] = None
    """the length of the run, in passes over the labelled rows; text and copies do not change it"""
    max_steps: Annotated[int | None, Field(gt=0, le=MANY)] = None
    """the length of the run in optimiser steps instead; both null: with teachers three passes over
    all rows, at least 1500 and at most 30000 steps; without teachers three epochs over the labelled
    rows, at least 200 steps"""
    early_stopping_patience: Annotated[int | None, Field(gt=0, le=MANY)] = None
    """the run ends when the selection loss has not fallen at this many checks in a row. A check
    follows each epoch over the labelled rows, or the fewest epochs that make 20 steps.
    num_train_epochs or max_steps is then the limit; without both and without teachers the limit is
    ten epochs. null: no early end, but `finetune` takes 2 where no length is given"""
    global_batch_size: Annotated[int, Field(gt=0, le=MANY)] = 32
    """rows per optimiser step, over all ranks: a random sample of the epoch's rows"""
    micro_batch_size: Annotated[int, Field(gt=0, le=MANY)] = 16
    """rows per forward and backward of one rank, on average; divides global_batch_size. A global
    batch is cut into micro-batches by length. Each has about as many padded tokens, and at most as
    many as micro_batch_size rows of the greatest length in the batch"""
    max_length: Annotated[int, Field(gt=1, le=MANY)] = 128
    """the most tokens per row, for the student and for teachers whose entry has no max_length"""
    optim: Literal["adamw", "sgd"] = "adamw"
    """adamw | sgd"""
    learning_rate: Annotated[float | None, Field(gt=0)] = None
    """the highest learning rate, reached after the warm-up; null: by the student's hidden size,
    3e-4 up to 256, 1e-4 up to 384, 5e-5 up to 768, else 2e-5"""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """linear | cosine | constant: the learning rate after the warm-up"""
    warmup_steps: Annotated[float, Field(ge=0, le=MANY)] = 0.1
    """steps over which the learning rate rises; below 1: a share of all steps"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """the weight decay of all weights but biases and norms"""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """the gradient is clipped to this norm; 0: it is not clipped"""
    precision: Precision = "fp32"
    """fp32 | bf16 | fp16: the student's arithmetic (weights stay fp32)"""
    deterministic: bool = False
    """true: only deterministic kernels (slower on GPUs, needed for bitwise resume there)"""
    deepspeed: Annotated[str | None, Operational] = None
    """split the student's state over the ranks: zero1 | zero2 | zero3 | zero2_offload |
    zero3_offload or your own JSON file"""


class OutputKeys(Section):
    """Which student is kept, what is saved, and where results are sent."""

    final_checkpoint: Literal["auto", "best", "last", "average"] = "auto"
    """which student is kept. best: the one that scored best on the selection split | last: that of
    the last step | average: the mean of its weights over the last steps | auto: best from 500
    selection rows up and with early_stopping_patience, else average"""
    average_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """for final_checkpoint=average: the share of the steps, up to the last one, over which the mean
    is taken"""
    eval_steps: Annotated[int | None, Field(gt=0, le=MANY), Operational] = None
    """steps from one score on the selection split to the next; null: one score after each
    epoch over the labelled rows, at most fifty in a run (where the best student is kept, a resume
    may not change it)"""
    save_steps: Annotated[int | None, Field(ge=0, le=MANY), Operational] = None
    """steps from one checkpoint to the next; 0: there are none; null: one each minute, as long as
    that takes at most 2% of the time, and one at each new best student where the best is kept"""
    save_total_limit: Annotated[int, Field(ge=1, le=MANY), Operational] = 2
    """the most checkpoints that are kept"""
    keep_training_state: Annotated[bool, Operational] = False
    """true: a finished run keeps its checkpoints"""
    preemption_notice_s: Annotated[float | None, Field(gt=0), Operational] = None
    """seconds between a scheduler's notice (SIGUSR2, SIGTERM) and the kill; with this key the time
    of a save is measured before the first step"""
    heartbeat: HeartbeatConfig = HeartbeatConfig()
    """a run in several processes ends when one of them is dead or hangs; the error names it"""
    report_to: Annotated[str | None, Operational] = None
    """tensorboard, or the name of another tracker that Accelerate accepts"""
    prediction_texts: Annotated[bool, Operational] = True
    """false: the files in predictions/ do not contain the texts of the rows"""
    push_to_hub: Annotated[bool, Operational] = False
    """true: model/ is uploaded when the run is finished; needs a token before it starts (hf auth
    login, or HF_TOKEN)"""
    hub_model_id: Annotated[str | None, Operational] = None
    """owner/name, or a name under the token's owner; null: the name on the card"""
    hub_private_repo: Annotated[bool | None, Operational] = None
    """true | false: whether a repository that the upload creates is private; null: the owner's
    default"""
    card: CardConfig = CardConfig()


# what a method's file may set: all methods share student, start, data and steps. A column is of the
# data.
METHOD_KEYS = tuple(key for key in MethodKeys.model_fields if key != "teacher_column")


# pydantic takes the fields of the last base first
class RunConfig(OutputKeys, TrainingKeys, MethodKeys, ModelKeys, TaskKeys):
    """The whole configuration of a run. `task` and `output_dir` must be given."""

    @property
    def taught(self) -> bool:
        """Whether teachers predict. (Where none does, they may still lend a tokeniser.)"""
        return bool(self.teachers) and self.uses_teachers

    @property
    def uses_teachers(self) -> bool:
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
        all are files, which have no answers for copies, only a number that a person sets."""
        if self.augment.copies == "auto" and self.teachers and not self.answers_any_text:
            return False
        return self.augment.copies is not None and (self.taught or self.augment.gold_labels)

    @property
    def answers_any_text(self) -> bool:
        """Whether a teacher can answer any text, which a file of predictions cannot."""
        return any(entry.predictions is None for entry in self.teachers)

    @property
    def pooled(self) -> bool:
        """Whether a teacher is in the pool."""
        return "pool" in {entry.placement or self.placement for entry in self.teachers}

    @property
    def window_rows(self) -> int:
        """Most rows of training steps that are requested of the teachers at once. Of a pool no
        more than a work item, so that the student waits for little at a time."""
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
        is repaired, have no effect and are left out."""
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
