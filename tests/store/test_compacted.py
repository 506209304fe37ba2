"""Compacted blocks: what they hold, how large they are, how damage is found, kills while merging."""

import os
import signal
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
    format_of,
    logits_of,
    make_ids,
    make_key,
    make_older,
    open_table,
    small_disk,
    start,
)

from sead_dist.store import ids as id_sets
from sead_dist.store import layout
from sead_dist.store import tensor_file as tensorfile
from sead_dist.store.compaction import compact
from sead_dist.store.ids import common, is_sorted_unique, positions, union, unique_ids
from sead_dist.store.maintenance import list_store, verify
from sead_dist.store.removal import plan_removal, remove
from sead_dist.store.rows import Coverage


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small stores take the ways of large ones: mapped, in many chunks, in many pieces."""
    monkeypatch.setattr(tensorfile, "MAP_BYTES", 2000)
    for module in ("store", "compaction", "ids"):
        monkeypatch.setattr(f"sead_dist.store.{module}.MAP_BYTES", 2000)
    monkeypatch.setattr("sead_dist.store.rows.CHUNK_BYTES", 600)
    monkeypatch.setattr(id_sets, "PIECE", 128)
    monkeypatch.setattr("sead_dist.store.rows.PIECE", 128)


def some(num: int, of: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(of, num, replace=False))


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/**/*.safetensors"))


# ---------------------------------------------------------------- sets of ids and what is covered


def test_sets_of_ids_are_searched_joined_and_united_piece_by_piece_as_all_at_once():
    ids = make_ids(1000)
    left, right = ids[some(700, 1000, 1)], ids[some(500, 1000, 2)]
    where = {id_.tobytes(): place for place, id_ in enumerate(right)}
    found = [where.get(id_.tobytes(), -1) for id_ in left]
    assert positions(left, right).tolist() == found
    shuffled = np.random.default_rng(3).permutation(700)
    assert positions(left[shuffled], right).tolist() == [found[place] for place in shuffled]
    assert positions(left, right[:0]).tolist() == [-1] * 700
    in_left, in_right = common(left, right)
    np.testing.assert_array_equal(left[in_left], right[in_right])
    assert len(in_left) == (np.array(found) >= 0).sum()
    for masks in [(np.ones(700, bool), np.ones(500, bool)), (left[:, 1] > 0, right[:, 1] < 0)]:
        pieces = list(union([(left, masks[0]), (right, masks[1])]))
        assert len(pieces) > 5
        expected = unique_ids(np.concatenate([left[masks[0]], right[masks[1]]]))[0]
        np.testing.assert_array_equal(np.concatenate(pieces), expected)
    assert is_sorted_unique(ids)
    for place in (0, 126, 127, 128, 998):  # before, at and after the border of two pieces
        wrong = ids.copy()
        wrong[place] = wrong[place + 1]
        assert not is_sorted_unique(wrong)


@pytest.mark.parametrize("num_rows", [1, 3, 5, 40, 300, 640, 999, 1000])
def test_every_form_of_a_coverage_says_the_same_as_its_mask(num_rows):
    mask = np.zeros(1000, bool)
    mask[some(num_rows, 1000, num_rows)] = True
    covers = Coverage.of(mask)
    places = np.flatnonzero(mask)
    assert covers.num_rows == num_rows
    assert covers.trouble() is None
    np.testing.assert_array_equal(np.concatenate(list(covers.pieces())), places)
    asked = np.random.default_rng(0).permutation(1000)
    rows = np.full(1000, -1)
    rows[places] = np.arange(num_rows)
    np.testing.assert_array_equal(covers.rows_at(asked), rows[asked])
    again = np.zeros(1000, bool)
    covers.add_to(again)
    np.testing.assert_array_equal(again, mask)
    size = sum(array.nbytes for array in covers.tensors.values())
    assert size <= min(4 * num_rows, 128) if num_rows < 1000 else size == 0


# ---------------------------------------------------------------- what is compacted is read


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_several_teachers_on_partly_shared_examples_read_the_same_after_compact(tmp_path, classes):
    ids = make_ids(900)
    keys = [make_key(teacher, classes=classes) for teacher in range(4)]
    held = [np.arange(900), some(500, 900, 1), some(12, 900, 2), np.arange(300, 700)]
    dev = make_ids(50, seed=1)
    fill(tmp_path, dev, keys[0], split="dev")  # another split has its own block
    for key, places in zip(keys, held, strict=True):
        table = open_table(tmp_path, ids, key)
        for part in np.array_split(np.random.default_rng(0).permutation(places), 3):
            table.write(part, logits_of(ids[part], key))
    own_set = ids[held[3]]  # and a run whose examples are others
    fill(tmp_path, ids[650:750], keys[3])
    compact(tmp_path)
    assert verify(tmp_path).ok
    held[3] = np.arange(300, 750)
    for key, places in zip(keys, held, strict=True):
        assert check_reads(tmp_path, ids, key, present=places) == []
    assert check_reads(tmp_path, own_set, keys[3]) == []
    assert check_reads(tmp_path, ids[::2], keys[1], present=held[1][held[1] % 2 == 0] // 2) == []
    rows = {(row.teacher, row.split): row.num_rows for row in list_store(tmp_path).rows}
    expected = {(key.name, "train"): len(places) for key, places in zip(keys, held, strict=True)}
    assert rows == {**expected, ("teacher-0", "dev"): 50}


def test_an_open_table_finds_what_is_missing_in_a_compacted_block_and_writes_the_rest(
    tmp_path, told
):
    ids, key = make_ids(600), make_key()
    table = open_table(tmp_path, ids, key)
    fill(tmp_path, ids, key, entries=np.arange(0, 600, 3))
    compact(tmp_path)
    table.refresh()
    assert table.present_U.sum() == 200
    table.write(np.arange(600), logits_of(ids, key))
    np.testing.assert_array_equal(table.lookup(np.arange(600))[0], logits_of(ids, key))
    check_reads(tmp_path, ids, key)
    compact(tmp_path)
    assert len(blocks_of(tmp_path)) == 1
    check_reads(tmp_path, ids, key)
    assert told == []


def test_rows_of_the_exact_class_come_before_a_compacted_block_of_another(tmp_path):
    ids, exact, other = make_ids(400), make_key(1, EXACT), make_key(1, OTHER)
    entries = some(300, 400, 1)
    open_table(tmp_path, ids, other).write(entries, np.full((300, 3), 9.0))
    compact(tmp_path)
    fill(tmp_path, ids, exact, entries=np.arange(30))
    found, present = open_table(tmp_path, ids, exact, accept_any=True).lookup(np.arange(400))
    np.testing.assert_array_equal(found[:30], logits_of(ids[:30], exact))
    assert (found[30:][present[30:]] == 9).all()
    np.testing.assert_array_equal(np.flatnonzero(present), np.union1d(np.arange(30), entries))


def test_the_safetensors_library_reads_a_compacted_block(tmp_path):
    ids, key = make_ids(500), make_key()
    entries = some(450, 500, 1)
    fill(tmp_path, ids, key, entries=entries)
    compact(tmp_path)
    (path,) = blocks_of(tmp_path)
    tensors = safetensors.numpy.load_file(path)
    assert set(tensors) == {"words", "sums", "logits"}
    np.testing.assert_array_equal(tensors["logits"], logits_of(ids[entries], key))


def test_rm_of_a_teacher_leaves_the_compacted_blocks_of_the_others(tmp_path):
    ids = make_ids(500)
    for teacher in (1, 2):
        fill(tmp_path, ids, make_key(teacher))
    compact(tmp_path)
    plan = plan_removal(tmp_path, teacher="teacher-1")
    assert remove(plan).num_blocks == 1
    check_reads(tmp_path, ids, make_key(2))
    check_reads(tmp_path, ids, make_key(1), present=[])
    remove(plan_removal(tmp_path, teacher="teacher-2"))
    assert stored_bytes(tmp_path) == 0


def test_a_compaction_raises_a_store_of_the_older_format_and_plain_blocks_lie_beside(tmp_path):
    ids, key = make_ids(300), make_key()
    fill(tmp_path, ids, key, entries=np.arange(100))
    make_older(tmp_path)
    compact(tmp_path)
    assert format_of(tmp_path) == 2
    check_reads(tmp_path, ids, key, present=np.arange(100))
    fill(tmp_path, ids, key, entries=np.arange(100, 300))  # plain blocks beside compacted ones
    check_reads(tmp_path, ids, key)


# ---------------------------------------------------------------- size


def least_bytes(held: dict[int, np.ndarray], classes: int) -> int:
    """One 16-byte key an example, and 4 x C bytes an example and teacher."""
    examples = len(np.unique(np.concatenate(list(held.values()))))
    return 16 * examples + 4 * classes * sum(len(places) for places in held.values())


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("mix", ["same", "parts_of_one_set", "own_sets", "little_of_a_large_set"])
def test_a_compacted_store_is_at_most_1_3_times_what_it_must_be(tmp_path, mix, classes):
    ids = make_ids(20_000)
    held = {teacher: np.arange(20_000) for teacher in range(8)}
    if mix in ("parts_of_one_set", "own_sets"):
        held = {teacher: some(9000 + 1000 * teacher, 20_000, teacher) for teacher in range(8)}
    if mix == "little_of_a_large_set":
        held = {teacher: some(2000, 20_000, 1)[: 1200 + 100 * teacher] for teacher in range(8)}
    for teacher, places in held.items():
        key = make_key(teacher, classes=classes)
        if mix == "own_sets":
            fill(tmp_path, ids[places], key)
        else:
            fill(tmp_path, ids, key, entries=places)
    compact(tmp_path)
    assert stored_bytes(tmp_path) <= 1.3 * least_bytes(held, classes)
    for teacher, places in held.items():
        assert check_reads(tmp_path, ids, make_key(teacher, classes=classes), present=places) == []
    assert verify(tmp_path).ok
    size = stored_bytes(tmp_path)
    compact(tmp_path)
    assert stored_bytes(tmp_path) == size


def test_key_blocks_as_runs_wrote_them_are_kept_where_they_cost_little(tmp_path):
    ids = make_ids(4000)
    fill(tmp_path, ids[:3600], make_key(1))
    for teacher in range(2, 20):
        fill(tmp_path, ids, make_key(teacher))
    before = sorted((tmp_path / "keys").iterdir())
    compact(tmp_path)
    assert sorted((tmp_path / "keys").iterdir()) == before
    assert len(before) == 2


# ---------------------------------------------------------------- damage


def compacted(folder: Path, num: int = 500, missing: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """A store with one compacted block in several chunks, with a bit map; ids and entries held."""
    ids = make_ids(num)
    entries = np.delete(np.arange(num), some(missing, num, 1))
    fill(folder, ids, make_key(), entries=entries)
    compact(folder)
    return ids, entries


@pytest.mark.slow
def test_every_flipped_byte_of_a_compacted_block_is_found_by_verify(tmp_path):
    compacted(tmp_path, num=150, missing=5)
    (path,) = blocks_of(tmp_path)
    good = path.read_bytes()
    for place in range(0, len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
        assert not verify(tmp_path).ok, f"byte {place} of {len(good)}"
    path.write_bytes(good)
    assert verify(tmp_path).ok


@pytest.mark.parametrize("where", ["chunk", "sums", "words", "cut"])
def test_a_damaged_compacted_block_gives_no_wrong_row_and_is_set_aside(tmp_path, where, told):
    ids, entries = compacted(tmp_path)
    (path,) = blocks_of(tmp_path)
    tensors = safetensors.numpy.load_file(path)
    content = bytearray(path.read_bytes())
    name = "logits" if where in ("chunk", "cut") else where
    start_of = content.index(tensors[name].tobytes())
    content[start_of + tensors[name].nbytes // 2] ^= 4
    path.write_bytes(content[:-4] if where == "cut" else content)
    table = open_table(tmp_path, ids, make_key())
    if where == "chunk":  # the rest is sound, and is read
        assert table.lookup(entries[:10])[1].all()
        assert told == []
    found, present = table.lookup(entries)
    assert not present.any()
    assert np.isnan(found).all()
    assert not table.present_U.any()
    assert len(told) == 1
    assert path.name in told[0]
    assert os.listdir(tmp_path / "quarantine") != []
    table.write(entries, logits_of(ids[entries], make_key()))  # computed again
    np.testing.assert_array_equal(table.lookup(entries)[0], logits_of(ids[entries], make_key()))
    check_reads(tmp_path, ids, make_key(), present=entries)


def test_a_flip_found_while_a_table_on_other_examples_reads_goes_the_same_way(tmp_path, told):
    ids, entries = compacted(tmp_path)
    (path,) = blocks_of(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    table = open_table(tmp_path, ids[100:], make_key())
    fresh = np.setdiff1d(np.arange(500), entries)
    assert table.lookup(np.arange(50))[1].sum() == 50 - (fresh[fresh < 150] >= 100).sum()
    assert not table.lookup(np.arange(400))[1].any()
    assert len(told) == 1
    table.write(np.arange(400), logits_of(ids[100:], make_key()))
    np.testing.assert_array_equal(table.lookup(np.arange(400))[0], logits_of(ids[100:], make_key()))


def test_compact_sets_an_altered_compacted_block_aside(tmp_path):
    ids, entries = compacted(tmp_path)
    (path,) = blocks_of(tmp_path)
    fill(tmp_path, ids, make_key())
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    result = compact(tmp_path)
    assert [bad.path for bad in result.bad] == [path]
    check_reads(tmp_path, ids, make_key(), present=np.setdiff1d(np.arange(500), entries))


# ---------------------------------------------------------------- kills, full disks


FILLED = """
from sead_dist.store import compaction
from sead_dist.store.compaction import compact
def tell(logits_MC):
    print("filled", flush=True)
    time.sleep(60)
