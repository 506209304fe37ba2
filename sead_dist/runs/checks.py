"""Checks of a run before any long work.

They find whether the run is finished, and mistakes in its keys, files and checkpoints. The file
also makes the configuration of the run of each encoder.

Only `check_inputs` and `check_checkpoints` need torch. So the command of a finished run, given
again, ends in a second or two.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sead_dist.config.automatic import PATIENCE
from sead_dist.config.load import names_shape, read_method
from sead_dist.config.registered import LANGUAGE_MODEL, NO_ENSEMBLE
from sead_dist.config.schema import METHOD_KEYS, RunConfig, StudentConfig, TeacherConfig
from sead_dist.config.yaml_text import read_run_config
from sead_dist.data.loading import find_files
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.errors import UserError
from sead_dist.models.pretrained import locate
from sead_dist.models.start import repair_teacher
from sead_dist.runs.claim import already_finished, drop_training_state
from sead_dist.runtime.run_log import PROGRESS, PUSHED, is_finished, read_as

_log = logging.getLogger(__name__)


def nothing_to_do(config: RunConfig) -> str | None:
    """The line for a run that is finished already; None where there is work.

    Rank 0 alone calls this. Raises UserError where the output folder holds something else, and
    where `config` is not of a distillation.
    """
    reject_encoders(config)
    reject_unused_text(config)
    if not already_finished(config):
        return None
    run = Path(config.output_dir)
    kept = read_run_config(run) if (run / "config.yaml").is_file() else None
    # The run may have been killed after its end and before it removed its training state. The key
    # `keep_training_state` of that run counts.
    if kept is None or not kept.get("keep_training_state"):
        drop_training_state(config)
    line = f"{run} holds this run, finished: nothing to do. Its model is in {run / 'model'}"
    if not config.push_to_hub or (run / PUSHED).is_file():
        return line
    # the run was killed before its upload, or the hub rejected the upload
    from sead_dist.reporting.hub import push_at_end  # heavy, and seldom needed

    return f"{line}; {push_at_end(run, config)}"


def finished_run(run: Path) -> Path:
    """The folder of a finished run. Raises UserError where there is none, with its state."""
    fix = "expected the folder of a finished run; give the output_dir of one"
    if not run.is_dir():
        raise UserError(f"{run} {'is a file' if run.exists() else 'does not exist'}; {fix}")
    if is_finished(run):
        return run
    if not (run / "run.json").is_file():
        raise UserError(f"{run} holds no run; {fix}")
    done = "no step is done"
    if (run / PROGRESS).is_file():
        noted = read_as(dict[str, Any], run / PROGRESS)
        done = f"it is at step {noted.get('step')} of {noted.get('total')}"
    raise UserError(
        f"the run {run} is not finished: {done}; expected a finished run; repeat the call or the "
        "command that began it"
    )


def reject_encoders(config: RunConfig) -> None:
    """Raises UserError where a distillation has `encoders`, which only a fine-tuning reads."""
    if config.encoders:
        raise UserError(
            "encoders is a key of finetune; give the teachers to distil: teachers=[DIR, ...]"
        )


def reject_unused_text(config: RunConfig) -> None:
    """Raises UserError for unlabelled text, or copies without gold labels, without teachers.

    A student learns nothing from such rows without teachers. `augment.copies=auto` is allowed: it
    makes no copies then.
    """
    if config.taught:
        return
    copies, rest = config.augment.copies, config.unlabeled.rest
    if config.unlabeled.path is not None:
        key, what = f"unlabeled.path={config.unlabeled.path}", "unlabelled rows"
    elif rest:
        key, what = "unlabeled.rest=true", "unlabelled rows"
    elif isinstance(copies, int) and not config.augment.gold_labels:
        key, what = f"augment.copies={copies}", "copies without gold labels"
    else:
        return
    if config.encoders:
        why, fix = "finetune uses none", "and give it to distill"
    elif config.teachers:
        why, fix = f"ensemble={config.ensemble} uses none", "or give another method or ensemble"
    else:
        why, fix = "none are given", "or give teachers=[DIR, ...]"
    name = key.partition("=")[0]
    own = " (augment.gold_labels=true keeps them)" if name == "augment.copies" else ""
    raise UserError(f"{key}: {what} need teachers, and {why}; leave {name} out{own}, {fix}")


def reject_untaught(config: RunConfig) -> None:
    """Raises UserError for `distill` without teachers, where the method needs teachers.

    Such a run would train on the gold labels alone. That needs method=finetune.
    """
    method = {} if config.method is None else read_method(config.method)
    # The run of a teacher has method=finetune, and may keep its students' key `ensemble`. So the
    # method's file counts here, not the key.
    by_labels = method.get("ensemble") == NO_ENSEMBLE
    if not config.teachers and config.uses_teachers and not by_labels:
        raise UserError(
            "teachers is empty, so there is nothing to distil; give teachers=[DIR, ...], or "
            "method=finetune to train the student on the gold labels alone"
        )


def teacher_runs(config: RunConfig) -> list[RunConfig]:
    """The configuration of each encoder's run.

    Their folders are OUTPUT/teacher-0, teacher-1, ..., their seeds seed, seed + 1, ... Where
    neither length nor patience is given, each trains until its selection loss stops falling
    (config/automatic.py). A warning names folds that no teacher leaves out. Raises UserError for a
    key of an encoder's entry that only a teacher has.
    """
    check_encoders(config)
    count, folds = len(config.encoders), config.folds or 0
    if 0 < count < folds:
        left = ", ".join(map(str, range(count, folds)))
        _log.warning(
            "folds=%d, but encoders has %d: every teacher is trained on the rows of fold %s, so no "
            "teacher has unbiased predictions of these rows; give %d encoders",
            folds, count, left, folds,
        )  # fmt: skip
    patience = config.early_stopping_patience
    unsaid = config.num_train_epochs is None and config.max_steps is None
    # the average is over the last steps of the run, so its length must be known from the start
    if patience is None and unsaid and config.final_checkpoint != "average":
        patience = PATIENCE
    return [
        config.model_copy(
            update={
                "student": encoder_as_student(encoder, config.student),
                "method": "finetune",
                "teachers": [],
                "encoders": [],
                "seed": config.seed + index,
                "early_stopping_patience": patience,
                "fold": None if config.folds is None else index % config.folds,
                "output_dir": str(Path(config.output_dir) / f"teacher-{index}"),
            }
        )
        for index, encoder in enumerate(config.encoders)
    ]


def teacher_layers(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers of a student's configuration, without the keys that only the student has.

    These are the keys on its teachers (such as temperature and teachers), on text that only
    teachers can label, on the layers that it takes from its start, and on the repair of its start.
    """
    own = ("method", "teacher_column", "unlabeled", "augment", "repair", *METHOD_KEYS)
    plain = [{key: layer[key] for key in layer if key not in own} for layer in layers]
    return [*plain, {"student": {"layers": None}}]


