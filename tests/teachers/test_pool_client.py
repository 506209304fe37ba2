"""What a student that follows the pool takes for a sign of life."""

import errno
import os
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from small import ALONE, load_teachers, make_source, save_teacher, small_split

from sead_dist.errors import RunError
from sead_dist.store.layout import create
from sead_dist.teachers import pool_client
from sead_dist.teachers.pool_client import Awaited, PoolClient, store_id

SILENT_S, LOOKS = 10.0, 40


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """(the awaited rows of `train`, wait): at each look a second has gone by."""
    source = make_source(
        load_teachers([save_teacher(tmp_path / "a")]), tmp_path / "store", tmp_path / "run", ALONE
    )
    clock = count()
    monkeypatch.setattr(
        pool_client, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _s: None)
    )
    table = source.table(0, small_split(21))
    awaited = Awaited("a", table, np.arange(21), np.zeros(21, bool))

    def wait(progress_or_stop):
        PoolClient(source.store.layout, SILENT_S, progress_or_stop).wait([awaited], "steps 1-2")

    yield source, table, wait
    source.close()


def test_rows_of_another_split_are_a_sign_of_life(waiting, tmp_path):
    """A worker fills the selection split first, while the student waits for training rows."""
    source, table, wait = waiting
    other = small_split(LOOKS, seed=5, split="selection")
    # as another process sees the store
    elsewhere = make_source(source.teachers, tmp_path / "store", tmp_path / "other", ALONE)
    looks = iter(range(LOOKS))

    def progress_or_stop(_doing):
        row = next(looks)
        elsewhere.table(0, other).write(np.array([row]), np.zeros((1, 2)))
        if row == LOOKS - 1:
            mine = elsewhere.table(0, small_split(21))
            mine.write(np.arange(21), np.zeros((21, 2)))

    wait(progress_or_stop)
    assert next(looks, None) is None
    assert table.present_U.all()
    elsewhere.close()


def test_a_store_gets_one_id_and_keeps_it(tmp_path):
    mine, other = create(tmp_path / "a"), create(tmp_path / "b")
    first = store_id(mine)
    assert first == store_id(create(tmp_path / "a")) != store_id(other)
    assert list(mine.tmp.iterdir()) == []


def test_a_store_gets_an_id_where_files_have_no_second_names_mocked(tmp_path, monkeypatch):
    """No such file system can be had here."""

    def link(*_args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    layout = create(tmp_path / "a")
    assert store_id(layout) == store_id(layout) != ""
    assert list(layout.tmp.iterdir()) == []


def test_nothing_at_all_is_none(waiting):
    _source, _table, wait = waiting
    looks = []
    with pytest.raises(RunError, match="nothing has come from the pool for 10 s"):
        wait(looks.append)
    assert len(looks) < LOOKS
