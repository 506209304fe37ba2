import json
import os
import reprlib
import shutil
import signal
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from store_world import (
    EXACT,
    OTHER,
    blocks_of,
    check_reads,
    fill,
    finish,
    logits_of,
    make_ids,
    make_key,
    open_table,
    small_disk,
    start,
)

from sead_dist.errors import RunError, UserError
from sead_dist.store import tensor_file as tensorfile
from sead_dist.store.ids import positions, unique_ids
from sead_dist.store.maintenance import verify
from sead_dist.store.store import StoreFolder, TeacherKey


def quarantined(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "quarantine"))


# ---------------------------------------------------------------- what is written is read


def test_lookup_gives_what_was_written_in_this_table_and_in_a_new_one(tmp_path):
    ids, key = make_ids(500), make_key()
    table = open_table(tmp_path, ids, key)
    assert not table.present_U.any()
    entries = np.random.default_rng(1).permutation(500)[:200]
    table.write(entries, logits_of(ids[entries], key))
    logits, present = table.lookup(entries)
    assert present.all()
    np.testing.assert_array_equal(logits, logits_of(ids[entries], key))
    check_reads(tmp_path, ids, key, present=entries)


@pytest.mark.parametrize("map_bytes", [0, 3000, 1 << 30])
def test_random_writes_and_lookups_agree_with_a_dict(tmp_path, monkeypatch, map_bytes):
    # map_bytes: every block mapped, large ones only, none
    monkeypatch.setattr(tensorfile, "MAP_BYTES", map_bytes)
    monkeypatch.setattr("sead_dist.store.store.MAP_BYTES", map_bytes)
    rng = np.random.default_rng(map_bytes)
    pool, keys = make_ids(300), [make_key(1), make_key(2, classes=2)]
    truth: dict[tuple[str, bytes], np.ndarray] = {}
    tables = []
    for step in range(60):
        if step % 6 == 0:
            subset = np.sort(rng.choice(300, rng.integers(1, 300), replace=False))
            key = keys[rng.integers(2)]
            tables.append((key, pool[subset], open_table(tmp_path, pool[subset], key)))
        key, ids, table = tables[rng.integers(len(tables))]
        entries = rng.integers(0, len(ids), rng.integers(1, 80))
        logits = rng.standard_normal((len(entries), key.classes)).astype(np.float32)
        table.refresh()
        table.write(entries, logits)
        for entry, row in zip(entries, logits, strict=True):
            truth.setdefault((key.name, ids[entry].tobytes()), row)
        key, ids, table = tables[rng.integers(len(tables))]
        table.refresh()
        entries = rng.integers(0, len(ids), 50)
        got, present = table.lookup(entries)
        for entry, row, there in zip(entries, got, present, strict=True):
            expected = truth.get((key.name, ids[entry].tobytes()))
            assert there == (expected is not None)
            if there:
                np.testing.assert_array_equal(row, expected)
    assert verify(tmp_path).ok


def test_ids_that_share_their_first_word_are_told_apart():
    pool = np.array([[a, b] for a in (-3, 0, 7) for b in range(-20, 20)], np.int64)
    some = pool[np.random.default_rng(0).permutation(len(pool))[:50]]
    ids, entries = unique_ids(np.concatenate([some, some]))
    assert len(ids) == 50
    np.testing.assert_array_equal(ids[entries], np.concatenate([some, some]))
    where = {tuple(row): place for place, row in enumerate(ids.tolist())}
    expected = [where.get(tuple(row), -1) for row in pool.tolist()]
    assert positions(pool, ids).tolist() == expected


def test_ids_that_are_not_sorted_and_unique_are_refused(tmp_path):
    ids = make_ids(10)
    for wrong in (ids[::-1], ids[[0, 0, 1]], ids[:, :1]):
        with pytest.raises(ValueError, match="sorted and unique"):
            open_table(tmp_path, wrong, make_key())


def test_an_empty_example_set_is_a_table_too(tmp_path):
    table = open_table(tmp_path, np.empty((0, 2), np.int64), make_key())
    table.write(np.empty(0, np.int64), np.empty((0, 3), np.float32))
    assert table.lookup(np.empty(0, np.int64))[0].shape == (0, 3)
    assert blocks_of(tmp_path) == []


