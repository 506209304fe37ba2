"""The gradient of a step does not depend on how micro-batches are laid out: invariant 2."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small import build_model, config, small_split

from sead_dist.data.kinds import KINDS
from sead_dist.data.order import BatchStream
from sead_dist.errors import RunError
from sead_dist.models.hidden_states import TeacherLogits
from sead_dist.objectives.ensemble import make_ensemble
from sead_dist.objectives.losses import make_loss
from sead_dist.runtime.heartbeat import Heartbeat
from sead_dist.teachers.base import TaughtStep
from sead_dist.training.engine import Engine
from sead_dist.training.trainer import Tally, Trainer


def teachers_of(batch) -> TeacherLogits:
    """Made-up logits_NBC that follow from the example alone."""
    entry_B = batch.entries_B.float()
    logits_NBC = torch.stack(
        [torch.stack([torch.sin(entry_B * (n + 2)), torch.cos(entry_B)], -1) for n in range(2)]
    )
    return TeacherLogits(logits_NBC, torch.ones(logits_NBC.shape[:2], dtype=torch.bool))


def gradients(world, rows, global_batch, micro_batch, step, ensemble, dropout=0.2):
    """This rank's gradients, flat, of one step in train mode with dropout, and the loss."""
    given = config(
        "teachers=[a,b]",
        global_batch_size=global_batch,
        micro_batch_size=micro_batch,
        ensemble=ensemble,
        seed=3,
    )
    batches = BatchStream(
        small_split(rows), given.seed, global_batch, micro_batch, 2, None, world.rank, world.size
    )
    model = build_model(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    engine = Engine(model, given, world, batches.total_steps)
    kind = KINDS["classification"]
    trainer = Trainer(
        given, world, engine, batches, None, ["a", "b"],
        make_ensemble(given, kind, torch.tensor([0.3, 0.7])), make_loss(given, kind, batches.total_steps), None, None, None, "accuracy", None, Heartbeat(0, 1, None, given.heartbeat),
    )  # fmt: skip
    engine.model.train()
    torch.manual_seed(1000 + world.rank)  # what came before does not matter
    torch.rand(world.rank)
    work, tally = batches.step(step), Tally(2)
    trainer.learn(TaughtStep(work, [teachers_of(batch) for batch in work.batches], 0.0), tally)
    flat = torch.cat([p.grad.flatten() for p in engine.module.parameters()])
    return flat.double().numpy(), tally.losses.double().numpy()


def loss_and_gradient(size, folder, *args):
    parts = run_ranks(size, folder, gradients, *args)
    for flat, _ in parts[1:]:
        np.testing.assert_array_equal(flat, parts[0][0])
    return parts[0][0], sum(losses for _, losses in parts)


CASES = {
    "whole batch": (40, 8, 2, 0, "mean_logits"),
    # 21 rows: the last batch of an epoch has five
    "partial batch": (21, 8, 2, 2, "confidence"),
    # three micro-batches: neither two nor four ranks divide them
    "uneven ranks": (40, 12, 4, 1, "mean_logits"),
}


@pytest.mark.parametrize("case", CASES)
def test_invariant_02_one_rank_two_ranks_and_four_ranks_make_the_same_gradient(tmp_path, case):
    rows, global_batch, micro_batch, step, ensemble = CASES[case]
    if case == "partial batch":
        batches = BatchStream(small_split(rows), 3, global_batch, micro_batch, 2, None, 0, 1)
        step = next(n for n in range(3) if len(batches.rows(n)) < batches.global_batch)
    args = (rows, global_batch, micro_batch, step, ensemble)
    alone, alone_losses = loss_and_gradient(1, tmp_path / "1", *args)
    norm = np.linalg.norm(alone)
    assert norm > 0.1
    for size in (2, 4):
        found, losses = loss_and_gradient(size, tmp_path / str(size), *args)
        assert np.linalg.norm(found - alone) < 1e-6 * norm
        np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)


def test_invariant_02_the_loss_is_the_mean_over_the_global_batchs_valid_rows(tmp_path):
    # without dropout, how a batch of five valid rows is cut into micro-batches does not show
    batches = BatchStream(small_split(21), 3, 8, 8, 2, None, 0, 1)
    step = next(n for n in range(3) if len(batches.rows(n)) < batches.global_batch)
    whole, losses = loss_and_gradient(1, tmp_path / "8", 21, 8, 8, step, "mean_logits", 0.0)
    for size, micro_batch in ((1, 2), (1, 4), (2, 2), (4, 1)):
        found, parts = loss_and_gradient(
            size, tmp_path / f"{size}-{micro_batch}", 21, 8, micro_batch, step, "mean_logits", 0.0
        )
        assert np.linalg.norm(found - whole) < 1e-5 * np.linalg.norm(whole)
        np.testing.assert_allclose(parts, losses, rtol=1e-5)


def test_dropout_was_at_work(tmp_path):
    args = (40, 8, 2, 0, "mean_logits")
    one, _ = loss_and_gradient(1, tmp_path / "one", *args)
    again, _ = loss_and_gradient(1, tmp_path / "again", *args)
    np.testing.assert_array_equal(one, again)
    other, _ = loss_and_gradient(1, tmp_path / "other", 40, 8, 4, 0, "mean_logits")
    # other micro-batches draw other masks
    assert np.linalg.norm(other - one) > 1e-2 * np.linalg.norm(one)


def fail_on_one(world):
    if world.rank == 1:
        raise RunError("this rank alone")
    return world.size


def test_the_helper_passes_results_and_exceptions_back(tmp_path):
    with pytest.raises(RunError, match="this rank alone"):
        run_ranks(2, tmp_path, fail_on_one)
    assert run_ranks(1, tmp_path, fail_on_one) == [1]


def wait_for_ever(world):
    torch.distributed.barrier() if world.rank == 0 else __import__("time").sleep(1000)


def test_the_helper_kills_ranks_that_hang(tmp_path):
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 still at work"):
        run_ranks(2, tmp_path, wait_for_ever, timeout_s=3.0)
