"""Kinds of teacher that are not classifiers of Transformers.

Language models and files of predictions are built in. A plugin registers its own kind.

Shapes: R text rows, K outputs of the teacher for one of them (in its own order) or rows of a
file, U unique examples of a split, M examples that are wanted, P examples of a piece, B rows, C
classes (of a file's predictions in task order).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sead_dist.config.registered import ADDED, ENDPOINT, LANGUAGE_MODEL, take_name
from sead_dist.config.schema import TeacherConfig
from sead_dist.data.examples import ExampleSet, has_label, subset
from sead_dist.data.prediction_file import Key, id_of, read_prediction_file, text_keys
from sead_dist.data.splits import RunExamples
from sead_dist.data.tasks import TaskSpec
from sead_dist.errors import RunError, UserError, lacks_memory, reading, reason
from sead_dist.models.sequence_classifier import align_classes
from sead_dist.runtime.console import counted
from sead_dist.teachers.endpoint import Endpoint
from sead_dist.teachers.inference import NotFiniteError
from sead_dist.teachers.language_model import open_language_model
from sead_dist.teachers.prompts import Opening

# examples in one call, unless a teacher gives another number (`at_once`)
ROWS = 256


class Answers(Protocol):
    """A loaded teacher that is not a classifier.

    Its logits of a text must not depend on the other texts of the call, on the order of calls or on
    the process (invariant 3).

    fingerprint: a text that differs wherever a prediction may differ, such as a hash of the files
    read. labels: the names of its outputs, in its own order; one name for scores and for choices.
    """

    fingerprint: str
    labels: Sequence[str]

    def answer(self, texts_a: list[str], texts_b: list[str] | None) -> np.ndarray:
        """The logits_RK (logarithms of probabilities are allowed), or scores_R1.

        texts_a: the first texts. texts_b: the second texts, None for tasks with one text.
        """
        ...


# open(path, task): the teacher at the `path` of its entry
Opener = Callable[[str, TaskSpec], Answers]
TEACHER_KINDS: dict[str, Opener] = {}
PROMPTED: dict[str, Callable[[Opening], Answers]] = {
    LANGUAGE_MODEL: open_language_model,
    ENDPOINT: Endpoint,
}


def register_teacher(kind: str, open: Opener) -> None:
    """Allow this kind in a teacher's entry: {kind: NAME, path: PATH}.

    open: called as open(path, task), gives `Answers`. Every process of a run calls it before any
    long work. Raises UserError where the name is taken.
    """
    take_name("kind of teacher", kind, open, Callable, "a function of path and task")
    TEACHER_KINDS[kind] = open


def open_answers(opening: Opening) -> tuple[Answers, list[int]]:
    """The teacher of an entry, and order_C: its own output for each class of the task.

    Raises UserError for a teacher that cannot be opened, and for labels that are not the task's.
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
    """A hash of all that the predictions depend on besides the texts."""
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
    """Get the own-order logits of these examples, piece by piece.

    Each piece is passed to `done(positions in rows_M, logits)`. Raises RunError where the teacher
    raises an error or gives another shape, and NotFiniteError for logits that are NaN or infinite.
    """
    choices = examples.choices
    at_once = getattr(answers, "at_once", ROWS)
    for start in range(0, len(rows_M), at_once):
        part_P = np.arange(start, min(start + at_once, len(rows_M)))
        texts = [row * choices + choice for row in rows_M[part_P] for choice in range(choices)]
        texts_a = [examples.texts_a[text] for text in texts]
        texts_b = None if examples.texts_b is None else [examples.texts_b[text] for text in texts]
        found_RK = call_teacher(answers, name, texts_a, texts_b)
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


def call_teacher(
    answers: Answers, name: str, texts_a: list[str], texts_b: list[str] | None
) -> np.ndarray:
    """The logits_RK of a teacher, float32. Raises RunError where its code fails, and passes on
    its UserError and RunError."""
    try:
        return np.asarray(answers.answer(texts_a, texts_b), dtype=np.float32)
    except (UserError, RunError):
        raise
    except Exception as error:
        machine = "use a machine with more memory"
        fix = machine if lacks_memory(error) else "correct its plugin"
        raise RunError(f"teacher {name} gave no logits: {reason(error)}; {fix}") from error


# letters of a text in a message
SHOWN = 60
# where at least so many predictions all equal the gold labels, chance is an unlikely reason
TELLING = 10


@dataclass(frozen=True)
class FileAnswers:
    """The predictions of a run's rows that a file holds.

    fingerprint: of the map from example to values, whatever the file's form and order. labels: the
    task's, in its order. place_of: from the id of an example to its row of values_KC. lines: of
    the log, on how many rows it predicts. remarks: warnings that are repeated at the end of the
    run.
    """

    fingerprint: str
    labels: Sequence[str]
    place_of: dict[bytes, int]
    values_KC: np.ndarray
    lines: list[str]
    remarks: list[str]

    def places(self, ids_U2: np.ndarray) -> np.ndarray:
        """The row of values_KC of each example, place_U; -1 where there is no prediction."""
        whole_U2 = np.ascontiguousarray(ids_U2, np.int64)
        found = [self.place_of.get(id_2.tobytes(), -1) for id_2 in whole_U2]
        return np.array(found, np.int64)


