"""What is told of a run without torch: whether it is finished, and text that no teacher answers.

So the command of a finished run, given again, ends in a second or two.
"""

from pathlib import Path

from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError
from sead_dist.runs.claim import already_finished


def nothing_to_do(config: RunConfig) -> str | None:
    """What to say where the output folder holds this very run, finished; None where there is work.
    Reads, never writes.

    Raises UserError where the folder holds something else, or `config` is none of a distillation.
    """
    if config.encoders:
        raise UserError(
            "encoders are for finetune; give the teachers to distil: teachers=[DIR, ...]"
        )
    refuse_unused_text(config)
    if not already_finished(config):
        return None
    run = Path(config.output_dir)
    return f"{run} holds this run, finished: nothing to do. Its model is in {run / 'model'}"


def refuse_unused_text(config: RunConfig) -> None:
    """Raises UserError for unlabelled text in a run that asks no teacher: its rows would fill the
    batches and teach nothing."""
    if config.unlabeled.path is None or config.taught:
        return
    if config.encoders:
        why, fix = "finetune asks none", "and give it to distill"
    elif config.teachers:
        why, fix = f"ensemble={config.ensemble} asks none", "or give another method or ensemble"
    else:
        why, fix = "none are given", "or give teachers=[DIR, ...]"
    raise UserError(
        f"unlabeled.path={config.unlabeled.path}: unlabelled rows are learnt from teachers alone, "
        f"and {why}; leave unlabeled.path out, {fix}"
    )