def test_another_set_and_another_task_find_the_examples_they_share(tmp_path):
    ids, key = make_ids(100), make_key()
    fill(tmp_path, ids[:60], key, entries=np.arange(10, 60))
    check_reads(tmp_path, ids, key, present=np.arange(10, 60), task="mnli", split="dev")
    check_reads(tmp_path, ids[40:], key, present=np.arange(20))


def test_hits_are_partial_per_teacher(tmp_path):
    ids = make_ids(50)
    fill(tmp_path, ids, make_key(1))
    fill(tmp_path, ids, make_key(2), entries=np.arange(20))
    check_reads(tmp_path, ids, make_key(1))
    check_reads(tmp_path, ids, make_key(2), present=np.arange(20))
    check_reads(tmp_path, ids, make_key(3), present=[])


def test_rows_that_are_stored_already_are_not_written_again(tmp_path):
    ids, key = make_ids(50), make_key()
    fill(tmp_path, ids, key, entries=np.arange(20))
    before = blocks_of(tmp_path)
    fill(tmp_path, ids, key, entries=np.arange(10))
    assert blocks_of(tmp_path) == before


def test_a_table_sees_on_refresh_what_others_wrote(tmp_path):
    ids, key = make_ids(50), make_key()
    table = open_table(tmp_path, ids, key)
    fill(tmp_path, ids, key, entries=np.arange(20))
    assert not table.present_U.any()
    table.refresh()
    assert table.present_U.sum() == 20


def test_keys_are_kept_once_for_three_teachers(tmp_path):
    ids = make_ids(5000)
    for teacher in (1, 2, 3):
        fill(tmp_path, ids, make_key(teacher))
    key_bytes = [path.stat().st_size for path in (tmp_path / "keys").iterdir()]
    value_bytes = [path.stat().st_size for path in blocks_of(tmp_path)]
    assert len(key_bytes) == 1
    assert len(value_bytes) == 3
    content = 5000 * (16 + 3 * 4 * 3)
    assert content < sum(key_bytes) + sum(value_bytes) < 1.05 * content


def test_the_safetensors_library_reads_every_block(tmp_path):
    ids, key = make_ids(30), make_key()
    fill(tmp_path, ids, key, entries=[2, 5])
    (path,) = blocks_of(tmp_path)
    tensors = safetensors.numpy.load_file(path)
    assert tensors["rows"].tolist() == [2, 5]
    np.testing.assert_array_equal(tensors["logits"], logits_of(ids[[2, 5]], key))
    (path,) = (tmp_path / "keys").iterdir()
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["ids"], ids)


# ---------------------------------------------------------------- numerics classes


def test_another_numerics_class_is_read_only_when_asked_for(tmp_path):
    ids = make_ids(40)
    fill(tmp_path, ids, make_key(1, OTHER))
    fill(tmp_path, ids, make_key(1, EXACT), entries=[0, 1])
    check_reads(tmp_path, ids, make_key(1, EXACT), present=[0, 1])
    notes = check_reads(tmp_path, ids, make_key(1, EXACT), accept_any=True)
    assert len(notes) == 1
    assert OTHER in notes[0]
    table = open_table(tmp_path, ids, make_key(1, EXACT), accept_any=True)
    assert table.classes_read == (EXACT, OTHER)


def test_rows_of_the_exact_class_come_before_a_whole_block_of_another(tmp_path):
    ids, exact, other = make_ids(40), make_key(1, EXACT), make_key(1, OTHER)
    open_table(tmp_path, ids, other).write(np.arange(40), np.full((40, 3), 9.0))
    fill(tmp_path, ids, exact, entries=[3, 4])
    logits, _ = open_table(tmp_path, ids, exact, accept_any=True).lookup(np.arange(40))
    np.testing.assert_array_equal(logits[3:5], logits_of(ids[3:5], exact))
    assert (np.delete(logits, [3, 4], 0) == 9).all()


# ---------------------------------------------------------------- bad files


