"""Runs that are submitted to the cluster of start.sh, and what can happen to them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small import model_bytes, newest, records, words

from sead_dist.cli import commands as cli
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm

START = Path(__file__).with_name("start.sh")
STEPS = 210
KEYS = {"num_train_epochs": 30, "save_steps": 10}


def run(*command, check=True):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needed(reason: str):
    """Skip, but fail where .ci/run has said that everything must run."""
    (pytest.fail if os.environ.get("SEAD_DIST_NEED_SLURM") else pytest.skip)(reason)


def until(true: Callable[[], object], what: str, timeout_s: float = 240.0):
    """What `true` gives as soon as it is something."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail(f"{what}: not within {timeout_s} s")


class Submitted:
    """A run on the cluster: words and options go in as on the command line."""

    def __init__(self, root: Path, task, **changes) -> None:
        self.root, self.run, self.registry = root, root / "run", root / "jobs"
        self.words = words(*task, self.run, root / "store", **{**KEYS, **changes})
        self.since = time.time()

    def command(self, *given) -> int | None:
        """`sead-dist ...` in this process; its exit code, None for 0."""
        args = cli.parser().parse_args([*map(str, given), "--root", str(self.registry)])
        return cli.attempt(lambda: args.run(args))

    def submit(self, *options, nodes: int = 2) -> int | None:
        fixed = ["--nodes", nodes, "--partition", "low", "--time", "0:10:00"]
        return self.command("submit", *self.words, *fixed, *options)

    @property
    def jobs(self) -> list[jobs.Job]:
        return jobs.registered(self.registry)

    @property
    def id(self) -> str:
        return self.jobs[-1].job

    def state(self) -> str | None:
        return slurm.job_states([self.id]).get(self.id)

    def reach(self, step: int) -> None:
        """Wait until a checkpoint of this step or a later one is there."""
        until(lambda: newest(self.root) >= step, f"a checkpoint of step {step}")
        assert newest(self.root) < STEPS, "the run ended before anything could happen to it"

    def out_of_the_queue(self) -> None:
        """Wait until all of its jobs have ended."""
        for job in self.jobs:
            until(
                lambda job=job: slurm.job_states([job.job]).get(job.job) in {None, *slurm.ENDED},
                f"the end of {job.name}",
            )

    def free_nodes(self) -> None:
        """End the jobs that a test which failed has left."""
        for job in self.jobs:
            run("scancel", job.job, check=False)
        self.out_of_the_queue()

    def wait(self) -> None:
        jobs.wait(self.jobs)

    def starts(self) -> int:
        return len(records(self.run, "start"))

    def log(self, rank: int = 0) -> str:
        return self.jobs[-1].log(rank).read_text()

    def check_done(self, reference: bytes, starts: int) -> None:
        """The right student, every step recorded once, and the right line in `sead-dist jobs`."""
        self.wait()
        assert model_bytes(self.run) == reference
        steps = [record["step"] for record in records(self.run)]
        assert sorted(set(steps)) == steps
        assert set(range(10, STEPS + 1, 10)) <= set(steps)
        assert self.starts() == starts, self.log()
        assert jobs.state_of(self.jobs[-1], self.state()) == "COMPLETED"
        at = jobs.progress(self.jobs[-1])
        assert (at.step, at.total, at.restarts) == (STEPS, STEPS, starts - 1)


def rank_pid(job: str, rank: int) -> int | None:
    """The process of a rank: a Python whose environment names job and rank."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((folder / "environ").read_bytes().split(b"\0"))
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if wanted <= variables and b"submitit.core._submit" in words:
            return int(folder.name)
    return None


def kill_rank(job: str, rank: int) -> None:
    pid = rank_pid(job, rank)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


PYTHON_FIRST = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
