"""Runs on a real SLURM of two nodes: the student is the one of two ranks without SLURM, bit for
bit, whatever happens on the way."""

import json
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from small import model_bytes, newest, records
from submitted import PYTHON_FIRST, START, STEPS, Submitted, kill_rank, needed, rank_pid, run, until

from sead_dist.errors import RunError, UserError
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def submitted(tmp_path, task):
    made = Submitted(tmp_path, task)
    yield made
    made.free_nodes()


def test_two_nodes_make_the_student_of_one_machine(submitted, reference, capsys):
    assert submitted.submit("--wait") is None
    submitted.check_done(reference, starts=1)
    summary = json.loads((submitted.run / "run_summary.json").read_text())
    assert summary["world_size"] == 2
    capsys.readouterr()
    assert submitted.command("jobs") is None
    table = capsys.readouterr().out
    assert f"{STEPS}/{STEPS}" in table
    assert "COMPLETED" in table
    # the job's folder runs as code: nobody else may write or read it
    folder = submitted.run / ".slurm"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # what --dry-run shows is what was submitted
    (submitted.run / "run_summary.json").unlink()
    assert submitted.submit("--dry-run") is None
    shown = capsys.readouterr().out
    assert shown.strip() == (folder / f"{submitted.id}_submission.sh").read_text().strip()


def test_a_job_runs_with_the_plugins_that_its_words_name(tmp_path, task):
    plugin = ROOT / "tests" / "fixtures" / "plugins" / "huber.py"
    made = Submitted(tmp_path, task, num_train_epochs=1, plugins=plugin, loss="huber")
    assert made.submit("--wait", nodes=1) is None
    summary = json.loads((made.run / "run_summary.json").read_text())
    assert summary["finished"]
    identity = json.loads((made.run / "run.json").read_text())["identity"]["config"]
    assert "plugin huber.py" in identity
    assert (made.run / "plugins" / "huber.py").read_bytes() == plugin.read_bytes()


def test_a_signal_before_the_time_limit_saves_and_queues_again(submitted, reference):
    submitted.submit()
    submitted.reach(10)
    run("scancel", "--signal=USR2", submitted.id)
    until(lambda: submitted.starts() == 2, "the second start")
    assert f"saved; job {submitted.id} is queued again" in submitted.log()
    submitted.check_done(reference, starts=2)


