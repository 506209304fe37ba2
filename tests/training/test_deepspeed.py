"""The student under DeepSpeed is the student without it, whatever the stage: ZeRO 1, 2 and 3, with
and without offload. Real gloo ranks, all ways one after the other in the same processes."""

import gc
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import finish, run_ranks, start
from small import (
    build_model,
    config,
    model_bytes,
    read,
    run_distill,
    small_split,
    words,
)
from test_gradients import teachers_of

from sead_dist.data.kinds import KINDS
from sead_dist.data.order import BatchStream
from sead_dist.objectives.ensemble import make_ensemble
from sead_dist.objectives.losses import make_loss
from sead_dist.runtime.heartbeat import Heartbeat
from sead_dist.teachers.base import TaughtStep
from sead_dist.training.engine import Engine
from sead_dist.training.trainer import Tally, Trainer

ROOT = Path(__file__).parents[2]
STAGES = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
WAYS = [None, *STAGES]  # None: DDP, without DeepSpeed


def make_trainer(world, way, seed=0, wide=False, **changes) -> Trainer:
    """A trainer of a small student with dropout: 8 rows a step in micro-batches of 2."""
    given = config(
        "teachers=[a,b]", seed=3, weight_decay=0.1,
        **{"learning_rate": 1e-3, "micro_batch_size": 2, **changes}, **({"deepspeed": way} if way else {}),
    )  # fmt: skip
    batches = BatchStream(
        small_split(40), 3, 8, given.micro_batch_size, 20, None, world.rank, world.size
    )
    sizes = {"hidden_size": 128, "intermediate_size": 512} if wide else {}
    model = build_model(seed=seed, hidden_dropout_prob=0.2, **sizes)
    engine = Engine(model, given, world, batches.total_steps)
    engine.model.train()
    kind = KINDS["classification"]
    return Trainer(
        given, world, engine, batches, None, ["a", "b"],
        make_ensemble(given, kind, torch.tensor([0.3, 0.7])), make_loss(given, kind, batches.total_steps), None, None, None, "accuracy", None, Heartbeat(0, 1, None, given.heartbeat),
    )  # fmt: skip


def learn(trainer, step: int) -> None:
    work = trainer.batches.step(step)
    taught = TaughtStep(work, [teachers_of(batch) for batch in work.batches], 0.0)
    trainer.learn(taught, Tally(2))


def train(trainer, steps: range) -> None:
    for step in steps:
        learn(trainer, step)
        trainer.engine.step()


def flat(tensors) -> np.ndarray:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).double().numpy()


def gradient_of(engine) -> np.ndarray:
    """The whole gradient, flat; every rank calls this between backward and step."""
    if engine.zero is None:
        return flat(p.grad for p in engine.module.parameters())
    from deepspeed.utils import safe_get_full_grad

    return flat(safe_get_full_grad(p) for p in engine.module.parameters())


def gradient_norm_and_student(world, way, steps, **changes):
    """The first step's gradient and its norm as the engine says it, and the student afterwards."""
    trainer = make_trainer(world, way, **changes)
    learn(trainer, 0)
    gradient = gradient_of(trainer.engine)
    norm = trainer.engine.step()
    train(trainer, range(1, steps))
    student = flat(trainer.engine.weights().values()) if world.is_main else None
    trainer.engine.close()
    return gradient, norm, student


def in_every_way(world, ways, steps, **changes):
    return {way: gradient_norm_and_student(world, way, steps, **changes) for way in ways}


def sgd(world, ways):
    return in_every_way(world, ways, 50, optim="sgd", learning_rate=0.01)


def adamw(world, ways):
    return in_every_way(world, ways, 50)


def far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_equal_to_alone(tmp_path, size, ways, work, tolerance):
    (alone,) = run_ranks(1, tmp_path / "alone", work, [None])
    gradient, norm, student = alone[None]
    assert norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert norm > 1.5  # clipping to 1 is at work
    found = run_ranks(size, tmp_path / "ranks", work, ways, timeout_s=400)
    for way in ways:
        for rank in found:
            assert far(rank[way][0], gradient) < 1e-6, way
            assert rank[way][1] == pytest.approx(norm, rel=1e-5)
        assert far(found[0][way][2], student) < tolerance, way


def test_invariant_02_deepspeed_makes_the_gradient_and_the_student_of_one_rank(tmp_path):
    check_equal_to_alone(tmp_path, 2, ["zero2", "zero3"], sgd, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "tolerance"), [(sgd, 1e-5), (adamw, 1e-3)])
@pytest.mark.parametrize("size", [2, 4])
def test_invariant_02_every_stage_makes_the_student_of_one_rank(tmp_path, size, work, tolerance):
    check_equal_to_alone(tmp_path, size, WAYS, work, tolerance)


