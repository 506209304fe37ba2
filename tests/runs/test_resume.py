"""Kill at any step and moment, give the same command again, get the same student: invariant 6.

A test watches for the moment, stops the process (SIGSTOP) to see that it is still in the middle of
it, and then kills it (SIGKILL).
"""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import finish, run_ranks, start, try_ranks
from small import (
    model_bytes,
    newest,
    read,
    records,
    run_distill,
    save_teacher,
    words,
)

from sead_dist.errors import UserError

# 54 labelled and 20 unlabelled rows of 60 + 20, two passes of 10 steps; every step is saved, and
# teachers work one step ahead, so that there are many moments of each kind
STEPS = 20
PAIRS = 2 * (60 + 20 + 20)
KEYS = {
    "max_steps": STEPS,
    "save_steps": 1,
    "eval_steps": 3,
    "prefetch_rows": 8,
    "keep_training_state": "true",
}
RANKS = {
    1: [sys.executable, "-m", "sead_dist", "distill"],
    2: [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", "2", "-m", "sead_dist", "distill"),
    ],
}


def given_words(task, root: Path, store: Path | None = None, teachers=None, **changes):
    data = task[0]
    teachers = teachers or task[1]
    keys = {**KEYS, "unlabeled__path": data / "unlabeled.tsv", **changes}
    return words(data, teachers, root / "run", store or root / "store", **keys)


# moments: each says whether the run of `root` is in the middle of it now


def in_a_checkpoint(step: int = 1):
    """While the checkpoint of this step, or of a later one, is being written."""

    def being_written(root: Path) -> bool:
        folders = [*(root / "run" / "checkpoints").glob("step-*.tmp")]
        return any(f"step-{step:08d}" <= f.name and any(f.iterdir()) for f in folders)

    return being_written


def in_a_block(root: Path) -> bool:
    # .probe files are how an open store tries whether it may write
    names = [path.name for path in (root / "store" / "tmp").glob("*")]
    return any("safetensors" in name for name in names)


def at_step(step: int):
    def reached(root: Path) -> bool:
        return newest(root) >= step

    return reached


def kill_when(root: Path, moment, pids, alive, timeout_s: float = 120.0) -> None:
    """Kill all of `pids()` in the middle of `moment`; fails where the run ends before."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        assert alive(), "the run ended before it could be killed"
        try:
            hit = moment(root)
        except FileNotFoundError:  # the moment has passed between two looks
            continue
        if not hit:
            time.sleep(0.0005)
            continue
        everyone = pids()
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        wait_until_stopped(everyone)
        try:
            still = moment(root)
        except FileNotFoundError:
            still = False
        for pid in everyone:
            os.kill(pid, signal.SIGKILL if still else signal.SIGCONT)
        if still:
            return
    pytest.fail(f"{moment.__name__} was never seen in {timeout_s} s")


def wait_until_stopped(pids, timeout_s: float = 30.0) -> None:
    """A thread that runs goes on for a moment after SIGSTOP: what it does then must be seen too."""
    end = time.monotonic() + timeout_s
    while not all(state in "TtZX" for pid in pids for state in thread_states(pid)):
        assert time.monotonic() < end, "a process did not stop"
        time.sleep(0.0005)


def thread_states(pid: int) -> list[str]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            found.append(file.read_text().rpartition(")")[2].split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def students(run: Path) -> tuple[bytes, bytes]:
    """The final model, which is the best one and may be of an early step, and the last step's."""
    last = run / "checkpoints" / f"step-{STEPS:08d}" / "student.safetensors"
    return model_bytes(run), last.read_bytes()


