"""Keys that were given and that the run's method does not read."""

from collections.abc import Iterator

from sead_dist.config.load import usual_values
from sead_dist.config.registered import BUILT_IN
from sead_dist.config.schema import RunConfig
from sead_dist.objectives.weightings import WEIGHTINGS, Fixed, Routed, Single

OF_TEACHERS = (
    *("temperature", "alpha", "alpha_end", "loss", "teacher", "teacher_column"),
    *("feature_loss_weight", "feature_stage_ratio"),
)


def unread_keys(config: RunConfig) -> list[str]:
    """A line for each key that differs from the default and the method's file, and changes nothing
    of this run."""
    usual = usual_values(config)
    lines = []
    for key, why in _unread(config):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value != usual.get(key):
            lines.append(f"{key}={value} is not read: {why}")
    named = [entry.name or entry.path for entry in config.teachers if entry.weight != 1.0]
    # a plugin's may read them
    built_in = config.taught and config.ensemble in BUILT_IN["ensemble"]
    if named and built_in and not isinstance(WEIGHTINGS[config.ensemble], Fixed):
        lines.append(
            f"the weight of teacher {named[0]} is not read: it is for ensemble=fixed, and this run "
            f"has ensemble={config.ensemble}"
        )
    return lines


def _unread(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.fold is None:
        yield "folds", "it is for finetune, which trains teachers"
    if not config.has_text:
        yield "unlabeled.ratio", "there is no unlabelled text"
    if config.augment.copies is None:
        yield "augment.operations", "augment.copies is null"
        yield "augment.gold_labels", "augment.copies is null"
    if not config.taught:
        for key in OF_TEACHERS:
            yield key, "no teacher is asked"
        return
    ensemble = f"this run has ensemble={config.ensemble}"
    weighting = WEIGHTINGS[config.ensemble]
    if not isinstance(weighting, Single) and config.feature_loss is None:
        yield "teacher", f"it is for ensemble=single or a feature_loss, and {ensemble}"
    if not isinstance(weighting, Routed):
        yield "teacher_column", f"it is for ensemble=routed, and {ensemble}"
    if config.feature_loss is None:
        yield "feature_loss_weight", "there is no feature_loss"
    if config.feature_loss != "tinybert":
        yield "feature_stage_ratio", "it is for feature_loss=tinybert"
    if config.loss in ("mse", "mse_centered") and weighting.of_logits:
        yield "temperature", f"loss={config.loss} compares logits"