def test_every_flipped_byte_of_a_value_block_is_found(tmp_path):
    ids, key = make_ids(5), make_key()
    fill(tmp_path, ids, key, entries=[0, 2, 3])
    (path,) = blocks_of(tmp_path)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
        assert not verify(tmp_path).ok, f"byte {place} of {len(good)}"
    path.write_bytes(good)
    assert verify(tmp_path).ok


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_block_is_named_set_aside_and_computed_again(tmp_path, kept):
    ids, key = make_ids(50), make_key()
    fill(tmp_path, ids, key, entries=np.arange(20))
    fill(tmp_path, ids, key, entries=np.arange(20, 50))
    path = blocks_of(tmp_path)[0]
    rows = safetensors.numpy.load_file(path)["rows"]
    path.write_bytes(path.read_bytes()[:kept])
    notes = check_reads(tmp_path, ids, key, present=np.setdiff1d(np.arange(50), rows))
    assert len(notes) == 1
    assert path.name in notes[0]
    assert len(quarantined(tmp_path)) == 1
    fill(tmp_path, ids, key, entries=rows)
    assert check_reads(tmp_path, ids, key) == []
    assert verify(tmp_path).ok


def test_foreign_safetensors_files_are_set_aside(tmp_path):
    ids, key = make_ids(50), make_key(1)
    fill(tmp_path, ids, key)
    fill(tmp_path, ids, make_key(2))
    (mine,), (other,) = blocks_of(tmp_path, key), blocks_of(tmp_path, make_key(2))
    shutil.copy(other, mine.parent / other.name)  # another teacher's
    shutil.copy(mine, mine.parent / ("0" * 32 + ".safetensors"))  # under another name
    weights = {"classifier.weight": np.ones((3, 8), np.float32)}
    safetensors.numpy.save_file(weights, mine.parent / "model.safetensors")
    (mine.parent / "text.safetensors").write_text("no tensors at all, but some text")
    mine.unlink()
    notes = check_reads(tmp_path, ids, key, present=[])
    assert len(notes) == len(quarantined(tmp_path)) == 4
    assert "it belongs to another teacher" in " ".join(notes)
    check_reads(tmp_path, ids, make_key(2))


def test_the_key_block_of_the_own_set_is_repaired_and_nothing_is_lost(tmp_path):
    ids, key = make_ids(50), make_key()
    fill(tmp_path, ids, key, entries=np.arange(30))
    (path,) = (tmp_path / "keys").iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-20])
    notes = check_reads(tmp_path, ids, key, present=np.arange(30))
    assert path.name in notes[0]
    assert path.read_bytes() == good
    path.unlink()
    check_reads(tmp_path, ids, key, present=np.arange(30))
    assert verify(tmp_path).ok


@pytest.mark.parametrize("harm", ["delete", "flip"])
def test_blocks_without_their_key_block_are_set_aside(tmp_path, harm):
    ids, key = make_ids(50), make_key()
    fill(tmp_path, ids, key)
    (path,) = (tmp_path / "keys").iterdir()
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    (value,) = blocks_of(tmp_path)
    notes = check_reads(tmp_path, ids[:20], key, present=[])
    assert value.name in notes[-1]
    assert path.stem in notes[-1]
    assert blocks_of(tmp_path) == []
    fill(tmp_path, ids[:20], key)
    check_reads(tmp_path, ids, key, present=np.arange(20))
    assert verify(tmp_path).ok


def test_another_width_is_the_callers_mistake_and_costs_no_block(tmp_path):
    ids = make_ids(10)
    fill(tmp_path, ids, make_key(classes=3))
    with pytest.raises(RunError, match="holds 3 logits an example, this run needs 2"):
        open_table(tmp_path, ids, make_key(classes=2))
    check_reads(tmp_path, ids, make_key(classes=3))


def test_logits_that_are_not_finite_are_not_stored(tmp_path):
    table = open_table(tmp_path, make_ids(10), make_key())
    logits = np.ones((4, 3), np.float32)
    logits[2, 1] = np.nan
    with pytest.raises(RunError, match=r"teacher-1: logits of 1 sst2 train examples"):
        table.write(np.arange(4), logits)
    assert blocks_of(tmp_path) == []


# ---------------------------------------------------------------- the folder


def test_a_store_of_another_format_is_refused_and_left_as_it_is(tmp_path):
    StoreFolder(tmp_path)
    (tmp_path / "format.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(UserError, match=r"has format 3, this version reads formats 1 and 2; give"):
        StoreFolder(tmp_path)
    file = tmp_path / "format.json"
    for text in ("{", "[]", '{"form": 2}', "[" * 10000, ""):
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            StoreFolder(tmp_path)
        assert str(caught.value) == (
            f"{file} does not give the store's format: it holds {reprlib.repr(text)}; expected "
            '{"format": 2}; write this into it where this version or an older one made the store, '
            "else give another store=DIR"
        )
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=r"format.json cannot be read: Is a directory; correct"):
        StoreFolder(tmp_path)


