"""Predictions exported from one store and imported into another."""

import numpy as np
import pytest
from store_world import check_reads, fill, logits_of, make_ids, make_key, open_table

from sead_dist.errors import UserError
from sead_dist.store.compaction import compact
from sead_dist.store.maintenance import list_store, verify
from sead_dist.store.store import TeacherKey
from sead_dist.store.transfer import carry

IDS = make_ids(300)


@pytest.fixture
def store(tmp_path):
    """Two teachers on two tasks; one of them is called by its path."""
    folder = tmp_path / "store"
    own = make_key()
    named = TeacherKey(own.fingerprint, own.numerics, "/home/someone/secret/teacher-1", 3)
    fill(folder, IDS, named, entries=range(200), run="/home/someone/run")
    fill(folder, IDS, make_key(2), task="cola", split="validation")
    return folder


@pytest.mark.parametrize("compacted", [False, True])
def test_what_was_exported_is_read_elsewhere(store, tmp_path, compacted):
    if compacted:
        compact(store)
    out, other = tmp_path / "out", tmp_path / "other"
    fill(other, IDS, make_key(3))
    carried = carry(store, out)
    assert (carried.blocks, carried.known, carried.num_rows) == (2, 0, 500)
    assert verify(out).ok
    assert carry(out, other).blocks == 2
    check_reads(other, IDS, make_key(), present=np.arange(200))
    check_reads(other, IDS, make_key(2), task="cola", split="validation")
    # what was there stays
    check_reads(other, IDS, make_key(3))
    again = carry(out, other)
    assert (again.blocks, again.known) == (0, 2)


@pytest.mark.parametrize("compacted", [False, True])
def test_an_answer_that_is_there_stays(tmp_path, compacted):
    """The same endpoint gave other answers on another machine."""
    own, other, key = tmp_path / "own", tmp_path / "other", make_key()
    fill(own, IDS, key, entries=range(50))
    open_table(other, IDS, key).write(np.arange(300), logits_of(IDS, key) + 1)
    if compacted:
        compact(other)
    carried = carry(other, own)
    assert (carried.blocks, carried.known, carried.num_rows) == (1, 0, 300)
    expected = logits_of(IDS, key)
    expected[50:] += 1
    for _ in range(2):
        logits, there = open_table(own, IDS, key).lookup(np.arange(300))
        assert there.all()
        np.testing.assert_array_equal(logits, expected)
        assert compact(own).differing == 0
    assert verify(own).ok
    assert carry(other, own).known == 1


def test_an_export_holds_no_paths(store, tmp_path):
    carry(store, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert not [path for path in files if b"someone" in path.read_bytes()]
    assert {row.teacher for row in list_store(tmp_path / "out").rows} == {"teacher-1", "teacher-2"}


def test_one_task_or_teacher_can_be_exported(store, tmp_path):
    carry(store, tmp_path / "task", task="cola")
    carry(store, tmp_path / "teacher", teacher="teacher-1")
    found = {
        name: [(row.teacher, row.task) for row in list_store(tmp_path / name).rows]
        for name in ("task", "teacher")
    }
    assert found == {"task": [("teacher-2", "cola")], "teacher": [("teacher-1", "sst2")]}
    with pytest.raises(
        UserError, match="holds no predictions of task rte; sead-dist store ls lists"
    ):
        carry(store, tmp_path / "none", task="rte")
    assert not (tmp_path / "none").exists()


def test_a_name_that_is_also_the_start_of_a_fingerprint_is_a_name(tmp_path):
    other = make_key(2)
    own = make_key()
    named = TeacherKey(own.fingerprint, own.numerics, other.fingerprint[:5], 3)
    for key in (named, other):
        fill(tmp_path / "store", IDS, key)
    for teacher, found in ((named.name, named.name), (other.fingerprint[:6], other.name)):
        out = tmp_path / f"only-{teacher}"
        carry(tmp_path / "store", out, teacher=teacher)
        assert {row.teacher for row in list_store(out).rows} == {found}


def test_an_altered_block_does_not_come_over(store, tmp_path):
    bad = sorted(store.glob("values/*/*.safetensors"))[0]
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    carried = carry(store, tmp_path / "out")
    assert [one.path for one in carried.bad] == [bad]
    assert carried.blocks == 1
    assert verify(tmp_path / "out").ok


def test_a_store_is_not_copied_into_itself_nor_into_other_things(store, tmp_path):
    with pytest.raises(UserError, match="is the store itself"):
        carry(store, store)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        carry(store, tmp_path / "full")
