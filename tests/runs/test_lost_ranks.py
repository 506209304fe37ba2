"""A rank that stops or dies before training, without a launcher: one line names it, exit code 3.

Each rank is a process with RANK and WORLD_SIZE of its own, as `srun` or a script would start it.
"""

import os
import signal
from pathlib import Path

import pytest
from forked import _command, free_port
from ranks import CONTEXT, serve
from small import words

# what a run is at before its first step, in this order
PHASES = (
    "making the process group",
    "looking for a finished run",
    "looking at the folders",
    "reading the data and the student",
    "reading the teachers",
    "tokenising the splits",
    "hashing data, teachers and start",
    "trying to save the student",
    "placing the teachers",
    "trying the report",
    "validating the teachers",
)


def lost_command(phase, number, *given):
    """The command; this process sends itself a signal when it comes to this phase."""
    from sead_dist.runtime.heartbeat import Heartbeat

    at = Heartbeat.set_activity

    def lost_at(self, doing):
        at(self, doing)
        if doing == phase:
            os.kill(os.getpid(), number)

    Heartbeat.set_activity = lost_at
    _command(*given)


def run_with_one_lost(asked, folder: Path, lost: int, phase: str, number: signal.Signals):
    """(exit code of the other rank of two, what it said)."""
    serve()
    port, started = free_port(), []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
                 "OMP_NUM_THREADS": 1}  # fmt: skip
        env = {**os.environ, **{name: str(value) for name, value in place.items()}}
        said = (folder / f"out-{rank}", folder / f"err-{rank}", None)
        where = (phase, number) if rank == lost else (None, number)
        given = (*where, list(asked), folder, env, *said)
        started.append(CONTEXT.Process(target=lost_command, args=given))
    for process in started:
        process.start()
    started[1 - lost].join(90)
    code = started[1 - lost].exitcode
    for process in started:
        process.kill()
        process.join()
    return code, (folder / f"err-{1 - lost}").read_text("utf-8")


def check_one_line(code, said, lost, phase, what):
    assert code == 3, said
    (line,) = [line for line in said.splitlines() if line.startswith("sead-dist: ")]
    assert line.startswith(f"sead-dist: rank {lost} ")
    assert what in line
    assert "Traceback" not in said
    return line


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize(
    "phase",
    [
        phase if phase == "reading the data and the student"
        else pytest.param(phase, marks=pytest.mark.slow)
        for phase in PHASES
    ],
)  # fmt: skip
def test_a_rank_that_stops_before_training_is_named_with_what_it_was_at(
    one_teacher, tmp_path, lost, phase
):
    asked = [*command(one_teacher, tmp_path), "heartbeat.timeout_s=3"]
    code, said = run_with_one_lost(asked, tmp_path, lost, phase, signal.SIGSTOP)
    line = check_one_line(code, said, lost, phase, "has given no sign of life for 3 s")
    # its last sign may be of a second before
    known = ["starting", *PHASES]
    told = line.partition("it was at: ")[2].partition(";")[0]
    assert told in known[: known.index(phase) + 1], line


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    "phase",
    [
        "tokenising the splits",
        *(pytest.param(phase, marks=pytest.mark.slow) for phase in ("hashing data, teachers and start", "validating the teachers")),
    ],
)  # fmt: skip
def test_a_peer_that_is_killed_is_one_line_without_a_launcher(one_teacher, tmp_path, lost, phase):
    code, said = run_with_one_lost(
        command(one_teacher, tmp_path), tmp_path, lost, phase, signal.SIGKILL
    )
    check_one_line(code, said, lost, phase, "is gone (")


def command(task, root):
    return ["distill", *words(*task, root / "run", max_steps=2, teacher_validation="on")]


@pytest.mark.slow
def test_a_rank_that_stops_while_a_model_answers_rows_is_named(finished, grammar, tmp_path):
    """Commands without a configuration have the usual limits, here made shorter."""
    asked = ["evaluate", str(finished), "--data", str(grammar)]
    code, said = run_with_one_lost(asked, tmp_path, 1, "loading the model", signal.SIGKILL)
    check_one_line(code, said, 1, "loading the model", "is gone (")


def test_a_rank_that_never_comes_is_named(tmp_path, monkeypatch):
    from sead_dist.errors import RunError
    from sead_dist.runtime import distributed

    monkeypatch.setattr(distributed, "LEAST_START_WAIT_S", 1.0)
    for name, value in {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    limits = distributed.DefaultLimits(timeout_s=0.1)
    with pytest.raises(RunError, match="rank 1 has not started within 1 s"):
        distributed.join_world(limits)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RunError, match=r"rank 0 has not started at 127\.0\.0\.1"):
        distributed.join_world(limits)