def test_a_path_that_cannot_be_a_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file"):
        StoreFolder(tmp_path / "file")
    with pytest.raises(UserError, match="not writable"):
        StoreFolder(tmp_path / "file" / "store")
    with pytest.raises(UserError, match="holds other things"):
        StoreFolder(tmp_path)
    assert os.listdir(tmp_path) == ["file"]
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / ".seen-by-another-run").write_text("")
    StoreFolder(tmp_path / "shared")


def test_a_store_that_may_not_be_written_is_refused_at_the_start():
    # Not below tmp_path, whose parents another user may not enter.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        code = """
        if os.geteuid() == 0:
            os.setuid(65534)
        from sead_dist.errors import RunError
        try:
            StoreFolder(Path(sys.argv[1]))
        except RunError as error:
            print(error)
        """
        out = finish(start(textwrap.dedent(code), folder))
        assert "is not writable (Permission denied)" in out
        assert os.listdir(folder) == []


def test_a_fingerprint_is_hex():
    with pytest.raises(ValueError, match="hex"):
        TeacherKey("../../etc", EXACT, "x", 2)


# ---------------------------------------------------------------- other processes


WRITER = """
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
ids, key = make_ids(3000), make_key()
table = open_table(folder, ids, key)
print("ready", flush=True)
for entries in np.array_split(np.random.default_rng(seed).permutation(3000), 300):
    table.write(entries, logits_of(ids[entries], key))
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_sound_store(tmp_path, told):
    ids, key = make_ids(3000), make_key()
    rng = np.random.default_rng(0)
    kept = 0
    for round_ in range(12):
        process = start(WRITER, tmp_path, round_)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert verify(tmp_path).ok
        table = open_table(tmp_path, ids, key)
        assert told == []
        logits, present = table.lookup(np.arange(3000))
        np.testing.assert_array_equal(logits[present], logits_of(ids[present], key))
        assert present.sum() >= kept
        kept = present.sum()
    assert kept > 0
    finish(start(WRITER, tmp_path, 99))
    check_reads(tmp_path, ids, key)


def test_two_processes_that_write_the_same_rows_at_the_same_time_make_the_same_files(tmp_path):
    twins = [start(WRITER, tmp_path, 5) for _ in range(2)]
    for process in twins:
        finish(process)
    check_reads(tmp_path, make_ids(3000), make_key())
    # Each saw nothing of the other after it opened, and still no row is there twice.
    assert len(blocks_of(tmp_path)) == 300
    assert verify(tmp_path).ok
    assert os.listdir(tmp_path / "tmp") == []


def test_a_full_disk_is_one_line_and_no_half_block(tmp_path):
    code = """
import resource
from sead_dist.errors import RunError
ids, key = make_ids(5000), make_key()
table = open_table(Path(sys.argv[1]), ids, key)
table.write(np.arange(1000), logits_of(ids[:1000], key))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    table.write(np.arange(1000, 5000), logits_of(ids[1000:], key))
except RunError as error:
    print(error)
"""
    out = finish(start(code, tmp_path))
    assert out.count("\n") == 1
    assert f"the prediction store {tmp_path} cannot be written" in out
    assert "File too large" in out
    assert verify(tmp_path).ok
    assert os.listdir(tmp_path / "tmp") == []
    check_reads(tmp_path, make_ids(5000), make_key(), present=np.arange(1000))


def test_a_really_full_disk_too(tmp_path):
    with small_disk(tmp_path, "256k"):
        ids, key = make_ids(5000), make_key()
        table = open_table(tmp_path, ids, key)
        with pytest.raises(RunError, match="No space left on device"):
            for entries in np.array_split(np.arange(5000), 2):
                table.write(entries, np.zeros((len(entries), 3)) + 1)
                fill(tmp_path, ids, make_key(2))
                fill(tmp_path, ids, make_key(3))
        assert verify(tmp_path).ok
        assert os.listdir(tmp_path / "tmp") == []
