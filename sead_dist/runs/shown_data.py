"""What a run would learn from: its training rows by kind, what was left out, and some of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sead_dist.config.schema import RunConfig
from sead_dist.data.splits import RunExamples, load_examples
from sead_dist.data.task_files import TaskSpec, load_task
from sead_dist.runs.encoders import teacher_runs
from sead_dist.runs.finished import refuse_unused_text
from sead_dist.runs.setup import read_inputs

# what the kinds of `RunExamples.kind` are called; a copy is called by its operation
NAMES = {"labelled": "labelled", "rest": "text: rest of the train file", "text": "text: file"}
# letters of a text that are shown
SHOWN = 160


@dataclass(frozen=True)
class ShownRow:
    kind: str
    label: str
    texts: str


@dataclass(frozen=True)
class ShownData:
    """notes: the lines that a run would say of its data; rows: how many training rows there are of
    each kind; removed: what was left out, by the reason; shown: some rows of every kind."""

    notes: list[str]
    rows: dict[str, int]
    removed: dict[str, int]
    shown: list[ShownRow]


def show_data(config: RunConfig, show: int) -> ShownData:
    """The data of a run, of which `show` rows. The student is loaded where there are copies, and no
    teacher. Of a fine-tuning of several encoders it is the first one's.

    Raises UserError for whatever is wrong with the configuration or the files.
    """
    refuse_unused_text(config)
    if config.encoders:
        config = teacher_runs(config)[0]
    notes: list[str] = []
    if config.uses_copies:
        task, examples, _, _ = read_inputs(config, notes.append)
    else:
        task = load_task(config.task)
        examples = load_examples(config, task, notes.append)
    names = NAMES if examples.labelled_rows else {**NAMES, "rest": "text: train file"}
    found = map(examples.kind, range(len(examples.train)))
    kinds = [names.get(kind, f"copy: {kind}") for kind in found]
    shown = [show_row(task, examples, kinds, index) for index in chosen_rows(kinds, show)]
    removed = {reason: count for reason, count in examples.removed.items() if count}
    return ShownData(notes, dict(Counter(kinds)), removed, shown)


def chosen_rows(kinds: Sequence[str], show: int) -> list[int]:
    """Places of `show` rows, as many of each kind as there can be, evenly spread over it."""
    places: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    taken = dict.fromkeys(places, 0)
    left = min(show, len(kinds))
    while left > 0:
        for kind in [kind for kind in places if taken[kind] < len(places[kind])][:left]:
            taken[kind] += 1
            left -= 1
    return [
        places[kind][at]
        for kind, count in taken.items()
        for at in np.linspace(0, len(places[kind]) - 1, count).round().astype(int).tolist()
    ]


def show_row(task: TaskSpec, examples: RunExamples, kinds: Sequence[str], index: int) -> ShownRow:
    train = examples.train
    first, after = index * train.choices, (index + 1) * train.choices
    texts = [train.texts_a[first], *(train.texts_b or [])[first:after]]
    label = float(train.labels_B[index])
    unlabelled = label != label or (task.task_kind.has_classes and label < 0)
    name = task.labels[int(label)] if task.labels and not unlabelled else f"{label:g}"
    cut = [text if len(text) <= SHOWN else f"{text[:SHOWN]}..." for text in texts]
    return ShownRow(kinds[index], "-" if unlabelled else name, " | ".join(cut))
