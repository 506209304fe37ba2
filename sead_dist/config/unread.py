"""Keys that were given and that the run's method does not read."""

from collections.abc import Iterator

from sead_dist.config.load import usual_values
from sead_dist.config.schema import RunConfig

OF_TEACHERS = (
    *("temperature", "alpha", "alpha_end", "loss", "teacher", "teacher_column"),
    *("feature_loss_weight", "feature_stage_ratio"),
)
# ensembles that weight teachers alike, or by what they say of a row
WITHOUT_WEIGHTS = (
    *("single", "mean_logits", "mean_probabilities", "score", "confidence", "entropy", "answers"),
    *("random", "routed", "fitted"),
)


def unread_keys(config: RunConfig) -> list[str]:
    """A line for each key that differs from base.yaml and the method's file, and changes nothing of
    this run."""
    usual = usual_values(config)
    lines = []
    for key, why in _unread(config):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if value != usual.get(key):
            lines.append(f"{key}={value} is not read: {why}")
    named = [entry.name or entry.path for entry in config.teachers if entry.weight != 1.0]
    if named and config.ensemble in WITHOUT_WEIGHTS:
        lines.append(
            f"the weight of teacher {named[0]} is not read: it is for ensemble=fixed, and this run "
            f"has ensemble={config.ensemble}"
        )
    return lines


def _unread(config: RunConfig) -> Iterator[tuple[str, str]]:
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
    if config.ensemble != "single" and config.feature_loss is None:
        yield "teacher", f"it is for ensemble=single or a feature_loss, and {ensemble}"
    if config.ensemble != "routed":
        yield "teacher_column", f"it is for ensemble=routed, and {ensemble}"
    if config.feature_loss is None:
        yield "feature_loss_weight", "there is no feature_loss"
    if config.feature_loss != "tinybert":
        yield "feature_stage_ratio", "it is for feature_loss=tinybert"
    if config.loss == "mse" and config.ensemble in ("single", "mean_logits", "fixed", "score"):
        yield "temperature", "loss=mse compares logits"
