import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
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
    start,
)

from sead_dist.errors import UserError
from sead_dist.store import compaction, layout
from sead_dist.store.compaction import compact
from sead_dist.store.ids import read_key_block
from sead_dist.store.maintenance import list_store, verify
from sead_dist.store.removal import plan_removal, remove
from sead_dist.store.store import StoreFolder


def fill_in_parts(folder: Path, ids: np.ndarray, key, num_parts: int, **more) -> None:
    table = open_table(folder, ids, key, **more)
    for entries in np.array_split(np.random.default_rng(3).permutation(len(ids)), num_parts):
        table.write(entries, logits_of(ids[entries], key))


def key_blocks(folder: Path) -> list[Path]:
    return sorted((folder / "keys").iterdir())


# ---------------------------------------------------------------- ls and verify


def test_ls_counts_unique_rows_of_each_teacher_task_and_split(tmp_path):
    ids = make_ids(100)
    fill(tmp_path, ids[:60], make_key(1))
    # A second set overlaps the first by 30; another run, which has not looked, writes them again.
    unaware = open_table(tmp_path, ids[30:90], make_key(2))
    fill(tmp_path, ids[:60], make_key(2))
    unaware.write(np.arange(60), logits_of(ids[30:90], make_key(2)))
    fill(tmp_path, ids[90:], make_key(1, OTHER), task="mnli", split="dev")
    rows = list_store(tmp_path).rows
    found = {(row.teacher, row.task, row.split, row.num_rows, row.num_blocks) for row in rows}
    assert found == {
        ("teacher-1", "sst2", "train", 60, 1),
        ("teacher-2", "sst2", "train", 90, 2),
        ("teacher-1", "mnli", "dev", 10, 1),
    }
    assert {row.numerics for row in rows} == {EXACT, OTHER}
    assert all(abs(row.newest - time.time()) < 60 for row in rows)
    assert sum(row.num_bytes for row in rows) == sum(p.stat().st_size for p in blocks_of(tmp_path))


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    for act in (list_store, verify, compact):
        with pytest.raises(UserError, match="does not exist"):
            act(tmp_path / "none")
        with pytest.raises(UserError, match="no format"):
            act(tmp_path)
    assert os.listdir(tmp_path) == []


def test_verify_names_each_bad_file_and_moves_it_only_when_asked(tmp_path):
    ids = make_ids(50)
    for teacher in (1, 2, 3):
        fill(tmp_path, ids, make_key(teacher))
    (flipped,), (cut,) = (blocks_of(tmp_path, make_key(teacher)) for teacher in (1, 2))
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x99")
    cut.write_bytes(cut.read_bytes()[:300])
    description = tmp_path / "values" / make_key(3).folder / "teacher.json"
    description.write_text("{")
    for _ in range(2):
        result = verify(tmp_path)
        assert {bad.path for bad in result.bad} == {flipped, cut, description}
        assert not any(bad.moved for bad in result.bad)
    result = verify(tmp_path, repair=True)
    assert all(bad.moved for bad in result.bad)
    assert verify(tmp_path).ok
    check_reads(tmp_path, ids, make_key(3))


def test_verify_names_the_blocks_that_lack_their_key_block(tmp_path):
    fill(tmp_path, make_ids(50), make_key())
    key_blocks(tmp_path)[0].unlink()
    (bad,) = verify(tmp_path).bad
    assert bad.path == blocks_of(tmp_path)[0]
    assert "key block" in bad.reason


# ---------------------------------------------------------------- compact