def computed_rows(root: Path) -> int:
    """Pairs that the ranks kept, over all restarts, by their journals."""
    files = (root / "run" / "teacher_rows").glob("rank-*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sum(line["rows"] for line in lines)


def check_finished(root: Path, reference: tuple[bytes, bytes], world_size: int = 1) -> None:
    run = root / "run"
    assert students(run) == reference
    steps = [record["step"] for record in records(run)]
    assert steps == list(range(1, STEPS + 1))
    evaluated = [record["step"] for record in records(run, "eval")]
    assert evaluated == [3, 6, 9, 12, 15, 18, 20]
    summary = read(run / "run_summary.json")
    assert summary["finished"]
    assert (summary["steps"], summary["world_size"]) == (STEPS, world_size)
    assert summary["teacher_forwards"] + summary["store_hits"] == PAIRS
    assert not list((run / "checkpoints").glob("*.tmp"))


# in processes forked from a warm server: the recipe itself, quickly


def start_run(size: int, root: Path, given):
    return start(size, root / "ranks", run_distill, given)


def kill_ranks(root: Path, ranks, moment) -> None:
    kill_when(
        root,
        moment,
        lambda: [rank.pid for rank in ranks],
        lambda: all(rank.is_alive() for rank in ranks),
    )
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def reference(two_kinds, tmp_path_factory):
    """The students of the uninterrupted run on so many ranks, made once."""

    @functools.cache
    def students_of(size: int):
        root = tmp_path_factory.mktemp(f"whole-{size}")
        finish(start_run(size, root, given_words(two_kinds, root)), root / "ranks", 120.0)
        found = students(root / "run")
        check_finished(root, found, size)
        assert read(root / "run" / "run_summary.json")["teacher_forwards"] == PAIRS
        assert computed_rows(root) == PAIRS
        return found

    return students_of


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_invariant_06_killed_again_and_again_the_student_is_the_same(
    tmp_path, two_kinds, reference, size
):
    given = given_words(two_kinds, tmp_path)
    chance = random.Random(size)
    steps = sorted(chance.sample(range(2, STEPS - 3), 3))
    moments = [in_a_block, in_a_checkpoint(steps[0]), at_step(steps[1]), in_a_checkpoint(steps[2])]
    for moment in moments:
        before = newest(tmp_path)
        kill_ranks(tmp_path, start_run(size, tmp_path, given), moment)
        # the harm is there to see
        assert moment(tmp_path)
        assert newest(tmp_path) >= before
    assert 0 < newest(tmp_path) < STEPS
    finish(start_run(size, tmp_path, given), tmp_path / "ranks", 120.0)
    check_finished(tmp_path, reference(size), size)
    # what lay in the store is not computed twice; a block half written is lost, once
    assert computed_rows(tmp_path) <= PAIRS
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("resuming at step") >= 2


@pytest.mark.parametrize(
    ("size", "moments"),
    [
        pytest.param(1, [in_a_block, in_a_checkpoint(7)], marks=pytest.mark.slow),
        pytest.param(2, [in_a_checkpoint(5)], marks=pytest.mark.slow),
    ],
)
def test_invariant_06_the_real_command_killed_and_given_again(
    tmp_path, two_kinds, reference, size, moments
):
    command = [*RANKS[size], *given_words(two_kinds, tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for moment in moments:
        kill_command(command, env, tmp_path, moment)
        assert newest(tmp_path) < STEPS
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    check_finished(tmp_path, reference(size), size)
    if size == 1:
        before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
        third = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert third.returncode == 0, third.stderr
        assert "finished: nothing to do" in third.stdout
        after = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
        assert after == before


def kill_command(command, env, root: Path, moment) -> None:
    """Start the command and kill it, launcher and ranks, as when the machine goes down."""
    with (root / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command, env=env, stdout=said, stderr=said, start_new_session=True
        )
        try:
            kill_when(root, moment, lambda: members(process.pid), lambda: process.poll() is None)
        finally:
            for pid in members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def members(session: int) -> list[int]:
    """The live processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return found


@pytest.fixture(scope="module")
def halfway(two_kinds, tmp_path_factory):
    """A run that was killed after its eighth step; tests copy it."""
    root = tmp_path_factory.mktemp("halfway")
    kill_ranks(root, start_run(1, root, given_words(two_kinds, root)), at_step(8))
    return root


def copy_of(halfway: Path, root: Path) -> Path:
    shutil.copytree(halfway, root, dirs_exist_ok=True)
    return root


def test_invariant_06_what_may_change_on_a_resume_changes_nothing_in_one_rank(
    tmp_path, two_kinds, reference, halfway
):
    root = copy_of(halfway, tmp_path)
    changed = given_words(
        two_kinds, root, prefetch_rows=50, placement="partitioned", save_total_limit=1,
        store=tmp_path / "another-store",
    )  # fmt: skip
    run_ranks(1, root / "ranks", run_distill, changed)
    check_finished(root, reference(1))


def test_invariant_06_a_run_may_go_on_with_another_number_of_ranks(tmp_path, two_kinds, halfway):
    root = copy_of(halfway, tmp_path)
    changed = given_words(two_kinds, root, placement="partitioned", save_steps=7)
    run_ranks(2, root / "ranks", run_distill, changed)
    summary = read(root / "run" / "run_summary.json")
    assert (summary["steps"], summary["world_size"]) == (STEPS, 2)
    assert summary["teacher_forwards"] + summary["store_hits"] == PAIRS


def other_data(task, root):
    data = shutil.copytree(task[0], root / "data")
    lines = (data / "train.tsv").read_text().splitlines()
    (data / "train.tsv").write_text("\n".join(lines[:-1]) + "\n")
    return {"data__path": data}


def other_teachers(task, root):
    return {"teachers": [task[1][0], save_teacher(root / "other", seed=9)]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda *_: {"alpha": 0.25}, r"alpha was 0\.9, is 0\.25"),
        (lambda *_: {"learning_rate": 0.002}, r"learning_rate was 0\.001, is 0\.002"),
        (lambda *_: {"global_batch_size": 16}, "global_batch_size was 8, is 16"),
        (other_data, "the fingerprint of data and task was"),
        (other_teachers, "fingerprint of teacher 2 was"),
        (lambda two_kinds, _: {"teachers": two_kinds[1][::-1]}, "fingerprint of teacher 1 was"),
    ],
)
def test_invariant_06_another_run_is_refused_and_what_differs_is_named(
    tmp_path, two_kinds, halfway, changes, said
):
    root = copy_of(halfway, tmp_path)
    before = {path: path.read_bytes() for path in (root / "run" / "checkpoints").rglob("*.*")}
    (outcome,) = try_ranks(
        1, root / "ranks", run_distill, given_words(two_kinds, root, **changes(two_kinds, tmp_path))
    )
    assert isinstance(outcome, UserError), outcome
    assert "holds another run" in str(outcome)
    assert re.search(said, str(outcome)), outcome
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(6))
def test_invariant_06_killed_at_moments_drawn_by_chance(tmp_path, two_kinds, reference, attempt):
    chance = random.Random(attempt)
    size = 1 + attempt % 2
    given = given_words(two_kinds, tmp_path)
    for _ in range(3):
        ranks = start_run(size, tmp_path, given)
        time.sleep(chance.uniform(0.5, 6.0))
        ended = [rank.is_alive() for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
        if not all(ended):
            break
    finish(start_run(size, tmp_path, given), tmp_path / "ranks", 180.0)
    check_finished(tmp_path, reference(size), size)
