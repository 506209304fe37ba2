"""Repair of a student's start that takes few layers of a model.

The start is trained on plain text to give that model's hidden states, before any task. The result
depends only on start, teacher, text, steps and batch sizes. It is kept in a folder whose name is
their hash, and other tasks and seeds use it too. The training has the loop, engine and checkpoints
of a run. So a killed repair is resumed, with any number of ranks.
"""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.data.examples import ExampleSet, build_examples
from sead_dist.data.order import BatchStream
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import RunError, UserError, reading
from sead_dist.models.hidden_states import LayerParts, find_layer_parts
from sead_dist.models.hidden_states_check import check_layer_outputs
from sead_dist.models.inputs import ModelInputs, settle, teacher_inputs
from sead_dist.models.loaded import head_names, pooler_names
from sead_dist.models.pretrained import load_tokenizer, tokenizer_hash
from sead_dist.models.sequence_classifier import frozen, load_start
from sead_dist.models.start import hash_of, repair_facts, repair_teacher
from sead_dist.models.student import build_student
from sead_dist.objectives.feature_losses import REPAIR, make_repair_loss, without_projections
from sead_dist.objectives.losses import DistillationLoss
from sead_dist.runs.claim import try_lock
from sead_dist.runtime.distributed import StopFlag, World, from_main, on_every_rank
from sead_dist.runtime.files import cache_place, written_aside
from sead_dist.runtime.heartbeat import Heartbeat, StopRequestedError
from sead_dist.runtime.run_log import RunLog, noted, read_metrics, tell, write_json
from sead_dist.teachers.feature_teacher import FeatureTeacher
from sead_dist.training.checkpoint import Checkpointer
from sead_dist.training.engine import Engine
from sead_dist.training.identity import Identity
from sead_dist.training.trainer import Trainer

WEIGHTS = "body.safetensors"
# the task of the repair's texts; its classes mean nothing, and no row has one
TEXT = TaskSpec(name="text", kind="classification", text_a="{text}", labels=("0", "1"))
# endings of files of rows with columns; their lines are not plain text
TABLES = (".tsv", ".csv", ".json", ".jsonl", ".parquet", ".arrow", ".gz")
LOOK_AGAIN_S = 1.0


def repair_folder(config: RunConfig) -> Path:
    """The folder of repaired starts.

    It is `repair.folder`, else SEAD_DIST_REPAIRED, else a folder in the user's cache.
    """
    return cache_place("repaired", "repair.folder=DIR", config.repair.folder)


def repaired_path(config: RunConfig, facts: dict[str, Any]) -> Path:
    """The file of the repaired start with these facts. It may not exist yet."""
    return repair_folder(config) / hash_of(facts)[:32] / WEIGHTS


def check_repair_setting(config: RunConfig, zero_stage: int | None) -> None:
    """Raises UserError for a repair under DeepSpeed's stage 3."""
    if config.repair.text is not None and zero_stage == 3:
        raise UserError(
            f"repair.text={config.repair.text} needs each rank to hold the student whole, and "
            "DeepSpeed's stage 3 splits it; give deepspeed=zero2 or zero1"
        )


def repair_start(
    config: RunConfig,
    world: World,
    model: PreTrainedModel,
    inputs: ModelInputs,
    stop: StopFlag,
    heartbeat: Heartbeat,
    console: bool,
) -> None:
    """Load the repaired body into the student `model`. The repair runs first where none is kept.

    Head and pooler are unchanged. Every rank calls this. console: as for `RunLog`. Raises UserError
    for a text or a teacher that does not fit. Raises StopRequestedError, after a checkpoint is
    saved, where a stop was requested.
    """
    world.set_activity("looking for a repaired start")
    facts = from_main(world, lambda: repair_facts(config))
    path = repaired_path(config, facts)
    folder = path.parent
    with ExitStack() as stack:
        if not from_main(world, path.is_file):
            wait_for_lock(world, folder, stop, heartbeat, stack)
        if from_main(world, path.is_file):
            tell(f"the start was repaired before: {folder}")
        else:
            with RunLog(folder, world.is_main, console) as log:
                repair(config, facts, world, inputs, stop, heartbeat, log)
            tell(f"the start is repaired: {folder}")
    on_every_rank(world, lambda: load_body(model, path))


