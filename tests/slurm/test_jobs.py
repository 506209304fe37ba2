"""The list of submitted runs, from a state folder and run directories; SLURM's answers are given."""

import json
import os
import stat

import pytest
from small import command

from sead_dist.errors import RunError, UserError
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm


def make_run(folder, starts=1, steps=(10, 20), finished=False):
    folder.mkdir(parents=True)
    events = [{"event": "start", "total_steps": 40, "world_size": 2}] * starts
    events += [{"event": "train", "step": n, "examples_per_second": n * 1.5} for n in steps]
    events += [{"event": "eval", "step": 20, "split": "selection", "metrics": {"accuracy": 0.75}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    scores = {"selection": {"student": {"accuracy": 0.7}}, "dev": {"student": {"accuracy": 0.8125}}}
    (folder / "scores.json").write_text(json.dumps({"metric": "accuracy", "splits": scores}))
    (folder / "run_summary.json").write_text(json.dumps({"finished": finished}))
    return folder


@pytest.fixture
def registry(tmp_path):
    """Two runs: `going`, job 7, in its second start, and `done`, job 8."""
    own = tmp_path / "jobs"
    for name, job, keys in (
        ("going", "7", {"starts": 2}),
        ("done", "8", {"steps": (40,), "finished": True}),
    ):
        run = make_run(tmp_path / name, **keys)
        (run / ".slurm").mkdir()
        log = f"submitit INFO (x) - Starting\n{name} says\n\nsrun: error: n2: task 1: Killed\n"
        (run / ".slurm" / f"{job}_0_log.out").write_text(log)
        when = f"2026-01-01T00:00:0{job}+00:00"
        jobs.register(own, jobs.Job(name, job, str(run / ".slurm"), [str(run)], when))
    return own


@pytest.fixture
def states(monkeypatch):
    known = {"7": "RUNNING"}
    monkeypatch.setattr(
        slurm, "job_states", lambda asked: {j: known[j] for j in asked if j in known}
    )
    return known


def test_the_table_says_how_far_each_run_is(registry, states, capsys):
    assert command("jobs", "--root", registry) is None
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert cells == [
        ["going", "7", "RUNNING", "20/40", "0.7500", "30.0000", "1", "going says"],
        ["done", "8", "COMPLETED", "40/40", "0.8125", "60.0000", "0", "done says"],
    ]


def test_a_state_is_slurms_word_or_the_run_folders(registry):
    going, done = jobs.registered(registry)
    assert jobs.state_of(going, "PREEMPTED") == "PREEMPTED"
    assert jobs.state_of(going, "COMPLETED") == "STOPPED"
    assert jobs.state_of(going, None) == "GONE"
    assert jobs.state_of(done, None) == "COMPLETED"


def test_the_registry_is_the_users_own_and_keeps_one_entry_a_run(registry):
    assert stat.S_IMODE(registry.stat().st_mode) == 0o700
    going = jobs.find(registry, "going")
    jobs.register(registry, jobs.Job("going", "9", going.folder, going.runs, "2027"))
    assert [job.job for job in jobs.registered(registry)] == ["8", "9"]


def test_the_state_folder_follows_the_users_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert jobs.state_folder(None) == tmp_path / "state" / "sead_dist" / "jobs"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jobs.state_folder(None) == tmp_path / ".local" / "state" / "sead_dist" / "jobs"
    assert jobs.state_folder("other") == type(tmp_path)("other")


def test_a_run_is_found_by_name_number_or_folder(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("going", "7", "./going", str(tmp_path / "going")):
        assert jobs.find(registry, word).job == "7"
    with pytest.raises(UserError, match=r"'gone' is not the name, .* run; names: going, done"):
        jobs.find(registry, "gone")


def test_a_file_that_is_no_job_is_named(registry):
    (registry / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json describes no job"):
        jobs.registered(registry)


def test_a_job_whose_runs_folder_cannot_be_is_named(registry):
    job = {"name": "x", "job": "1", "folder": "f", "runs": ["/r/" + "ä" * 130], "submitted": ""}
    (registry / "x.json").write_text(json.dumps(job))
    with pytest.raises(UserError, match=r"x\.json names a run directory with a name of more than"):
        jobs.registered(registry)


def test_logs_are_printed_and_followed_to_the_end(registry, states, capsys, monkeypatch):
    assert command("jobs", "logs", "going", "--root", registry) is None
    assert "going says\n" in capsys.readouterr().out
    log = jobs.find(registry, "going").log(0)

    def later(_seconds):
        with log.open("a") as file:
            file.write("the end\n")
        states["7"] = "COMPLETED"

    monkeypatch.setattr(jobs.time, "sleep", later)
    assert command("jobs", "--root", registry, "logs", "going", "-f") is None
    said = capsys.readouterr().out
    assert said.count("going says") == 1
    assert said.endswith("the end\n")


def test_a_log_that_is_not_there_yet(registry, states, capsys):
    assert command("jobs", "--root", registry, "logs", "going", "--rank", 1) == 2
    assert "job 7 is RUNNING; give -f to wait for the log" in capsys.readouterr().err


def test_wait_ends_with_the_runs_exit_code(registry, states):
    going, done = jobs.registered(registry)
    jobs.wait([done])
    states["7"] = "FAILED"
    with pytest.raises(RunError, match=r"going \(job 7\) ended with the state FAILED: going says"):
        jobs.wait([going])
    jobs.exit_file(going.folder, "7", 0).write_text("2\n")
    with pytest.raises(UserError, match="ended with the state FAILED"):
        jobs.wait([going])


def test_wait_ends_where_slurm_has_forgotten_the_job(registry, states, monkeypatch):
    monkeypatch.setattr(jobs, "FORGOTTEN_S", 0.0)
    monkeypatch.setattr(jobs, "POLL_S", 0.01)
    states.clear()
    with pytest.raises(RunError, match="ended with the state GONE"):
        jobs.wait([jobs.find(registry, "going")])


def test_no_runs_yet(tmp_path, capsys):
    assert command("jobs", "--root", tmp_path / "none") is None
    assert "no submitted runs in" in capsys.readouterr().out


def test_cancel_says_where_there_is_no_slurm(registry, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    assert command("jobs", "--root", registry, "cancel", "going") == 2
    assert "there is no scancel" in capsys.readouterr().err
