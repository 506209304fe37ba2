"""A file of predictions as a teacher: which examples of a run it answers, and what it says of them.

Shapes: U unique examples of a split, K answers, C classes (in task order), B rows.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sead_dist.config.schema import TeacherConfig
from sead_dist.data.examples import ExampleSet, subset
from sead_dist.data.prediction_file import Key, id_of, read_prediction_file, text_keys
from sead_dist.data.splits import RunExamples
from sead_dist.data.task_files import TaskSpec
from sead_dist.errors import UserError

# letters of a text that is shown
SHOWN = 60


@dataclass(frozen=True)
class FileAnswers:
    """fingerprint: of the map from example to values, whatever the file's form and order. place_of:
    the row of values_KC of each example, by its id. labels: of the task, in its order. told: lines
    on what was found of what."""

    fingerprint: str
    labels: Sequence[str]
    place_of: dict[bytes, int]
    values_KC: np.ndarray
    told: list[str]

    def places(self, ids_U2: np.ndarray) -> np.ndarray:
        """The row of values_KC of each example, place_U; -1 where there is no answer."""
        whole_U2 = np.ascontiguousarray(ids_U2, np.int64)
        found = [self.place_of.get(id_2.tobytes(), -1) for id_2 in whole_U2]
        return np.array(found, np.int64)


def open_file(
    entry: TeacherConfig, name: str, task: TaskSpec, examples: RunExamples
) -> FileAnswers:
    """What the file of an entry answers of a run's rows. Raises UserError for what is no file of
    predictions for the task, and for one that answers no training row."""
    file = read_prediction_file(entry, name, task)
    place_of_key = {key: place for place, key in enumerate(file.keys)}
    place_of: dict[bytes, int] = {}
    met = np.zeros(len(file.keys), bool)
    counts: list[str] = []
    without: str | None = None
    parts = parts_of(examples)
    for part in parts:
        answered = 0
        keys: Iterable[Key] = map(id_of, part.ids_B2) if file.by_id else text_keys(part)
        for at, (key, id_2) in enumerate(zip(keys, part.ids_B2, strict=True)):
            place = place_of_key.get(key)
            if place is None:
                without = without or f"{part.split} row {part.rows_B[at] + 1}, {shown(part, at)}"
                continue
            place_of[np.ascontiguousarray(id_2, np.int64).tobytes()] = place
            met[place] = True
            answered += 1
        counts.append(f"{answered} of {len(part)} {part.split} rows")
    told = [f"teacher {name}: {entry.path} answers {', '.join(counts)}"]
    if without is not None:
        told[0] += f"; it has no answer to {without}"
    if not met.all():
        place = int(np.flatnonzero(~met)[0])
        told.append(
            f"teacher {name}: {int((~met).sum())} answers of {entry.path} are of no row of this "
            f"run, the first in row {file.rows_K[place]}, {key_shown(file.keys[place])}"
        )
    told += [f"teacher {name}: {entry.path}: {note}" for note in file.notes]
    if not met.any():
        first = key_shown(id_of(parts[0].ids_B2[0])) if file.by_id else shown(parts[0], 0)
        raise UserError(
            f"teacher {name}: {entry.path} answers none of this run's rows; its row "
            f"{file.rows_K[0]} is {key_shown(file.keys[0])}, and the run's first is "
            f"{first}; check that both are of one task and form"
        )
    labels = task.task_kind.outputs(task) if task.task_kind.head_of_labels else ("score",)
    return FileAnswers(hash_of(place_of, file.values_KC), labels, place_of, file.values_KC, told)


def parts_of(examples: RunExamples) -> list[ExampleSet]:
    """The splits that a file may answer: all rows but copies."""
    train = examples.train
    if examples.copied:
        train = subset(train, np.arange(len(train) - len(examples.copied)))
    return [train, examples.selection, *examples.official.values()]


def shown(part: ExampleSet, at: int) -> str:
    return repr(part.texts_a[at * part.choices][:SHOWN])


def key_shown(key: Key) -> str:
    return f"the id {key}" if isinstance(key, str) else repr(key[0][:SHOWN])


def hash_of(place_of: dict[bytes, int], values_KC: np.ndarray) -> str:
    digest = hashlib.sha256(b"predictions 1")
    for id_ in sorted(place_of):
        digest.update(id_)
        digest.update(values_KC[place_of[id_]].astype("<f4").tobytes())
    return digest.hexdigest()
