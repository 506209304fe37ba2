"""The parts of a run, built from its configuration before the first step.

All of a person's mistakes come to light here or in the validation.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sead_dist.config.automatic import epoch_steps
from sead_dist.config.load import DEFAULT_METHOD
from sead_dist.config.schema import RunConfig
from sead_dist.data.order import BatchStream, Split
from sead_dist.data.splits import (
    RunExamples,
    RunSplits,
    check_tokens,
    load_examples,
    tokenize_splits,
    told_cuts,
)
from sead_dist.data.task_files import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import find_layer_parts
from sead_dist.models.hidden_states_check import check_inside, needs_attention
from sead_dist.models.inputs import ModelInputs, settle, student_inputs
from sead_dist.models.pretrained import load_tokenizer
from sead_dist.models.resaved import check_saving, one_row
from sead_dist.models.start import run_start_hash, student_tokenizer
from sead_dist.models.student import build_student, start_as_feature_teacher
from sead_dist.objectives.ensemble import check_method, check_selection
from sead_dist.objectives.feature_losses import (
    FeatureLoss,
    check_feature_loss,
    make_feature_loss,
)
from sead_dist.objectives.losses import DistillationLoss, make_loss
from sead_dist.reporting.hub import check_push
from sead_dist.runs.baseline import OWN, baseline_logits
from sead_dist.runs.choices import told_choices, with_choices
from sead_dist.runs.claim import claim, forget_followed, locked, refuse_other_scoring, say_followed
from sead_dist.runs.copies import add_copies
from sead_dist.runs.prediction import tell_aside
from sead_dist.runs.remarks import unread_keys
from sead_dist.runs.repair import check_repair_setting, repair_folder, repair_start
from sead_dist.runs.requests import (
    answered_examples,
    check_fitted,
    check_scored,
    tell_requests,
    told_files,
)
from sead_dist.runs.without_gold import check_gold
from sead_dist.runtime.distributed import StopFlag, World, check_shared, from_main, on_every_rank
from sead_dist.runtime.heartbeat import Heartbeat
from sead_dist.runtime.run_log import RunLog, write_json
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.store.layout import refuse_foreign, store_folder
from sead_dist.store.store import PredictionStore
from sead_dist.teachers.entries import read_teachers
from sead_dist.teachers.feature_teacher import (
    FeatureTeacher,
    candidates,
    check_feature_teacher,
    held_everywhere,
    load_feature_teacher,
)
from sead_dist.teachers.placement import (
    check_placements,
    choose_placements,
    describe_shares,
    least_free,
    place,
    share_rows,
)
from sead_dist.teachers.pool_client import PoolClient, store_id
from sead_dist.teachers.rates import known_costs
from sead_dist.teachers.sharding import check_shardable
from sead_dist.teachers.source import StoredSource
from sead_dist.teachers.teacher import Teacher, tokenizers_of
from sead_dist.teachers.validation import best_teacher
from sead_dist.training.checkpoint import Checkpointer
from sead_dist.training.deepspeed_config import zero_config
from sead_dist.training.engine import Engine, check_arithmetic, check_tracker, slow_arithmetic
from sead_dist.training.identity import Identity


@dataclass(frozen=True)
class Parts:
    """What a run is made of before its first step."""

    config: RunConfig
    task: TaskSpec
    world: World
    log: RunLog
    examples: RunExamples
    splits: RunSplits
    inputs: ModelInputs
    teachers: list[Teacher]
    source: StoredSource | None
    engine: Engine
    batches: BatchStream
    checkpointer: Checkpointer
    stop: StopFlag
    heartbeat: Heartbeat
    feature_teacher: FeatureTeacher | None
    loss: DistillationLoss

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch over the labelled rows."""
        return epoch_steps(self.config, self.examples.labelled_rows, len(self.splits.train))

    def forward(self, inputs: dict[str, torch.Tensor], choices: int) -> torch.Tensor:
        """The student's logits in scoring, where every rank does the same number of forwards: a
        long split is no hang."""
        self.heartbeat.move("scoring the student")
        return self.engine.forward(inputs, choices)


