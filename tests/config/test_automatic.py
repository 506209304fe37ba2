"""What a run takes where nothing is said: its length and its learning rate."""

import pytest
from small import build_model, config

from sead_dist.config.automatic import (
    epoch_steps,
    learning_rate,
    length_line,
    patience_steps,
    run_steps,
    scoring_steps,
)
from sead_dist.training.engine import build_optimizer, width_of

TAUGHT = "teachers=[a,b]"


def steps(labelled, rows, *given, **keys):
    return run_steps(
        config(*given, **{"global_batch_size": 32, "micro_batch_size": 16, **keys}), labelled, rows
    )


def test_with_teachers_it_is_three_passes_over_all_rows_within_bounds():
    assert steps(2250, 2250, TAUGHT) == 1500
    assert steps(2250, 22_250, TAUGHT) == 3 * 696
    assert steps(2250, 10**7, TAUGHT) == 30_000


def test_without_teachers_it_is_three_epochs_and_200_steps_at_least():
    assert steps(2250, 2250) == steps(2250, 2250, TAUGHT, method="finetune") == 3 * 71
    assert steps(250, 250) == 200
    assert steps(10**6, 10**6) == 3 * 31_250


def test_epochs_are_of_the_labelled_rows_however_much_text_there_is():
    assert steps(2250, 2250, TAUGHT, num_train_epochs=2) == 2 * 71
    assert steps(2250, 80_000, TAUGHT, num_train_epochs=2) == 2 * 71
    assert epoch_steps(config(global_batch_size=32), 2250, 80_000) == 71
    # of a run that has no labels, of its text
    assert steps(0, 640, TAUGHT, num_train_epochs=2) == 2 * 20


def test_steps_that_are_given_count():
    assert steps(2250, 80_000, TAUGHT, num_train_epochs=2, max_steps=7) == 7


def test_a_student_is_scored_each_epoch_and_at_most_fifty_times():
    assert scoring_steps(config(), 71, 213) == 71
    # 64 labelled rows, 32 to a step
    assert scoring_steps(config(), 2, 1500) == 30
    assert 1501 // scoring_steps(config(), 2, 1501) <= 50
    assert scoring_steps(config(eval_steps=5), 2, 1500) == 5


def test_the_length_is_told_with_its_reason():
    said = length_line(config(TAUGHT), 54, 74)
    assert said.startswith("1500 steps (automatic: three passes over 74 rows, at least 1500, ")
    assert "epochs or max_steps change that" in said
    assert length_line(config(TAUGHT, num_train_epochs=2), 54, 74) == (
        "14 steps (num_train_epochs=2 over 54 labelled rows)"
    )
    assert "three epochs over 54 labelled rows, at least 200" in length_line(config(), 54, 54)


def test_a_run_that_ends_by_its_loss_takes_ten_epochs_at_most():
    assert steps(2250, 2250, early_stopping_patience=2) == 10 * 71
    assert steps(100, 100, early_stopping_patience=2) == 200
    # what a person gives stays
    assert steps(2250, 2250, early_stopping_patience=2, num_train_epochs=4) == 4 * 71
    assert length_line(config(early_stopping_patience=2), 540, 540).startswith(
        "at most 680 steps (automatic: at most ten epochs over 540 labelled rows, or 200 steps; "
    )


def test_the_epochs_of_a_patience_are_told_as_they_are_counted():
    def end(rows, patience):
        return length_line(config(early_stopping_patience=patience), rows, rows).rpartition("; ")[2]

    said = "it ends earlier if the selection loss has not fallen for "
    assert end(2250, 2) == f"{said}2 epochs"
    assert end(2250, 1) == f"{said}an epoch"
    # epochs of seven steps, of which three count as one
    assert end(56, 2) == f"{said}6 epochs"


def test_the_end_is_decided_after_whole_epochs_of_twenty_steps_at_least():
    assert [patience_steps(epoch) for epoch in (71, 20, 19, 7, 1)] == [71, 20, 38, 21, 20]


def test_the_learning_rate_goes_by_the_students_width_unless_one_is_given():
    widths = (128, 256, 312, 384, 512, 768, 1024)
    found = [learning_rate(config(), width) for width in widths]
    assert found == [3e-4, 3e-4, 1e-4, 1e-4, 5e-5, 5e-5, 2e-5]
    assert learning_rate(config(learning_rate=7e-3), 384) == 7e-3


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2"])
def test_the_optimiser_has_the_rate_of_its_students_width(kind):
    more = {"n_embd": 32} if kind == "gpt2" else {}
    model = build_model(kind, **more)
    assert width_of(model) == 32
    assert build_optimizer(model, config()).param_groups[0]["lr"] == 3e-4
