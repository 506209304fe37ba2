"""Teachers that are trained until their selection loss has not fallen for two epochs."""

import shutil

import pytest
from small import ALONE, model_bytes, read, records, words

from sead_dist.config.load import load_config
from sead_dist.errors import UserError
from sead_dist.runs.checks import teacher_runs
from sead_dist.runs.distillation import distill, finetune

KEYS = {"teacher_validation": "on", "save_steps": 1, "keep_training_state": "true"}


def finetune_words(task, output, *more, **changes) -> list[str]:
    given = words(task, [], output, **{**KEYS, **changes})
    return [*given, f"encoders=[{task / 'student.yaml'}]", *more]


@pytest.fixture(scope="module")
def ended(tiny_data, tmp_path_factory):
    """A teacher that ends before its thirty epochs of 7 steps, of which three count as one: it
    learns too quickly."""
    given = finetune_words(
        tiny_data, tmp_path_factory.mktemp("t") / "teachers", "early_stopping_patience=2",
        num_train_epochs=30, learning_rate=3e-2, save_total_limit=1000,
    )  # fmt: skip
    return finetune(load_config(given), ALONE)[0]


def test_a_teacher_ends_once_its_selection_loss_has_not_fallen_for_two_epochs(ended):
    done = read(ended / "run_summary.json")
    losses = {line["step"]: line["loss"] for line in records(ended, "eval")}
    losses = {step: loss for step, loss in losses.items() if step % 21 == 0}
    lowest = min(losses, key=lambda step: (losses[step], step))
    assert done["steps"] < 210
    assert (done["steps"], done["lowest_step"]) == (lowest + 2 * 21, lowest)
    said = (ended / "log.txt").read_text()
    assert f"ended after {done['steps']} of at most 210 steps" in said
    assert f"for 6 epochs: lowest {losses[lowest]:.4f}, after epoch {lowest // 7}" in said
    assert "final_checkpoint=best" in said


@pytest.mark.parametrize("from_epoch_end", [True, False])
def test_a_killed_teacher_ends_at_the_same_epoch_with_the_same_weights(
    ended, tmp_path, from_epoch_end
):
    teachers = tmp_path / "teachers"
    shutil.copytree(ended.parent, teachers)
    run = teachers / "teacher-0"
    end = read(ended / "run_summary.json")["steps"]
    kept = end - 21 if from_epoch_end else end - 3
    (run / "run_summary.json").unlink()
    shutil.rmtree(run / "model")
    for folder in (run / "checkpoints").glob("*-*"):
        if int(folder.name.partition("-")[2]) > kept:
            shutil.rmtree(folder)
    distill(load_config([str(ended / "config.yaml"), f"output_dir={run}"]), ALONE)
    assert read(run / "run_summary.json")["steps"] == end
    assert model_bytes(run) == model_bytes(ended)


def test_only_a_teacher_whose_length_is_not_given_trains_until_it_has_converged():
    base = ["task=sst2", "output_dir=o", "encoders=[a,b]"]

    def patience(*more):
        return [one.early_stopping_patience for one in teacher_runs(load_config([*base, *more]))]

    assert patience() == [2, 2]
    assert patience("early_stopping_patience=3") == [3, 3]
    for length in ("num_train_epochs=4", "max_steps=100", "final_checkpoint=average"):
        assert patience(length) == [None, None]
    assert patience("num_train_epochs=4", "early_stopping_patience=1") == [1, 1]


def test_folds_that_no_teacher_leaves_out_are_told(caplog):
    given = ["task=sst2", "output_dir=o", "folds=3"]
    for encoders, told in (
        ("[a]", "of fold 1, 2, so"),
        ("[a,b]", "of fold 2, so"),
        ("[a,b,c]", ""),
    ):
        caplog.clear()
        teacher_runs(load_config([*given, f"encoders={encoders}"]))
        assert told in caplog.text
        assert bool(caplog.records) == bool(told)


def test_an_average_of_steps_that_are_not_known_is_refused():
    with pytest.raises(UserError, match="early_stopping_patience=2 these are not known in advance"):
        load_config(
            ["task=sst2", "output_dir=o", "early_stopping_patience=2", "final_checkpoint=average"]
        )