def open_file(
    entry: TeacherConfig, name: str, task: TaskSpec, examples: RunExamples, own: Sequence[Path]
) -> FileAnswers:
    """The predictions of a run's rows in an entry's file. own: the files that these rows were read
    from.

    Raises UserError for a file that does not hold predictions for the task, and for one without a
    prediction of any row of the run. Raises it for the run's own file too, where its predictions
    are the gold labels and its column was not named.
    """
    file = read_prediction_file(entry, name, task)
    place_of_key = {key: place for place, key in enumerate(file.keys)}
    place_of: dict[bytes, int] = {}
    met = np.zeros(len(file.keys), bool)
    counts: list[str] = []
    without: str | None = None
    parts = _parts_of(examples)
    for part in parts:
        answered = 0
        keys: Iterable[Key] = map(id_of, part.ids_B2) if file.by_id else text_keys(part)
        for at, (key, id_2) in enumerate(zip(keys, part.ids_B2, strict=True)):
            place = place_of_key.get(key)
            if place is None:
                without = without or f"{part.split} row {part.rows_B[at] + 1}, {_shown(part, at)}"
                continue
            place_of[np.ascontiguousarray(id_2, np.int64).tobytes()] = place
            met[place] = True
            answered += 1
        counts.append(f"{answered} of {len(part)} {part.split} rows")
    lines = [f"teacher {name}: {entry.path} has predictions of {', '.join(counts)}"]
    if without is not None:
        lines[0] += f"; the first row without one is {without}"
    if not met.all():
        place = int(np.flatnonzero(~met)[0])
        lines.append(
            f"teacher {name}: {counted(int((~met).sum()), 'prediction')} in {entry.path} without a "
            f"row in this run; the first is in row {file.rows_K[place]}, "
            f"{_key_shown(file.keys[place])}"
        )
    lines += [f"teacher {name}: {entry.path}: {note}" for note in file.notes]
    if not met.any():
        first = _key_shown(id_of(parts[0].ids_B2[0])) if file.by_id else _shown(parts[0], 0)
        raise UserError(
            f"teacher {name}: {entry.path} has no prediction of any row of this run; its row "
            f"{file.rows_K[0]} is {_key_shown(file.keys[0])}, and the run's first is "
            f"{first}; give a file for this task, with the ids or texts of these rows"
        )
    labels = task.task_kind.outputs(task) if task.task_kind.head_of_labels else ("score",)
    fingerprint = _hash_of(place_of, file.values_KC)
    answers = FileAnswers(fingerprint, labels, place_of, file.values_KC, lines, [])
    gold = count_gold_rows(answers, task, parts)
    what = f"teacher {name} has the gold label as its prediction in all {gold} rows that have one"
    fix = "name the column of its own predictions with column"
    if gold and entry.column is None and Path(entry.path).resolve() in own:
        raise UserError(f"{what}: {entry.path} is the file of these rows; {fix}, or leave it out")
    if gold >= TELLING:
        answers.remarks.append(f"{what}: a file of gold labels teaches nothing more; {fix}")
    return answers


def count_gold_rows(answers: FileAnswers, task: TaskSpec, parts: Iterable[ExampleSet]) -> int:
    """How many rows with a gold label a file predicts, if every prediction is this label and all of
    them have one certainty; else 0."""
    values_KC, rows = answers.values_KC, 0
    if task.task_kind.has_classes and np.ptp(np.sort(values_KC, axis=1), axis=0).any():
        return 0
    for part in parts:
        place_B = answers.places(part.ids_B2)
        gold_B = has_label(part.labels_B) & (place_B >= 0)
        said_BC = values_KC[place_B[gold_B]]
        said_B = said_BC.argmax(1) if task.task_kind.has_classes else said_BC[:, 0]
        if not np.allclose(said_B, part.labels_B[gold_B]):
            return 0
        rows += len(said_B)
    return rows


def _parts_of(examples: RunExamples) -> list[ExampleSet]:
    """The splits that a file may predict: all rows without copies."""
    train = examples.train
    if examples.copied:
        train = subset(train, np.arange(len(train) - len(examples.copied)))
    return [train, examples.selection, *examples.official.values()]


def _shown(part: ExampleSet, at: int) -> str:
    return repr(part.texts_a[at * part.choices][:SHOWN])


def _key_shown(key: Key) -> str:
    return f"the id {key}" if isinstance(key, str) else repr(key[0][:SHOWN])


def _hash_of(place_of: dict[bytes, int], values_KC: np.ndarray) -> str:
    digest = hashlib.sha256(b"predictions 1")
    for id_ in sorted(place_of):
        digest.update(id_)
        digest.update(values_KC[place_of[id_]].astype("<f4").tobytes())
    return digest.hexdigest()