def wait_for_lock(
    world: World,
    folder: Path,
    stop: StopFlag,
    heartbeat: Heartbeat,
    stack: ExitStack,
) -> None:
    """Wait until no other run repairs the same start, then hold the lock. `stack` frees it.

    Raises StopRequestedError where a stop was requested.
    """
    lock = folder.with_name(f"{folder.name}.lock")

    def attempt() -> bool:
        with ExitStack() as attempted:
            taken = attempted.enter_context(try_lock(lock, "repair.folder"))
            if taken:
                stack.push(attempted.pop_all())  # the lock is held beyond this block
        return taken

    announced = False
    while not from_main(world, attempt):
        if not announced:
            tell(f"waiting for another run, which repairs the same start in {folder}")
            announced = True
        heartbeat.count_progress("waiting for a start that another run repairs")
        if stop.agreed(world):
            raise StopRequestedError(
                "stopped while another run repaired the start; nothing is lost"
            )
        time.sleep(LOOK_AGAIN_S)


def repair(
    config: RunConfig,
    facts: dict[str, Any],
    world: World,
    inputs: ModelInputs,
    stop: StopFlag,
    heartbeat: Heartbeat,
    log: RunLog,
) -> None:
    """Train the start's body, and write it to the folder of `log`.

    Raises StopRequestedError, after a checkpoint is saved, where a stop was requested.
    """
    own, steps = repair_config(config, log.folder), config.repair.steps
    with noted():  # these lines are dropped: the run has logged this start
        student = build_student(
            own.student, TEXT, inputs.tokenizer, own.seed, own.trust_remote_code
        )
    settle(inputs.tokenizer, student.config)
    check_layer_outputs(student, inputs, REPAIR, "the student")
    split = inputs.split(read_text(Path(config.repair.text or "")))
    whole, parts = on_every_rank(world, lambda: load_whole_model(config, inputs, world))
    feature = make_repair_loss(student, parts, steps, own.seed)
    loss = DistillationLoss(
        soft="kl",
        hard=TEXT.task_kind.hard_loss,
        alpha=0.0,
        alpha_end=None,
        total_steps=steps,
        feature=feature,
    )
    identity = Identity(config={}, data="", teachers=[], start=hash_of(facts))
    name = repair_teacher(config).name
    with ExitStack() as stack:
        engine = Engine(student, own, world, steps, feature.rest)
        stack.callback(engine.close)
        checkpointer = Checkpointer(log.folder, identity, world, own.save_total_limit)
        tell(
            f"repairing the start: the hidden states of {name} on {len(split)} texts, {steps} steps"
        )
        state = checkpointer.resume(engine, log, steps)
        trainer = Trainer(
            config=own,
            world=world,
            engine=engine,
            batches=BatchStream(
                split, own.seed, own.global_batch_size, own.micro_batch_size, None, steps,
                world.rank, world.size,
            ),
            source=None,
            teacher_names=[],
            ensemble=None,
            loss=loss,
            checkpointer=checkpointer,
            log=log,
            select=None,
            metric="",
            stop=stop,
            heartbeat=heartbeat,
            feature_teacher=FeatureTeacher(name, whole, parts, feature.theirs, steps),
        )  # fmt: skip
        state = trainer.run(state)
        if not trainer.is_over(state):
            raise StopRequestedError(
                f"stopped at step {state.step} of {steps} of the start's repair, saved; give the "
                "same command again to continue"
            )
        weights = without_projections(engine.weights())
        not_trained = head_names(student) | pooler_names(student)
        body = {name: tensor for name, tensor in weights.items() if name not in not_trained}
        from_main(world, lambda: write_body(log.folder, body, facts))
    losses = [line["loss"] for line in read_metrics(log.folder) if line.get("event") == "train"]
    if losses:
        tell(f"repaired: the squared error went from {losses[0]:.4g} to {losses[-1]:.4g}")


