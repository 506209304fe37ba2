"""Teachers in a pool: other processes fill the store, the student follows it, and is bit for bit
the one that computes its teachers itself."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ranks import finish, run_ranks, start
from small import model_bytes, read, run_distill, save_teacher, words

from sead_dist.cli.submit import remove_expectations
from sead_dist.config.load import load_config
from sead_dist.errors import RunError, UserError
from sead_dist.runs.claim import read_student_store, try_lock, write_student_store
from sead_dist.runs.distillation import distill
from sead_dist.runs.pool_worker import reject_other_store, teach, worker_folder
from sead_dist.runtime.distributed import World
from sead_dist.runtime.run_log import is_finished
from sead_dist.store.layout import create
from sead_dist.teachers.pool import Worker
from sead_dist.teachers.pool_client import store_id

# 54 training, 6 selection and 20 dev rows of three teachers; two epochs of 7 steps
PAIRS = 3 * (54 + 6 + 20)
KEYS = {"num_train_epochs": 2, "pool__item_rows": 16, "pool__timeout_s": 300.0}
WAIT_S = 90.0


@pytest.fixture(scope="module")
def task(two_kinds, tmp_path_factory):
    data, teachers = two_kinds
    return data, [*teachers, save_teacher(tmp_path_factory.mktemp("third") / "c", seed=2)]


def given_words(task, root, **changes):
    keys = {"placement": "pool", **KEYS, **changes}
    return words(*task, root / "run", root / "store", **keys)


@pytest.fixture(scope="module")
def colocated(task, tmp_path_factory):
    """The student of so many ranks that compute their teachers themselves."""
    made = {}

    def student(size):
        if size not in made:
            root = tmp_path_factory.mktemp(f"colocated-{size}")
            own = given_words(task, root, placement="colocated")
            run_ranks(size, root / "ranks", run_distill, own)
            made[size] = model_bytes(root / "run")
        return made[size]

    return student


def run_teach(world: World, given, worker):
    """The real worker (for `ranks.start`)."""
    return teach(load_config(given), worker, world)


def run_sharing_teach(world: World, given, worker, journal):
    """The same, but behind its first work item it waits until the other worker has computed one too: how
    quick each is to start shall not decide who does what."""
    compute = Worker.compute

    def compute_and_wait(self, item):
        compute(self, item)
        until(journal.is_file, "a work item of the other worker")

    Worker.compute = compute_and_wait  # in this process, which ends with the work
    return teach(load_config(given), worker, world)


def until(true, what, pause_s=0.01):
    end = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < end, f"{what}: not within {WAIT_S} s"
        time.sleep(pause_s)


def said(run):
    path = run / "log.txt"
    return path.read_text() if path.is_file() else ""


def journal_of(run, number, workers):
    return worker_folder(run, number, workers) / "teacher_rows" / "rank-0.jsonl"


def rows_of(run, number, workers):
    """What a worker has computed, over all its starts."""
    journal = journal_of(run, number, workers)
    if not journal.is_file():
        return 0
    return sum(json.loads(line)["rows"] for line in journal.read_text().splitlines())


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_student_beside_two_workers_is_that_of_a_colocated_run(tmp_path, task, colocated, size):
    given, run = given_words(task, tmp_path), tmp_path / "run"
    student = start(size, tmp_path / "student", run_distill, given)
    # it is there first, and waits
    until(lambda: "waiting for the pool: " in said(run), "a student that waits")
    workers = [
        start(1, tmp_path / f"w{n}", run_sharing_teach, given, f"{n}/2", journal_of(run, 3 - n, 2))
        for n in (1, 2)
    ]
    for number, worker in enumerate(workers, start=1):
        (folder,) = finish(worker, tmp_path / f"w{number}", WAIT_S)
        assert is_finished(folder)
    finish(student, tmp_path / "student", WAIT_S)
    assert model_bytes(run) == colocated(size)
    summary = read(run / "run_summary.json")
    assert (summary["teacher_forwards"], summary["store_hits"]) == (0, PAIRS)
    assert summary["placement"] == "pool"
    # nothing was computed twice, and each did a part
    shares = [rows_of(run, number, 2) for number in (1, 2)]
    assert sum(shares) == PAIRS
    assert min(shares) > 0
    assert " rows ahead" in said(run)


def test_a_worker_that_is_killed_in_a_work_item_is_replaced_by_another(tmp_path, task, colocated):
    given = given_words(task, tmp_path, pool__lease_s=1.0)
    run, leases = tmp_path / "run", tmp_path / "store" / "leases"
    student = start(1, tmp_path / "student", run_distill, given)
    victim = start(1, tmp_path / "w1", run_teach, given, "1/2")[0]
    for _ in range(1000):
        until(lambda: rows_of(run, 1, 2) > 6 and any(leases.iterdir()), "a lease", 0.0005)
        os.kill(victim.pid, signal.SIGSTOP)
        left = list(leases.iterdir())
        os.kill(victim.pid, signal.SIGKILL if left else signal.SIGCONT)
        if left:
            break
    victim.join()
    done = rows_of(run, 1, 2)
    assert done < PAIRS, "the worker was done before it could be killed"
    # the dead one's machine was years ahead: nobody looks at that
    (lease,) = left
    os.utime(lease, (4e9, 4e9))
    worker = start(1, tmp_path / "w2", run_teach, given, "2/2")
    finish(worker, tmp_path / "w2", WAIT_S)
    finish(student, tmp_path / "student", WAIT_S)
    assert model_bytes(run) == colocated(1)
    assert list(leases.iterdir()) == []
    # what the dead one had kept was not computed again; a block may have come before its line
    assert PAIRS - done - 16 <= rows_of(run, 2, 2) <= PAIRS - done


def test_a_student_without_workers_ends_and_names_the_teacher(tmp_path, task, distil):
    given = given_words(task, tmp_path, pool__timeout_s=0.2)
    with pytest.raises(RunError) as caught:
        distil(given)
    line = str(caught.value)
    assert line.startswith("teacher a: nothing has come from the pool for 0.2 s (pool.timeout_s)")
    assert "16 of 16 rows of steps 1-2 are missing" in line
    assert f"are missing in the store {tmp_path / 'store'} for teacher a" in said(tmp_path / "run")
    assert "sead-dist teach, with the keys of this run" in line


def test_a_student_that_finds_another_class_in_the_store_says_which(tmp_path, task, distil):
    given = given_words(task, tmp_path, pool__timeout_s=0.2)
    teach(load_config([*given, "teacher_precision=bf16"]), "1/1", alone())
    with pytest.raises(RunError, match=r"another numerics class \(dtype 'bf16', here 'fp32'\)"):
        distil(given)


def alone():
    import torch

    return World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def waited(task, tmp_path_factory):
    """The words and the run directory of a student that is there and found no workers."""
    root = tmp_path_factory.mktemp("waited")
    given = given_words(task, root, pool__timeout_s=0.05)
    with pytest.raises(RunError):
        distill(load_config(given), alone())
    return given, root / "run"


def test_a_worker_with_other_weights_names_both_fingerprints(waited, tmp_path):
    given, run = waited
    other = save_teacher(tmp_path / "b", "roberta", seed=9)
    teachers = [entry["path"] for entry in read(run / "teacher_manifest.json")]
    teachers[1] = str(other)
    with pytest.raises(UserError) as caught:
        teach(load_config([*given, f"teachers=[{','.join(teachers)}]"]), "1/1", alone())
    expected = read(run / "teacher_manifest.json")[1]["fingerprint"]
    line = str(caught.value)
    assert line.startswith("teacher b: the fingerprint of its weights and settings is ")
    assert f"expects {expected[:16]}" in line
    here = line.split(" is ")[1][:16]
    assert len(here) == 16
    assert here != expected[:16]


def test_what_a_student_without_progress_expected_is_forgotten_when_a_new_pool_is_submitted(
    task, tmp_path
):
    """Teachers were fixed after it ended; the new workers start before the new student."""
    given, run = given_words(task, tmp_path, pool__timeout_s=0.05), tmp_path / "run"
    with pytest.raises(RunError):
        distill(load_config(given), alone())
    replaced = save_teacher(tmp_path / "b", "roberta", seed=9)
    teachers = [str(entry["path"]) for entry in read(run / "teacher_manifest.json")]
    now = [*given, f"teachers=[{teachers[0]},{replaced},{teachers[2]}]"]
    with try_lock(run / ".lock") as taken:
        assert taken
        remove_expectations(run)  # a student is there: it counts
    with pytest.raises(UserError, match="expects"):
        teach(load_config(now), "1/1", alone())
    remove_expectations(run)
    teach(load_config(now), "1/1", alone())
    assert rows_of(run, 1, 1) == PAIRS


def test_a_worker_of_another_numerics_class_is_refused_by_name(waited):
    given, _run = waited
    with pytest.raises(UserError, match=r"teacher a: .*\(dtype 'fp32', here 'bf16'\)"):
        teach(load_config([*given, "teacher_precision=bf16"]), "1/1", alone())


def test_a_worker_for_other_data_or_settings_is_refused(waited):
    given, _run = waited
    with pytest.raises(UserError, match=r"has other settings: seed was 0, is 3; give worker and"):
        teach(load_config([*given, "seed=3"]), "1/1", alone())


def test_a_worker_that_would_fill_another_store_is_refused_and_both_are_named(waited, tmp_path):
    given, run = waited
    with pytest.raises(UserError) as caught:
        teach(load_config([*given, f"store={tmp_path / 'mine'}"]), "1/1", alone())
    theirs = run.parent / "store"
    line = f"the student in {run} reads the store {theirs}, and this worker would write to "
    assert str(caught.value).startswith(f"{line}another one, {tmp_path / 'mine'} on ")
    assert "give both the same store=DIR on a disk that their machines share" in str(caught.value)
    assert rows_of(run, 1, 1) == 0


def test_a_store_is_known_by_its_id_not_by_its_path(tmp_path):
    run, mine = tmp_path / "run", create(tmp_path / "store")
    run.mkdir()
    reject_other_store(run, mine)  # no student yet
    write_student_store(run, tmp_path / "where-the-student-sees-it", store_id(mine))
    reject_other_store(run, mine)
    # on another machine's own disk a folder of the same path is another store
    write_student_store(run, tmp_path / "store", store_id(create(tmp_path / "elsewhere")))
    with pytest.raises(UserError, match=f"reads the store {tmp_path / 'store'}, and this"):
        reject_other_store(run, mine)


def test_word_of_an_earlier_student_is_forgotten_with_the_next(task, tmp_path):
    """A student with progress goes on with another store; workers may start before it."""
    given, run = given_words(task, tmp_path, placement="colocated"), tmp_path / "run"
    distill(load_config([*given, "max_steps=2"]), alone())
    write_student_store(run, tmp_path / "full", "id of the full one")
    remove_expectations(run)
    assert read_student_store(run) is None
    # and with a student that follows none
    shutil.rmtree(run)
    run.mkdir()
    write_student_store(run, tmp_path / "full", "id of the full one")
    distill(load_config(given), alone())
    assert read_student_store(run) is None


def test_a_worker_that_leaves_to_the_student_what_the_student_awaits_is_refused(waited):
    given, run = waited
    one, *others = [entry["path"] for entry in read(run / "teacher_manifest.json")]
    mine = f"teachers=[{{path: {one}, placement: colocated}}, {', '.join(others)}]"
    with pytest.raises(
        UserError, match=r"teacher a: the student in .* waits for its predictions from"
    ):
        teach(load_config([*given, mine]), "1/1", alone())


def test_a_student_that_comes_later_with_another_store_stops_the_worker(task, tmp_path):
    given = given_words(task, tmp_path)
    worker = start(1, tmp_path / "w", run_teach, given, "1/1")
    until(lambda: rows_of(tmp_path / "run", 1, 1) > 0, "a worker at work")
    os.kill(worker[0].pid, signal.SIGSTOP)
    with pytest.raises(RunError, match="nothing has come from the pool"):
        distill(
            load_config([*given, "pool.timeout_s=0.05", f"store={tmp_path / 'other'}"]), alone()
        )
    os.kill(worker[0].pid, signal.SIGCONT)
    (outcome,) = finish(worker, tmp_path / "w", WAIT_S)
    assert isinstance(outcome, UserError)
    assert f"reads the store {tmp_path / 'other'}" in str(outcome)


@pytest.mark.parametrize(
    ("keys", "of_the_other"),
    [
        ({"teacher_validation": "off"}, 0),
        ({"teacher_validation": "on"}, 0),
        ({"ensemble": "score"}, 6),
    ],
)
def test_a_worker_leaves_teachers_that_are_not_in_the_pool_to_the_student(
    task, tmp_path, distil, monkeypatch, keys, of_the_other
):
    """Where scores decide who teaches, it has to know how all do on the selection split."""
    for module in ("pool_worker", "prepared_teachers"):  # these teachers know nothing
        monkeypatch.setattr(f"sead_dist.runs.{module}.require_passed", lambda *_: None)
    _, (one, two, three) = task
    pooled = [f"{{path: {path}, placement: pool}}" for path in (one, three)]
    entries = f"teachers=[{pooled[0]}, {two}, {pooled[1]}]"
    given = [*given_words(task, tmp_path, placement="colocated", **keys), entries]
    folder = teach(load_config(given), "1/1", alone())
    assert "2 teachers, store " in (folder / "log.txt").read_text()
    assert rows_of(tmp_path / "run", 1, 1) == PAIRS * 2 // 3 + of_the_other
    distil(given)
    forwards = read(tmp_path / "run" / "run_summary.json")["teacher_forwards"]
    assert forwards == PAIRS // 3 - of_the_other


def test_a_worker_counts_what_it_has_computed_since_it_was_started(task, tmp_path, capsys, shown):
    given = given_words(task, tmp_path)
    folder = teach(load_config(given), "1/1", alone())
    assert f"this worker has computed {PAIRS} rows" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "store")
    teach(load_config(given), "1/1", alone())
    assert f"this worker has computed {PAIRS} rows" in capsys.readouterr().out
    teach(load_config(given), "1/1", alone())
    said = capsys.readouterr().out
    assert "this worker has computed 0 rows" in said
    assert "dev texts occur in" not in said  # those lines are the student's
    assert read(folder / "run_summary.json")["rows"] == 0


def test_a_student_that_comes_later_stops_a_worker_that_teaches_something_else(task, tmp_path):
    """The worker looks before every work item."""
    given = given_words(task, tmp_path)
    worker = start(1, tmp_path / "w", run_teach, [*given, "teacher_precision=bf16"], "1/1")
    until(lambda: rows_of(tmp_path / "run", 1, 1) > 0, "a worker at work")
    os.kill(worker[0].pid, signal.SIGSTOP)
    with pytest.raises(RunError, match="nothing has come from the pool"):
        distill(load_config([*given, "pool.timeout_s=0.05"]), alone())
    os.kill(worker[0].pid, signal.SIGCONT)
    (outcome,) = finish(worker, tmp_path / "w", WAIT_S)
    assert isinstance(outcome, UserError)
    assert "another numerics class" in str(outcome)


def run_with_full_disk(world: World, given, worker):
    """A worker that after its first work item may write no block, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    compute = Worker.compute

    def first_alone(self, item):
        if self.done == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
        compute(self, item)

    Worker.compute = first_alone
    try:
        return teach(load_config(given), worker, world)
    finally:
        Worker.compute = compute
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))


