"""Losses over a feature teacher's layer outputs on several ranks: invariants 2 and 7, and DeepSpeed."""

import hashlib

import numpy as np
import pytest
import torch
from ranks import run_ranks, try_ranks
from safetensors.torch import load_file
from small import (
    build_model,
    config,
    read,
    run_distill,
    save_teacher,
    small_split,
    words,
    write_task,
)

from sead_dist.data.kinds import KINDS
from sead_dist.data.order import BatchStream
from sead_dist.errors import UserError
from sead_dist.models.hidden_states import TeacherLogits, find_layer_parts
from sead_dist.objectives.ensemble import make_ensemble
from sead_dist.objectives.feature_losses import make_feature_loss
from sead_dist.objectives.losses import make_loss
from sead_dist.runtime.heartbeat import Heartbeat
from sead_dist.teachers.base import TaughtStep
from sead_dist.teachers.feature_teacher import FeatureTeacher
from sead_dist.training.engine import Engine
from sead_dist.training.trainer import Tally, Trainer

METHODS = ("distilbert", "tinybert", "minilm")


def said_of(batch) -> TeacherLogits:
    """Made-up logits_NBC that follow from the example alone."""
    entry_B = batch.entries_B.float()
    logits_1BC = torch.stack([torch.sin(entry_B), torch.cos(entry_B)], -1)[None]
    return TeacherLogits(logits_1BC, torch.ones(logits_1BC.shape[:2], dtype=torch.bool))


def gradients(world, method):
    """This rank's gradients, flat, of a step of four micro-batches that five of eight rows fill, in
    train mode with dropout; and the losses."""
    given = config("teachers=[a]", method=method, global_batch_size=8, micro_batch_size=2, seed=3)
    batches = BatchStream(small_split(21), given.seed, 8, 2, 2, None, world.rank, world.size)
    step = next(n for n in range(3) if len(batches.rows(n)) < batches.global_batch)
    student = build_model(
        num_hidden_layers=2, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2
    )
    body = build_model(seed=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    layer_parts = find_layer_parts(body, "teacher a", True)
    feature_loss = make_feature_loss(given, student, layer_parts, total_steps=100)
    engine = Engine(student, given, world, batches.total_steps)
    feature_teacher = FeatureTeacher(
        "a", body, layer_parts, feature_loss.theirs, feature_loss.until
    )
    kind = KINDS["classification"]
    trainer = Trainer(
        given, world, engine, batches, None, ["a"], make_ensemble(given, kind, torch.ones(1)),
        make_loss(given, kind, batches.total_steps, feature_loss),
        None, None, None, "accuracy", None, Heartbeat(0, 1, None, given.heartbeat), feature_teacher,
    )  # fmt: skip
    engine.model.train()
    work, tally = batches.step(step), Tally(1)
    trainer.learn(
        TaughtStep(work, [said_of(batch) for batch in work.batches], 0.0, feature_teacher), tally
    )
    flat = torch.cat([p.grad.flatten() for p in student.parameters()])
    engine.close()
    return flat.double().numpy(), tally.losses.double().numpy()


def of_each_method(world):
    return {method: gradients(world, method) for method in METHODS}


def test_invariant_02_one_two_and_four_ranks_make_the_same_gradient(tmp_path):
    found = {size: run_ranks(size, tmp_path / str(size), of_each_method) for size in (1, 2, 4)}
    for method in METHODS:
        (alone, alone_losses) = found[1][0][method]
        norm = np.linalg.norm(alone)
        assert norm > 0.01
        assert alone_losses[3] > 0.01
        for size in (2, 4):
            flats = [rank[method][0] for rank in found[size]]
            losses = sum(rank[method][1] for rank in found[size])
            for flat in flats[1:]:
                np.testing.assert_array_equal(flat, flats[0])
            assert np.linalg.norm(flats[0] - alone) < 1e-6 * norm
            np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("task")
    teacher = save_teacher(root / "a", num_hidden_layers=2, num_attention_heads=4)
    return write_task(root / "data"), teacher


def run_and_watch(world, given):
    """The parameters after each step, projections included, as this rank holds them."""
    seen, step = [], Engine.step

    def step_and_note(self):
        norm = step(self)
        digest = hashlib.sha256()
        for name, parameter in self.module.named_parameters():
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
        seen.append(digest.hexdigest())
        return norm

    Engine.step = step_and_note
    run_distill(world, given)
    return seen


@pytest.fixture(scope="module")
def two_ranks(task, tmp_path_factory):
    """A run of tinybert on two ranks, and what each saw."""
    root = tmp_path_factory.mktemp("two-ranks")
    given = tinybert_words(task, root)
    return root / "run", run_ranks(2, root / "ranks", run_and_watch, given)


def tinybert_words(task, root, **changes):
    data, teacher = task
    keys = {"micro_batch_size": 2, "eval_steps": 4, "final_checkpoint": "last", **changes}
    return words(data, [teacher], root / "run", method="tinybert", **keys)


def test_invariant_07_ranks_hold_equal_parameters_after_every_step_of_both_stages(two_ranks):
    run, (first, second) = two_ranks
    assert first == second
    assert len(set(first)) == len(first) == 7
    summary = read(run / "run_summary.json")
    # seven steps, of which the first four (3.5) are the first stage, eight rows each
    assert summary["feature_loss"]["until_step"] == 4
    assert summary["feature_loss"]["forwards"] == 4 * 8
    assert summary["teacher_forwards"] + summary["store_hits"] == 80 + 4 * 8


def test_a_feature_teacher_that_is_not_on_every_rank_is_refused_when_the_run_is_built(
    tmp_path, task
):
    data, teacher = task
    given = words(data, [teacher], tmp_path / "run", method="minilm", placement="partitioned")
    for outcome in try_ranks(2, tmp_path / "ranks", run_distill, given):
        assert isinstance(outcome, UserError)
        assert "teacher a is partitioned, and feature_loss=minilm needs it" in str(outcome)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_tinybert_under_zero_2_is_tinybert_without_it(tmp_path, task, two_ranks):
    run_ranks(2, tmp_path / "ranks", run_distill, tinybert_words(task, tmp_path, deepspeed="zero2"))
    plain, split = (
        load_file(run / "model" / "model.safetensors") for run in (two_ranks[0], tmp_path / "run")
    )
    assert set(plain) == set(split)
    for name, weight in plain.items():
        torch.testing.assert_close(split[name], weight, rtol=1e-4, atol=1e-5)


def test_tinybert_under_zero_3_is_refused(tmp_path, task):
    data, teacher = task
    given = words(data, [teacher], tmp_path / "run", method="tinybert", deepspeed="zero3")
    (outcome,) = try_ranks(1, tmp_path / "ranks", run_distill, given)
    assert isinstance(outcome, UserError)
    assert "feature_loss=tinybert needs each rank to hold the student whole" in str(outcome)