def repair_config(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration of the repair's training.

    Of the run's own keys, only those in `repair_facts`, and those on saving, have an effect.
    """
    return config.model_copy(
        update={
            "output_dir": str(folder),
            "seed": 0,
            "teachers": [],
            "feature_loss": None,
            "num_train_epochs": None,
            "max_steps": config.repair.steps,
            "early_stopping_patience": None,
            "optim": "adamw",
            "learning_rate": None,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "weight_decay": 0.0,  # embeddings of words that the text lacks stay unchanged
            "max_grad_norm": 1.0,
            "final_checkpoint": "last",
            "report_to": None,
        }
    )


def read_text(path: Path) -> ExampleSet:
    """The lines of a plain text file, without blank lines. Raises UserError for another file."""
    if path.suffix in TABLES:
        raise UserError(
            f"repair.text={path} is a file of rows with columns; give a text file, one text a line"
        )
    with reading(path, "give a file in UTF-8, one text a line", f"repair.text={path}"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [{"text": line} for line in lines if line]
    return build_examples(TEXT, rows, "text to repair on", labelled=False)


def load_whole_model(
    config: RunConfig, inputs: ModelInputs, world: World
) -> tuple[PreTrainedModel, LayerParts]:
    """The model whose hidden states are the target, in fp32 and eval mode, and its layers.

    inputs: those of the student. Raises UserError where the model cannot be read, or has other
    inputs than the student.
    """
    checkpoint = repair_teacher(config)
    who = f"repair.teacher={checkpoint.name}"
    tokenizer = load_tokenizer(checkpoint, config.trust_remote_code)
    model, _ = load_start(checkpoint, config.trust_remote_code)
    settle(tokenizer, model.config)
    theirs = teacher_inputs(tokenizer, tokenizer_hash(tokenizer), model.config, inputs.max_length)
    if theirs.tokenizer_hash != inputs.tokenizer_hash:
        raise UserError(
            f"{who} has another tokeniser than the student, and their hidden states are compared "
            "token by token; give a student with its tokeniser"
        )
    if theirs.max_length < inputs.max_length:
        raise UserError(
            f"{who} reads at most {theirs.max_length} tokens, and the student reads "
            f"{inputs.max_length}; give max_length={theirs.max_length}"
        )
    if theirs.padding != inputs.padding:
        raise UserError(
            f"{who} is a {model.config.model_type}, which cannot read rows that are padded on the "
            f"{inputs.padding}; give another model"
        )
    model = frozen(model.float().to(world.device))
    check_layer_outputs(model, theirs, REPAIR, who)
    return model, find_layer_parts(model, who, attention=False)


def write_body(folder: Path, weights: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the body's weights and their facts, then remove the checkpoints. Rank 0 calls this.

    Raises RunError where the files cannot be written.
    """
    try:
        write_json(folder / "repair.json", facts)
        with written_aside(folder / WEIGHTS) as aside:
            save_file({name: t.contiguous().cpu() for name, t in weights.items()}, aside)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the repaired start cannot be written to {folder}: {error}; free space or fix the "
            "folder, then give the same command again"
        ) from error
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def load_body(model: PreTrainedModel, path: Path) -> None:
    """Load the repaired weights into the student. Raises UserError where the file does not fit."""
    with reading(path, f"remove {path.parent}, and it is made again"):
        weights = load_file(path)
        lacking, unknown = model.load_state_dict(weights, strict=False)
    state = model.state_dict(keep_vars=True)
    # a tensor with two names (tied embeddings) may stand in the file under one of them
    loaded = {state[name].data_ptr() for name in weights if name in state}
    missing = set(lacking) - head_names(model) - pooler_names(model)
    missing = {name for name in missing if state[name].data_ptr() not in loaded}
    if missing or unknown:
        problem = f"holds the unknown tensor {unknown[0]}" if unknown else ""
        if missing:
            problem = f"lacks the tensor {min(missing)}"
        raise UserError(
            f"{path} {problem}, so it is not a start of this student; remove {path.parent}, and it "
            "is made again"
        )
