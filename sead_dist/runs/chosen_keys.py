"""The values of keys that are null or auto, once a run's rows and student are known."""

from collections.abc import Callable

from transformers import PreTrainedModel

from sead_dist.config.automatic import (
    checkpoint_line,
    epoch_steps,
    final_checkpoint,
    learning_rate,
    length_line,
    run_steps,
    scoring_steps,
)
from sead_dist.config.schema import RunConfig
from sead_dist.data.augmentation import run_rows
from sead_dist.data.splits import RunExamples
from sead_dist.data.tasks import TaskSpec
from sead_dist.data.tokens import TokenTable
from sead_dist.runtime.console import clock, counted
from sead_dist.runtime.distributed import World, from_main
from sead_dist.teachers.rates import default_rates, remembered, student_key, this_machine
from sead_dist.training.checkpoint import TrainState
from sead_dist.training.engine import width_of


def with_chosen_keys(config: RunConfig, examples: RunExamples) -> RunConfig:
    """The configuration with the values of max_steps, final_checkpoint and eval_steps filled in."""
    labelled = examples.labelled_rows
    rows = run_rows(config, labelled, examples.unlabelled_rows)
    steps = steps_of(config, examples)
    return config.model_copy(
        update={
            "max_steps": steps,
            "final_checkpoint": final_checkpoint(config, examples.rows_to_choose_by),
            "eval_steps": scoring_steps(config, epoch_steps(config, labelled, rows), steps),
        }
    )


def chosen_key_lines(
    config: RunConfig,
    task: TaskSpec,
    examples: RunExamples,
    tokens: Callable[[], TokenTable],
    model: PreTrainedModel,
    world: World,
) -> list[str]:
    """Lines on the length of the run, its learning rate and the student that is kept.

    tokens: gives the tokens of the training rows. It is called where the time of a step is known.
    """
    labelled = examples.labelled_rows
    rows = run_rows(config, labelled, examples.unlabelled_rows)
    steps = steps_of(config, examples)
    length = length_line(config, labelled, rows)
    step_s = known_step_seconds(config, task, tokens, model, world)
    if step_s is not None:
        about = "about" if config.early_stopping_patience is None else "at most about"
        length += (
            f"; {about} {clock(steps * step_s)} of training, at the rate that `plan` measured here"
        )
    width = width_of(model)
    rate = f"learning_rate={learning_rate(config, width):g}"
    if config.learning_rate is None:
        rate += f" (automatic: the student's width is {width})"
    if config.warmup(steps) >= steps:
        warmup = f"warmup_steps={config.warmup_steps:g}"
        rate += (
            f"; WARNING: it is never reached: {warmup}, and the run has {counted(steps, 'step')}"
        )
    return [length, rate, checkpoint_line(config, examples.rows_to_choose_by, steps)]


def known_step_seconds(
    config: RunConfig,
    task: TaskSpec,
    tokens: Callable[[], TokenTable],
    model: PreTrainedModel,
    world: World,
) -> float | None:
    """Seconds of a step of the student; None where `plan` has not measured it on this machine.

    The estimate takes every row to have the mean length.
    """

    def find() -> float | None:
        key = student_key(model, config, task.kind, this_machine(world.device))
        rate = remembered(default_rates()).get(key)
        if rate is None:
            return None
        micro_batches = -(-config.global_batch_size // (config.micro_batch_size * world.size))
        rows_s = config.micro_batch_size * float(rate.row_s(tokens().lengths_B().mean()))
        return micro_batches * (rows_s + rate.batch_s) + rate.once_s

    return from_main(world, find)


def early_end_line(state: TrainState, most: int, epoch: int) -> str:
    """The line on the end of a run with early_stopping_patience.

    most: the largest number of steps that the run could take. epoch: the steps of one epoch.
    """
    line = f"ended after {state.step} of at most {most} steps ({state.step / epoch:.3g} epochs)"
    if state.lowest_loss is None or state.lowest_step is None:
        return line
    lowest = f"{state.lowest_loss:.4f}, after epoch {state.lowest_step // epoch}"
    if not state.losses_without_fall:
        return f"{line}; the selection loss was still falling: {lowest}"
    since = (state.step - state.lowest_step) / epoch
    return f"{line}; the selection loss has not fallen for {since:.3g} epochs: lowest {lowest}"


def steps_of(config: RunConfig, examples: RunExamples) -> int:
    """Optimiser steps of the run."""
    labelled = examples.labelled_rows
    return run_steps(config, labelled, run_rows(config, labelled, examples.unlabelled_rows))
