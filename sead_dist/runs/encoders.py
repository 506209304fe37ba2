"""Fine-tuning teachers is distillation with no teacher: the runs that `encoders` stand for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sead_dist.config.automatic import PATIENCE
from sead_dist.config.load import names_shape
from sead_dist.config.schema import METHOD_KEYS, RunConfig, StudentConfig, TeacherConfig
from sead_dist.errors import UserError


def teacher_runs(config: RunConfig) -> list[RunConfig]:
    """The run of each encoder: OUTPUT/teacher-0, teacher-1, ... with seeds seed, seed + 1, ...

    Where neither length nor patience is given each trains until it has converged
    (config/automatic.py). Raises UserError for a key of an encoder's entry that only means
    something to a teacher.
    """
    check_encoders(config)
    patience = config.early_stopping_patience
    unsaid = config.num_train_epochs is None and config.max_steps is None
    # the average is of the last steps, which must be known before
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
    """The layers of a student's configuration without what is the student's alone: what it asks of
    teachers (another temperature, the same teachers), the text that only they can label, the
    layers that it takes of its start, and how that is repaired."""
    own = ("method", "teacher_column", "unlabeled", "augment", "repair", *METHOD_KEYS)
    plain = [{key: layer[key] for key in layer if key not in own} for layer in layers]
    return [*plain, {"student": {"layers": None}}]


def check_encoders(config: RunConfig) -> None:
    """Raises UserError for a key of an encoder's entry that only means something to a teacher."""
    for encoder in config.encoders:
        plain = TeacherConfig(path=encoder.path, revision=encoder.revision)
        for key, value in encoder.model_dump().items():
            if value != getattr(plain, key):
                raise UserError(
                    f"encoders: {encoder.path} has {key}={value}, which is a teacher's; an encoder "
                    "has path and revision, and the run's keys say the rest"
                )


def encoder_as_student(encoder: TeacherConfig, student: StudentConfig) -> StudentConfig:
    is_shape = names_shape(encoder.path)
    path = encoder.path if encoder.revision is None else f"{encoder.path}@{encoder.revision}"
    start = {"shape": encoder.path, "path": None} if is_shape else {"path": path, "shape": None}
    return student.model_copy(update=start)
