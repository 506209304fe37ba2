"""A configuration with what a run would take for its `null` and `auto`, told before the run."""

from typing import Any

from transformers import PreTrainedModel

from sead_dist.config.automatic import learning_rate
from sead_dist.config.schema import RunConfig
from sead_dist.data.augmentation import COPIES_OF_EACH, automatic_copies
from sead_dist.data.splits import RunExamples
from sead_dist.data.task_files import TaskSpec
from sead_dist.runs.choices import with_choices
from sead_dist.runs.encoders import teacher_runs
from sead_dist.runs.finished import refuse_unused_text
from sead_dist.runs.inputs import check_predictions
from sead_dist.runs.own_baseline import MOST_OF_STEPS, OWN, baseline_steps
from sead_dist.runs.quiet import quiet_libraries
from sead_dist.runs.setup import read_inputs
from sead_dist.runtime.distributed import World, on_every_rank
from sead_dist.training.engine import width_of


def resolve_all(config: RunConfig, world: World) -> tuple[RunConfig, list[str]]:
    """(the configuration with every value that is known before the run, lines on its data and on
    what is settled later). Of a fine-tuning the values are those of the first encoder. Every rank
    calls this; nothing is written. Raises UserError as the run would.
    """
    quiet_libraries(world)
    refuse_unused_text(config)
    check_predictions(config)
    one = teacher_runs(config)[0] if config.encoders else config
    notes: list[str] = []
    task, examples, _, model = on_every_rank(world, lambda: read_inputs(one, notes.append))
    found, later = with_values(one, task, examples, model)
    if config.encoders:  # of which each has a folder, a student and a seed
        own = ("output_dir", "student", "seed", "encoders")
        found = found.model_copy(update={name: getattr(config, name) for name in own})
    return found, [*notes, *later]


def with_values(
    config: RunConfig, task: TaskSpec, examples: RunExamples, model: PreTrainedModel
) -> tuple[RunConfig, list[str]]:
    """The configuration with the values that rows and student decide, and a line on each key that
    keeps its `auto`."""
    chosen = with_choices(config, examples)
    later: list[str] = []
    update: dict[str, Any] = {"learning_rate": learning_rate(config, width_of(model))}
    if config.taught and config.loss == "auto":
        update["loss"] = task.task_kind.soft_losses[0]
    if config.unlabeled.rest is None:
        update["unlabeled"] = config.unlabeled.model_copy(update={"rest": config.uses_rest})
    if config.augment.copies == "auto":
        copies = automatic_copies(examples.labelled_rows, examples.transfer_rows)
        if not copies or not config.uses_copies:
            update["augment"] = config.augment.model_copy(update={"copies": None})
        elif not examples.transfer_rows:
            update["augment"] = config.augment.model_copy(update={"copies": COPIES_OF_EACH})
        else:  # which is not so many of each row
            later.append(f"augment.copies=auto: up to {copies} copies in all, beside the text")
    if config.baseline == OWN:
        steps = baseline_steps(config, examples)
        if steps and steps * MOST_OF_STEPS <= (chosen.max_steps or 0):
            later.append(f"baseline=auto: a fine-tuned student of {steps} steps is made first")
        else:
            update["baseline"] = None
    if config.taught and config.placement == "auto":
        later.append("placement=auto is settled at the start, by the memory that is free then")
    return chosen.model_copy(update=update), later
