"""Reads and checks a run's configuration, data, student and teachers, in one order. All of this
comes before anything is written or placed, and before a teacher is used.

`distill` and `plan` call `check_run`. A plan leaves out one check: whether the hub accepts the
token of an upload. Pool workers and `labels` train no student, and call only the second half,
`read_run`.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sead_dist.config.registered import MODEL
from sead_dist.config.schema import RunConfig
from sead_dist.data.augmentation import (
    Material,
    WantedCopies,
    automatic_copies,
    fitting_operations,
    make_copies,
    no_copies_line,
)
from sead_dist.data.examples import ExampleSet, concatenate
from sead_dist.data.neighbors import embedding_table, near_words, table_hash
from sead_dist.data.splits import RunExamples, check_tokens, load_examples
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.models.hidden_states_check import check_layer_outputs
from sead_dist.models.inputs import ModelInputs, settle, student_inputs
from sead_dist.models.pretrained import TOKENIZER_FILES, load_tokenizer, locate
from sead_dist.models.start import run_start_hash, student_tokenizer
from sead_dist.models.student import build_student
from sead_dist.objectives.ensemble import check_method, check_selection
from sead_dist.objectives.feature_losses import check_feature_loss
from sead_dist.objectives.losses import check_losses
from sead_dist.reporting.hub import check_push, check_push_here
from sead_dist.runs.baseline import OWN, baseline_logits
from sead_dist.runs.repair import check_repair_setting
from sead_dist.runs.requests import answered_examples, check_fitted, check_scored
from sead_dist.runs.without_gold import check_gold
from sead_dist.runtime.console import counted_rows
from sead_dist.runtime.distributed import World, check_shared, from_main, on_every_rank
from sead_dist.runtime.run_log import tell
from sead_dist.store.layout import reject_foreign, store_folder
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.feature_teacher import check_feature_teacher, colocate_candidates
from sead_dist.teachers.teacher import Teacher, tokenizers_of
from sead_dist.training.deepspeed_config import zero_config
from sead_dist.training.engine import check_arithmetic, check_tracker, slow_arithmetic
from sead_dist.training.identity import Identity


@dataclass(frozen=True)
class CheckedRun:
    """What a run reads.

    read: the examples of its files, and their copies. examples: the part of `read` that the run
    uses. inputs: the inputs of the student. model: the student before its first step.
    """

    config: RunConfig
    task: TaskSpec
    read: RunExamples
    examples: RunExamples
    inputs: ModelInputs
    model: PreTrainedModel
    teachers: list[Teacher]

    def identity(self, world: World) -> Identity:
        """The facts that identify the run: two runs with equal identities are the same run.

        Every rank calls this. Rank 0 hashes the files of the student's start.
        """
        start = from_main(world, lambda: run_start_hash(self.config))
        manifests = [teacher.manifest() for teacher in self.teachers]
        # The fingerprint is of `read`, not of `examples`. Files of predictions determine which rows
        # are left out, and the manifests identify these files.
        rows = self.read.fingerprint(self.task)
        return Identity.of(self.config, rows, manifests, start, self.examples.copies)


def check_run(
    config: RunConfig,
    world: World,
    ranks: int | None = None,
    device: torch.device | None = None,
    folders: Mapping[str, Path] | None = None,
) -> CheckedRun:
    """Read and check a run that trains a student. Every rank calls this. Nothing is written.

    ranks, device: those of the planned run, where they differ from the present ones. folders: the
    folders that every node must reach (key -> folder). It is None for a plan; then the hub is not
    queried about an upload. Raises UserError, on every rank, for a mistake in the configuration,
    the files or the models.
    """
    ranks, device = ranks or world.size, device or world.device
    world.set_activity("looking at the folders")
    if config.taught:
        from_main(world, lambda: reject_foreign(store_folder(config.store.path)))
    if folders is not None:
        check_shared(world, folders)
    check_setting(config, world, ranks, device)
    if folders is not None and config.push_to_hub:
        from_main(world, lambda: check_push(config.hub_model_id))
    for line in slow_arithmetic(config, device):
        tell(line)
    run = read_run(config, world, ranks)
    if run.teachers and config.baseline not in (None, OWN):
        given = Path(str(config.baseline))
        on_every_rank(world, lambda: baseline_logits(given, run.task, run.examples.selection))
    return run


def read_run(
    config: RunConfig,
    world: World,
    ranks: int | None = None,
    learns: bool = True,
) -> CheckedRun:
    """Read task, data, student and teachers, and check that they fit each other and their keys.

    Every rank calls this. learns: False where no student is trained (`labels`). Then unlabelled
    rows that no teacher predicts are kept, and a teacher need not give hidden states. Raises
    UserError as `check_run` does.
    """
    world.set_activity("reading the data and the student")
    task, read, inputs, model = on_every_rank(world, lambda: read_inputs(config))
    world.set_activity("reading the teachers")
    teachers = []
    if config.taught:
        teachers = read_teachers(config, task, world, inputs.tokenizer, read)
    on_every_rank(world, lambda: check_scored(config, read, teachers))
    on_every_rank(world, lambda: check_fitted(config, read, teachers))
    examples = read
    if learns:
        examples = on_every_rank(world, lambda: answered_examples(config, read, teachers))
    check_tokens(examples, tokenizers_of(teachers))
    if learns:
        size = ranks or world.size
        on_every_rank(world, lambda: check_feature_teacher(config, teachers, inputs, size))
        teachers = colocate_candidates(config, teachers)
    return CheckedRun(config, task, read, examples, inputs, model, teachers)


def check_setting(config: RunConfig, world: World, ranks: int, device: torch.device) -> None:
    """Check what depends only on the settings and this machine. Nothing is read before.

    This checks that a tracker's package is installed, and does not start it. Raises UserError.
    """
    check_tracker(config.report_to)
    if config.push_to_hub:
        from_main(world, lambda: check_push_here(config.hub_model_id))
    check_arithmetic(config.precision, device)
    zero = zero_config(config, ranks)
    stage = zero.stage if zero is not None else None
    check_feature_loss(config, stage)
    check_repair_setting(config, stage)


def read_inputs(
    config: RunConfig,
) -> tuple[TaskSpec, RunExamples, ModelInputs, PreTrainedModel]:
    """(task, examples, the inputs of the student, student)."""
    task = load_task(config.task)
    check_losses(task.task_kind)
    if config.taught:
        check_method(config, task.task_kind)
    tokenizer = load_tokenizer(student_tokenizer(config.student, config.teachers))
    examples = load_examples(config, task)
    check_gold(config, task, examples)
    check_selection(config, examples.selection.labels_B)
    model = build_student(
        config.student,
        task,
        tokenizer,
        config.seed,
        config.trust_remote_code,
        examples.mean_score(task),
    )
    settle(tokenizer, model.config)
    examples = add_copies(config, task, examples, tokenizer, model)
    check_tokens(examples, {"the student": tokenizer})
    inputs = student_inputs(model, tokenizer, config.max_length, "the student", examples.train)
    if config.feature_loss is not None:
        check_layer_outputs(model, inputs, config.feature_loss, "the student")
    return task, examples, inputs, model


def add_copies(
    config: RunConfig,
    task: TaskSpec,
    examples: RunExamples,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> RunExamples:
    """The examples with the copies that `augment` sets. Copies are the last training rows.

    tokenizer, model: of the student before its first step. Raises UserError for an operation that
    does not fit.
    """
    asked = config.augment.copies
    if asked is None or not config.uses_copies:
        return examples
    in_all = automatic_copies(examples.labelled_rows, examples.unlabelled_rows)
    if asked == "auto" and in_all == 0:
        tell(no_copies_line(examples.labelled_rows, examples.unlabelled_rows))
        return examples
    # a run without teachers has no unlabelled text among these rows
    sources = examples.train
    # The embeddings of a new shape are random. With another tokeniser they belong to other tokens.
    own = config.student.shape is None and config.student.tokenizer is None
    table = embedding_table(model) if own else None
    operations = fitting_operations(
        config.augment.operations, task, table is not None, gold_alone=not config.taught
    )
    material = Material(mask_token_of(config, tokenizer) if "mask" in operations else None)
    if table is not None and "neighbor" in operations:
        near = near_words(table, tokenizer, words_of(sources))
        material = replace(material, neighbors=near, table=table_hash(table))
    of_each = None if asked == "auto" else asked
    wanted = WantedCopies(
        operations, config.selection.seed, of_each, in_all, config.augment.gold_labels
    )
    held = [examples.selection, *examples.official.values()]
    copies = make_copies(task, sources, held, wanted, material)
    counts = Counter(copies.operations)
    made = ", ".join(f"{name} {counts[name]}" for name in operations) or "no operation fits"
    gone = "".join(f"; {counted_rows(count, reason)}" for reason, count in copies.removed.items())
    tell(f"copies: {len(copies.operations)} ({made}){gone}")
    if copies.examples is None:
        return examples
    return replace(
        examples,
        train=replace(concatenate(examples.train, copies.examples), split="train"),
        copied=copies.operations,
        copies=copies.fingerprint,
        removed={**examples.removed, **copies.removed},
    )


def mask_token_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The student's mask token where every teacher has the same mask token, else None.

    A teacher with another mask token would read the student's as an ordinary word.
    """
    mask: str | None = tokenizer.mask_token
    for entry in config.teachers if mask is not None else ():
        if entry.predictions is not None:  # a file of predictions reads no copy
            continue
        if entry.kind != MODEL:  # how another kind of teacher reads text is unknown
            return None
        try:
            found = locate(entry.path, entry.revision, marks=TOKENIZER_FILES)
            theirs = load_tokenizer(found, config.trust_remote_code)
        except UserError:  # the mistake is raised again where the teacher is loaded
            return None
        if theirs.mask_token != mask:
            return None
    return mask


def words_of(examples: ExampleSet) -> set[str]:
    """The words of all texts."""
    texts = [*examples.texts_a, *(examples.texts_b or ())]
    return {word for text in texts for word in re.findall(r"\w+", text)}
