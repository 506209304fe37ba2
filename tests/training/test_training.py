"""Whole runs on several ranks: invariant 7."""

import hashlib

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small import read, records, run_distill, save_teacher, words


def digest(tensors) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


def run_and_watch(world, given):
    """The student's weights after each step, and at the end, as this rank holds them."""
    from sead_dist.training.engine import Engine

    seen, engines, step = [], [], Engine.step

    def step_and_note(self):
        norm = step(self)
        engines.append(self)
        # what every rank does to its generator by itself must not show
        torch.rand(world.rank + 1)
        seen.append(digest(dict(self.module.named_parameters())))
        return norm

    Engine.step = step_and_note
    run_distill(world, given)
    return seen, digest(engines[-1].module.state_dict())


@pytest.mark.parametrize("size", [2, 4])
def test_invariant_07_ranks_hold_equal_parameters_after_every_step(tmp_path, tiny_task, size):
    data, teachers = tiny_task
    given = words(
        data, teachers, tmp_path / "run", placement="partitioned", num_train_epochs=2,
        unlabeled__path=data / "unlabeled.tsv", micro_batch_size=2, eval_steps=4,
        keep_training_state="true",
    )  # fmt: skip
    found = run_ranks(size, tmp_path / "ranks", run_and_watch, given)
    assert len(found[0][0]) == records(tmp_path / "run")[-1]["step"] > 10
    assert len(set(found[0][0])) == len(found[0][0])
    for rank in found[1:]:
        assert rank == found[0]
    # the best student, which is the final one
    best = read(tmp_path / "run" / "run_summary.json")["best_step"]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert digest(saved) == found[0][1]
    kept = tmp_path / "run" / "checkpoints" / f"best-{best:08d}" / "student.safetensors"
    assert digest(load_file(kept)) == found[0][1]


def test_a_second_run_reads_everything_and_a_third_teacher_is_computed_alone(tmp_path, tiny_task):
    data, teachers = tiny_task
    third = save_teacher(tmp_path / "c", seed=5)
    store = tmp_path / "store"
    for size, given, expected in (
        (1, teachers, "all"),
        (2, teachers, "none"),
        (2, [*teachers, third], "third"),
        (1, [*teachers, third], "none"),
    ):
        run = tmp_path / f"run-{size}-{len(given)}"
        run_ranks(
            size, tmp_path / "ranks", run_distill,
            words(data, given, run, store, placement="colocated"),
        )  # fmt: skip
        counts = read(run / "run_summary.json")
        pairs = counts["teacher_forwards"] + counts["store_hits"]
        computed = {"all": pairs, "none": 0, "third": pairs // 3}[expected]
        assert counts["teacher_forwards"] == computed
        # 60 rows of train and selection, 20 of dev, no two equal
        assert pairs == len(given) * 80
