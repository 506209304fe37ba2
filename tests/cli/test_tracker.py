"""A tracker follows a run."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard_shows_what_the_log_holds(words, distil, tmp_path):
    run = distil(words(tmp_path / "run", "report_to=tensorboard", "max_steps=10"))
    seen = EventAccumulator(str(run / "tracker"))
    seen.Reload()
    tags = seen.Tags()["scalars"]
    assert {"loss", "loss_soft", "loss_hard", "learning_rate", "selection_accuracy"} <= set(tags)
    assert [point.step for point in seen.Scalars("loss")] == [10]
