"""The engine's schedule and the loop's decisions."""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import ALONE, build_model, config, records, small_split

from sead_dist.data.kinds import KINDS
from sead_dist.data.order import BatchStream, micro_batch_seed
from sead_dist.errors import RunError
from sead_dist.objectives.ensemble import make_ensemble
from sead_dist.objectives.losses import make_loss
from sead_dist.objectives.weightings import chosen_teacher
from sead_dist.runtime.distributed import StopFlag
from sead_dist.runtime.heartbeat import Heartbeat
from sead_dist.runtime.run_log import RunLog
from sead_dist.teachers.base import TaughtStep
from sead_dist.training.checkpoint import Checkpointer, TrainState
from sead_dist.training.engine import Engine
from sead_dist.training.evaluation import EvalResult
from sead_dist.training.identity import Identity
from sead_dist.training.trainer import Pace, Trainer, is_better


def rates(**keys):
    """The learning rate of each of ten steps."""
    engine = Engine(build_model(), config(learning_rate=1.0, **keys), ALONE, total_steps=10)
    found = []
    for _ in range(10):
        found.append(engine.learning_rate)
        engine.optimizer.step()
        engine.schedule.step()
    return found


def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing():
    rising = [0.0, 0.5]
    assert rates(lr_scheduler_type="linear", warmup_steps=0.2) == pytest.approx(
        rising + [1 - n / 8 for n in range(8)]
    )
    assert rates(lr_scheduler_type="cosine", warmup_steps=0.2) == pytest.approx(
        rising + [0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)]
    )
    assert rates(lr_scheduler_type="constant", warmup_steps=0.2) == rising + [1.0] * 8
    assert rates(lr_scheduler_type="constant", warmup_steps=0.0) == [1.0] * 10


def test_weight_decay_leaves_biases_and_norms_alone():
    engine = Engine(build_model(), config(weight_decay=0.1), ALONE, total_steps=2)
    decayed, free = engine.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}


def test_gradients_are_clipped_to_the_norm_asked_for():
    for most, expected in ((1.0, 1.0), (0.0, None)):
        given = config(
            max_grad_norm=most,
            optim="sgd",
            lr_scheduler_type="constant",
            learning_rate=1.0,
            warmup_steps=0,
            weight_decay=0,
        )
        engine = Engine(build_model(), given, ALONE, total_steps=10**6)
        before = [p.detach().clone() for p in engine.module.parameters()]
        for parameter in engine.module.parameters():
            parameter.grad = torch.full_like(parameter, 3.0)
        engine.step()
        moved = torch.cat(
            [
                (a - b.detach()).flatten()
                for a, b in zip(before, engine.module.parameters(), strict=True)
            ]
        )
        count = moved.numel()
        norm = float(moved.norm())
        assert norm == pytest.approx(expected or 3 * math.sqrt(count), rel=0.05)


def test_a_micro_batch_seed_is_its_own():
    places = [(s, t, m) for s in range(3) for t in range(40) for m in range(8)]
    assert len({micro_batch_seed(*place) for place in places}) == len(places)
    assert all(0 <= micro_batch_seed(*place) < 2**63 for place in places)


def weighed(given, weights_N):
    return make_ensemble(given, KINDS["classification"], weights_N)


def make_trainer(tmp_path, names=(), select=None, split=None, losses=None, **keys):
    given = config(output_dir=tmp_path, learning_rate=1e-3, **keys)
    split = split or small_split(21)
    batches = BatchStream(
        split,
        given.seed,
        given.global_batch_size,
        given.micro_batch_size,
        given.num_train_epochs,
        None,
        0,
        1,
    )
    engine = Engine(build_model(), given, ALONE, batches.total_steps)

    def score(step):
        metrics = {"accuracy": (select or {}).get(step, 0.0)}
        loss = (losses or {}).get(step, 0.0)
        return EvalResult("small", "selection", step, 1, metrics, loss, 1.0, np.zeros((1, 2)))

    stop = StopFlag()
    return Trainer(
        config=given,
        world=ALONE,
        engine=engine,
        batches=batches,
        source=None,
        teacher_names=list(names),
        ensemble=weighed(given, torch.ones(len(names)) / max(1, len(names))) if names else None,
        loss=make_loss(given, KINDS["classification"], batches.total_steps),
        checkpointer=Checkpointer(tmp_path, Identity({}, "", []), ALONE, 3),
        log=RunLog(tmp_path, True, console=False),
        select=score,
        metric="accuracy",
        stop=stop,
        heartbeat=Heartbeat(0, 1, None, given.heartbeat),
    )  # fmt: skip


