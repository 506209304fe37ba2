"""A teacher split over the ranks: the unsharded teacher's bits, held whole by nobody.

N teachers, R requested examples, C classes.
"""

import gc
import time

import numpy as np
import pytest
import torch
from ranks import run_ranks, start
from safetensors.torch import load_file, save_file
from small import (
    answers_of,
    load_teachers,
    make_source,
    model_bytes,
    read,
    run_distill,
    save_teacher,
    small_split,
    words,
    write_task,
)

from sead_dist.errors import RunError
from sead_dist.teachers.sharding import build_sharded

SPLIT = small_split(21)
# some rows, all rows (some are there by then), one row: fewer than there are ranks
PARTS = ([0, 2, 4, 6, 8], list(range(21)))
# albert runs the parameters of one layer three times
KINDS = ("bert", "roberta", "distilbert", "albert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    swapped = ("positive", "negative")
    return [save_teacher(root / kind, kind, seed=n, labels=swapped) for n, kind in enumerate(KINDS)]


def ask(source, parts=PARTS):
    return answers_of(source, SPLIT, parts)


def sharded_and_not(world, entries, root):
    """(answers colocated, answers sharded, (computed, read), kinds of models) on this rank."""
    teachers, found = load_teachers(entries, world), []
    for placement in ("colocated", "sharded"):
        source = make_source(
            teachers, root / placement / "st", root / placement / "run", world,
            [placement] * len(teachers),
        )  # fmt: skip
        found.append(ask(source, [[13], *PARTS]))
        counts, kinds = source.counts(), [type(m).__name__ for m in source.models.values()]
        source.close()
    return *found, counts, kinds


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_invariant_03_a_sharded_teachers_logits_are_the_unsharded_ones_bit_for_bit(
    tmp_path, folders, size
):
    entries = [*folders, f"{{path: {folders[0]}, dtype: bf16}}"]
    entries.append(f"{{path: {folders[1]}, offload: true, max_length: 31}}")
    for whole, split, counts, kinds in run_ranks(
        size, tmp_path, sharded_and_not, entries, tmp_path
    ):
        for expected, found in zip(whole, split, strict=True):
            assert np.abs(expected).max() > 0.1
            np.testing.assert_array_equal(found, expected)
        assert counts == (6 * 21, 0)
        # in a world of one only what is offloaded runs in parts
        split_kinds = [kind.startswith("FSDP") for kind in kinds]
        assert sum(split_kinds) == (1 if size == 1 else 6)


def live_bytes() -> int:
    """Memory of all tensors that Python has made since `gc.freeze()`, each storage once."""
    held = {}
    gc.collect()  # cycles that nothing holds go at a time of their own
    for thing in gc.get_objects():
        # not isinstance: torch has lazy attributes that would be imported by it
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            tensor = thing.to_local() if hasattr(thing, "to_local") else thing
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values())


def weighed(world, folder, entry):
    """Bytes on this rank: most while loading, after it, most while computing, after it, and those
    read from the files."""
    from sead_dist.teachers import sharding as sharded

    (teacher,) = load_teachers([entry], world)
    seen, read_bytes = [], []
    gc.freeze()

    class Watched:
        """A slice that is weighed, with all else, when it is read."""

        def __init__(self, real):
            self.real = real

        def get_shape(self):
            return self.real.get_shape()

        def get_dtype(self):
            return self.real.get_dtype()

        def __getitem__(self, rows):
            part = self.real[rows]
            read_bytes.append(part.nbytes)
            seen.append(live_bytes())
            return part

    class WatchedFile:
        def __init__(self, path, framework):
            self.file = safe_open(path, framework=framework)

        def __enter__(self):
            self.real = self.file.__enter__()
            return self

        def __exit__(self, *what):
            return self.file.__exit__(*what)

        def keys(self):
            return self.real.keys()

        def get_slice(self, name):
            return Watched(self.real.get_slice(name))

    safe_open, sharded.safe_open = sharded.safe_open, WatchedFile
    model = build_sharded(teacher, world, False)
    loading, loaded = max(seen), live_bytes()
    seen.clear()
    for layer in model.bert.encoder.layer:
        layer.attention.register_forward_hook(lambda *_: seen.append(live_bytes()))
    inputs = SPLIT.tokens.pad(np.arange(2), 16)
    with torch.inference_mode():
        model(**inputs)
    return loading, loaded, max(seen), live_bytes(), sum(read_bytes)


