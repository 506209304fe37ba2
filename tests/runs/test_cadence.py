"""When states are saved where no key says so: small runs are as safe as large ones."""

import shutil
import time

import pytest
from ranks import finish, run_ranks, start
from small import model_bytes, read, records, run_distill, words

from sead_dist.training import checkpoint
from sead_dist.training.checkpoint import SaveClock

STEPS = 14


def given_words(task, root, **changes):
    return words(
        *task, root / "run", root / "store", num_train_epochs=2, final_checkpoint="best", **changes
    )


class Clock:
    """Seconds that the test sets."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def go(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(("save_s", "interval_s"), [(0.25, 60), (1.0, 60), (4.0, 200)])
def test_a_state_is_due_each_minute_or_so_that_saving_takes_two_percent(save_s, interval_s):
    clock = Clock()
    saves = SaveClock(clock)
    clock.go(59)
    assert not saves.due()
    clock.go(1)
    assert saves.due()
    saves.save(lambda: clock.go(save_s))
    clock.go(interval_s - 1)
    assert not saves.due()
    clock.go(1)
    assert saves.due()


def saved_steps(root):
    return sorted(int(p.name[5:]) for p in (root / "run" / "checkpoints").glob("step-*[0-9]"))


def slow_distill(world, given):
    """The recipe, with a pause after each step in which a test can kill it."""
    from sead_dist.training.engine import Engine

    step = Engine.step

    def slow(self):
        time.sleep(0.05)
        return step(self)

    Engine.step = slow
    run_distill(world, given)


def test_invariant_06_a_short_run_killed_with_default_settings_goes_on_from_its_best_student(
    tmp_path, one_teacher
):
    whole, root = tmp_path / "whole", tmp_path / "killed"
    run_ranks(1, whole / "ranks", run_distill, given_words(one_teacher, whole))
    given = given_words(one_teacher, root, learning_rate=1e-3)
    (rank,) = start(1, root / "ranks", slow_distill, given)
    end = time.monotonic() + 60
    while not saved_steps(root) or read(root / "run" / "progress.json")["step"] < 9:
        assert rank.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.001)
    rank.kill()
    rank.join()
    # the first epoch's student is the best so far: its state is there
    assert 7 in saved_steps(root)
    finish(start(1, root / "ranks", run_distill, given), root / "ranks", 60.0)
    assert "resuming at step 7 of 14" in (root / "run" / "log.txt").read_text()
    assert model_bytes(root / "run") == model_bytes(whole / "run")


def test_a_finished_run_keeps_its_model_and_deletes_its_training_states(tmp_path, one_teacher):
    for name, keeps in (("run", False), ("kept", True)):
        key = {"keep_training_state": str(keeps).lower()}
        run_ranks(
            1, tmp_path / name / "r", run_distill, given_words(one_teacher, tmp_path / name, **key)
        )
        run = tmp_path / name / "run"
        assert (run / "model" / "model.safetensors").is_file()
        assert (run / "checkpoints").exists() is keeps
    # as a kill between the run's end and the deletion would leave it
    shutil.copytree(tmp_path / "kept" / "run" / "checkpoints", tmp_path / "run/run/checkpoints")
    given = given_words(one_teacher, tmp_path / "run", keep_training_state="false")
    run_ranks(1, tmp_path / "run" / "r", run_distill, given)
    assert not (tmp_path / "run" / "run" / "checkpoints").exists()


def at_every_step_of_rank_0(world, given, folder):
    """The recipe on a rank whose clock runs fast on rank 0 alone; the steps that were saved."""
    from sead_dist.training.checkpoint import Checkpointer

    if world.is_main:
        checkpoint.SAVE_EVERY_S, checkpoint.SAVE_SHARE = 0.0, 1e9
    saved, save = [], Checkpointer.save

    def note(self, engine, state):
        saved.append(state.step)
        save(self, engine, state)

    Checkpointer.save = note
    run_distill(world, given)
    return saved


def test_invariant_08_rank_0_decides_when_a_state_is_saved_and_the_student_is_the_same(
    tmp_path, one_teacher
):
    plain = given_words(one_teacher, tmp_path / "plain", save_steps=0)
    run_ranks(2, tmp_path / "r", run_distill, plain)
    given = given_words(one_teacher, tmp_path / "often", keep_training_state="true")
    found = run_ranks(2, tmp_path / "r", at_every_step_of_rank_0, given, tmp_path)
    assert found == [list(range(1, STEPS + 1))] * 2
    assert model_bytes(tmp_path / "often" / "run") == model_bytes(tmp_path / "plain" / "run")
    assert [r["step"] for r in records(tmp_path / "often" / "run")] == list(range(1, STEPS + 1))