def test_compact_merges_a_group_into_one_block_with_the_same_rows(tmp_path):
    ids = make_ids(1000)
    fill_in_parts(tmp_path, ids, make_key(1), 10)
    fill_in_parts(tmp_path, ids[:900], make_key(2), 7)
    fill(tmp_path, ids, make_key(3), entries=np.arange(300))
    fill(tmp_path, ids, make_key(3), entries=np.arange(200, 500))
    fill_in_parts(tmp_path, ids[:40], make_key(1, OTHER), 2, split="dev")
    result = compact(tmp_path)
    assert (result.blocks_before, result.blocks_after) == (21, 4)
    assert result.bytes_after < result.bytes_before
    assert (result.differing, result.bad) == (0, ())
    check_reads(tmp_path, ids, make_key(1))
    check_reads(tmp_path, ids, make_key(2), present=np.arange(900))
    check_reads(tmp_path, ids, make_key(3), present=np.arange(500))
    check_reads(tmp_path, ids, make_key(1, OTHER), present=np.arange(40))
    assert verify(tmp_path).ok
    again = compact(tmp_path)
    assert again.blocks_before == again.blocks_after == 4
    assert again.bytes_before == again.bytes_after


def test_after_compact_teachers_with_the_same_examples_share_one_key_block(tmp_path):
    ids = make_ids(4000)
    fill(tmp_path, ids[:3000], make_key(1))
    fill(tmp_path, ids[1000:], make_key(1))  # the two sets overlap, neither has all
    fill(tmp_path, ids[:2000], make_key(2))
    fill(tmp_path, ids, make_key(2))
    fill_in_parts(tmp_path, ids, make_key(3), 5)
    compact(tmp_path)
    (keys,) = key_blocks(tmp_path)
    total = keys.stat().st_size + sum(path.stat().st_size for path in blocks_of(tmp_path))
    assert total < 1.1 * 4000 * (16 + 3 * 4 * 3)
    for teacher in (1, 2, 3):
        check_reads(tmp_path, ids, make_key(teacher))


def test_compact_counts_rows_that_were_stored_with_other_bits(tmp_path):
    ids, key = make_ids(50), make_key()
    tables = [open_table(tmp_path, ids, key) for _ in range(2)]
    for number, table in enumerate(tables):
        logits = logits_of(ids, key)
        logits[:3] += number
        table.write(np.arange(50), logits)
    assert compact(tmp_path).differing == 3


def test_compact_sets_bad_blocks_aside_and_keeps_the_rest(tmp_path, told):
    ids, key = make_ids(50), make_key()
    fill_in_parts(tmp_path, ids, key, 5)
    path = blocks_of(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-4])
    result = compact(tmp_path)
    assert [bad.path for bad in result.bad] == [path]
    assert result.blocks_after == 1
    table = open_table(tmp_path, ids, key)
    assert told == []
    assert table.present_U.sum() == 40


def test_a_table_that_is_open_reads_on_after_a_compact_and_finds_the_merged_rows(tmp_path, told):
    ids, key = make_ids(500), make_key()
    table = open_table(tmp_path, ids, key)
    fill_in_parts(tmp_path, ids[:200], key, 4)
    table.refresh()
    fill_in_parts(tmp_path, ids, key, 4)
    compact(tmp_path)
    assert table.lookup(np.arange(200))[1].all()
    table.refresh()
    np.testing.assert_array_equal(table.lookup(np.arange(500))[0], logits_of(ids, key))
    assert told == []


def test_a_compact_between_reading_a_block_and_reading_its_keys_goes_unnoticed(
    tmp_path, monkeypatch
):
    ids, key = make_ids(50), make_key()
    fill(tmp_path, ids[:30], key)
    fill(tmp_path, ids[20:], key)
    old_keys = key_blocks(tmp_path)

    def compact_first(path: Path) -> np.ndarray:
        monkeypatch.undo()
        compact(tmp_path)
        return read_key_block(path)

    monkeypatch.setattr("sead_dist.store.store.read_key_block", compact_first)
    assert check_reads(tmp_path, ids, key) == []
    assert not any(path.exists() for path in old_keys)
    assert os.listdir(tmp_path / "quarantine") == []


def test_temporary_files_go_when_they_are_old(tmp_path):
    fill(tmp_path, make_ids(5), make_key())
    old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    for path in (old, new):
        path.write_text("half a block")
    os.utime(old, (0, time.time() - layout.DEAD_WRITER_S - 60))
    assert verify(tmp_path).unfinished == 1
    compact(tmp_path)
    assert os.listdir(tmp_path / "tmp") == ["new"]


