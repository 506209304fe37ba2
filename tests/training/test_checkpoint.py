"""Checkpoints: written aside, found again, refused where they are another run's (invariant 6)."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from small import ALONE, Trap, build_model, config

from sead_dist.data.order import Cursor
from sead_dist.errors import RunError, UserError
from sead_dist.training.checkpoint import Checkpointer, TrainState
from sead_dist.training.engine import Engine
from sead_dist.training.identity import Identity, teacher_identity

TEACHERS = [
    {
        "fingerprint": "a" * 64,
        "labels": ["x", "y"],
        "order": [0, 1],
        "weight": 1.0,
        "numerics": "cpu",
        "trained_rows": "",
    }
]
IDENTITY = Identity({"seed": 0, "alpha": 0.5}, "data-1" * 4, TEACHERS)


@pytest.fixture
def engine(tmp_path):
    return Engine(build_model(), config(output_dir=tmp_path), ALONE, total_steps=10)


def keeper(tmp_path, identity=IDENTITY, keep_last=2):
    return Checkpointer(tmp_path, identity, ALONE, keep_last)


def change(engine, amount=1.0):
    """Move the weights, and give the optimiser something to remember."""
    for parameter in engine.module.parameters():
        parameter.grad = torch.full_like(parameter, amount)
    engine.step()


def weights(engine):
    return torch.cat([p.detach().flatten() for p in engine.module.parameters()])


def state_at(step, **more):
    return TrainState(step=step, cursor=Cursor(0, step), totals={"rows": 8.0 * step}, **more)


def test_what_was_saved_comes_back_and_training_goes_on_bit_for_bit(tmp_path, engine):
    checkpoints = keeper(tmp_path)
    change(engine)
    checkpoints.save(engine, state_at(1))
    change(engine, 0.5)
    expected, rate = weights(engine), engine.learning_rate
    other = Engine(build_model(seed=9), config(output_dir=tmp_path), ALONE, total_steps=10)
    folder, state = keeper(tmp_path).latest()
    assert state == state_at(1)
    other.load(folder)
    change(other, 0.5)
    assert torch.equal(weights(other), expected)
    assert other.learning_rate == rate


def test_sums_of_an_older_version_are_read_under_their_present_names(tmp_path, engine):
    checkpoints = keeper(tmp_path)
    checkpoints.save(engine, replace(state_at(1), totals={"rows": 8.0, "live_rows": 4.0}))
    _, state = checkpoints.latest()
    assert state.add(feature_rows=4).totals == {"rows": 8.0, "feature_rows": 8.0}


def test_no_checkpoint_is_no_state(tmp_path):
    assert keeper(tmp_path).latest() is None


def test_the_last_so_many_are_kept_and_the_best(tmp_path, engine):
    checkpoints = keeper(tmp_path)
    for step in (1, 2, 3):
        if step < 3:
            checkpoints.save_best(engine, step)
        checkpoints.save(engine, state_at(step, best_step=min(step, 2), best_metric=0.5))
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert names == ["best-00000002", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("file", ["state.json", "student.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("harm", ["cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path, engine, file, harm, told
):
    checkpoints = keeper(tmp_path)
    checkpoints.save(engine, state_at(1))
    checkpoints.save(engine, state_at(2))
    path = checkpoints.folder / "step-00000002" / file
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if harm == "cut" else b"")
    folder, state = checkpoints.latest()
    assert (folder.name, state.step) == ("step-00000001", 1)
    assert "step-00000002" in told[0]


def test_half_a_checkpoint_is_no_checkpoint(tmp_path, engine):
    checkpoints = keeper(tmp_path)
    checkpoints.save(engine, state_at(1))
    whole = checkpoints.folder / "step-00000001"
    whole.rename(checkpoints.folder / "step-00000001.tmp")
    assert checkpoints.latest() is None
    # and it is not a hindrance to the next one
    checkpoints.save(engine, state_at(1))
    assert checkpoints.latest()[1].step == 1


def test_invariant_09_a_foreign_optimizer_file_is_not_executed(tmp_path, engine, told):
    checkpoints = keeper(tmp_path)
    checkpoints.save(engine, state_at(1))
    mark = tmp_path / "executed"
    path = checkpoints.folder / "step-00000001" / "optimizer.pt"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Trap(mark))),
        lambda: torch.save({"optimizer": Trap(mark)}, path),
    ):
        write()
        assert checkpoints.latest() is None
        assert "step-00000001" in told[-2]
        assert not mark.exists()
    with pytest.raises(UserError, match="remove step-00000001") as caught:
        engine.load(path.parent)
    assert isinstance(caught.value.__cause__, pickle.UnpicklingError)
    assert not mark.exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_intact(tmp_path, engine):
    checkpoints = keeper(tmp_path)
    checkpoints.save(engine, state_at(1))
    # a file lies where the folder aside should be
    (checkpoints.folder / "step-00000002.tmp").write_text("in the way")
    with pytest.raises(RunError, match=r"checkpoint step-00000002 cannot be written") as caught:
        checkpoints.save(engine, state_at(2))
    assert "the last checkpoint is intact" in str(caught.value)
    assert checkpoints.latest()[1].step == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (replace(IDENTITY, config={"seed": 1, "alpha": 0.5}), "seed was 0, is 1"),
        (
            replace(IDENTITY, data="data-2" * 4),
            "the fingerprint of data and task was data-1data-1, is data-2",
        ),
        (replace(IDENTITY, teachers=[]), r"teachers were aaaaaaaa \(x/y\), are none"),
    ],
)
def test_invariant_06_another_runs_checkpoint_is_refused_naming_what_differs(
    tmp_path, engine, asked, said
):
    keeper(tmp_path).save(engine, state_at(1))
    with pytest.raises(UserError, match=said):
        keeper(tmp_path, asked).latest()


def test_a_teachers_identity_is_what_it_says_not_where_it_lies():
    manifest = {
        "name": "t",
        "path": "/x",
        "revision": None,
        "placement": "colocated",
        **TEACHERS[0],
    }
    assert teacher_identity(manifest) == TEACHERS[0]
    moved = {**manifest, "name": "u", "path": "/y", "placement": "partitioned"}
    assert teacher_identity(moved) == teacher_identity(manifest)
    for key, value in (("weight", 2.0), ("order", [1, 0]), ("fingerprint", "b")):
        assert teacher_identity({**manifest, key: value}) != teacher_identity(manifest)


def test_a_record_is_readable_json(tmp_path, engine):
    checkpoints = keeper(tmp_path)
    checkpoints.save(engine, state_at(3))
    record = json.loads((checkpoints.folder / "step-00000003" / "state.json").read_text())
    assert record["state"]["cursor"] == {"epoch": 0, "batch": 3}
    assert record["identity"]["teachers"] == TEACHERS


def test_an_earlier_checkpoint_can_be_fallen_back_to_with_its_own_best_student(
    tmp_path, engine, told
):
    checkpoints = keeper(tmp_path)
    for step in (1, 2, 3):
        change(engine)
        checkpoints.save_best(engine, step)
        checkpoints.save(engine, state_at(step, best_step=step, best_metric=step / 10))
    assert not checkpoints.best_folder(1).exists()
    (checkpoints.folder / "step-00000003" / "student.safetensors").write_bytes(b"cut")
    folder, state = checkpoints.latest()
    assert (folder.name, state.best_step) == ("step-00000002", 2)
    assert any("step-00000003 is damaged" in line for line in told)
    (checkpoints.folder / "step-00000002" / "optimizer.pt").unlink()
    assert checkpoints.latest() is None
    assert "the run starts again at step 0" in told[-1]
