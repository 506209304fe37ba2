"""The setup of a run: all its objects, built from its configuration before the first step.

A mistake in the configuration raises an error here or in the validation of the teachers.

Shapes: N teachers, W ranks.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sead_dist.config.automatic import epoch_steps
from sead_dist.config.load import DEFAULT_METHOD
from sead_dist.config.schema import RunConfig
from sead_dist.data.order import BatchStream, Split
from sead_dist.data.splits import RunExamples, RunSplits, cut_lines, tokenize_splits
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import find_layer_parts
from sead_dist.models.hidden_states_check import needs_attention
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.resaved import check_saving, one_row
from sead_dist.models.student import start_as_feature_teacher
from sead_dist.objectives.feature_losses import FeatureLoss, make_feature_loss
from sead_dist.objectives.losses import DistillationLoss, make_loss
from sead_dist.runs.checked_run import CheckedRun, check_run
from sead_dist.runs.chosen_keys import chosen_key_lines, with_chosen_keys
from sead_dist.runs.claim import (
    claim,
    locked,
    reject_other_scoring,
    remove_student_store,
    write_student_store,
)
from sead_dist.runs.remarks import unread_keys
from sead_dist.runs.repair import repair_folder, repair_start
from sead_dist.runs.requests import file_lines, tell_requests
from sead_dist.runtime.distributed import StopFlag, World, from_main, on_every_rank
from sead_dist.runtime.heartbeat import Heartbeat
from sead_dist.runtime.run_log import RunLog, noted, tell, write_json
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.store.layout import store_folder
from sead_dist.store.store import StoreFolder
from sead_dist.teachers.feature_teacher import FeatureTeacher, candidates, load_feature_teacher
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
from sead_dist.teachers.teacher import Teacher
from sead_dist.teachers.validation import best_teacher
from sead_dist.training.checkpoint import Checkpointer
from sead_dist.training.engine import Engine
from sead_dist.training.identity import Identity


@dataclass(frozen=True)
class RunSetup:
    """The objects of a run before its first step."""

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
        """The student's logits in scoring. Every rank computes the same number of forwards.

        Each forward reports progress, so that a long split does not count as a hang.
        """
        self.heartbeat.count_progress("scoring the student")
        return self.engine.forward(inputs, choices)


def build(
    config: RunConfig, world: World, stack: ExitStack, stop: StopFlag, console: bool = True
) -> RunSetup:
    """Build the setup of the run. `stack` closes it.

    Nothing is written before the configuration, data and models are checked. stop: holds the signal
    that requests a stop. console: as for `RunLog`. Raises UserError for a mistake in them, and
    StopRequestedError where a stop was requested while a start is repaired.
    """
    quiet_libraries(world)
    run = Path(config.output_dir)
    with noted() as notes:
        checked = check_run(config, world, folders=run_folders(config))
    task, examples, inputs, model = checked.task, checked.examples, checked.inputs, checked.model
    teachers = checked.teachers
    world.set_activity("tokenising the splits")
    splits = tokenize_splits(examples, inputs.split)
    identity = claim_folder(checked, splits, world, stack)
    beating = world.heartbeat or Heartbeat(0, 1, None, config.heartbeat)
    heartbeat = stack.enter_context(beating.of_run(run, stop, config.heartbeat))
    log = stack.enter_context(RunLog(run, world.is_main, console))
    for line in first_lines(checked, splits, notes, world):
        tell(line)
    if config.repair.text is not None:
        repair_start(config, world, model, inputs, stop, heartbeat, console)
    config = with_chosen_keys(config, examples)
    world.set_activity("placing the teachers")
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
    for line in (*idle_rank_lines(config, world.size), *teacher_count_lines(config, teachers)):
        tell(line)
    set_deterministic(config.deterministic)
    source, feature_teacher, feature_loss = None, None, None
    if teachers:
        source = place_teachers(config, task, world, teachers, heartbeat, stack)
        share_splits(source, splits, inputs, world)
    if config.feature_loss is not None and source is not None:
        chosen = choose_feature_teacher(config, task, teachers, source, splits.selection, heartbeat)
        feature_teacher, feature_loss = load_feature_distillation(
            config, world, chosen, model, batches.total_steps
        )
        tell(
            f"feature_loss={feature_loss.method} of {feature_teacher.name}: {feature_loss.variant}"
        )
    rest = None if feature_loss is None else feature_loss.rest
    engine = Engine(model, config, world, batches.total_steps, rest)
    if config.report_to is not None:
        engine.start_tracker("tracker", config.identity())
    stack.callback(engine.close)
    checkpointer = Checkpointer(run, identity, world, config.save_total_limit)
    return RunSetup(
        config, task, world, log, examples, splits, inputs, teachers, source, engine, batches,
        checkpointer, stop, heartbeat, feature_teacher,
        make_loss(config, task.task_kind, batches.total_steps, feature_loss),
    )  # fmt: skip


def run_folders(config: RunConfig) -> dict[str, Path]:
    """The folders that every node of a run must reach, by their keys."""
    folders = {"output_dir": Path(config.output_dir)}
    if config.taught:
        folders["store"] = store_folder(config.store.path)
    if config.repair.text is not None:
        folders["repair.folder"] = repair_folder(config)
    return folders


def claim_folder(
    checked: CheckedRun, splits: RunSplits, world: World, stack: ExitStack
) -> Identity:
    """Claim the output folder for this run, and lock it while `stack` is open.

    A run writes nothing before this. A trial save checks that the student can be saved. Returns the
    run's identity. Raises UserError for a folder of another run, and for a student that is read
    back differently than it was saved.
    """
    config, run = checked.config, Path(checked.config.output_dir)
    world.set_activity("hashing data, teachers and start")
    identity = checked.identity(world)
    world.set_activity("trying to save the student")
    from_main(world, lambda: stack.enter_context(locked(run)))
    row = one_row(splits.train)
    from_main(world, lambda: check_saving(checked.model, row, run, config.trust_remote_code))
    from_main(world, lambda: reject_other_scoring(config, checked.examples))
    from_main(world, lambda: claim(run, config, identity, world.command))
    return identity


def first_lines(
    checked: CheckedRun, splits: RunSplits, notes: Sequence[str], world: World
) -> list[str]:
    """The first lines of the log: the values chosen for null and auto keys, and what was read.

    notes: the lines about data and student. Every rank calls this.
    """
    config, task, examples = checked.config, checked.task, checked.examples
    return [
        *chosen_key_lines(
            config, task, examples, lambda: splits.train.tokens, checked.model, world
        ),
        *notes,
        *file_lines(examples, checked.teachers),
        *cut_lines(examples, splits, config.max_length, checked.inputs.max_length),
        *(f"WARNING: {line}" for line in unread_keys(config)),
    ]


def teacher_count_lines(config: RunConfig, teachers: Sequence[Teacher]) -> list[str]:
    """A line where there are no teachers, or where the default method has a single teacher."""
    if not teachers:
        return ["no teachers: the student learns from the gold labels alone"]
    if config.method == DEFAULT_METHOD and len(teachers) == 1:
        return [
            f"method={DEFAULT_METHOD} is for several teachers; with one teacher it trains the same "
            "student as method=single"
        ]
    return []


def set_deterministic(on: bool) -> None:
    """Set whether torch raises an error for operations that are not deterministic."""
    if on:
        # deterministic matrix products of CUDA need this; it is read when the first one runs
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)


def idle_rank_lines(config: RunConfig, ranks: int) -> list[str]:
    """A line where some ranks idle in a part of every step."""
    micro_batches = config.global_batch_size // config.micro_batch_size
    if micro_batches % ranks == 0:
        return []
    return [
        f"global_batch_size={config.global_batch_size} makes {micro_batches} micro-batches, which "
        f"{ranks} ranks cannot share evenly: some ranks idle; lower micro_batch_size"
    ]


def place_teachers(
    config: RunConfig,
    task: TaskSpec,
    world: World,
    teachers: Sequence[Teacher],
    heartbeat: Heartbeat,
    stack: ExitStack,
) -> StoredSource:
    """Place every teacher, and open the source of their predictions. `stack` closes it.

    Writes teacher_manifest.json, and for a pool the record of the store. Raises UserError for a
    placement that does not fit.
    """
    run, folder = Path(config.output_dir), store_folder(config.store.path)
    free = least_free(world)
    placements, reason = choose_placements(teachers, config.placement, world.size, free)
    on_every_rank(world, lambda: check_placed(config, teachers, placements))
    # measured rates may differ between machines, and all ranks must place teachers alike
    costs_N = from_main(world, lambda: known_costs(teachers, world.device))
    share_NW = share_rows(teachers, placements, costs_N, world.size, free)
    tell(reason)
    if "partitioned" in placements and world.size > 1:
        tell(describe_shares(teachers, placements, share_NW))
    store = on_every_rank(world, lambda: StoreFolder(folder))
    keys = [teacher.key for teacher in teachers]
    accept_any = config.store.accept == "any"
    stack.enter_context(store.hold(str(run), keys, accept_any) if world.is_main else nullcontext())
    manifest = [
        {**teacher.manifest(), "placement": placement}
        for teacher, placement in zip(teachers, placements, strict=True)
    ]
    from_main(world, lambda: write_json(run / "teacher_manifest.json", manifest))
    pool_client = None
    from_main(world, lambda: remove_student_store(run))
    if "pool" in placements:
        root = store.layout.root
        from_main(world, lambda: write_student_store(run, root, store_id(store.layout)))
        pool_client = PoolClient(store.layout, config.pool.timeout_s, heartbeat.progress_or_stop)
    source = StoredSource(
        teachers, place(teachers, placements, share_NW), world, store, task.name, run, accept_any,
        config.trust_remote_code, heartbeat.progress_or_stop, pool_client,
    )  # fmt: skip
    stack.callback(source.close)
    return source


def share_splits(
    source: StoredSource, splits: RunSplits, inputs: ModelInputs, world: World
) -> None:
    """Share the student's tokens with teachers of the same inputs, and log requests to endpoints.

    Raises UserError where an endpoint would get more requests than its max_requests.
    """
    predicted = (splits.train, splits.selection, *splits.official.values())
    for split in predicted:
        source.share_tokens(split, inputs)
    from_main(world, lambda: tell_requests(source, predicted))


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
        heartbeat.end_if_rank_lost(error)  # a collective fails when another rank ends
        raise


def load_feature_distillation(
    config: RunConfig, world: World, teacher: Teacher, model: PreTrainedModel, total_steps: int
) -> tuple[FeatureTeacher, FeatureLoss]:
    """The loaded feature teacher, and the loss over its hidden states and attention.

    model: the student before its first step. With student_init=feature_teacher it gets the feature
    teacher's layers where they fit.
    """

    def load() -> tuple[FeatureTeacher, FeatureLoss]:
        assert config.feature_loss is not None
        body = load_feature_teacher(config, teacher, world.device)
        layer_parts = find_layer_parts(
            body, f"teacher {teacher.name}", needs_attention(config.feature_loss)
        )
        feature_loss = make_feature_loss(config, model, layer_parts, total_steps)
        if config.student_init == "feature_teacher":
            start = "the feature teacher's layers"
            if not start_as_feature_teacher(model, body):
                start = "its own, the feature teacher's layers do not fit"
            feature_loss = replace(feature_loss, variant=f"{feature_loss.variant}; start: {start}")
        return FeatureTeacher(
            teacher.name, body, layer_parts, feature_loss.theirs, feature_loss.until
        ), feature_loss

    return on_every_rank(world, load)


def check_placed(config: RunConfig, teachers: Sequence[Teacher], placements: Sequence[str]) -> None:
    """Raises UserError where a teacher cannot have its placement."""
    check_placements(teachers, placements)
    if "pool" in placements and config.teacher_validation == "fp32":
        raise UserError(
            "teacher_validation=fp32 loads each teacher in the student's processes, and "
            "placement=pool does not; give teacher_validation=on, or another placement"
        )
    for teacher, placement in zip(teachers, placements, strict=True):
        if placement == "sharded":
            check_shardable(teacher, config.trust_remote_code)
