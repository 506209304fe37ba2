"""The fine-tuned student that a run compares its ensemble and its student with: a run of its own in
RUN/baseline, made before the teachers are asked, or the run that `baseline` names.
"""

from pathlib import Path

from sead_dist.config.automatic import run_steps
from sead_dist.config.registered import NO_ENSEMBLE
from sead_dist.config.schema import METHOD_KEYS, RunConfig
from sead_dist.config.sections import AugmentConfig
from sead_dist.data.augmentation import rows_asked
from sead_dist.data.order import BatchStream
from sead_dist.data.splits import RunExamples
from sead_dist.objectives.ensemble import asks_selection
from sead_dist.runs.inputs import without_teachers_text
from sead_dist.runtime.run_log import RunLog, is_finished

OWN = "auto"
FOLDER = "baseline"
# a step on gold labels alone takes about half of one with teachers, so that a fifth of the steps
# is a tenth of the time
MOST_OF_STEPS = 5


def baseline_folder(config: RunConfig) -> Path | None:
    """The run folder of the fine-tuned student; None where there is none."""
    if config.baseline != OWN:
        return None if config.baseline is None else Path(config.baseline)
    own = Path(config.output_dir) / FOLDER
    return own if is_finished(own) else None


def own_baseline(config: RunConfig) -> RunConfig:
    """The same student on the same labelled rows without teachers, for as many steps as fine-tuning
    takes by itself."""
    untaught = {key: RunConfig.model_fields[key].get_default() for key in METHOD_KEYS}
    own = without_teachers_text(
        config.model_copy(
            update={
                **untaught,
                "method": "finetune",
                "ensemble": NO_ENSEMBLE,
                "output_dir": str(Path(config.output_dir) / FOLDER),
                "max_steps": None,
                "num_train_epochs": None,
                "early_stopping_patience": None,
                "baseline": None,
                "teacher_column": None,
                "push_to_hub": False,
                "report_to": None,
            }
        )
    )
    if own.augment.copies is None:  # else it would be told that keys of copies are not read
        own = own.model_copy(update={"augment": AugmentConfig(copies=None)})
    return own


def baseline_steps(config: RunConfig, examples: RunExamples) -> int:
    """Steps of the run's own baseline; 0 where none is to be made: another is named, or none is
    wanted, or the rows have no labels, or teachers are not validated."""
    validates = config.validates or asks_selection(config)
    if config.baseline != OWN or not config.taught or not validates:
        return 0
    held = (examples.selection, *examples.official.values())
    if not examples.labelled_rows or not all(part.has_gold for part in held):
        return 0
    own = own_baseline(config)
    labelled = examples.labelled_rows
    return run_steps(own, labelled, rows_asked(own, labelled, 0))


def needs_own_baseline(
    config: RunConfig, examples: RunExamples, batches: BatchStream, log: RunLog
) -> bool:
    """Whether the run's own baseline is to be made; the log says why not."""
    steps = baseline_steps(config, examples)
    if not steps or baseline_folder(config) is not None:
        return False
    if steps * MOST_OF_STEPS > batches.total_steps:
        log.say(
            f"no fine-tuned student to compare with: its {steps} steps are more than a fifth of "
            f"this run's {batches.total_steps} (a tenth of its time); make one by "
            "method=finetune and give baseline=RUN_DIR"
        )
        return False
    return True


def told_baseline(config: RunConfig, examples: RunExamples) -> str:
    """The line of the log before it is made."""
    return (
        f"first a fine-tuned student to compare with: {baseline_steps(config, examples)} steps "
        f"without teachers, in {Path(config.output_dir) / FOLDER} (baseline=null: none)"
    )