@pytest.mark.slow
def test_the_time_limit_itself_is_no_end(submitted, reference):
    """SLURM looks at limits twice a minute, and the run would be over before: so it is held."""
    submitted.submit("--signal-delay", 110)
    submitted.reach(10)
    ranks = [rank_pid(submitted.id, rank) for rank in (0, 1)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    run("scontrol", "update", f"JobId={submitted.id}", "TimeLimit=2")
    # the notice wakes them
    until(lambda: submitted.state() != "RUNNING", "the end of the first start")
    run("scontrol", "update", f"JobId={submitted.id}", "TimeLimit=10")
    submitted.check_done(reference, starts=2)
    assert f"saved; job {submitted.id} is queued again" in submitted.log()


def test_a_job_of_a_higher_partition_takes_the_nodes_and_gives_them_back(submitted, reference):
    submitted.submit()
    submitted.reach(10)
    wanted = ["--partition=high", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null"]
    other = run("sbatch", "--parsable", *wanted, "--wrap", "sleep 3").strip()
    until(lambda: slurm.job_states([other]).get(other) == "RUNNING", "the other job")
    assert submitted.state() in ("PENDING", "COMPLETING")
    # saved at the notice, not only by the clock
    assert "saved; job" in submitted.log()
    submitted.check_done(reference, starts=2)


def test_a_job_that_is_requeued_by_hand_goes_on(submitted, reference):
    submitted.submit()
    submitted.reach(10)
    run("scontrol", "requeue", submitted.id)
    submitted.check_done(reference, starts=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_started_again(submitted, reference, rank):
    submitted.submit()
    submitted.reach(10)
    kill_rank(submitted.id, rank)
    submitted.check_done(reference, starts=2)
    assert "a rank was killed or lost" in submitted.log()


def test_a_rank_killed_too_often_ends_the_job_and_the_wait(submitted):
    """Without accounting, submitit alone would wait for ever."""
    submitted.submit("--restarts", 0)
    submitted.reach(10)
    kill_rank(submitted.id, 1)
    with pytest.raises(RunError, match=r"ended with the state FAILED: .*after 0 restarts"):
        submitted.wait()
    # the same line goes on where it stopped
    assert newest(submitted.root) >= 10
    assert submitted.starts() == 1


def test_a_node_that_is_lost_and_comes_back(submitted, reference, cluster):
    submitted.submit()
    submitted.reach(10)
    os.kill(int((cluster / "slurmd-seadtest2.pid").read_text()), signal.SIGKILL)
    kill_rank(submitted.id, 1)  # a node takes its processes with it
    until(lambda: "idle" not in node_state("seadtest2"), "the node's absence")
    run(START, "node", cluster, "seadtest2")
    submitted.check_done(reference, starts=2)


def node_state(name: str) -> str:
    return run("sinfo", "--noheader", f"--nodes={name}", "--partition=low", "--format=%T")


def test_a_job_is_not_queued_twice_and_a_cancelled_one_stays_cancelled(submitted, capsys):
    submitted.submit()
    submitted.reach(10)
    assert submitted.submit() == 2
    assert f"job {submitted.id} of run is RUNNING already" in capsys.readouterr().err
    assert submitted.command("jobs", "cancel", "run") is None
    with pytest.raises(RunError, match="ended with the state CANCELLED"):
        submitted.wait()
    assert submitted.starts() == 1


def test_an_array_over_seeds_makes_a_run_of_each(task, tmp_path):
    made = Submitted(tmp_path, task, num_train_epochs=2)
    assert made.submit("--seeds", "0-1", "--concurrent", 1, "--wait", nodes=1) is None
    names = [job.name for job in made.jobs]
    assert names == ["run/seed-0", "run/seed-1"]
    assert len({job.job.partition("_")[0] for job in made.jobs}) == 1
    students = [model_bytes(made.run / f"seed-{seed}") for seed in (0, 1)]
    assert students[0] != students[1]
    # again: both are done, so nothing is queued
    assert made.submit("--seeds", "0-1", nodes=1) is None
    assert len(made.jobs) == 2


def test_a_folder_that_the_other_node_does_not_see_is_found_at_the_start(task, tmp_path, cluster):
    """DIR/local of this cluster is a disk of each node."""
    if "ok" not in run(
        "srun",
        "--nodelist=seadtest2",
        "sh",
        "-c",
        f"mountpoint {cluster}/local && echo ok",
        check=False,
    ):
        needed("the nodes have no disks of their own: mounting is not allowed here")
    made = Submitted(tmp_path, task)
    made.words.append(f"store={cluster / 'local' / 'store'}")
    assert made.submit("--wait") == 2
    line = "a file that node seadtest1 wrote there is missing on node seadtest2"
    assert made.log().count(line) == 1
    assert "Traceback" not in made.log()
    with pytest.raises(UserError, match=line):
        made.wait()


def test_a_mistake_that_sbatch_finds_is_one_line(task, tmp_path, capsys):
    made = Submitted(tmp_path, task)
    assert made.submit("--partition", "none") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "sbatch rejected the job" in said
    assert not made.jobs


def test_the_sbatch_twin_needs_no_submitit(task, tmp_path, reference):
    made = Submitted(tmp_path, task)
    given = [word for word in made.words if not word.startswith("output_dir=")]
    command = ["sbatch", "--parsable", f"--output={tmp_path / 'log'}", "--partition=low"]
    done = subprocess.run(
        [*command, ROOT / "launch" / "slurm.sbatch", made.run, *given],
        capture_output=True,
        text=True,
        check=True,
        env=PYTHON_FIRST,
    )
    job = done.stdout.strip()
    made.reach(10)
    run("scancel", "--signal=USR2", job)
    until(lambda: slurm.job_states([job]).get(job) in slurm.ENDED, "the end of the job")
    assert slurm.job_states([job])[job] == "COMPLETED", (tmp_path / "log").read_text()
    assert model_bytes(made.run) == reference
    assert len(records(made.run, "start")) == 2


@pytest.mark.slow
def test_accounting_knows_what_the_controller_has_forgotten(task, tmp_path, monkeypatch):
    """One job on a cluster of its own with slurmdbd on MariaDB."""
    folder = Path(tempfile.mkdtemp()) / "cluster"
    folder.parent.chmod(0o755)  # munge's socket is for everybody
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("ACCT", "1")
    run(START, folder)
    try:
        made = Submitted(tmp_path, task, num_train_epochs=2)
        assert made.submit("--wait") is None
        job = made.id
        made.submit("--seeds", "5", nodes=1)
        made.command("jobs", "cancel", "run/seed-5")
        with pytest.raises(RunError, match="ended with the state CANCELLED"):
            jobs.wait([jobs.find(made.registry, "run/seed-5")])
        # squeue answers nothing: what follows can only come from sacct
        monkeypatch.setattr(slurm, "SQUEUE", ["true"])
        assert slurm.job_states([job]) == {job: "COMPLETED"}
        cancelled = jobs.find(made.registry, "run/seed-5").job
        assert slurm.job_states([cancelled]) == {cancelled: "CANCELLED"}
    finally:
        run(START, "stop", folder)
        shutil.rmtree(folder.parent)