def test_the_loop_evaluates_and_saves_when_asked_to(tmp_path):
    keys = {"num_train_epochs": 2, "save_steps": 2, "eval_steps": 4}
    trainer = make_trainer(tmp_path, **{k.replace(".", "__"): v for k, v in keys.items()})
    assert trainer.batches.total_steps == 6
    assert [s for s in range(1, 7) if trainer.evaluates_after(s)] == [4, 6]
    # the end too, or a kill while the report is written would cost the last steps
    assert [s for s in range(1, 7) if trainer.saves_after(s)] == [2, 4, 6]
    never = make_trainer(tmp_path, save_steps=0)
    assert not any(never.saves_after(s) for s in range(1, 7))
    default = make_trainer(tmp_path, num_train_epochs=2)
    assert [s for s in range(1, 7) if default.evaluates_after(s)] == [3, 6]
    many = make_trainer(tmp_path, num_train_epochs=100)
    assert [s for s in range(1, 301) if many.evaluates_after(s)] == [*range(6, 301, 6)]


def test_the_best_student_is_the_first_with_the_highest_score(tmp_path):
    scores = {2: 0.5, 4: 0.7, 6: 0.7}
    trainer = make_trainer(tmp_path, select=scores, num_train_epochs=2, eval_steps=2)
    state = trainer.run(TrainState())
    assert (state.step, state.best_step, state.best_metric) == (6, 4, 0.7)
    assert (tmp_path / "checkpoints" / "best-00000004" / "student.safetensors").is_file()
    assert state.totals["rows"] == 42


def test_the_last_student_is_kept_where_that_is_asked_for(tmp_path):
    keys = {"select": {2: 0.5, 4: 0.7, 6: 0.6}, "num_train_epochs": 2, "eval_steps": 2}
    last = make_trainer(tmp_path, **keys, final_checkpoint="last")
    state = last.run(TrainState())
    assert (state.best_step, state.best_metric) == (6, 0.6)
    assert last.checkpointer.best_folder(6).is_dir()


def test_a_student_whose_head_nothing_has_taught_is_not_kept(tmp_path):
    class TwoStages(SimpleNamespace):
        def join(self, terms, *_rest):
            return terms

        def reading(self):
            return nullcontext()

    keys = {"select": {2: 0.9, 4: 0.7, 6: 0.6}, "num_train_epochs": 2, "eval_steps": 2}
    feature = TwoStages(has_no_head=lambda step: step <= 2)
    trainer = make_trainer(tmp_path, **keys)
    trainer = replace(trainer, loss=replace(trainer.loss, feature=feature))
    state = trainer.run(TrainState())
    assert (state.best_step, state.best_metric) == (4, 0.7)


# an epoch is three steps
FALLS = {3: 0.5, 6: 0.3, 9: 0.4, 12: 0.3, 15: 0.2}


def test_a_run_ends_when_its_selection_loss_has_not_fallen_for_so_many_epochs(tmp_path):
    scores = {6: 0.8, 9: 0.9}
    keys = {"num_train_epochs": 5, "early_stopping_patience": 2, "save_steps": 1}
    trainer = make_trainer(tmp_path, select=scores, losses=FALLS, **keys)
    state = trainer.run(TrainState())
    # equal to the lowest is not a fall
    assert (state.step, state.lowest_step, state.lowest_loss) == (12, 6, 0.3)
    # the loss says when, the score which
    assert (state.best_step, trainer.checkpointer.latest()[1].step) == (9, 12)
    assert trainer.run(trainer.checkpointer.latest()[1]).step == 12
    # a run that is scored more often ends where it ended
    often = make_trainer(tmp_path / "often", losses=FALLS, eval_steps=1, **keys)
    assert often.run(TrainState()).step == 12
    longer = make_trainer(tmp_path / "3", losses=FALLS, **{**keys, "early_stopping_patience": 3})
    state = longer.run(TrainState())
    assert (state.step, state.lowest_step, state.losses_without_fall) == (15, 15, 0)