def test_one_compact_at_a_time(tmp_path):
    fill(tmp_path, make_ids(5), make_key())
    with (
        layout.existing(tmp_path).lock("compact.lock", exclusive=True),
        pytest.raises(UserError, match="another compaction or removal is running"),
    ):
        compact(tmp_path)
    compact(tmp_path)


COMPACT = """
from sead_dist.errors import UserError
from sead_dist.store.compaction import compact
print("ready", flush=True)
while True:
    try:
        compact(Path(sys.argv[1]))
    except UserError as error:
        assert "another compaction" in str(error), error
    print("compacted", flush=True)
    if len(sys.argv) > 2:
        break
"""

WRITE = """
folder, teacher = Path(sys.argv[1]), int(sys.argv[2])
ids, key = make_ids(2000), make_key(teacher)
for entries in np.array_split(np.random.default_rng(teacher).permutation(2000), 100):
    part = np.sort(entries)
    with noted() as told:
        table = open_table(folder, ids[part], key)
        own = np.arange(len(part))
        table.write(own[::2], logits_of(ids[part[::2]], key))
        table.write(own[1::2], logits_of(ids[part[1::2]], key))
    assert table.present_U.all() and told == [], told
"""

READ = """
folder = Path(sys.argv[1])
ids, key = make_ids(2000), make_key(1)
before, rounds = 0, 0
while before < 2000:
    with noted() as told:
        table = open_table(folder, ids, key)
        logits, present = table.lookup(np.arange(2000))
    np.testing.assert_array_equal(logits[present], logits_of(ids[present], key))
    assert told == [] and present.sum() >= before, (told, present.sum(), before)
    before, rounds = present.sum(), rounds + 1
print(rounds)
"""


@pytest.mark.slow
def test_two_compacts_run_beside_readers_and_writers_and_nobody_notices(tmp_path):
    ids = make_ids(2000)
    StoreFolder(tmp_path)
    compacts = [start(COMPACT, tmp_path) for _ in range(2)]
    for process in compacts:
        assert process.stdout.readline() == "ready\n"
    workers = [start(WRITE, tmp_path, 1), start(WRITE, tmp_path, 2), start(READ, tmp_path)]
    for process in workers:
        finish(process)
    for process in compacts:
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.communicate()
    assert verify(tmp_path).ok
    assert os.listdir(tmp_path / "quarantine") == []
    compact(tmp_path)
    assert len(blocks_of(tmp_path)) == 2
    for teacher in (1, 2):
        check_reads(tmp_path, ids, make_key(teacher))


def test_a_compact_killed_at_any_moment_loses_nothing(tmp_path):
    ids, key = make_ids(1500), make_key()
    rng = np.random.default_rng(0)
    present = np.zeros(1500, bool)
    ended_in_time = 0
    for _ in range(15):
        table = open_table(tmp_path, ids, key)
        for _ in range(6):
            entries = rng.integers(0, 1500, 20)
            table.write(entries, logits_of(ids[entries], key))
            present[entries] = True
        process = start(COMPACT, tmp_path, "once")
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.04))
        process.send_signal(signal.SIGKILL)
        ended_in_time += process.communicate()[0] != ""
        assert verify(tmp_path).ok
        check_reads(tmp_path, ids, key, present=present)
    assert ended_in_time < 15
    finish(start(COMPACT, tmp_path, "once"))
    assert len(blocks_of(tmp_path)) == 1
    check_reads(tmp_path, ids, key, present=present)


@pytest.mark.parametrize("moment", range(6))
def test_a_compact_that_stops_between_any_two_of_its_steps_loses_nothing(
    tmp_path, monkeypatch, moment
):
    """The kills above come at random; these stop before each removal of a part."""
    ids, key = make_ids(60), make_key()
    fill_in_parts(tmp_path, ids, key, 5)
    left = [moment]
    unlink = Path.unlink

    def stop_at(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop_at)
        try:
            compact(tmp_path)
        except KeyboardInterrupt:
            assert moment < 5
    check_reads(tmp_path, ids, key)
    assert compact(tmp_path).blocks_after == 1
    check_reads(tmp_path, ids, key)