def build(
    config: RunConfig, world: World, stack: ExitStack, stop: StopFlag, console: bool = True
) -> Parts:
    """Every part of the run; `stack` closes them. Nothing is written before all is checked."""
    run = Path(config.output_dir)
    store = store_folder(config.store.path)
    quiet_libraries(world)
    world.at("looking at the folders")
    shared = {"output_dir": run, **({"store": store} if config.taught else {})}
    if config.repair.text is not None:
        shared["repair.folder"] = repair_folder(config)
    if config.taught:
        from_main(world, lambda: refuse_foreign(store))
    check_shared(world, shared)
    check_setting(config, world)
    notes = slow_arithmetic(config, world.device)
    world.at("reading the data and the student")
    task, examples, inputs, model = on_every_rank(world, lambda: read_inputs(config, notes.append))
    world.at("reading the teachers")
    teachers = []
    if config.taught:
        teachers = read_teachers(config, task, world, inputs.tokenizer, examples)
    on_every_rank(world, lambda: check_scored(config, examples, teachers))
    on_every_rank(world, lambda: check_fitted(config, examples, teachers))
    # what files do not answer follows from them, and they are part of the identity themselves
    rows = examples.fingerprint(task)
    examples = on_every_rank(world, lambda: answered_examples(config, examples, teachers))
    world.at("tokenising the splits")
    splits = tokenize_splits(examples, inputs.split)
    check_tokens(examples, tokenizers_of(teachers))
    if teachers and config.baseline not in (None, OWN):
        given = Path(str(config.baseline))
        on_every_rank(world, lambda: baseline_logits(given, task, examples.selection))
    on_every_rank(world, lambda: check_feature_teacher(config, teachers, inputs, world))
    teachers = held_everywhere(config, teachers)
    world.at("hashing data, teachers and start")
    start = from_main(world, lambda: run_start_hash(config))
    manifests = [teacher.manifest() for teacher in teachers]
    identity = Identity.of(config, rows, manifests, start, examples.copies)
    world.at("trying to save the student")
    from_main(world, lambda: stack.enter_context(locked(run)))
    row = one_row(splits.train)
    from_main(world, lambda: check_saving(model, row, run, config.trust_remote_code))
    from_main(world, lambda: refuse_other_scoring(config, examples))
    from_main(world, lambda: claim(run, config, identity))
    beating = world.heartbeat or Heartbeat(0, 1, None, config.heartbeat)
    heartbeat = stack.enter_context(beating.of_run(run, stop, config.heartbeat))
    log = RunLog(run, world.is_main, console)
    stack.callback(log.close)
    for note in (
        *told_choices(config, task, examples, lambda: splits.train.tokens, model, world),
        *notes,
        *told_files(examples, teachers),
        *told_cuts(examples, splits, config.max_length, inputs.max_length),
    ):
        log.say(note)
    for line in unread_keys(config):
        log.say(f"WARNING: {line}")
    if config.repair.text is not None:
        repair_start(config, world, model, inputs, stop, heartbeat, log, console)
    config = with_choices(config, examples)
    world.at("placing the teachers")
    batches = BatchStream(
        splits.train,
        config.seed,
        config.global_batch_size,
        config.micro_batch_size,
        config.num_train_epochs,
        config.max_steps,
        world.rank,
        world.size,
    )
    for line in uneven(config, world.size):
        log.say(line)
    if config.deterministic:
        # what CUDA's matrix products ask for; read when the first one runs
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    if not teachers:
        log.say("no teachers: the student learns from the labels alone")
    if config.method == DEFAULT_METHOD and len(teachers) == 1:
        log.say(f"method={DEFAULT_METHOD} counts several teachers alike; with one it is `single`")
    source = (
        place_teachers(config, task, world, teachers, run, store, log, heartbeat, stack)
        if teachers
        else None
    )
    if source is not None:
        asked = (splits.train, splits.selection, *splits.official.values())
        for split in asked:
            source.share_tokens(split, inputs)
        from_main(world, lambda: tell_requests(source, asked, log.say))
    feature_teacher, feature_loss = None, None
    if config.feature_loss is not None and source is not None:
        chosen = choose_feature_teacher(config, task, teachers, source, splits.selection, heartbeat)
        feature_teacher, feature_loss = follow(config, world, chosen, model, batches.total_steps)
        log.say(
            f"feature_loss={feature_loss.method} of {feature_teacher.name}: {feature_loss.variant}"
        )
    rest = None if feature_loss is None else feature_loss.rest
    engine = Engine(model, config, world, batches.total_steps, rest)
    if config.report_to is not None:
        engine.start_tracker("tracker", config.identity())
    stack.callback(engine.close)
    checkpointer = Checkpointer(run, identity, world, config.save_total_limit, log.say)
    return Parts(
        config, task, world, log, examples, splits, inputs, teachers, source, engine, batches,
        checkpointer, stop, heartbeat, feature_teacher,
        make_loss(config, task.task_kind, batches.total_steps, feature_loss),
    )  # fmt: skip


def check_setting(config: RunConfig, world: World) -> None:
    """What can be told from the settings alone, before anything is read. Raises UserError."""
    check_tracker(config.report_to)
    if config.push_to_hub:
        from_main(world, lambda: check_push(config.hub_model_id))
    check_arithmetic(config.precision, world.device)
    zero = zero_config(config, world.size)
    stage = zero.stage if zero is not None else None
    check_feature_loss(config, stage)
    check_repair_setting(config, stage)


def uneven(config: RunConfig, ranks: int) -> list[str]:
    """A line where some ranks have nothing to do in a part of every step."""
    micro_batches = config.global_batch_size // config.micro_batch_size
    if micro_batches % ranks == 0:
        return []
    return [
        f"global_batch_size={config.global_batch_size} makes {micro_batches} micro-batches, which "
        f"{ranks} ranks cannot share evenly: some ranks idle; lower micro_batch_size"
    ]