def test_bf16_is_the_arithmetic_of_a_run_without_deepspeed(tmp_path):
    """Its gradients are sums in another order; fp32's are a hundred times further away."""
    (found,) = run_ranks(1, tmp_path, bf16)
    (exact,) = run_ranks(1, tmp_path, fp32)
    gradient = found[None][0]
    error = far(exact[None][0], gradient)
    assert error > 1e-4
    for way in ("zero2", "zero3"):
        assert far(found[way][0], gradient) < error / 100


def bf16(world):
    return in_every_way(world, [None, "zero2", "zero3"], 1, precision="bf16")


def fp32(world):
    return in_every_way(world, [None], 1)


def save_and_load(world, root, ways):
    """Train 3 steps, save, train 2 more; then load in a fresh student and train the same 2."""
    found = {}
    for way in ways:
        trainer = make_trainer(world, way)
        train(trainer, range(3))
        trainer.engine.save(made(root / str(way), world))
        train(trainer, range(3, 5))
        whole = trainer.engine.weights()
        trainer.engine.close()
        torch.distributed.barrier()
        other = make_trainer(world, way, seed=9)
        other.engine.load(root / str(way))
        train(other, range(3, 5))
        resumed = other.engine.weights()
        found[way] = [name for name in whole if not torch.equal(whole[name], resumed[name])]
        found[way, "tensors"] = len(whole)
        other.engine.close()
    return found


def made(folder, world):
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_and_save(world, root, pairs):
    """Load what one way saved into another, and save it again: the names of what differs."""
    found = {}
    for kept, way in pairs:
        engine = make_trainer(world, way, seed=9).engine
        engine.load(root / str(kept))
        again = made(root / f"{kept}-{way}-{world.size}", world)
        engine.save(again)
        if world.is_main:
            found[kept, way] = differences(root / str(kept), again)
        engine.close()
    return found


def differences(kept, again) -> list[str]:
    from safetensors.torch import load_file

    one, two = (load_file(folder / "student.safetensors") for folder in (kept, again))
    assert one.keys() == two.keys()
    found = [name for name in one if not torch.equal(one[name], two[name])]
    one, two = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (kept, again))
    assert one["schedule"] == two["schedule"]
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    one, two = one["optimizer"]["state"], two["optimizer"]["state"]
    assert one.keys() == two.keys()
    assert one
    for number, key in itertools.product(one, ("step", "exp_avg", "exp_avg_sq")):
        if not torch.equal(one[number][key], two[number][key].reshape(one[number][key].shape)):
            found.append(f"{number} {key}")
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The checkpoints of every way, made by two ranks, and what a resume of each gave."""
    root = tmp_path_factory.mktemp("saved")
    found = run_ranks(2, root / "ranks", save_and_load, root, WAYS, timeout_s=200)
    return root, found


@pytest.mark.slow
def test_invariant_06_every_stage_resumes_bit_for_bit(saved):
    for way in WAYS:
        assert saved[1][0][way, "tensors"] > 15
        assert saved[1][0][way] == []


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_invariant_06_a_checkpoint_fits_every_stage_and_number_of_ranks(saved, size):
    root = saved[0]
    # neither number makes the parts that two ranks made
    ways = [("zero3", None), (None, "zero3_offload"), ("zero2_offload", "zero1")]
    found = run_ranks(size, root / "ranks", load_and_save, root, ways, timeout_s=200)
    assert found[0] == {pair: [] for pair in ways}


def bytes_held(world, ways, root):
    """Bytes per parameter in tensors, at the end of backward, when the optimiser has moments."""
    found = {}
    for way in ways:
        before = set(storages())
        trainer = make_trainer(
            world, with_small_buckets(way, root / f"{world.rank}"), wide=True, micro_batch_size=1
        )
        size = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.engine.module.parameters())
        train(trainer, range(1))
        accumulate_one(trainer)
        found[way] = at_rest(before) / size
        trainer.engine.close()
        del trainer
    return found


def at_rest(before: set[int]) -> int:
    """Bytes in tensors that are not in `before`, once they have not become fewer for two seconds:
    a reduction's thread may not have let go of what it sent, least of all on a busy machine."""
    least, fell_at = None, time.monotonic()
    while time.monotonic() - fell_at < 2.0:
        now = sum(count for key, count in storages().items() if key not in before)
        if least is None or now < least:
            least, fell_at = now, time.monotonic()
        time.sleep(0.1)
    return least


def accumulate_one(trainer) -> None:
    """Forward and backward of a micro-batch that is not the last one of its step."""
    batch = trainer.batches.step(1).batches[0]
    with trainer.engine.accumulate(last=False):
        trainer.engine.backward(trainer.engine.forward(batch.inputs, 1).sum())


def with_small_buckets(way, folder):
    """Buffers of a fixed size would hide what grows with the student."""
    if way is None:
        return None
    values = json.loads((ROOT / "configs" / "deepspeed" / f"{way}.json").read_text())
    small = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    values["zero_optimization"].update(**small, stage3_param_persistence_threshold=0)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{way}.json"
    path.write_text(json.dumps(values))
    return path