def test_a_full_disk_stops_the_worker_and_keeps_what_was_finished(tmp_path, task, colocated):
    given, run = given_words(task, tmp_path), tmp_path / "run"
    student = start(1, tmp_path / "student", run_distill, given)
    worker = start(1, tmp_path / "w1", run_with_full_disk, given, "1/1")
    (outcome,) = finish(worker, tmp_path / "w1", WAIT_S)
    assert isinstance(outcome, RunError)
    assert "cannot be written" in str(outcome)
    assert "ulimit -f" in str(outcome)
    # the first work item was written; the student still waits for the rest
    assert rows_of(run, 1, 1) == 16
    assert student[0].is_alive()
    worker = start(1, tmp_path / "w2", run_teach, given, "1/1")
    finish(worker, tmp_path / "w2", WAIT_S)
    finish(student, tmp_path / "student", WAIT_S)
    assert rows_of(run, 1, 1) == PAIRS
    assert model_bytes(run) == colocated(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(
            "store", "store={} is not writable (Permission denied)", marks=pytest.mark.slow
        ),
        ("run", "output_dir={}: a worker keeps its log in {}/.pool/worker-1-of-1, which cannot be"),
    ],
)
def test_a_folder_that_is_read_only_stops_the_worker_in_one_line(tmp_path, task, name, message):
    """As root a folder's mode counts only without the capability to pass over it."""
    mortal = []
    if os.geteuid() == 0:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may write everywhere, and there is no setpriv to change that")
        mortal = [setpriv, "--bounding-set=-dac_override"]
    given = given_words(task, tmp_path)
    folder = tmp_path / name
    folder.mkdir(0o555)
    done = subprocess.run(
        [*mortal, sys.executable, "-m", "sead_dist", "teach", *given],
        capture_output=True, text=True, check=False, timeout=WAIT_S,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("sead-dist: ")]
    assert message.replace("{}", str(folder)) in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "worker", "message"),
    [
        ({}, "5/4", "--worker '5/4' is not a worker; give NUMBER/WORKERS"),
        ({}, "one", "--worker 'one' is not a worker"),
        (
            {"ensemble": "none"},
            "1/1",
            "this run uses no teachers, so a worker has nothing to compute",
        ),
        ({"placement": "auto"}, "1/1", r"no teacher of this run is in the pool \(placement=auto\)"),
        ({"encoders": "[x]"}, "1/1", "encoders is a key of finetune"),
    ],
)
def test_a_worker_says_what_it_cannot_do(tmp_path, task, changes, worker, message):
    with pytest.raises(UserError, match=message):
        teach(load_config(given_words(task, tmp_path, **changes)), worker, alone())


def test_a_worker_is_one_process(tmp_path, task):
    with pytest.raises(
        UserError, match=r"a worker is one process, and WORLD_SIZE=2; .* --worker 1/2"
    ):
        teach(load_config(given_words(task, tmp_path)), "1/1", World(0, 2, alone().device))


def test_drift_is_not_measured_on_teachers_of_the_pool(tmp_path, task, distil):
    with pytest.raises(
        UserError, match="teacher_validation=fp32 loads each teacher in the student's"
    ):
        distil(given_words(task, tmp_path, teacher_validation="fp32"))


def test_a_worker_validates_teachers_as_the_student_does(tmp_path, task):
    """It ends before the training rows, with the student's own line."""
    given = [*given_words(task, tmp_path), "teacher_validation=on"]
    with pytest.raises(UserError, match="failed its validation"):
        teach(load_config(given), "1/1", alone())
    assert rows_of(tmp_path / "run", 1, 1) == 3 * 6
