"""What is quickly told of a run before any long work: its task, method, files and checkpoints."""

from pathlib import Path

from sead_dist.config.load import names_shape
from sead_dist.config.schema import RunConfig
from sead_dist.data.loading import find_files
from sead_dist.data.task_files import load_task
from sead_dist.errors import UserError
from sead_dist.models.pretrained import locate
from sead_dist.models.student import check_start
from sead_dist.objectives.ensemble import check_method


def without_teachers_text(config: RunConfig) -> RunConfig:
    """The configuration of a run that asks no teacher without the rows that only a teacher can say
    something of: unlabelled text, and copies without gold labels."""
    if config.taught:
        return config
    text = config.unlabeled.model_copy(update={"path": None, "rest": None, "ratio": None})
    copies = config.augment.copies if config.augment.gold_labels else None
    augment = config.augment.model_copy(update={"copies": copies})
    return config.model_copy(update={"unlabeled": text, "augment": augment})


def refuse_unused_text(config: RunConfig) -> None:
    """Raises UserError for unlabelled text, or copies without gold labels, in a run that asks no
    teacher: such rows would fill the batches and teach nothing. (`augment.copies=auto` is none.)"""
    if config.taught:
        return
    copies, rest = config.augment.copies, config.unlabeled.rest
    if config.unlabeled.path is not None:
        key, what = f"unlabeled.path={config.unlabeled.path}", "unlabelled rows are learnt"
    elif rest:
        key, what = "unlabeled.rest=true", "unlabelled rows are learnt"
    elif isinstance(copies, int) and not config.augment.gold_labels:
        key, what = f"augment.copies={copies}", "copies without gold labels are learnt"
    else:
        return
    if config.encoders:
        why, fix = "finetune asks none", "and give it to distill"
    elif config.teachers:
        why, fix = f"ensemble={config.ensemble} asks none", "or give another method or ensemble"
    else:
        why, fix = "none are given", "or give teachers=[DIR, ...]"
    name = key.partition("=")[0]
    own = " (augment.gold_labels=true keeps them)" if name == "augment.copies" else ""
    raise UserError(f"{key}: {what} from teachers alone, and {why}; leave {name} out{own}, {fix}")


def refuse_untaught(config: RunConfig) -> None:
    """Raises UserError for `distill` with neither teachers nor a method: it would train on the gold
    labels alone, which nobody asked for."""
    if not config.teachers and config.method is None and config.ensemble != "none":
        raise UserError(
            "teachers is empty, so there is nothing to distil; give teachers=[DIR, ...], or "
            "method=finetune to train the student on the gold labels alone"
        )


def check_inputs(config: RunConfig) -> None:
    """What is quickly told of a run before it is queued: task, method, files and checkpoints.
    Checkpoints of the hub are fetched, since a node may have no network. Raises UserError."""
    task = load_task(config.task)
    if not config.encoders:
        refuse_untaught(config)
    if config.taught:
        check_method(config, task.task_kind)
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
    for entry in (*config.teachers, *config.encoders):
        if entry.is_model and not names_shape(entry.path):
            locate(entry.path, entry.revision)
    # a shape without a tokeniser of its own takes a teacher's, which is not looked for here
    if config.student.path is not None or config.student.tokenizer is not None:
        check_start(config.student, config.trust_remote_code)
