"""A tracker follows a run."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sead_dist.runtime.run_log import read_metrics


def test_tensorboard_shows_what_the_log_holds(words, distil, tmp_path):
    run = distil(words(tmp_path / "run", "report_to=tensorboard", "max_steps=10"))
    seen = EventAccumulator(str(run / "tracker"))
    seen.Reload()
    tags = seen.Tags()["scalars"]
    assert {"loss", "loss_soft", "loss_hard", "learning_rate", "selection_accuracy"} <= set(tags)
    assert [point.step for point in seen.Scalars("loss")] == [10]


def test_tensorboard_shows_the_feature_loss_that_the_log_holds(words, distil, tmp_path):
    keys = ("report_to=tensorboard", "max_steps=2", "method=minilm", "teacher=a")
    run = distil(words(tmp_path / "run", *keys))
    seen = EventAccumulator(str(run / "tracker"))
    seen.Reload()
    logged = [line["loss_feature"] for line in read_metrics(run) if line["event"] == "train"]
    assert logged[-1] > 0
    assert [point.value for point in seen.Scalars("loss_feature")] == pytest.approx(logged)