def test_a_writer_whose_key_block_a_compact_removed_writes_it_again(tmp_path, told):
    ids, key = make_ids(50), make_key()
    table = open_table(tmp_path, ids[:30], key)
    table.write(np.arange(10), logits_of(ids[:10], key))
    fill(tmp_path, ids, key)
    compact(tmp_path)
    assert len(key_blocks(tmp_path)) == 1
    table.write(np.arange(10, 30), logits_of(ids[10:30], key))
    assert verify(tmp_path).ok
    assert told == []


def test_large_parts_stay_while_a_run_holds_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "MAP_BYTES", 1000)
    ids, key = make_ids(500), make_key()
    fill_in_parts(tmp_path, ids, key, 3)
    with StoreFolder(tmp_path).hold("runs/a", [key]):
        assert compact(tmp_path).left_in_use == 3
        assert len(blocks_of(tmp_path)) == 4
    assert compact(tmp_path).blocks_after == 1
    check_reads(tmp_path, ids, key)


def test_a_run_that_accepts_any_numerics_holds_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(compaction, "MAP_BYTES", 1000)
    ids, key = make_ids(500), make_key()
    fill_in_parts(tmp_path, ids, key, 3)
    elsewhere = replace(key, numerics="of another machine")
    with StoreFolder(tmp_path).hold("runs/a", [elsewhere], accept_any=True):
        assert compact(tmp_path).left_in_use == 3
    with StoreFolder(tmp_path).hold("runs/a", [elsewhere]):
        assert compact(tmp_path).left_in_use == 0


# ---------------------------------------------------------------- rm


def test_rm_by_teacher_takes_all_of_it_and_nothing_else(tmp_path):
    ids = make_ids(100)
    fill(tmp_path, ids[:50], make_key(1))
    fill(tmp_path, ids[50:], make_key(1), split="dev")
    fill(tmp_path, ids[:50], make_key(2))
    before = sum(path.stat().st_size for path in tmp_path.glob("**/*.safetensors"))
    for name in ("teacher-1", make_key(1).fingerprint[:8]):
        plan = plan_removal(tmp_path, teacher=name)
        assert {(row.teacher, row.split) for row in plan.rows} == {
            ("teacher-1", "train"),
            ("teacher-1", "dev"),
        }
    assert len(blocks_of(tmp_path)) == 3  # a plan removes nothing
    done = remove(plan)
    after = sum(path.stat().st_size for path in tmp_path.glob("**/*.safetensors"))
    assert (done.num_blocks, done.kept, done.changed) == (2, 0, 0)
    assert done.num_bytes == plan.num_bytes == before - after
    assert not (tmp_path / "values" / make_key(1).folder).exists()
    assert len(key_blocks(tmp_path)) == 1
    check_reads(tmp_path, ids[:50], make_key(2))
    check_reads(tmp_path, ids[:50], make_key(1), present=[])


def test_rm_by_task_and_by_age(tmp_path):
    ids, key = make_ids(100), make_key()
    fill(tmp_path, ids[:50], key, task="sst2")
    time.sleep(0.05)
    middle = time.time()
    fill(tmp_path, ids[50:], key, task="mnli")
    plan = plan_removal(tmp_path, task="mnli")
    assert [row.task for row in plan.rows] == ["mnli"]
    plan = plan_removal(tmp_path, older_than_s=time.time() - middle)
    assert [row.task for row in plan.rows] == ["sst2"]
    assert plan_removal(tmp_path, task="mnli", older_than_s=3600).rows == ()
    remove(plan)
    check_reads(tmp_path, ids, key, present=np.arange(50, 100))


