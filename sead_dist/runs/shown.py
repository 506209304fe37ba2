"""What is shown of a run before it starts: values of null and auto keys, and training rows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from sead_dist.config.automatic import learning_rate
from sead_dist.config.schema import RunConfig
from sead_dist.data.augmentation import COPIES_OF_EACH, automatic_copies
from sead_dist.data.splits import RunExamples, load_examples
from sead_dist.data.tasks import TaskSpec, load_task
from sead_dist.runs.baseline import MOST_OF_STEPS, OWN, baseline_steps
from sead_dist.runs.checked_run import read_inputs
from sead_dist.runs.checks import (
    check_predictions,
    reject_untaught,
    reject_unused_text,
    teacher_runs,
)
from sead_dist.runs.chosen_keys import chosen_key_lines, with_chosen_keys
from sead_dist.runtime.distributed import World, on_every_rank
from sead_dist.runtime.run_log import noted
from sead_dist.runtime.surroundings import quiet_libraries
from sead_dist.training.engine import width_of


def resolve_all(config: RunConfig, world: World) -> tuple[RunConfig, list[str]]:
    """(the configuration with every value that is known before the run, lines to show with it).

    The lines are on the data, on values that are chosen later, and on the run's length. For a
    fine-tuning the values are those of the first encoder. Every rank calls this. Nothing is
    written. Raises UserError as the run does.
    """
    quiet_libraries(world)
    if not config.encoders:
        reject_untaught(config)
    reject_unused_text(config)
    check_predictions(config)
    one = teacher_runs(config)[0] if config.encoders else config
    with noted() as notes:
        task, examples, inputs, model = on_every_rank(world, lambda: read_inputs(one))
    found, later = with_values(one, task, examples, model)
    later += chosen_key_lines(
        one, task, examples, lambda: inputs.tokens(examples.train), model, world
    )
    if config.encoders:  # each encoder has a folder, a student and a seed of its own
        own = ("output_dir", "student", "seed", "encoders")
        found = found.model_copy(update={name: getattr(config, name) for name in own})
    return found, [*notes, *later]


def with_values(
    config: RunConfig, task: TaskSpec, examples: RunExamples, model: PreTrainedModel
) -> tuple[RunConfig, list[str]]:
    """(the configuration with the values that depend on rows and student, lines).

    There is a line on each key that stays auto.
    """
    chosen = with_chosen_keys(config, examples)
    later: list[str] = []
    update: dict[str, Any] = {"learning_rate": learning_rate(config, width_of(model))}
    if config.taught and config.loss == "auto":
        update["loss"] = task.task_kind.soft_losses[0]
    if config.unlabeled.rest is None:
        update["unlabeled"] = config.unlabeled.model_copy(update={"rest": config.uses_rest})
    if config.augment.copies == "auto":
        copies = automatic_copies(examples.labelled_rows, examples.unlabelled_rows)
        if not copies or not config.uses_copies:
            update["augment"] = config.augment.model_copy(update={"copies": None})
        elif not examples.unlabelled_rows:
            update["augment"] = config.augment.model_copy(update={"copies": COPIES_OF_EACH})
        else:  # no value of the key stands for a number of copies in all
            later.append(f"augment.copies=auto: up to {copies} copies in all, beside the text")
    if config.baseline == OWN:
        steps = baseline_steps(config, examples)
        if steps and steps * MOST_OF_STEPS <= (chosen.max_steps or 0):
            later.append(f"baseline=auto: a fine-tuned student of {steps} steps is made first")
        else:
            update["baseline"] = None
    if config.taught and config.placement == "auto":
        later.append(
            "placement=auto: the placement is chosen at the start, by the memory that is free then"
        )
    return chosen.model_copy(update=update), later


# names of the kinds of `RunExamples.kind`; the name of a copy is its operation
NAMES = {"labelled": "labelled", "rest": "text: rest of the train file", "text": "text: file"}
# the number of characters of a text that are shown
SHOWN = 160


@dataclass(frozen=True)
class ShownRow:
    """A training row to show: its kind, the name of its label ("-" for none), and its texts."""

    kind: str
    label: str
    texts: str


@dataclass(frozen=True)
class ShownData:
    """What `show_data` shows of a run's data.

    notes: the lines that a run logs about its data. rows: the number of training rows of each kind.
    removed: the number of rows left out, by reason. shown: some rows of each kind.
    """

    notes: list[str]
    rows: dict[str, int]
    removed: dict[str, int]
    shown: list[ShownRow]


def show_data(config: RunConfig, show: int) -> ShownData:
    """The data of a run, with `show` of its training rows.

    No teacher is loaded. The student is loaded where the run uses copies. For a fine-tuning the
    data are those of the first encoder. Raises UserError for a mistake in the configuration or the
    files.
    """
    reject_unused_text(config)
    if config.encoders:
        config = teacher_runs(config)[0]
    with noted() as notes:
        if config.uses_copies:
            task, examples, _, _ = read_inputs(config)
        else:
            task = load_task(config.task)
            examples = load_examples(config, task)
    names = NAMES if examples.labelled_rows else {**NAMES, "rest": "text: train file"}
    found = map(examples.kind, range(len(examples.train)))
    kinds = [names.get(kind, f"copy: {kind}") for kind in found]
    shown = [show_row(task, examples, kinds, index) for index in chosen_rows(kinds, show)]
    removed = {reason: count for reason, count in examples.removed.items() if count}
    return ShownData(notes, dict(Counter(kinds)), removed, shown)


def chosen_rows(kinds: Sequence[str], show: int) -> list[int]:
    """Indices of `show` rows, shared equally among the kinds and spread evenly over each kind."""
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
    """The row at `index` of the training split, with its texts cut to SHOWN characters."""
    train = examples.train
    first, after = index * train.choices, (index + 1) * train.choices
    texts = [train.texts_a[first], *(train.texts_b or [])[first:after]]
    label = float(train.labels_B[index])
    unlabelled = label != label or (task.task_kind.has_classes and label < 0)
    name = task.labels[int(label)] if task.labels and not unlabelled else f"{label:g}"
    cut = [text if len(text) <= SHOWN else f"{text[:SHOWN]}..." for text in texts]
    return ShownRow(kinds[index], "-" if unlabelled else name, " | ".join(cut))
