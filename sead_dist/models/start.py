"""The files that a student starts from. They are found and compared without torch."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sead_dist.config.load import config_folder
from sead_dist.config.schema import StudentConfig, TeacherConfig
from sead_dist.errors import UserError, reading
from sead_dist.models.pretrained import (
    TOKENIZER_FILES,
    Checkpoint,
    locate,
    setting_hash,
    weights_hash,
)


def start_hash(
    student: StudentConfig, teachers: Sequence[TeacherConfig], offline: bool = False
) -> str:
    """Of the files that decide the student's weights before the first step, and its tokeniser.
    offline: of a hub id only what was fetched before.

    Raises UserError where they are not there.
    """
    digest = hashlib.sha256(setting_hash(student_tokenizer(student, teachers, offline)).encode())
    if student.shape is not None:
        with reading(shape_file(student.shape), "give a YAML file"):
            digest.update(shape_file(student.shape).read_bytes())
    elif student.path is not None:
        checkpoint = locate(student.path, offline=offline)
        digest.update(f"{weights_hash(checkpoint)} {setting_hash(checkpoint)}".encode())
    return digest.hexdigest()


def student_tokenizer(
    student: StudentConfig, teachers: Sequence[TeacherConfig], offline: bool = False
) -> Checkpoint:
    """Where the student's tokeniser comes from: its own entry, its start, else a teacher."""
    models = [teacher.path for teacher in teachers if teacher.is_model]
    sources = [student.tokenizer, student.path, *models]
    source = next((source for source in sources if source is not None), None)
    if source is None:
        raise UserError(
            "a student of a shape needs a tokeniser; set student.tokenizer=FOLDER, or give teachers"
        )
    return locate(source, marks=TOKENIZER_FILES, offline=offline)


def shape_file(shape: str) -> Path:
    named = config_folder() / "students" / f"{shape}.yaml"
    path = named if named.is_file() else Path(shape)
    if not path.is_file():
        known = sorted(file.stem for file in (config_folder() / "students").glob("*.yaml"))
        raise UserError(f"{shape} is no shape of a model; known: {', '.join(known)}, or a file")
    return path