def test_the_end_is_decided_after_so_many_steps_each(tmp_path):
    keys = {"num_train_epochs": 5, "early_stopping_patience": 1, "eval_steps": 100}
    trainer = make_trainer(tmp_path, losses={2: 0.5, 4: 0.6}, **keys)
    assert replace(trainer, patience_steps=2).run(TrainState()).step == 4


def test_the_last_student_of_a_run_that_ended_early_is_kept_where_that_is_asked_for(tmp_path):
    keys = {"num_train_epochs": 5, "early_stopping_patience": 2, "final_checkpoint": "last"}
    trainer = make_trainer(tmp_path, losses=FALLS, **keys)
    state = trainer.run(TrainState())
    assert (state.step, state.best_step) == (12, 12)
    assert trainer.checkpointer.best_folder(12).is_dir()


def test_a_row_counts_alike_in_the_logged_loss_whatever_batch_it_is_in(tmp_path):
    split = small_split(21)
    # three batches, the last of five rows; nothing is learnt between them, or dropped out
    trainer = make_trainer(
        tmp_path, split=split, num_train_epochs=1, global_batch_size=8, micro_batch_size=4
    )
    trainer.engine.step = lambda: 1.0
    model = trainer.engine.module.eval()
    trainer.engine.model.train = lambda *_: None
    inputs = split.tokens.pad(np.arange(21), int(split.tokens.lengths_B().max()))
    with torch.no_grad():
        labels_B = torch.from_numpy(split.examples.labels_B)
        expected = torch.nn.functional.cross_entropy(model(**inputs).logits, labels_B)
    trainer.run(TrainState())
    found = [line for line in records(tmp_path) if line["step"] == 3]
    assert [line["rows"] for line in found] == [21]
    assert found[0]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_stop_is_taken_at_a_step_boundary_with_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2)
    trainer.stop.signal = 15
    state = trainer.run(TrainState())
    assert state.step == 1
    assert trainer.checkpointer.latest()[1].step == 1


@pytest.mark.parametrize("clip", [1.0, 0])
def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_lower(tmp_path, clip):
    trainer = make_trainer(tmp_path, max_grad_norm=clip)
    with torch.no_grad():
        trainer.engine.module.classifier.bias[0] = float("nan")
    with pytest.raises(
        RunError, match=r"the gradient's norm is nan at step 1; .* a lower learning_rate"
    ):
        trainer.run(TrainState())


def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, save_steps=1)
    backward = trainer.engine.backward

    def spoilt(loss):
        backward(loss)
        if trainer.checkpointer.latest() is not None:  # the loss itself is sound
            trainer.engine.module.classifier.bias.grad[0] = float("inf")

    trainer.engine.backward = spoilt
    with pytest.raises(RunError, match="the gradient's norm is inf at step 2"):
        trainer.run(TrainState())
    assert trainer.checkpointer.latest()[1].step == 1


def test_random_asks_one_teacher_per_micro_batch_and_only_for_its_rows(tmp_path):
    trainer = make_trainer(tmp_path, names="abc", ensemble="random", seed=4)
    steps = range(0, 3)
    entries_R = trainer.batches.entries(steps)
    needed_NR = trainer.needed(steps, entries_R)
    # every row is in one micro-batch of an epoch, so one teacher is asked for it
    assert needed_NR.sum(0).tolist() == [1] * 21
    by_hand = Counter()
    for step in steps:
        for batch in trainer.batches.step(step).batches:
            chosen = chosen_teacher(4, step, batch.micro, 3)
            by_hand[chosen] += int(batch.valid_B.sum())
            weights_N = trainer.ensemble.weighting.at(torch.ones(3), 4, step, batch.micro)
            assert weights_N.tolist() == [float(n == chosen) for n in range(3)]
    assert needed_NR.sum(1).tolist() == [by_hand[n] for n in range(3)]
    every = weighed(config("teachers=[a,b,c]"), torch.full((3,), 1 / 3))
    assert every.needed(trainer.batches, steps, entries_R) is None