compaction.chunk_sums = tell
compact(Path(sys.argv[1]))
"""


def test_a_compact_killed_with_a_block_half_made_loses_nothing(tmp_path):
    ids = make_ids(400)
    for teacher in (1, 2):
        fill(tmp_path, ids[:300], make_key(teacher))
        fill(tmp_path, ids, make_key(teacher))
    before = blocks_of(tmp_path)
    process = start(FILLED, tmp_path)
    assert process.stdout.readline() == "filled\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert blocks_of(tmp_path) == before
    (left,) = (tmp_path / "tmp").iterdir()
    assert verify(tmp_path).ok
    for teacher in (1, 2):
        check_reads(tmp_path, ids, make_key(teacher))
    os.utime(left, (0, time.time() - layout.DEAD_WRITER_S - 60))
    compact(tmp_path)
    assert not left.exists()
    assert len(blocks_of(tmp_path)) == 2
    for teacher in (1, 2):
        check_reads(tmp_path, ids, make_key(teacher))


@pytest.mark.parametrize("moment", range(4))
def test_a_compact_that_stops_before_any_file_gets_its_name_loses_nothing(
    tmp_path, monkeypatch, moment
):
    ids = make_ids(600)
    for teacher, places in enumerate((some(300, 600, 1), some(300, 600, 2))):
        fill(tmp_path, ids[places], make_key(teacher, classes=1))
        fill(tmp_path, ids[:10], make_key(teacher, classes=1))
    make_older(tmp_path)
    replace, left = os.replace, [moment]

    def stop_at(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at)
        with pytest.raises(KeyboardInterrupt):  # format, key blocks, value blocks
            compact(tmp_path)
    assert verify(tmp_path).ok
    assert os.listdir(tmp_path / "tmp") == []
    compact(tmp_path)
    assert len(blocks_of(tmp_path)) == 2
    for teacher, places in enumerate((some(300, 600, 1), some(300, 600, 2))):
        present = np.union1d(places, np.arange(10))
        check_reads(tmp_path, ids, make_key(teacher, classes=1), present=present)


def test_a_compact_without_room_is_one_line_and_loses_nothing(tmp_path):
    ids, key = make_ids(5000), make_key()
    for part in np.array_split(np.arange(5000), 10):
        fill(tmp_path, ids, key, entries=part)
    before = blocks_of(tmp_path)
    code = """
import resource
from sead_dist.errors import RunError
from sead_dist.store.compaction import compact
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    compact(Path(sys.argv[1]))
except RunError as error:
    print(error)
"""
    out = finish(start(code, tmp_path))
    assert out.count("\n") == 1
    assert "cannot be written" in out
    assert "File too large" in out
    assert os.listdir(tmp_path / "tmp") == []
    assert blocks_of(tmp_path) == before
    check_reads(tmp_path, ids, key)


def test_a_compact_on_a_really_full_disk_is_one_line_too(tmp_path):
    code = """
from sead_dist.errors import RunError
from sead_dist.store.compaction import compact
try:
    compact(Path(sys.argv[1]))
except RunError as error:
    print(error)
"""
    with small_disk(tmp_path, "160k"):
        ids, key = make_ids(4000), make_key()
        for part in np.array_split(np.arange(4000), 2):
            fill(tmp_path, ids, key, entries=part)
        # room would be promised to a mapped file, and the process killed when it uses it
        out = finish(start(code, tmp_path))
        assert "No space left on device" in out
        check_reads(tmp_path, ids, key)