def check_encoders(config: RunConfig) -> None:
    """Raises UserError for a key of an encoder's entry that only a teacher has."""
    for encoder in config.encoders:
        plain = TeacherConfig(path=encoder.path, revision=encoder.revision)
        for key, value in encoder.model_dump().items():
            if value != getattr(plain, key):
                raise UserError(
                    f"encoders: {encoder.path} has {key}={value}, which is a key of teachers; an "
                    f"encoder has path and revision; leave {key} out"
                )


def encoder_as_student(encoder: TeacherConfig, student: StudentConfig) -> StudentConfig:
    """The student's keys with this encoder as its start."""
    is_shape = names_shape(encoder.path)
    path = encoder.path if encoder.revision is None else f"{encoder.path}@{encoder.revision}"
    start = {"shape": encoder.path, "path": None} if is_shape else {"path": path, "shape": None}
    return student.model_copy(update=start)


def without_teachers_text(config: RunConfig) -> RunConfig:
    """The same configuration; without teachers, also without the rows that only teachers label.

    Such rows are unlabelled text, and copies without gold labels.
    """
    if config.taught:
        return config
    text = config.unlabeled.model_copy(update={"path": None, "rest": None, "ratio": None})
    copies = config.augment.copies if config.augment.gold_labels else None
    augment = config.augment.model_copy(update={"copies": copies})
    return config.model_copy(update={"unlabeled": text, "augment": augment})


def check_inputs(config: RunConfig) -> None:
    """Check task, method, files and checkpoints of a run before it is queued.

    Checkpoints of the hub are fetched, since a node may have no network. Raises UserError.
    """
    from sead_dist.models.student import check_start
    from sead_dist.objectives.ensemble import check_method
    from sead_dist.objectives.losses import check_losses

    task = load_task(config.task)
    check_losses(task.task_kind)
    if not config.encoders:
        reject_untaught(config)
    if config.taught:
        check_method(config, task.task_kind)
    check_files(config, task)
    check_checkpoints(config)
    check_predictions(config)
    # a shape without a tokeniser of its own takes a teacher's tokeniser, which is not checked here
    if config.student.path is not None or config.student.tokenizer is not None:
        check_start(config.student, config.trust_remote_code)


def check_files(config: RunConfig, task: TaskSpec) -> None:
    """Raises UserError for a file of data or of text that does not exist."""
    first_dev = list(task.splits)[1]
    given = {"train": config.data.train, first_dev: config.data.validation}
    for split in task.splits:
        file = given.get(split)
        if file is not None and not Path(file).is_file():
            raise UserError(f"data file {file} does not exist; give an existing file")
        if file is None and config.data.path is not None:
            find_files(task, split, Path(config.data.path))
    if config.unlabeled.path is not None and not Path(config.unlabeled.path).is_file():
        raise UserError(f"unlabeled.path={config.unlabeled.path} does not exist; give a file")
    if config.repair.text is not None:
        repair_teacher(config)
        if not Path(config.repair.text).is_file():
            raise UserError(f"repair.text={config.repair.text} does not exist; give a file")


def check_checkpoints(config: RunConfig) -> None:
    """Fetch the teachers and encoders that are on the hub.

    Raises UserError for a teacher or an encoder whose files are not found.
    """
    from sead_dist.teachers.language_model import find_model

    for entry in (*config.teachers, *config.encoders):
        if entry.is_model and not names_shape(entry.path):
            locate(entry.path, entry.revision, as_teacher=entry in config.teachers)
        elif entry.kind == LANGUAGE_MODEL:
            find_model(entry.path, entry.revision)


def check_predictions(config: RunConfig) -> None:
    """Raises UserError for a file of predictions that does not exist."""
    for entry in config.teachers:
        if entry.predictions is not None and not Path(entry.predictions).exists():
            raise UserError(f"predictions={entry.predictions} does not exist; give a file")
