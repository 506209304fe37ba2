"""What is told of a run without torch: whether it is finished, and text that no teacher answers.

So the command of a finished run, given again, ends in a second or two.
"""

from pathlib import Path

from sead_dist.config.registered import NO_ENSEMBLE
from sead_dist.config.schema import RunConfig
from sead_dist.config.yaml_text import read_yaml
from sead_dist.errors import UserError
from sead_dist.runs.claim import already_finished, drop_training_state
from sead_dist.runtime.run_log import PUSHED


def nothing_to_do(config: RunConfig) -> str | None:
    """What to say where the output folder holds this very run, finished; None where there is work.
    Rank 0 alone calls this.

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
    kept = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    # a kill may have come between its end and this; what was asked for then decides
    if not kept.get("keep_training_state"):
        drop_training_state(config)
    line = f"{run} holds this run, finished: nothing to do. Its model is in {run / 'model'}"
    if not config.push_to_hub or (run / PUSHED).is_file():
        return line
    # it was killed before its upload, or the hub refused it
    from sead_dist.reporting.hub import push_at_end  # heavy, and seldom needed

    return f"{line}; {push_at_end(run, config)}"


def refuse_unused_text(config: RunConfig) -> None:
    """Raises UserError for unlabelled text, or copies without gold labels, in a run that asks no
    teacher: such rows would fill the batches and teach nothing. (`augment.copies=auto` is none.)"""
    if config.taught:
        return
    copies, rest = config.augment.copies, config.unlabeled.rest
    if config.unlabeled.path is not None:
        key, what = f"unlabeled.path={config.unlabeled.path}", "unlabelled rows are learnt"
    elif rest:
        key, what = "unlabeled.rest=true", "unlabelled rows are learnt"
    elif isinstance(copies, int) and not config.augment.gold_labels:
        key, what = f"augment.copies={copies}", "copies without gold labels are learnt"
    else:
        return
    if config.encoders:
        why, fix = "finetune asks none", "and give it to distill"
    elif config.teachers:
        why, fix = f"ensemble={config.ensemble} asks none", "or give another method or ensemble"
    else:
        why, fix = "none are given", "or give teachers=[DIR, ...]"
    name = key.partition("=")[0]
    own = " (augment.gold_labels=true keeps them)" if name == "augment.copies" else ""
    raise UserError(f"{key}: {what} from teachers alone, and {why}; leave {name} out{own}, {fix}")


def refuse_untaught(config: RunConfig) -> None:
    """Raises UserError for `distill` with neither teachers nor a method: it would train on the gold
    labels alone, which nobody asked for."""
    if not config.teachers and config.method is None and config.ensemble != NO_ENSEMBLE:
        raise UserError(
            "teachers is empty, so there is nothing to distil; give teachers=[DIR, ...], or "
            "method=finetune to train the student on the gold labels alone"
        )
