"""What `null` and `auto` stand for: length, learning rate and final checkpoint of a run.

They depend on the run's rows and its student's width. The log names each value that was chosen.
"""

from typing import Literal

from sead_dist.config.schema import RunConfig

# a selection split with fewer rows is too small to choose a checkpoint by: at an accuracy of .85
# the standard error of one score is 1.6 points on 500 rows
ENOUGH_TO_CHOOSE = 500
# with teachers: passes over all rows, and bounds of the number of steps (Beyer et al. 2022: be
# patient)
PASSES, LEAST_STEPS, MOST_STEPS = 3, 1500, 30_000
# without teachers: epochs over the labelled rows (Devlin et al. 2019, appendix A.3: two to four),
# and the fewest steps, which count where rows are few (Mosbach et al. 2021)
EPOCHS, LEAST_FINETUNING = 3, 200
# for a teacher, which trains until it converges: the most epochs, and the most epochs without a
# lower selection loss (Prechelt 1998: early stopping, when?)
MOST_EPOCHS, PATIENCE = 10, 2
# most times that a student is scored on the selection split: an epoch over few labelled rows may be
# one or two steps
MOST_SCORES = 50
# the highest learning rate up to each width. Turc et al. 2019 tune students over 1e-4 and 3e-4.
# Devlin et al. 2019 tune BERT over 2e-5, 3e-5 and 5e-5; large models need the lowest of these
RATES = ((256, 3e-4), (384, 1e-4), (768, 5e-5))
RATE_BEYOND = 2e-5


def epoch_steps(config: RunConfig, labelled: int, rows: int) -> int:
    """Steps of one epoch over the labelled rows, or over all rows where none has a label."""
    return -(-(labelled or rows) // config.global_batch_size)


def scoring_steps(config: RunConfig, epoch: int, steps: int) -> int:
    """The number of steps between two scores of the student, in a run of `steps` steps: eval_steps,
    else one epoch of `epoch` steps. Without eval_steps there are at most fifty scores."""
    return config.eval_steps or max(epoch, -(-steps // MOST_SCORES))


def patience_steps(epoch: int) -> int:
    """The number of steps between two decisions whether a run ends early. It is a whole number of
    epochs of `epoch` steps. It is at least a tenth of LEAST_FINETUNING: over fewer steps a loss
    says little."""
    return -(-LEAST_FINETUNING // (MOST_EPOCHS * epoch)) * epoch


def run_steps(config: RunConfig, labelled: int, rows: int) -> int:
    """Optimiser steps of a run with `rows` training rows, `labelled` of them with a label.

    They are max_steps, else num_train_epochs over the labelled rows. Where neither is given, a run
    with teachers takes three passes over all rows, within bounds. A run without teachers takes
    three epochs, and at least 200 steps. With early_stopping_patience it takes at most ten epochs
    instead of three.
    """
    epoch = epoch_steps(config, labelled, rows)
    if config.max_steps is not None:
        return config.max_steps
    if config.num_train_epochs is not None:
        return config.num_train_epochs * epoch
    all_rows = -(-rows // config.global_batch_size)
    if not config.taught:  # these rows may include copies with gold labels
        epochs = EPOCHS if config.early_stopping_patience is None else MOST_EPOCHS
        return max(epochs * all_rows, LEAST_FINETUNING)
    passes = PASSES * all_rows
    return min(max(passes, LEAST_STEPS), MOST_STEPS)


def most_rows_read(config: RunConfig, labelled: int) -> int:
    """The most rows that a run of this configuration can take. Text beyond these is not kept.
    labelled: the number of rows with a label."""
    epochs = config.num_train_epochs or 0
    steps = max(MOST_STEPS, config.max_steps or 0, epochs * epoch_steps(config, labelled, 0))
    return steps * config.global_batch_size


def length_line(config: RunConfig, labelled: int, rows: int) -> str:
    """How long a run is, and why."""
    steps = run_steps(config, labelled, rows)
    patience = config.early_stopping_patience
    if patience is not None:
        epoch = epoch_steps(config, labelled, rows)
        epochs = patience * patience_steps(epoch) // epoch
        passes = "an epoch" if epochs == 1 else f"{epochs} epochs"
        end = f"; it ends earlier if the selection loss has not fallen for {passes}"
        return "at most " + _steps_line(config, labelled, rows, steps) + end
    return _steps_line(config, labelled, rows, steps)


def _steps_line(config: RunConfig, labelled: int, rows: int, steps: int) -> str:
    epochs = config.num_train_epochs
    if config.max_steps is not None:
        other = "" if epochs is None else f"; num_train_epochs={epochs} is not used"
        return f"{steps} steps (max_steps{other})"
    if epochs is not None:
        return f"{steps} steps (num_train_epochs={epochs} over {labelled or rows} labelled rows)"
    if config.early_stopping_patience is not None and not config.taught:
        why = f"at most ten epochs over {rows} labelled rows, or {LEAST_FINETUNING} steps"
    elif not config.taught:
        why = f"three epochs over {rows} labelled rows, at least {LEAST_FINETUNING}"
    else:
        why = f"three passes over {rows} rows, at least {LEAST_STEPS}, at most {MOST_STEPS}"
    return f"{steps} steps (automatic: {why}; num_train_epochs or max_steps change that)"


def learning_rate(config: RunConfig, width: int) -> float:
    """The highest learning rate of a run whose student has hidden states of this width."""
    if config.learning_rate is not None:
        return config.learning_rate
    return next((rate for widest, rate in RATES if width <= widest), RATE_BEYOND)


def averaged_steps(config: RunConfig, total_steps: int) -> int:
    """How many of the last steps the average is taken over."""
    return max(1, round(config.average_share * total_steps))


def final_checkpoint(config: RunConfig, selection_rows: int) -> Literal["best", "last", "average"]:
    """Which student is kept: the one that the key names. `auto` means the best, if the selection
    split has enough rows with labels to choose by, else the average. With early_stopping_patience
    `auto` means the best: the last steps of such a run are not known before it ends."""
    if config.final_checkpoint != "auto":
        return config.final_checkpoint
    if config.early_stopping_patience is not None:
        return "best"
    return "best" if selection_rows >= ENOUGH_TO_CHOOSE else "average"


def checkpoint_line(config: RunConfig, selection_rows: int, total_steps: int) -> str:
    """Which student is kept, and why."""
    kept = final_checkpoint(config, selection_rows)
    what = {
        "best": "the best on the selection split",
        "last": "that of the last step",
        "average": f"the mean of the weights of the last {averaged_steps(config, total_steps)} "
        f"of {total_steps} steps",
    }[kept]
    line = f"final_checkpoint={kept}: the student that is kept is {what}"
    if config.final_checkpoint != "auto":
        return line
    if config.early_stopping_patience is not None:
        why = "with early_stopping_patience the last steps are not known in advance"
        return f"{line} (automatic: {why})"
    if not selection_rows:
        return f"{line} (automatic: the selection split has no gold labels to choose by)"
    enough = "enough" if kept == "best" else "too few"
    return (
        f"{line} (automatic: {selection_rows} selection rows are {enough} to choose by; "
        f"{ENOUGH_TO_CHOOSE} are enough)"
    )