def test_rm_by_size_takes_the_oldest_until_the_rest_is_small_enough(tmp_path):
    for teacher in range(1, 5):
        fill(tmp_path, make_ids(200, seed=teacher), make_key(teacher))
        time.sleep(0.002)
    total = verify(tmp_path).num_bytes
    plan = plan_removal(tmp_path, keep_bytes=total * 6 // 10)
    assert [row.teacher for row in plan.rows] == ["teacher-1", "teacher-2"]
    remove(plan)
    assert verify(tmp_path).num_bytes == total - plan.num_bytes <= total * 6 // 10
    assert plan_removal(tmp_path, keep_bytes=total).rows == ()


def test_rm_without_a_condition_or_with_an_unknown_name_is_refused(tmp_path):
    fill(tmp_path, make_ids(5), make_key())
    with pytest.raises(UserError, match="no condition for what to remove"):
        plan_removal(tmp_path)
    with pytest.raises(UserError, match=r"in the store; did you mean 'teacher-1'\?"):
        plan_removal(tmp_path, teacher="teacher-9")
    with pytest.raises(UserError, match=r"did you mean 'sst2'\?"):
        plan_removal(tmp_path, task="sst3")
    fill(tmp_path, make_ids(5), make_key(2), task="cola")
    with pytest.raises(UserError, match="no task 'copa-2' is in the store; it holds cola, sst2"):
        plan_removal(tmp_path, task="copa-2")


HOLD = """
key = make_key(int(sys.argv[2]))
with StoreFolder(Path(sys.argv[1])).hold("runs/live", [key]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_rm_leaves_what_a_running_process_holds_and_takes_it_after_that_is_killed(tmp_path):
    ids = make_ids(50)
    fill(tmp_path, ids, make_key(1))
    fill(tmp_path, ids, make_key(2))
    early = plan_removal(tmp_path, task="sst2")
    assert len(early.rows) == 2
    process = start(HOLD, tmp_path, 1)
    assert process.stdout.readline() == "held\n"
    plan = plan_removal(tmp_path, task="sst2")
    assert [row.teacher for row in plan.rows] == ["teacher-2"]
    ((row, run),) = plan.kept
    assert (row.teacher, run.pid, run.run) == ("teacher-1", process.pid, "runs/live")
    assert [hold.pid for hold in list_store(tmp_path).holds] == [process.pid]
    # The plan made before the run began must not take it either.
    done = remove(early)
    assert (done.num_blocks, done.kept) == (1, 1)
    check_reads(tmp_path, ids, make_key(1))
    process.kill()
    process.communicate()
    assert os.listdir(tmp_path / "live") != []
    plan = plan_removal(tmp_path, task="sst2")
    assert plan.kept == ()
    assert remove(plan).num_blocks == 1
    assert blocks_of(tmp_path) == []
    compact(tmp_path)
    assert os.listdir(tmp_path / "live") == []


def test_a_plan_says_so_where_a_compact_came_between(tmp_path):
    ids, key = make_ids(50), make_key()
    fill_in_parts(tmp_path, ids, key, 3)
    plan = plan_removal(tmp_path, task="sst2")
    compact(tmp_path)
    assert remove(plan).changed == 3
    check_reads(tmp_path, ids, key)


def test_a_hold_ends_with_its_block_also_after_an_error(tmp_path):
    store = StoreFolder(tmp_path)
    with pytest.raises(KeyError), store.hold("runs/a", [make_key()]):
        assert len(list_store(tmp_path).holds) == 1
        raise KeyError
    assert list_store(tmp_path).holds == ()
    assert os.listdir(tmp_path / "live") == []


def test_a_description_with_one_bit_changed_is_found_and_ends_no_run(tmp_path):
    ids = make_ids(50)
    key = make_key()
    fill(tmp_path, ids, key)
    description = tmp_path / "values" / key.folder / "teacher.json"
    sound = description.read_text()
    for number in re.finditer('"classes": ([0-9])', sound):
        place = number.start(1)
        flipped = f"{sound[:place]}{chr(ord(sound[place]) ^ 1)}{sound[place + 1 :]}"
        description.write_text(flipped)
        (bad,) = verify(tmp_path).bad
        assert bad.path == description
        check_reads(tmp_path, ids, key)  # set aside, and no run ends by it
        assert not description.exists()
    # as earlier versions wrote it
    old = json.loads(sound)
    del old["checksum"]
    description.write_text(json.dumps(old))
    assert verify(tmp_path).ok
    check_reads(tmp_path, ids, key)
