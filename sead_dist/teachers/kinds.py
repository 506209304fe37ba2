"""Kinds of teacher: what else than a classifier of Transformers answers texts. Language models are
built in; a plugin registers its own.

Shapes: R text rows, K outputs of the teacher for one of them (in its own order), M examples that
are wanted, P examples of a piece, C classes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from sead_dist.config.registered import ADDED, ENDPOINT, LANGUAGE_MODEL, claim_name
from sead_dist.config.schema import TeacherConfig
from sead_dist.data.examples import ExampleSet
from sead_dist.data.task_files import TaskSpec
from sead_dist.errors import RunError, UserError, reading, reason
from sead_dist.models.sequence_classifier import align_classes
from sead_dist.teachers.endpoint import Endpoint
from sead_dist.teachers.inference import NotFiniteError
from sead_dist.teachers.language_model import open_language_model
from sead_dist.teachers.prompts import Opening

# examples that are asked at once, where a teacher does not say another number (`at_once`)
ROWS = 256


class Answers(Protocol):
    """A teacher at work. It must answer a text alike whatever it is asked beside it, in whatever
    order and process (invariant 3).

    fingerprint: a text that is another one wherever an answer may be, such as a hash of the files
    read. labels: the names of its outputs, in its own order; of scores and of choices one name.
    """

    fingerprint: str
    labels: Sequence[str]

    def answer(self, texts_a: list[str], texts_b: list[str] | None) -> np.ndarray:
        """logits_RK (logarithms of probabilities will do), or scores_R1; texts_b: second texts."""
        ...


# open(path, task): the teacher at the `path` of its entry
Opener = Callable[[str, TaskSpec], Answers]
TEACHER_KINDS: dict[str, Opener] = {}
PROMPTED: dict[str, Callable[[Opening], Answers]] = {
    LANGUAGE_MODEL: open_language_model,
    ENDPOINT: Endpoint,
}


def register_teacher(kind: str, open: Opener) -> None:
    """Let a teacher's entry name this kind: {kind: NAME, path: PATH}.

    open(path, task) -> `Answers`; every process of a run calls it, before any long work. Raises
    UserError where the name is taken.
    """
    claim_name("kind of teacher", kind)
    TEACHER_KINDS[kind] = open


def open_answers(opening: Opening) -> tuple[Answers, list[int]]:
    """The teacher of an entry, and order_C: its own output of each task class.

    Raises UserError for a kind that cannot be opened, and for labels that are not the task's.
    """
    entry, name, task = opening.entry, opening.name, opening.task
    with reading(entry.path, f"check its path and its kind {entry.kind}", f"teacher {name}"):
        if entry.kind in PROMPTED:
            answers = PROMPTED[entry.kind](opening)
        else:
            answers = TEACHER_KINDS[entry.kind](entry.path, task)
        fingerprint, labels = answers.fingerprint, list(answers.labels)
    if not isinstance(fingerprint, str) or not fingerprint:
        raise UserError(
            f"teacher {name}: its kind {entry.kind} has the fingerprint {fingerprint!r}; it must "
            "be a text, such as a hash of the files read"
        )
    return answers, align_classes(task, entry.path, labels, entry.class_names)


def fingerprint_of(entry: TeacherConfig, answers: Answers) -> str:
    """Of all that the answers depend on beside the texts."""
    plugin = ADDED.owners["kind of teacher"].get(entry.kind, "")
    facts = [entry.kind, plugin, answers.fingerprint]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def answer_rows(
    answers: Answers,
    name: str,
    examples: ExampleSet,
    classes: int,
    rows_M: np.ndarray,
    done: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    """Own-order logits of these examples, handed to `done(positions in rows_M, logits)` piece by
    piece. Raises RunError where the teacher raises, or gives another shape."""
    choices = examples.choices
    at_once = getattr(answers, "at_once", ROWS)
    for start in range(0, len(rows_M), at_once):
        part_P = np.arange(start, min(start + at_once, len(rows_M)))
        texts = [row * choices + choice for row in rows_M[part_P] for choice in range(choices)]
        texts_a = [examples.texts_a[text] for text in texts]
        texts_b = None if examples.texts_b is None else [examples.texts_b[text] for text in texts]
        found_RK = ask(answers, name, texts_a, texts_b)
        if found_RK.shape != (len(texts), classes // choices):
            raise RunError(
                f"teacher {name} gave {found_RK.shape} for {len(texts)} text rows; expected "
                f"{(len(texts), classes // choices)}; correct its plugin"
            )
        logits_PC = found_RK.reshape(len(part_P), classes)
        bad_P = ~np.isfinite(logits_PC).all(axis=1)
        if bad_P.any():
            raise NotFiniteError(int(part_P[bad_P][0]))
        done(part_P, logits_PC)


def ask(answers: Answers, name: str, texts_a: list[str], texts_b: list[str] | None) -> np.ndarray:
    try:
        return np.asarray(answers.answer(texts_a, texts_b), dtype=np.float32)
    except (UserError, RunError):
        raise
    except Exception as error:
        raise RunError(
            f"teacher {name} cannot answer: {reason(error)}; correct its plugin"
        ) from error
