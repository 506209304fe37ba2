"""One format of the store: new stores have it, and one of the older format is raised when it is
opened for writing. A kept store of commit b2c3d08 is one of format 1."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from store_world import (
    check_reads,
    files_of,
    fill,
    finish,
    format_of,
    logits_of,
    make_ids,
    make_key,
    make_older,
    open_table,
    start,
)

from sead_dist.errors import UserError
from sead_dist.runtime.run_log import noted
from sead_dist.store.layout import Layout
from sead_dist.store.maintenance import list_store, verify
from sead_dist.store.removal import plan_removal
from sead_dist.store.store import StoreFolder
from sead_dist.store.transfer import carry

KEPT = Path(__file__).parents[1] / "fixtures" / "b2c3d08" / "store"


def without_number(folder: Path) -> dict[str, bytes]:
    """Keys, values and descriptions, as they lie."""
    return {
        name: held for name, held in files_of(folder).items() if name.startswith(("keys", "values"))
    }


@pytest.fixture
def older(tmp_path):
    """A copy of the kept store."""
    shutil.copytree(KEPT, tmp_path / "older")
    assert format_of(tmp_path / "older") == 1
    return tmp_path / "older"


def test_a_new_store_and_an_export_are_of_the_newest_format(tmp_path):
    fill(tmp_path / "new", make_ids(20), make_key())
    carry(tmp_path / "new", tmp_path / "out")
    assert [format_of(tmp_path / name) for name in ("new", "out")] == [2, 2]


def test_what_only_reads_a_store_of_the_older_format_changes_nothing_in_it(older, tmp_path):
    before = files_of(older)
    listing = list_store(older)
    assert verify(older).ok
    teacher = listing.rows[0].teacher
    assert plan_removal(older, teacher=teacher).paths
    carried = carry(older, tmp_path / "out")
    StoreFolder(older, read_only=True)
    assert files_of(older) == before
    assert [row.num_rows for row in listing.rows] == [
        row.num_rows for row in list_store(tmp_path / "out").rows
    ]
    assert carried.num_rows == sum(row.num_rows for row in listing.rows) > 0


def test_opening_for_writing_raises_the_kept_store_and_leaves_every_block_as_it_was(older):
    before, rows = without_number(older), list_store(older).rows
    StoreFolder(older)
    assert format_of(older) == 2
    assert without_number(older) == before
    assert list_store(older).rows == rows
    assert verify(older).ok


def test_rows_of_a_raised_store_are_read_and_added_to(tmp_path):
    ids, key = make_ids(60), make_key()
    fill(tmp_path, ids, key, entries=range(20))
    make_older(tmp_path)
    reader = StoreFolder(tmp_path, read_only=True).table(key, ids, "sst2", "train", "")
    fill(tmp_path, ids, key, entries=range(20, 40))
    assert format_of(tmp_path) == 2
    # one that has had it open since before sees the old rows and the new ones
    reader.refresh()
    np.testing.assert_array_equal(np.flatnonzero(reader.present_U), np.arange(40))
    check_reads(tmp_path, ids, key, present=np.arange(40))


def test_a_raise_that_is_stopped_before_its_rename_leaves_the_older_number(older, monkeypatch):
    before = without_number(older)

    def stop(*_paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            StoreFolder(older)
    assert format_of(older) == 1
    assert without_number(older) == before
    assert os.listdir(older / "tmp") == []
    StoreFolder(older)
    assert format_of(older) == 2


def test_a_raise_waits_for_the_lock_and_does_not_lower_what_was_raised_further_meanwhile(older):
    said = []

    def open_it() -> None:
        try:
            StoreFolder(older)
        except UserError as error:
            said.append(str(error))

    (older / "tmp").mkdir()
    waits = threading.Thread(target=open_it)
    with Layout(older).lock("store.lock", exclusive=False):
        waits.start()
        waits.join(0.3)
        assert waits.is_alive()
        assert format_of(older) == 1
        (older / "format.json").write_text('{"format": 3}')
    waits.join(60)
    assert "has format 3, this version reads formats 1 and 2" in said[0]
    assert format_of(older) == 3


def test_processes_that_raise_at_once_all_go_on(older):
    code = "StoreFolder(Path(sys.argv[1]))"
    for process in [start(code, older) for _ in range(3)]:
        finish(process)
    assert format_of(older) == 2
    assert os.listdir(older / "tmp") == []


def test_a_store_opened_for_reading_alone_keeps_a_bad_block_where_it_is(tmp_path):
    ids, key = make_ids(30), make_key()
    fill(tmp_path, ids, key)
    path = next(tmp_path.glob("values/*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    before = files_of(tmp_path)
    with noted() as notes:
        table = StoreFolder(tmp_path, read_only=True).table(key, ids, "sst2", "train", "")
    assert not table.present_U.any()
    assert files_of(tmp_path) == before
    assert len(notes) == 1
    assert notes[0].endswith("altered); left in place")
    with pytest.raises(ValueError, match="opened as read-only"):
        table.write(np.arange(30), logits_of(ids, key))
    table = open_table(tmp_path, ids, key)
    assert not path.exists()
    with pytest.raises(UserError, match="does not exist"):
        StoreFolder(tmp_path / "nowhere", read_only=True)
