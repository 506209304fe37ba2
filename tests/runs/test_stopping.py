"""Signals, and ranks that die or hang: everything is saved together, or the run ends by name."""

import functools
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from ranks import finish, run_ranks, start
from small import model_bytes, read, run_distill, words

STEPS = 20
# of 60 training rows, 20 of dev, 6 held out; two teachers
PAIRS = 2 * 80


def given_words(tiny_task, root, **changes):
    keys = {"max_steps": STEPS, "num_train_epochs": 3, "save_steps": 6, **changes}
    return words(*tiny_task, root / "run", placement="partitioned", **keys)


@pytest.fixture(scope="module")
def whole(tiny_task, tmp_path_factory):
    """`whole(size)`: the student of an uninterrupted run on so many ranks."""

    @functools.cache
    def student(size):
        root = tmp_path_factory.mktemp(f"whole-{size}")
        run_ranks(size, root / "ranks", run_distill, given_words(tiny_task, root))
        assert not (root / "run" / ".ranks").exists()
        return model_bytes(root / "run")

    return student


def slowly(world, given, where, seconds):
    """The recipe, with every teacher batch or student step taking longer; where="hang": one step
    of rank 1 never ends."""
    from sead_dist.teachers import source
    from sead_dist.training.engine import Engine

    predict, step, count = source.predict, Engine.step, []

    def slow_predict(*given, **more):
        *others, done = given

        def done_slowly(part, logits):
            time.sleep(seconds)
            done(part, logits)

        return predict(*others, done_slowly, **more)

    def slow_step(self):
        count.append(1)
        time.sleep(seconds)
        while where == "hang" and world.rank == 1 and len(count) == 5:
            time.sleep(1)
        return step(self)

    if where == "teachers":
        source.predict = slow_predict
    else:
        Engine.step = slow_step
    run_distill(world, given)


