"""The files that a student starts from. They are found and compared without torch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sead_dist.config.load import shipped_files
from sead_dist.config.names import known_names, nearest
from sead_dist.config.rules import INPUT_RULES, ORDER_RULES, REPAIR_RULES, START_RULES
from sead_dist.config.schema import RunConfig, StudentConfig, TeacherConfig
from sead_dist.errors import UserError, reading
from sead_dist.models.pretrained import (
    TOKENIZER_FILES,
    Checkpoint,
    locate,
    setting_hash,
    weights_hash,
)
from sead_dist.runtime.files import files_hash

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def run_start_hash(config: RunConfig, offline: bool = False) -> str:
    """A hash of all that determines a run's start: its files, and how they are repaired. offline,
    errors: as for `start_hash`."""
    start = start_hash(config, offline)
    if config.repair.text is None:
        return start
    facts = repair_facts(config, offline)
    return hashlib.sha256(f"{start} {hash_of(facts)}".encode()).hexdigest()


def repair_facts(config: RunConfig, offline: bool = False) -> dict[str, Any]:
    """The facts that determine a repaired start. The task and the run's seed are not among them.
    offline, errors: as for `start_hash`."""
    text = Path(config.repair.text or "")
    if not text.is_file():
        raise UserError(f"repair.text={text} does not exist; give a file with one text a line")
    teacher = repair_teacher(config, offline)
    return {
        "start": start_hash(config, offline),
        "layers": config.student.layers,
        "teacher": [weights_hash(teacher), setting_hash(teacher)],
        "text": files_hash([text]),
        "steps": config.repair.steps,
        "global_batch_size": config.global_batch_size,
        "micro_batch_size": config.micro_batch_size,
        "max_length": config.max_length,
        "precision": config.precision,
        "rules": [REPAIR_RULES, START_RULES, INPUT_RULES, ORDER_RULES],
    }


def hash_of(facts: dict[str, Any]) -> str:
    """SHA-256 of facts, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def repair_teacher(config: RunConfig, offline: bool = False) -> Checkpoint:
    """The model whose hidden states are the targets when a start is repaired."""
    given = config.repair.teacher or config.student.path
    assert given is not None  # a configuration with neither was rejected
    return locate(given, offline=offline)


def start_hash(config: RunConfig, offline: bool) -> str:
    """A hash of the files that determine the student's weights before the first step, and of its
    tokeniser. offline: take from the hub only what was fetched before.

    Raises UserError where a file is missing.
    """
    student = config.student
    words = setting_hash(student_tokenizer(student, config.teachers, offline))
    digest = hashlib.sha256(words.encode())
    if student.shape is not None:
        with reading(shape_file(student.shape), "give a YAML file"):
            digest.update(shape_file(student.shape).read_bytes())
    elif student.path is not None:
        checkpoint = locate(student.path, offline=offline)
        digest.update(f"{weights_hash(checkpoint)} {setting_hash(checkpoint)}".encode())
    return digest.hexdigest()


def student_tokenizer(
    student: StudentConfig, teachers: Sequence[TeacherConfig] | None, offline: bool = False
) -> Checkpoint:
    """Where the student's tokeniser comes from: student.tokenizer, else the student's start, else
    the first teacher that is a model. teachers: None for a run that can have none, such as an
    encoder's. Raises UserError where there is no such place."""
    models = [teacher.path for teacher in teachers or () if teacher.is_model]
    sources = [student.tokenizer, student.path, *models]
    source = next((source for source in sources if source is not None), None)
    if source is None and teachers is None:
        raise UserError(
            f"{student.shape} is a shape, which has no tokeniser; set student.tokenizer=DIR, a "
            "folder or hub id that has one"
        )
    if source is None:
        raise UserError(
            "a student of a shape needs a tokeniser; set student.tokenizer=FOLDER, or give "
            + ("a teacher that is a model" if teachers else "teachers")
            + (
                " (a file of predictions has no tokeniser)"
                if any(teacher.predictions is not None for teacher in teachers or ())
                else ""
            )
        )
    as_teacher = source not in (student.tokenizer, student.path)
    return locate(source, marks=TOKENIZER_FILES, offline=offline, as_teacher=as_teacher)


def shape_file(shape: str) -> Path:
    """The YAML file of a shape: a shipped one by name, or one by path. Raises UserError where there
    is none."""
    known = shipped_files("students")
    path = known.get(shape, Path(shape))
    if not path.is_file():
        if shape.endswith((".yaml", ".yml")):
            raise UserError(
                f"student.shape: the file {shape} does not exist; give a YAML file, or one of "
                f"{', '.join(known)}"
            )
        # L6-H256 lacks the heads
        meant = next((one for one in known if one.startswith(shape)), shape)
        raise UserError(
            f"student.shape={shape} is neither a shipped shape nor a YAML file"
            f"{known_names(meant, known)}"
        )
    return path


def misspelt_field(config: "PretrainedConfig", fields: Mapping[str, Any]) -> str | None:
    """An error message for the first field that seems misspelt: the config lacks it, and has one of
    nearly the same name. None where there is no such field. Other unknown fields pass: a model may
    read what its config does not name (position_buckets of DeBERTa), and old files have fields that
    are no longer read."""
    known = type(config)().to_dict()
    for name in fields:
        near = None if hasattr(type(config)(), name) else nearest(name, known)
        if near is not None and near not in fields:
            kind = config.model_type
            return f"unknown field {name!r} of a {kind}; did you mean {near!r}?"
    return None