def test_a_teacher_without_weight_is_not_asked(tmp_path):
    trainer = make_trainer(tmp_path, names="abc", ensemble="single")
    steps = range(0, 3)
    entries_R = trainer.batches.entries(steps)
    given, one = config("teachers=[a,b,c]", ensemble="single"), torch.tensor([0.0, 1.0, 0.0])
    needed_NR = weighed(given, one).needed(trainer.batches, steps, entries_R)
    assert needed_NR.all(1).tolist() == [False, True, False]
    assert needed_NR.sum() == 21


def test_routed_asks_each_rows_own_teacher_and_equal_rows_may_ask_two(tmp_path):
    trainer = make_trainer(tmp_path, names="ab", ensemble="routed")
    split = trainer.batches.split
    routes_B = np.arange(len(split)) % 2
    twins = replace(split.examples, routes_B=routes_B)
    # the second row is the first once more
    entry_B = split.entry_B.copy()
    entry_B[1] = entry_B[0]
    batches = trainer.batches
    batches.split = replace(split, examples=twins, entry_B=entry_B)
    steps = range(0, 3)
    entries_R = batches.entries(steps)
    given = config("teachers=[a,b]", ensemble="routed", teacher_column="column")
    needed_NR = weighed(given, torch.full((2,), 0.5)).needed(batches, steps, entries_R)
    assert needed_NR[:, np.searchsorted(entries_R, entry_B[0])].tolist() == [True, True]
    assert needed_NR.sum() == len(split)
    for step in steps:
        for batch in batches.step(step).batches:
            at_B = np.searchsorted(entries_R, batch.entries_B.numpy())
            assert needed_NR[batch.routes_B.numpy(), at_B].all()


def test_of_equal_scores_the_student_with_the_lower_loss_is_kept():
    best = TrainState(best_step=3, best_metric=0.8, best_loss=0.5)
    assert is_better(0.8, 0.4, best)
    assert not is_better(0.8, 0.5, best)
    assert not is_better(0.8, 0.6, best)
    assert is_better(0.81, 9.0, best)
    assert not is_better(0.79, 0.1, best)
    assert is_better(0.1, 9.0, TrainState())


def test_the_time_left_counts_the_waits_of_steps_to_come_only(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("sead_dist.training.trainer.time.monotonic", lambda: now[0])

    def after(pace, step, seconds, window=None, waited_s=0.0):
        now[0] += seconds + waited_s
        pace.add(TaughtStep(SimpleNamespace(number=step - 1), None, waited_s, None, window))
        return pace.left_s(step)

    # three epochs of 20 steps; teachers compute ten steps at once in 50 s, a step takes 2 s
    pace = Pace(0, 60, 20)
    assert after(pace, 1, 2.0, range(10), 50.0) == pytest.approx(59 * 2 + 50)
    assert after(pace, 2, 2.0) == pytest.approx(58 * 2 + 50)
    for step in range(3, 11):
        after(pace, step, 2.0)
    assert after(pace, 11, 2.0, range(10, 20), 70.0) == pytest.approx(49 * 2)
    for step in range(12, 21):
        after(pace, step, 2.0)
    # the store is read in the second epoch
    assert after(pace, 21, 2.0, range(20, 30), 1.0) == pytest.approx(39 * 2 + 3)
    # a resume in the middle of the first epoch, and one in a later epoch
    assert after(Pace(15, 60, 20), 16, 2.0, range(15, 20), 5.0) == pytest.approx(44 * 2)
    assert after(Pace(40, 60, 20), 41, 2.0, range(40, 50), 10.0) == pytest.approx(19 * 2 + 10)
    # no teachers, and fewer steps than an epoch
    assert after(Pace(0, 5, 20), 1, 2.0) == pytest.approx(4 * 2)
