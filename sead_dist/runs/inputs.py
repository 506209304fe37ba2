"""What is quickly told of a run before any long work: its task, method, files and checkpoints."""

from pathlib import Path

from sead_dist.config.load import names_shape
from sead_dist.config.registered import LANGUAGE_MODEL
from sead_dist.config.schema import RunConfig
from sead_dist.data.loading import find_files
from sead_dist.data.task_files import load_task
from sead_dist.errors import UserError
from sead_dist.models.pretrained import locate
from sead_dist.models.start import repair_teacher
from sead_dist.models.student import check_start
from sead_dist.objectives.ensemble import check_method
from sead_dist.runs.finished import refuse_untaught
from sead_dist.teachers.language_model import find_model


def without_teachers_text(config: RunConfig) -> RunConfig:
    """The configuration of a run that asks no teacher without the rows that only a teacher can say
    something of: unlabelled text, and copies without gold labels."""
    if config.taught:
        return config
    text = config.unlabeled.model_copy(update={"path": None, "rest": None, "ratio": None})
    copies = config.augment.copies if config.augment.gold_labels else None
    augment = config.augment.model_copy(update={"copies": copies})
    return config.model_copy(update={"unlabeled": text, "augment": augment})


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
    if config.repair.text is not None:
        repair_teacher(config)
        if not Path(config.repair.text).is_file():
            raise UserError(f"repair.text={config.repair.text} does not exist; give a file")
    for entry in (*config.teachers, *config.encoders):
        if entry.is_model and not names_shape(entry.path):
            locate(entry.path, entry.revision)
        elif entry.kind == LANGUAGE_MODEL:
            find_model(entry.path, entry.revision)
        if entry.predictions is not None and not Path(entry.predictions).exists():
            raise UserError(f"predictions={entry.predictions} does not exist; give a file")
    # a shape without a tokeniser of its own takes a teacher's, which is not looked for here
    if config.student.path is not None or config.student.tokenizer is not None:
        check_start(config.student, config.trust_remote_code)
