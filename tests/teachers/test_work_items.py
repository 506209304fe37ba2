"""The work of a pool: every pair that a student will ask for once, in its order of use."""

from functools import partial

import numpy as np
import pytest
import torch
from small import ALONE, config, load_teachers, make_source, save_teacher, small_split

from sead_dist.data.kinds import KINDS
from sead_dist.data.order import BatchStream
from sead_dist.objectives.ensemble import make_ensemble
from sead_dist.teachers.pool import Leases, Worker, items_of_split, items_of_training

TEACHERS, ROWS = 3, 8


def items(split, **changes):
    """(the training items, the stream, what it asks of whom) of three epochs of 6 steps."""
    given = config(global_batch_size=4, micro_batch_size=2, **changes)
    batches = BatchStream(split, 0, 4, 2, 3, None, 0, 1)
    weights_N = torch.full((TEACHERS,), 1 / TEACHERS)
    needed = partial(make_ensemble(given, KINDS["classification"], weights_N).needed, batches)
    return items_of_training(batches, TEACHERS, ROWS, needed), batches, needed


@pytest.mark.parametrize("ensemble", ["mean_logits", "random"])
def test_items_hold_every_pair_that_is_asked_for_once_and_no_later_than_needed(ensemble):
    split = small_split(21)
    found, batches, needed = items(split, ensemble=ensemble)
    first_NU = np.full((TEACHERS, 21), -1)
    for place, item in enumerate(found):
        assert (first_NU[item.teacher, item.entries_R] == -1).all(), "a pair is there twice"
        first_NU[item.teacher, item.entries_R] = place
    last = -1
    needed_NU = np.zeros((TEACHERS, 21), bool)
    for steps in batches.windows(0, ROWS):
        entries_R = batches.entries(steps)
        needed_NR = needed(steps, entries_R)
        new_NU = np.zeros((TEACHERS, 21), bool)
        new_NU[:, entries_R] = True if needed_NR is None else needed_NR
        new_NU &= ~needed_NU
        needed_NU |= new_NU
        if new_NU.any():
            # what a window is the first to need comes after all that earlier ones need
            assert first_NU[new_NU].min() > last
            last = first_NU[new_NU].max()
    np.testing.assert_array_equal(first_NU >= 0, needed_NU)


def test_an_items_name_is_of_its_content_alone(tmp_path):
    teachers = load_teachers([save_teacher(tmp_path / "a"), save_teacher(tmp_path / "b", seed=1)])
    one, same, longer = small_split(21), small_split(21), small_split(22)
    names = [c.name(teachers[c.teacher].key) for c in items_of_split(one, 2, ROWS)]
    again = [c.name(teachers[c.teacher].key) for c in items_of_split(same, 2, ROWS)]
    other = [c.name(teachers[c.teacher].key) for c in items_of_split(longer, 2, ROWS)]
    assert names == again
    assert len(set(names)) == len(names) == 6
    assert set(names) != set(other)


@pytest.fixture
def pool(tmp_path):
    teachers = load_teachers([save_teacher(tmp_path / name, seed=ord(name)) for name in "abc"])

    def worker(number: int, workers: int, check=lambda: True) -> Worker:
        source = make_source(teachers, tmp_path / "store", tmp_path / f"{number}", ALONE)
        return Worker(source, Leases(source.store.layout, 60.0), number, workers, check)

    return worker


def test_workers_begin_at_different_places_and_where_room_is_short_stay_with_their_teacher(pool):
    split = small_split(21)
    for number in (4, 3, 2, 1):
        hand = pool(number, 4)
        hand.room = 1
        left = items_of_split(split, TEACHERS, ROWS)
        want = left[number - 1]
        item, lease = hand.take(left)
        assert item is want
        with lease:
            hand.compute(item)
        left.remove(item)
        following, lease = hand.take(left)
        with lease:
            pass
        assert following.teacher == item.teacher


def test_after_its_first_item_a_worker_goes_in_the_students_order(pool):
    """Alone, worker 3 of 4 leaves nothing behind that the student will ask for first."""
    split = small_split(64)
    hand, order = pool(3, 4), []
    compute = hand.compute
    hand.compute = lambda item: (order.append(item), compute(item))
    items = items_of_split(split, TEACHERS, ROWS)
    assert hand.fill(items)
    places = [items.index(item) for item in order]
    assert places == [2, 0, 1, *range(3, 24)]


def test_a_worker_holds_no_more_teachers_than_there_is_room_for(pool):
    hand = pool(1, 1)
    hand.room = 2 * hand.source.teachers[0].bytes
    for n in (0, 1, 2):
        hand.make_room(n)
        hand.source._load(n, small_split(8))
    assert list(hand.source.models) == [1, 2]
    hand.room = 1  # one teacher is always held
    hand.make_room(1)
    assert list(hand.source.models) == [1]


def test_a_worker_passes_over_what_others_have_finished_and_ends_when_nothing_is_left(pool):
    first, second = pool(1, 2), pool(2, 2)
    split = small_split(21)
    assert first.fill(items_of_split(split, TEACHERS, ROWS))
    assert second.fill(items_of_split(split, TEACHERS, ROWS))
    assert first.source.journal.rows() == 3 * 21
    assert second.source.journal.rows() == 0


def test_a_worker_ends_when_its_work_is_no_longer_needed(pool):
    left = iter([True, True, False])
    hand = pool(1, 1, lambda: next(left))
    assert not hand.fill(items_of_split(small_split(21), TEACHERS, ROWS))
    assert hand.source.journal.rows() == 2 * ROWS


def test_a_worker_says_from_whom_it_takes_an_item_over(pool, told):
    hand = pool(1, 1)
    hand.leases.broken_s = 0.0
    items = items_of_split(small_split(21), TEACHERS, ROWS)
    dead = hand.source.store.layout.leases / hand.name(items[1])
    dead.write_text("000000000007 elsewhere 4711 0123\n")
    assert hand.fill(items)
    assert hand.rows == 3 * 21
    said = [line for line in told if "taken over" in line]
    place = f"{hand.source.teachers[items[1].teacher].name}, {items[1].what}"
    assert said == [
        f"{place}: taken over from process 4711 on elsewhere, which did not renew its lease for 0 s"
    ]


def test_a_lease_that_a_dead_worker_left_on_a_finished_item_is_removed_at_the_end(pool):
    hand = pool(1, 1)
    items = items_of_split(small_split(21), TEACHERS, ROWS)
    for item in items:
        hand.compute(item)
    leftover = hand.source.store.layout.leases / hand.name(items[0])
    elsewhere = leftover.with_name("of another run")
    for path in (leftover, elsewhere):
        path.write_text("000000000007 elsewhere 4711 0123\n")
    assert hand.fill(items)
    assert not leftover.exists()
    assert elsewhere.exists()
