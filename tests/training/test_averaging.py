"""The mean of the student's weights over the last steps, and which student is kept."""

import pytest
import torch
from safetensors.torch import load_file
from small import ALONE, build_model, config, read
from test_trainer import make_trainer

from sead_dist.config.automatic import (
    ENOUGH_TO_CHOOSE,
    averaged_steps,
    checkpoint_line,
    final_checkpoint,
)
from sead_dist.training.checkpoint import TrainState
from sead_dist.training.engine import AVERAGE_FILE, Engine, WeightAverage

# 21 rows, eight a step: six steps in two epochs
KEYS = {
    "num_train_epochs": 2,
    "final_checkpoint": "average",
    "average_share": 0.5,
    "save_steps": 1,
}


def saved(trainer, name):
    return load_file(trainer.checkpointer.folder / name / "student.safetensors")


def test_the_average_is_the_mean_of_the_weights_after_each_of_the_last_steps(tmp_path):
    trainer = make_trainer(tmp_path, **KEYS)
    trainer.checkpointer.keep_last = 9
    state = trainer.run(TrainState())
    assert (state.step, state.best_step) == (6, 6)
    each = [saved(trainer, f"step-{step:08d}") for step in (4, 5, 6)]
    kept = saved(trainer, "best-00000006")
    for name, tensor in kept.items():
        expected = torch.stack([one[name].double() for one in each]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(kept[name], each[-1][name]) for name in kept)


def test_invariant_06_the_average_of_a_resumed_run_is_equal_to_the_last_bit(tmp_path):
    whole = make_trainer(tmp_path / "whole", **KEYS)
    whole.run(TrainState())
    first = make_trainer(tmp_path / "cut", **KEYS)
    stop_after(first, 5)
    assert first.run(TrainState()).step == 5
    second = make_trainer(tmp_path / "cut", **KEYS)
    folder, state = second.checkpointer.latest()
    second.engine.load(folder)
    assert second.engine.average.count == 2
    second.run(state)
    name = "checkpoints/best-00000006/student.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stop_after(trainer, step):
    update = trainer.engine.average_weights

    def counted(taken):
        update(taken)
        if taken == step:
            trainer.stop.signal = 15

    trainer.engine.average_weights = counted


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_checkpoint_whose_sums_are_damaged_is_passed_over(tmp_path, harm, told):
    trainer = make_trainer(tmp_path, **KEYS)
    trainer.run(TrainState())
    path = trainer.checkpointer.folder / "step-00000006" / AVERAGE_FILE
    data = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    folder, _ = trainer.checkpointer.latest()
    assert folder.name == "step-00000005"
    assert any("step-00000006 is damaged" in line for line in told)
    assert read(folder / "state.json")["averaged"] == 2


def test_before_the_last_share_no_sums_are_kept(tmp_path):
    trainer = make_trainer(tmp_path, **KEYS)
    trainer.run(TrainState())
    names = {path.parent.name for path in trainer.checkpointer.folder.glob(f"*/{AVERAGE_FILE}")}
    assert names == {"step-00000004", "step-00000005", "step-00000006"}


def test_numbers_that_are_no_weights_are_not_averaged():
    average = WeightAverage(1)
    for place in (1, 3):
        average.add({"weight": torch.tensor([float(place)]), "place": torch.tensor([place])})
    mean = average.mean({"weight": torch.tensor([3.0]), "place": torch.tensor([3])})
    assert (mean["weight"].item(), mean["place"].item()) == (2.0, 3)


def test_the_average_takes_the_share_that_is_asked_for_and_one_step_at_least():
    assert averaged_steps(config(), 1500) == 300
    assert averaged_steps(config(average_share=1), 7) == 7
    assert averaged_steps(config(), 1) == 1
    engine = Engine(build_model(), config(final_checkpoint="average"), ALONE, 10)
    assert engine.average.first == 9


def test_from_500_selection_rows_up_the_best_student_is_kept_else_the_average():
    assert ENOUGH_TO_CHOOSE == 500
    assert final_checkpoint(config(), 499) == "average"
    assert final_checkpoint(config(), 500) == "best"
    assert final_checkpoint(config(final_checkpoint="last"), 9999) == "last"
    said = checkpoint_line(config(), 250, 1500)
    assert "the mean of the weights of the last 300 of 1500 steps" in said
    assert "250 selection rows are too few to choose by; 500 are enough" in said
    assert "automatic" not in checkpoint_line(config(final_checkpoint="last"), 250, 1500)