def read_inputs(
    config: RunConfig, say: Callable[[str], None]
) -> tuple[TaskSpec, RunExamples, ModelInputs, PreTrainedModel]:
    """Task, examples, and the student with what it is fed."""
    task = load_task(config.task)
    if config.taught:
        check_method(config, task.task_kind)
    tokenizer = load_tokenizer(student_tokenizer(config.student, config.teachers))
    examples = load_examples(config, task, say)
    check_gold(config, task, examples)
    check_selection(config, examples.selection.labels_B)
    model = build_student(
        config.student,
        task,
        tokenizer,
        config.seed,
        config.trust_remote_code,
        say,
        examples.mean_score(task),
    )
    settle(tokenizer, model.config)
    examples = add_copies(config, task, examples, tokenizer, model, say)
    check_tokens(examples, {"the student": tokenizer})
    inputs = student_inputs(model, tokenizer, config.max_length, "the student", examples.train)
    if config.feature_loss is not None:
        check_inside(model, inputs, config.feature_loss, "the student")
    return task, examples, inputs, model


def place_teachers(
    config: RunConfig,
    task: TaskSpec,
    world: World,
    teachers: Sequence[Teacher],
    run: Path,
    folder: Path,
    log: RunLog,
    heartbeat: Heartbeat,
    stack: ExitStack,
) -> StoredSource:
    """The teacher source over the store in `folder`, with every teacher placed."""
    free = least_free(world)
    placements, reason = choose_placements(teachers, config.placement, world.size, free)
    on_every_rank(world, lambda: check_placed(config, teachers, placements))
    # what is remembered of rates may differ from machine to machine, and owners must be agreed
    costs_N = from_main(world, lambda: known_costs(teachers, world.device))
    share_NW = share_rows(teachers, placements, costs_N, world.size, free)
    log.say(reason)
    if "partitioned" in placements and world.size > 1:
        log.say(describe_shares(teachers, placements, share_NW))
    report = log.say if world.is_main else tell_aside
    store = on_every_rank(world, lambda: PredictionStore(folder, report))
    keys = [teacher.key for teacher in teachers]
    accept_any = config.store.accept == "any"
    stack.enter_context(store.hold(str(run), keys, accept_any) if world.is_main else nullcontext())
    manifest = [
        {**teacher.manifest(), "placement": placement}
        for teacher, placement in zip(teachers, placements, strict=True)
    ]
    from_main(world, lambda: write_json(run / "teacher_manifest.json", manifest))
    pool_client = None
    from_main(world, lambda: forget_followed(run))
    if "pool" in placements:
        root = store.layout.root
        from_main(world, lambda: say_followed(run, root, store_id(store.layout)))
        pool_client = PoolClient(
            store.layout, config.pool.timeout_s, log.say, heartbeat.progress_or_stop
        )
    source = StoredSource(
        teachers, place(teachers, placements, share_NW), world, store, task.name, run, accept_any,
        config.trust_remote_code, log.say, heartbeat.progress_or_stop, pool_client,
    )  # fmt: skip
    stack.callback(source.close)
    return source


def choose_feature_teacher(
    config: RunConfig,
    task: TaskSpec,
    teachers: Sequence[Teacher],
    source: StoredSource,
    selection: Split,
    heartbeat: Heartbeat,
) -> Teacher:
    """The teacher that `teacher` names, else the best on the selection split, as for `single`."""
    named = candidates(config, teachers)
    if len(named) == 1:
        return named[0]
    try:
        return teachers[best_teacher(source, task, selection, config.prefetch_rows)]
    except RuntimeError as error:
        heartbeat.explain(error)  # a collective breaks when another rank dies
        raise


def follow(
    config: RunConfig, world: World, teacher: Teacher, model: PreTrainedModel, total_steps: int
) -> tuple[FeatureTeacher, FeatureLoss]:
    """The feature teacher at work, and the loss over its hidden states and attention; the student
    at its start, changed where the method says so."""

    def load() -> tuple[FeatureTeacher, FeatureLoss]:
        assert config.feature_loss is not None
        body = load_feature_teacher(config, teacher, world.device)
        layer_parts = find_layer_parts(
            body, f"teacher {teacher.name}", needs_attention(config.feature_loss)
        )
        feature_loss = make_feature_loss(config, model, layer_parts, total_steps)
        if config.student_init == "feature_teacher":
            fits = start_as_feature_teacher(model, body)
            start = (
                "the feature teacher's layers"
                if fits
                else "its own, the feature teacher's layers do not fit"
            )
            feature_loss = replace(feature_loss, variant=f"{feature_loss.variant}; start: {start}")
        return FeatureTeacher(
            teacher.name, body, layer_parts, feature_loss.theirs, feature_loss.until
        ), feature_loss

    return on_every_rank(world, load)


def check_placed(config: RunConfig, teachers: Sequence[Teacher], placements: Sequence[str]) -> None:
    """Raises UserError where a teacher cannot be placed as it should be."""
    check_placements(teachers, placements)
    if "pool" in placements and config.teacher_validation == "fp32":
        raise UserError(
            "teacher_validation=fp32 asks teachers in fp32 in the student's processes, and "
            "placement=pool is for teachers that are not there; compare them in a run with another "
            "placement"
        )
    for teacher, placement in zip(teachers, placements, strict=True):
        if placement == "sharded":
            check_shardable(teacher, config.trust_remote_code)