def test_no_rank_holds_a_sharded_teacher_whole_while_loading_or_computing(tmp_path):
    folder = save_teacher(tmp_path / "t", hidden_size=64, num_hidden_layers=12)
    tensors = load_file(folder / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    layer = sum(t.nbytes for name, t in tensors.items() if ".layer.0." in name)
    # embeddings, pooler and head are a unit; so are the layers
    rest = whole - 12 * layer
    slack = 0.03 * whole  # buffers, activations, padding of small tensors to equal parts
    ranks = run_ranks(4, tmp_path / "ranks", weighed, folder, folder)
    assert sum(rank[4] for rank in ranks) == whole
    for loading, loaded, computing, after, _ in ranks:
        assert loaded < whole / 4 + slack
        # a slice is a view of its tensor, which is mapped from the file
        assert loading < whole / 4 + largest + slack
        # this layer, and the next one on its way
        assert computing < whole / 4 + rest + 2 * layer + slack < 0.6 * whole
        assert after < whole / 4 + slack


def lone_rows(world, folders, stores, root):
    """Every rank sees a store of its own."""
    teachers = load_teachers(folders, world)
    source = make_source(teachers, stores[world.rank], root / "run", world, ["sharded"] * 2)
    answers = ask(source)
    source.close()
    return answers


def test_invariant_08_a_rank_that_finds_nothing_in_its_store_still_forwards_with_the_others(
    tmp_path, folders
):
    full, empty = tmp_path / "full", tmp_path / "empty"
    (expected,) = run_ranks(1, tmp_path / "1", lone_rows, folders[:2], [full], tmp_path)
    for rank in run_ranks(2, tmp_path / "2", lone_rows, folders[:2], [full, empty], tmp_path):
        for answer, wanted in zip(rank, expected, strict=True):
            np.testing.assert_array_equal(answer, wanted)


def harmed(world, folders, root, harms):
    """What this rank's source raised for each harm that was done to one rank or teacher."""
    from sead_dist.teachers import source as module

    said = {}
    for harm in harms:
        chosen = folders if harm == "nan" else folders[:2]
        source = make_source(
            load_teachers(chosen, world), root / harm / "st", root / harm / "run", world,
            ["sharded", "colocated", "sharded"][: len(chosen)],
        )  # fmt: skip
        on_one = world.rank == 1
        real = module.Table.write, module.Table.lookup

        def full_disk(*_):
            raise OSError(28, "No space left on device")

        def bad_block(*_):
            raise RunError("the store cannot be read")

        if harm == "disk full" and on_one:
            module.Table.write = full_disk
        if harm == "unreadable" and on_one:
            module.Table.lookup = bad_block
        if harm == "torn":
            ask(source, [[0, 1, 2]])
            if on_one:
                source.models[0] = "no model at all"
        try:
            ask(source)
            said[harm] = None
        except Exception as error:
            said[harm] = error
        module.Table.write, module.Table.lookup = real
        if harm != "torn":
            source.close()
    return said


def test_invariant_08_what_fails_on_one_rank_ends_a_sharded_pass_on_all(tmp_path, folders):
    broken = save_teacher(tmp_path / "broken", num_hidden_layers=2)
    tensors = load_file(broken / "model.safetensors")
    tensors["bert.embeddings.position_embeddings.weight"][11:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    harms = ["nan", "disk full", "unreadable", "torn"]
    for rank in run_ranks(
        3, tmp_path / "ranks", harmed, [*folders[:2], broken], tmp_path, harms, timeout_s=60.0
    ):
        assert all(isinstance(error, RunError) for error in rank.values())
        # only the longest rows reach the broken positions
        assert "teacher broken gave NaN or infinite logits" in str(rank["nan"])
        assert "No space left on device" in str(rank["disk full"])
        assert "the store cannot be read" in str(rank["unreadable"])
        assert "a sharded teacher's forward failed at a test" in str(rank["torn"])


@pytest.fixture(scope="module")
def task(tmp_path_factory, folders):
    root = tmp_path_factory.mktemp("task")
    return write_task(root / "data"), [save_teacher(root / "a", num_hidden_layers=2), folders[1]]


@pytest.mark.slow
def test_a_run_with_a_sharded_and_a_whole_teacher_gives_the_student_of_whole_ones(tmp_path, task):
    data, (large, small) = task
    mixed = [f"{{path: {large}, placement: sharded}}", small]
    for name, teachers in (("whole", [large, small]), ("mixed", mixed), ("again", mixed)):
        store = tmp_path / ("whole-st" if name == "whole" else "mixed-st")
        given = words(data, teachers, tmp_path / name, store, placement="colocated")
        run_ranks(2, tmp_path / "ranks", run_distill, given)
        assert model_bytes(tmp_path / name) == model_bytes(tmp_path / "whole")
    assert read(tmp_path / "mixed" / "run_summary.json")["placement"] == "sharded, colocated"
    assert read(tmp_path / "mixed" / "run_summary.json")["teacher_forwards"] == 2 * 80
    # all read from the store: nothing was forwarded
    assert read(tmp_path / "again" / "run_summary.json")["teacher_forwards"] == 0


@pytest.mark.slow
def test_a_killed_run_with_a_sharded_teacher_goes_on_to_the_same_student(tmp_path, task):
    data, teachers = task
    keys = {"placement": "sharded", "save_steps": 1, "prefetch_rows": 8, "num_train_epochs": 2}
    run_ranks(2, tmp_path / "r", run_distill, words(data, teachers, tmp_path / "whole", **keys))
    given = words(data, teachers, tmp_path / "killed", tmp_path / "st", **keys)
    ranks = start(2, tmp_path / "ranks", run_distill, given)
    end = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoints" / "step-00000003").is_dir():
        assert time.monotonic() < end
        time.sleep(0.001)
    for rank in ranks:
        rank.kill()
        rank.join()
    assert not (tmp_path / "killed" / "run_summary.json").exists()
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    assert "resuming at step" in (tmp_path / "killed" / "log.txt").read_text()
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")
