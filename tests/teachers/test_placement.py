"""Who computes what: one owner for each (teacher, example), known to every rank (invariant 8).

N teachers, R requested examples.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import (
    ALONE,
    load_teachers,
    logits_of,
    make_source,
    save_teacher,
    small_split,
)

from sead_dist.errors import RunError
from sead_dist.models.pretrained import locate
from sead_dist.models.sequence_classifier import load_classifier
from sead_dist.teachers.base import Request
from sead_dist.teachers.placement import (
    UNEVEN,
    Placement,
    choose_placements,
    deal,
    describe_shares,
    least_free,
    place,
    share_rows,
)

SPLIT = small_split(21)
EVERY = np.arange(21)


def request(entries_R=EVERY, needed_NR=None, split=SPLIT):
    return Request(split, np.asarray(entries_R), needed_NR, "a test")


@pytest.fixture(scope="module")
def teachers(folders):
    return load_teachers(folders)


def of_size(teacher, *sizes):
    """Teachers that take so many bytes each, named after their place."""
    return [replace(teacher, bytes=size, name=f"t{n}") for n, size in enumerate(sizes)]


def test_every_pair_has_one_owner_and_colocated_shares_are_equal():
    for size in (1, 2, 4):
        share_NW = np.full((3, size), 1 / size)
        share_NW[1] = np.eye(size)[size - 1]
        owner_NR = Placement(["partitioned"] * 3, [False] * 3, share_NW).owners(request())
        assert owner_NR.shape == (3, 21)
        assert set(owner_NR[1]) == {size - 1}
        for n in (0, 2):
            counts = np.bincount(owner_NR[n], minlength=size)
            assert counts.max() - counts.min() <= 1
            # long rows are dealt out too
            tokens = SPLIT.tokens.lengths_B()[SPLIT.row_U]
            sums = [tokens[owner_NR[n] == rank].sum() for rank in range(size)]
            assert max(sums) - min(sums) <= tokens.max() * 1.5


def test_a_placement_says_how_each_teachers_passes_are_computed(teachers):
    names = ["sharded", "pool", "colocated"]
    offloaded = teachers[0].entry.model_copy(update={"offload": True})
    for entry, size, together in (
        (teachers[0].entry, 2, True),
        (teachers[0].entry, 1, False),
        (offloaded, 1, True),
    ):
        placed = [replace(teachers[0], entry=entry), *teachers[1:]]
        found = place(placed, names, np.full((3, size), 1 / size))
        assert found.together_N == [together, False, False]
        assert [found.awaits(n) for n in range(3)] == [False, True, False]
        assert [found.is_alone(n) for n in range(3)] == [not together, False, True]
        assert found.word == "sharded, pool, colocated"
        picked = found.pick([2, 0])
        assert (picked.names, picked.together_N) == (["colocated", "sharded"], [False, together])
        assert picked.share_NW.shape == (2, size)


def test_rows_are_dealt_by_share_and_evenly():
    share_W = np.array([0.5, 0.0, 0.3, 0.2])
    for rows in (0, 1, 7, 1000):
        counts = np.bincount(deal(share_W, rows), minlength=4)
        assert counts.sum() == rows
        assert np.abs(counts - share_W * rows).max() < 1
        assert counts[1] == 0
    # any run of rows is dealt like the whole
    counts = np.bincount(deal(share_W, 1000)[400:500], minlength=4)
    assert np.abs(counts - 100 * share_W).max() <= 1


def test_partitioned_teachers_go_costliest_first_to_the_least_loaded_rank(teachers):
    three = of_size(teachers[0], 10, 10, 10)
    share_NW = share_rows(three, ["partitioned"] * 3, [1.0, 1.0, 2.0], 2, 1000)
    assert share_NW.tolist() == [[0, 1], [0, 1], [1, 0]]
    assert (share_rows(three, ["colocated"] * 3, [1.0, 1.0, 2.0], 2, 1000) == 0.5).all()


# costs of the teachers, and how many ranks
MIXES = [
    ([9, 1, 1, 1], 4),
    ([1], 4),
    ([1, 1, 1], 2),
    ([5, 4, 3, 3, 3], 2),
    ([7] + [1] * 20, 8),
    ([3, 2, 2], 5),
    (list(range(1, 30)), 7),
]


@pytest.mark.parametrize(("costs_N", "size"), MIXES)
def test_no_rank_has_more_than_a_twentieth_above_the_mean_where_memory_allows(
    teachers, costs_N, size
):
    many = of_size(teachers[0], *[10] * len(costs_N))
    placements = ["partitioned"] * len(many)
    share_NW = share_rows(many, placements, costs_N, size, 10**6)
    np.testing.assert_allclose(share_NW.sum(axis=1), 1)
    assert share_NW.min() >= 0
    load_W = np.asarray(costs_N) @ share_NW
    ideal = sum(costs_N) / size
    assert load_W.max() <= (1 + UNEVEN) * ideal + 1e-9
    # as few as can be: each further holder of a teacher levels at least one rank
    assert (share_NW > 0).sum() <= len(many) + size - 1
    # and in rows, whatever the number asked for
    rows = np.array([np.bincount(deal(share_W, 5000), minlength=size) for share_W in share_NW])
    assert (np.asarray(costs_N) @ rows).max() / 5000 <= (1 + UNEVEN) * ideal + max(costs_N) / 500


def test_a_teacher_is_split_only_over_ranks_that_have_room_for_it(teachers):
    many = of_size(teachers[0], 100, 10, 10, 10)
    costs_N = [9.0, 1.0, 1.0, 1.0]
    placements = ["partitioned"] * 4
    # half of 200 holds the large one alone, half of 240 it and two small ones
    whole = share_rows(many, placements, costs_N, 4, 200)
    assert ((whole == 0) | (whole == 1)).all()
    split = share_rows(many, placements, costs_N, 4, 240)
    assert (split[0] > 0).all()
    # what every rank holds anyway leaves less room
    common = [*of_size(teachers[0], 100, 10, 10, 10), *of_size(teachers[0], 15)]
    held = share_rows(common, [*placements, "colocated"], [*costs_N, 1.0], 4, 240)
    assert ((held[:4] == 0) | (held[:4] == 1)).all()


def test_where_memory_bars_some_ranks_the_others_share_to_an_end(teachers):
    """A rank that has the mean but for rounding takes nothing; it once took nothing for ever."""
    many = of_size(teachers[0], 265, 438, 1420, 500)
    share_NW = share_rows(many, ["partitioned"] * 4, [66.0, 110.0, 355.0, 125.0], 6, 3983)
    np.testing.assert_allclose(share_NW.sum(axis=1), 1.0)
    assert share_NW[share_NW > 0].min() > 1e-6


def test_the_run_says_who_holds_what(teachers):
    two = of_size(teachers[0], 10, 10)
    share_NW = share_rows(two, ["partitioned"] * 2, [3.0, 1.0], 2, 1000)
    line = describe_shares(two, ["partitioned"] * 2, share_NW)
    assert line == "partitioned: t0 on rank 0 (67%), 1 (33%); t1 on rank 1 (100%)"


def test_auto_is_colocated_where_teachers_fit_and_entries_have_the_last_word(teachers):
    own = teachers[1].entry.model_copy(update={"placement": "partitioned"})
    mixed = [teachers[0], replace(teachers[1], entry=own)]
    placements, reason = choose_placements(mixed, "auto", 1, least_free(ALONE))
    assert placements == ["colocated", "partitioned"]
    assert "half of what is free" in reason
    assert choose_placements(teachers, "partitioned", 1, 0)[0] == ["partitioned"] * 3


def test_answers_are_the_models_own_in_task_order(folders, teachers, tmp_path):
    source = make_source(teachers, tmp_path / "st", tmp_path / "run")
    answer = source.submit(request()).result()
    texts = [SPLIT.examples.texts_a[row] for row in SPLIT.row_U]
    for n, folder in enumerate(folders):
        expected = logits_of(load_classifier(locate(str(folder))), texts)
        expected = expected[:, ::-1] if n == 1 else expected
        np.testing.assert_allclose(answer.logits_NBC[n].numpy(), expected, rtol=1e-4, atol=1e-4)
    source.close()


def test_invariant_03_partial_hits_give_the_bits_of_one_pass(teachers, tmp_path):
    whole = make_source(teachers, tmp_path / "whole", tmp_path / "run-1")
    expected = whole.submit(request()).result().logits_NBC
    parts = make_source(teachers, tmp_path / "parts", tmp_path / "run-2")
    for entries_R in ([3], [0, 3, 9], [9, 10, 11, 20], EVERY):
        found = parts.submit(request(entries_R)).result().logits_NBC
        assert torch.equal(found, expected[:, entries_R])
    assert parts.counts() == (3 * 21, 0)
    # another set that shares half of its texts
    other = small_split(10, split="other")
    both = np.isin(SPLIT.ids_U2[:, 0], other.ids_U2[:, 0])
    found = parts.submit(request(np.arange(10), split=other)).result().logits_NBC
    assert torch.equal(found, expected[:, both])
    whole.close()
    parts.close()


def test_a_second_run_computes_nothing_and_loads_no_teacher(teachers, tmp_path):
    for run, expected in (("one", (63, 0)), ("two", (0, 63))):
        source = make_source(teachers, tmp_path / "st", tmp_path / run)
        source.submit(request()).result()
        assert source.counts() == expected
        assert len(source.models) == (3 if run == "one" else 0)
        source.close()


def test_a_third_teacher_is_the_only_one_computed(teachers, tmp_path):
    first = make_source(teachers[:2], tmp_path / "st", tmp_path / "one")
    first.submit(request()).result()
    source = make_source(teachers, tmp_path / "st", tmp_path / "two")
    source.submit(request()).result()
    assert source.counts() == (21, 42)
    assert set(source.models) == {2}
    first.close()
    source.close()


def test_only_the_pairs_that_are_asked_for_are_computed(teachers, tmp_path):
    source = make_source(teachers, tmp_path / "st", tmp_path / "run")
    needed_NR = np.zeros((3, 21), bool)
    needed_NR[0, :5] = needed_NR[2, 5:7] = True
    answer = source.submit(request(needed_NR=needed_NR)).result()
    assert source.counts() == (7, 0)
    assert set(source.models) == {0, 2}
    np.testing.assert_array_equal(answer.present_NB.numpy(), needed_NR)
    assert not answer.logits_NBC[~torch.from_numpy(needed_NR)].any()
    journal = [json.loads(line) for line in source.journal.path.read_text().splitlines()]
    assert [(line["teacher"], line["rows"]) for line in journal] == [("a", 5), ("c", 2)]
    source.close()


def test_a_teacher_that_gives_nan_is_named_with_the_row(folders, tmp_path):
    model = load_classifier(locate(str(folders[0])))
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    broken = save_teacher(tmp_path / "broken")
    model.save_pretrained(broken)
    source = make_source(load_teachers([broken]), tmp_path / "st", tmp_path / "run")
    with pytest.raises(RunError, match=r"teacher broken gave NaN .* at a test for train row \d+"):
        source.submit(request()).result()
    source.close()


def test_what_identifies_a_prediction(folders, teachers, tmp_path):
    base = teachers[0]
    renamed = save_teacher(tmp_path / "renamed", seed=0, labels=("positive", "negative"))
    for other in load_teachers([f"{{path: {folders[0]}, weight: 3, name: x}}", renamed]):
        assert other.key.folder == base.key.folder
    for other in load_teachers(
        [
            f"{{path: {folders[0]}, max_length: 16}}",
            f"{{path: {folders[0]}, dtype: bf16}}",
            save_teacher(tmp_path / "other", seed=7),
        ]
    ):
        assert other.key.folder != base.key.folder
