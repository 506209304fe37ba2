"""Teachers over several ranks: one owner each, equal answers for all, failures shared (8)."""

import numpy as np
import pytest
from ranks import run_ranks, try_ranks
from small import (
    answers_of,
    example_set,
    grammar_tokenizer,
    load_teachers,
    make_source,
    save_teacher,
    small_split,
)

from sead_dist.data.order import make_split
from sead_dist.errors import RunError, UserError
from sead_dist.runtime.distributed import barrier
from sead_dist.runtime.run_log import RunLog

MIXES = {
    "colocated": ["colocated"] * 3,
    "partitioned": ["partitioned"] * 3,
    "mixed": ["partitioned", "colocated", "partitioned"],
}
# the second asks for rows that are there and rows that are not; the last for one row
PARTS = ([0, 2, 4, 6, 8], list(range(21)), [13])


def ask(source):
    return answers_of(source, small_split(21), PARTS)


def every_placement(world, folders, root):
    """{placement: (answers, (computed, read), teachers loaded, teachers of which it owns rows)},
    of this rank."""
    teachers, found = load_teachers(folders, world), {}
    for mix, placements in MIXES.items():
        source = make_source(teachers, root / mix / "st", root / mix / "run", world, placements)
        owned = set(np.flatnonzero(source.placement.share_NW[:, world.rank]).tolist())
        found[mix] = (ask(source), source.counts(), set(source.models), owned)
        source.close()
    return found


def test_invariant_08_every_pair_has_one_owner_and_all_ranks_receive_the_same_bits(
    tmp_path, folders
):
    (alone,) = run_ranks(1, tmp_path / "1", every_placement, folders, tmp_path / "one")
    expected = alone["colocated"][0]
    for size in (1, 2, 4):
        found = [alone]
        if size > 1:
            folder = tmp_path / str(size)
            found = run_ranks(size, folder, every_placement, folders, folder)
        for mix in MIXES:
            for rank in found:
                for answer, wanted in zip(rank[mix][0], expected, strict=True):
                    np.testing.assert_array_equal(answer, wanted)
                # each pair was computed once, by its owner
                assert rank[mix][1] == (3 * 21, 0)
        for rank in found:
            assert rank["partitioned"][2] == rank["partitioned"][3]
        # the one of three layers is the tail, and further ranks hold it too
        holders = [sum(n in rank["partitioned"][2] for rank in found) for n in range(3)]
        assert min(holders) == 1
        assert (holders[2] > 1) == (size == 4)


def with_own_store(world, folders, stores, placements, root):
    """Every rank sees a store of its own."""
    source = make_source(
        load_teachers(folders, world), stores[world.rank], root / "run", world, placements
    )
    found = ask(source)
    source.close()
    return found


def test_invariant_08_a_rank_that_finds_nothing_in_its_store_hinders_nobody(tmp_path, folders):
    full, empty = tmp_path / "full", tmp_path / "empty"
    (expected,) = run_ranks(
        1, tmp_path / "1", with_own_store, folders, [full], MIXES["colocated"], tmp_path
    )
    for mix in ("colocated", "mixed"):
        for stores in ([full, empty / mix / "1"], [empty / mix / "0", full]):
            found = run_ranks(
                2, tmp_path / mix, with_own_store, folders, stores, MIXES[mix], tmp_path / mix,
                timeout_s=60.0,
            )  # fmt: skip
            for rank in found:
                for answer, wanted in zip(rank, expected, strict=True):
                    np.testing.assert_array_equal(answer, wanted)


def one_rank_fails(world, folders, root, harm):
    source = make_source(
        load_teachers(folders, world), root / "st", root / "run", world, MIXES["partitioned"]
    )
    (own,) = np.flatnonzero(source.placement.share_NW[:, world.rank])
    barrier(world)
    if world.rank == 1:
        if harm == "weights gone":
            (folders[own] / "model.safetensors").unlink()
        else:
            source.models[own] = "no model at all"
    ask(source)


@pytest.mark.parametrize(
    ("harm", "kind", "said"),
    [
        ("weights gone", (UserError, RunError), "holds no weights"),
        ("a bug", RunError, "rank 1 failed in the teachers' pass at a test: AttributeError"),
    ],
)
def test_invariant_08_what_fails_on_one_rank_is_raised_on_all(tmp_path, harm, kind, said):
    folders = [save_teacher(tmp_path / name, seed=ord(name)) for name in "abc"]
    found = try_ranks(
        3, tmp_path / "ranks", one_rank_fails, folders, tmp_path, harm, timeout_s=40.0
    )
    for outcome in found:
        assert isinstance(outcome, kind)
        assert said in str(outcome)


def test_a_line_of_the_teachers_thread_is_in_the_log_of_the_run(tmp_path):
    source = make_source(
        load_teachers([save_teacher(tmp_path / "a")]), tmp_path / "store", tmp_path / "run"
    )
    split = make_split(example_set(["good " * 40, "bad"]), grammar_tokenizer(), 64)
    with RunLog(tmp_path / "run", is_main=True, console=False):
        answers_of(source, split, [[0, 1]])
        source.close()
    told = (tmp_path / "run" / "log.txt").read_text()
    assert "teacher a: text rows cut at 32 tokens: 1 of 2 in train\n" in told
