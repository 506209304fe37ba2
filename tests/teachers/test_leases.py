"""Leases on the work items of a pool: one holder at a time, and a dead one's work is taken over, by the
observer's own clock alone."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from sead_dist.store.layout import create
from sead_dist.teachers import pool as module
from sead_dist.teachers.pool import Leases

FAR_PAST, FAR_FUTURE = 0.0, 4e9


class Clock:
    """Stands in for the observer's monotonic clock."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def store(tmp_path):
    return create(tmp_path / "store")


def of_a_dead_worker(store, name: str) -> Path:
    """A lease whose holder was killed: it is never written to again."""
    path = store.leases / name
    path.write_text("000000000007 elsewhere 4711 0123\n")
    return path


def test_a_work_item_has_one_holder_at_a_time(store):
    ours, theirs = Leases(store, 60.0), Leases(store, 60.0)
    lease = ours.take("item")
    assert lease is not None
    assert lease.taken_from is None
    with lease:
        assert theirs.take("item") is None
        other = theirs.take("another")
        assert other is not None
        with other:
            pass
    again = theirs.take("item")
    assert again is not None
    with again:
        assert ours.take("item") is None
    assert list(store.leases.iterdir()) == []


def test_the_lease_of_a_worker_that_lives_is_never_taken_away(store, clock):
    ours, theirs = Leases(store, 0.2), Leases(store, 60.0)
    lease = ours.take("item")
    with lease:
        text = lease.path.read_bytes()
        for _ in range(3):
            assert theirs.take("item") is None
            clock.now += 61.0  # by the observer's clock a sign of life is due
            end = time.monotonic() + 30.0
            while lease.path.read_bytes() == text:
                assert time.monotonic() < end, "the holder gave no sign of life"
                time.sleep(0.005)
            text = lease.path.read_bytes()
            assert theirs.take("item") is None


@pytest.mark.parametrize("written_at", [FAR_PAST, FAR_FUTURE])
def test_clocks_of_other_machines_have_no_effect(store, clock, written_at):
    path = of_a_dead_worker(store, "item")
    os.utime(path, (written_at, written_at))
    observer = Leases(store, 60.0)
    # however old or new it says it is, the first look only notes what is in it
    assert observer.take("item") is None
    clock.now += 59.0
    os.utime(path, (clock.now, clock.now))  # a time that moves is not a sign of life
    assert observer.take("item") is None
    clock.now += 2.0
    lease = observer.take("item")
    assert lease is not None
    assert lease.taken_from == "process 4711 on elsewhere, which did not renew its lease for 60 s"
    with lease:
        assert observer.take("item") is None


def test_a_sign_of_life_starts_the_count_again(store, clock):
    path = of_a_dead_worker(store, "item")
    observer = Leases(store, 60.0)
    for beat in range(3):
        assert observer.take("item") is None
        clock.now += 59.0
        path.write_text(f"{beat:012d} elsewhere 4711 0123\n")
    assert observer.take("item") is None


def overtakers(store, clock, monkeypatch, third=None):
    """The leases that a quicker worker, and then a third, got of a dead worker's item, which a
    slower one was taking over."""
    of_a_dead_worker(store, "item")
    quick, slow = Leases(store, 60.0), Leases(store, 60.0)
    assert quick.take("item") is None
    assert slow.take("item") is None
    clock.now += 61.0
    rename, won = os.rename, []

    def overtaken(path, aside):
        monkeypatch.setattr(os, "rename", rename)
        won.append(quick.take("item"))
        rename(path, aside)
        if third is not None:
            won.append(third.take("item"))

    monkeypatch.setattr(os, "rename", overtaken)
    assert slow.take("item") is None
    return won


def test_of_two_that_take_over_a_dead_workers_item_one_gets_it(store, clock, monkeypatch):
    """The slower one has seen the dead lease too, and comes when the quicker has its own there."""
    (won,) = overtakers(store, clock, monkeypatch)
    with won as lease:
        # it was put back as it was: its holder still writes to it, and removes it
        assert os.path.samestat(os.stat(lease.path), os.fstat(lease._file))
    assert list(store.leases.iterdir()) == []
    assert not list(store.tmp.iterdir())


def test_a_lease_that_cannot_be_put_back_leaves_no_file(store, clock, monkeypatch):
    """A third worker has a lease of its own before the slower one can give back the quicker's."""
    first, second = overtakers(store, clock, monkeypatch, third=Leases(store, 60.0))
    with second:
        assert not list(store.tmp.iterdir())
    with first:
        pass


def test_a_holder_whose_lease_was_taken_away_leaves_the_new_one_alone(store, clock):
    suspended, other = Leases(store, 1e9), Leases(store, 60.0)
    with ExitStack() as held:
        held.enter_context(suspended.take("item"))
        assert other.take("item") is None
        clock.now += 61.0  # it gives a sign of life every five seconds, and has given none
        with other.take("item"):
            held.close()
            assert (store.leases / "item").exists()
    assert list(store.leases.iterdir()) == []
