"""A tracker follows a run."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard_shows_what_the_log_holds(words, distil, tmp_path):
    run = distil(words(tmp_path / "run", "tracker=tensorboard", "max_steps=10"))
    seen = EventAccumulator(str(run / "tracker"))
    seen.Reload()
    tags = seen.Tags()["scalars"]
    assert {"loss", "loss_soft", "loss_hard", "learning_rate", "selection_accuracy"} <= set(tags)
    assert [point.step for point in seen.Scalars("loss")] == [10]


def test_no_token_of_the_environment_reaches_a_file_of_the_run(
    words, distil, tmp_path, monkeypatch
):
    tokens = {"HF_TOKEN": "hf_abcdefghijklmnop", "WANDB_API_KEY": "0123456789abcdefplainsecret"}
    for name, value in tokens.items():
        monkeypatch.setenv(name, value)
    run = distil(words(tmp_path / "run", "tracker=tensorboard", "max_steps=2"))
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        for value in tokens.values():
            assert value.encode() not in path.read_bytes(), path