def wait_for(condition, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        time.sleep(0.01)
    pytest.fail("what was waited for never came")


def at_step(root, step):
    return lambda: read(root / "run" / "progress.json")["step"] >= step


def checkpoints(root):
    return sorted(path.name for path in (root / "run" / "checkpoints").glob("step-*"))


def log(root) -> str:
    return (root / "run" / "log.txt").read_text("utf-8")


@pytest.mark.parametrize(
    ("size", "number"),
    [
        pytest.param(1, signal.SIGUSR2, marks=pytest.mark.slow),
        (2, signal.SIGUSR2),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_invariant_08_a_notice_to_one_rank_saves_all_at_one_step_and_the_student_is_the_same(
    tmp_path, tiny_task, whole, size, number
):
    given = given_words(tiny_task, tmp_path)
    ranks = start(size, tmp_path / "ranks", slowly, given, "student", 0.2)
    wait_for(at_step(tmp_path, 2))
    for _ in range(3):  # further notices change nothing
        os.kill(ranks[-1].pid, number)
        time.sleep(0.05)
    assert finish(ranks, tmp_path / "ranks", 60.0) == [None] * size
    (saved,) = checkpoints(tmp_path)
    step = int(saved.partition("-")[2])
    assert 2 <= step < 6
    assert f"stopped at step {step} of {STEPS}, saved" in log(tmp_path)
    assert not (tmp_path / "run" / "run_summary.json").exists()
    run_ranks(size, tmp_path / "ranks", run_distill, given)
    assert f"resuming at step {step} of {STEPS} ({saved})\n" in log(tmp_path)
    assert model_bytes(tmp_path / "run") == whole(size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_notice_while_teachers_compute_keeps_what_they_computed(tmp_path, tiny_task, whole, size):
    given = given_words(tiny_task, tmp_path)
    ranks = start(size, tmp_path / "ranks", slowly, given, "teachers", 0.3)
    wait_for((tmp_path / "run" / "teacher_manifest.json").exists)
    time.sleep(1.0)
    os.kill(ranks[0].pid, signal.SIGUSR2)
    assert finish(ranks, tmp_path / "ranks", 60.0) == [None] * size
    # between two steps: none has been taken yet
    assert checkpoints(tmp_path) == ["step-00000000"]
    kept = computed_rows(tmp_path)
    assert 0 < kept < PAIRS
    run_ranks(size, tmp_path / "ranks", run_distill, given)
    assert (
        computed_rows(tmp_path) == read(tmp_path / "run" / "run_summary.json")["teacher_forwards"]
    )
    assert model_bytes(tmp_path / "run") == whole(size)


def computed_rows(root: Path) -> int:
    files = (root / "run" / "teacher_rows").glob("rank-*.jsonl")
    return sum(json.loads(line)["rows"] for file in files for line in file.read_text().splitlines())


@pytest.mark.slow
def test_a_notice_in_the_validation_keeps_what_was_computed(words, tmp_path):
    given = words(tmp_path / "run", f"store={tmp_path / 'store'}")
    ranks = start(2, tmp_path / "ranks", slowly, given, "teachers", 0.5)
    wait_for((tmp_path / "run" / "teacher_manifest.json").exists)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert finish(ranks, tmp_path / "ranks", 60.0) == [None, None]
    assert "stopped while teachers computed; what they have computed is kept" in log(tmp_path)
    assert not (tmp_path / "run" / "checkpoints").exists()
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    summary = read(tmp_path / "run" / "run_summary.json")
    assert summary["finished"]
    assert computed_rows(tmp_path) == summary["teacher_forwards"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"rank 1 (process {pid} on "),
        pytest.param(
            *(signal.SIGSTOP, r"has given no sign of life for 3 s"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_dies_or_stops_ends_the_run_by_name(tmp_path, tiny_task, number, said):
    given = given_words(tiny_task, tmp_path, heartbeat__timeout_s=3)
    ranks = start(2, tmp_path / "ranks", slowly, given, "student", 0.1)
    wait_for(at_step(tmp_path, 7))
    os.kill(ranks[1].pid, number)
    ranks[0].join(60)
    assert ranks[0].exitcode == 3
    for rank in ranks:
        rank.kill()
        rank.join()
    line = log(tmp_path).splitlines()[-1]
    assert said.format(pid=ranks[1].pid) in line
    assert "rank 1 " in line
    # as its last sign of life had it, up to a second before
    assert re.search(r"it was at: (training|scoring|saving)", line)
    assert checkpoints(tmp_path)[-1] == "step-00000006"
    run_ranks(2, tmp_path / "ranks", run_distill, given)
    assert "steps taken after it are repeated" in log(tmp_path)


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_by_name(tmp_path, tiny_task):
    given = given_words(tiny_task, tmp_path, heartbeat__hang_timeout_s=3)
    ranks = start(2, tmp_path / "ranks", slowly, given, "hang", 0.0)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [3, 3]
    (line,) = [line for line in log(tmp_path).splitlines() if line.startswith("rank ")]
    assert line.startswith("rank 1 (process")
    assert "hangs: no rank has made progress for 3 s" in line


@pytest.mark.slow
def test_ranks_that_wait_for_a_slow_teacher_do_not_hang(tmp_path, tiny_task):
    data, teachers = tiny_task
    given = given_words(
        (data, teachers[:1]), tmp_path, heartbeat__timeout_s=9, heartbeat__hang_timeout_s=6
    )
    ranks = start(2, tmp_path / "ranks", slowly, given, "teachers", 0.9)
    finish(ranks, tmp_path / "ranks", 90.0)
    assert read(tmp_path / "run" / "run_summary.json")["finished"]


@pytest.mark.parametrize(("grace_s", "warned"), [(600, False), (1e-6, True)])
def test_a_save_is_timed_against_the_notice(tmp_path, tiny_task, grace_s, warned):
    run_ranks(
        1,
        tmp_path / "ranks",
        run_distill,
        given_words(tiny_task, tmp_path, preemption_notice_s=grace_s),
    )
    (line,) = [line for line in log(tmp_path).splitlines() if "a save takes" in line]
    assert ("WARNING" in line) == warned
    assert not (tmp_path / "run" / "checkpoints" / "trial").exists()