def storages() -> dict[int, int]:
    """Bytes of each memory block that a tensor of this process lives in; those on the meta device
    live in none, and all have the address 0."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    blocks = [t.untyped_storage() for t in tensors if not t.is_meta]
    return {block.data_ptr(): block.nbytes() for block in blocks}


def bytes_promised(way: str | None, ranks: int) -> float:
    """docs/placement.md, section Memory: bytes per parameter of the student on one rank."""
    parameters, gradients, moments = 4.0, 4.0, 8.0
    if way is None:
        return parameters + gradients + moments
    own = 4.0 / ranks  # this rank's part of the parameters, as the optimiser steps them
    if way == "zero1":
        return parameters + gradients + own + moments / ranks
    if way == "zero2":
        return parameters + gradients / ranks + own + moments / ranks
    # parameters; gradients, in a buffer and as the optimiser reads them; moments
    return own + 2 * gradients / ranks + moments / ranks


def check_memory(tmp_path, size, ways):
    for rank in run_ranks(size, tmp_path / "ranks", bytes_held, ways, tmp_path, timeout_s=300):
        for way in ways:
            if way in ("zero2_offload", "zero3_offload"):
                # on a CPU the machine's memory is the device's too: both together
                most = 8 + 24 / size if way == "zero2_offload" else 24 / size
                assert rank[way] < most + 0.1
            else:
                # a tensor that lies across two ranks' parts weighs more in a small student
                promised = bytes_promised(way, size)
                assert promised < rank[way] < promised + (1.3 if way == "zero2" else 0.4), way


@pytest.mark.slow
def test_memory_falls_as_the_stages_promise(tmp_path):
    check_memory(tmp_path, 2, [None, "zero1", "zero2", "zero3"])


@pytest.mark.slow
def test_memory_falls_as_the_stages_promise_on_four_ranks_and_with_offload(tmp_path):
    check_memory(tmp_path, 4, WAYS)


def rows_of_the_table() -> list[list[str]]:
    text = (ROOT / "docs" / "placement.md").read_text(encoding="utf-8")
    section = text.partition("## Memory of the student")[2]
    lines = [line for line in section.splitlines() if line.startswith(("| `", "| DDP"))]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_students_that_fit_follows_from_the_counted_bytes():
    rows = {row[0]: row[1:] for row in rows_of_the_table()}
    for name, way in (("DDP", None), ("zero1", "zero1"), ("zero2", "zero2"), ("zero3", "zero3")):
        expected = [f"{0.8 * gigabytes / bytes_promised(way, 8):.1f}" for gigabytes in (16, 24, 80)]
        assert rows[name][-3:] == expected, name
        assert rows[name][2] == f"{bytes_promised(way, 8):g}"


def whole_run(task, root, size, **changes):
    given = words(*task, root / "run", root / "store", save_steps=2, **changes)
    finish(start(size, root / "ranks", run_distill, given), root / "ranks", 300.0)
    return root / "run"


@pytest.mark.slow
def test_invariant_06_a_run_under_zero3_killed_after_a_checkpoint_ends_with_the_same_model(
    one_teacher, tmp_path
):
    whole = whole_run(one_teacher, tmp_path / "whole", 2, deepspeed="zero3")
    root = tmp_path / "killed"
    given = words(*one_teacher, root / "run", root / "store", save_steps=2, deepspeed="zero3")
    ranks = start(2, root / "ranks", run_distill, given)
    first = root / "run" / "checkpoints" / "step-00000002"
    while not first.is_dir():
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.001)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert not (root / "run" / "run_summary.json").exists()
    run = whole_run(one_teacher, root, 2, deepspeed="zero3")
    assert "resuming at step" in (run / "log.txt").read_text()
    assert model_bytes(run) == model_bytes(whole)
    assert read(run / "run_summary.json")["deepspeed"] == "zero3"


def average_in_every_way(world, ways):
    """The mean of the weights after steps 6 to 12, of a run of 12 steps whose last 7 count."""
    found = {}
    for way in ways:
        trainer = make_trainer(world, way, final_checkpoint="average", average_share=0.58)
        trainer.engine.average.first = 6
        for step in range(12):
            learn(trainer, step)
            trainer.update(step + 1)
        weights = trainer.engine.weights()
        if world.is_main:
            assert trainer.engine.average.count == 7
            found[way] = flat(trainer.engine.average.mean(weights).values())
        trainer.engine.close()
    return found


@pytest.mark.slow
def test_the_average_of_the_weights_is_that_of_one_rank_whatever_the_stage(tmp_path):
    (alone,) = run_ranks(1, tmp_path / "alone", average_in_every_way, [None])
    ways = [None, "zero2", "zero3"]
    found = run_ranks(2, tmp_path / "ranks", average_in_every_way, ways, timeout_s=400)[0]
    for way in ways:
        assert far(found[way], alone[None]) < 1e-4, way
