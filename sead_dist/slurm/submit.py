"""SLURM jobs that run what the command line runs, through submitit.

SLURM gives notice of a stop (time limit, preemption, scancel --signal=USR2). The run then saves and
returns unfinished. Only after that, submitit's handler queues the job again under its number. The
handler alone would do this on rank 0 at once, before any rank could save.
"""

import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment
from submitit.slurm import slurm as submitit_slurm

from sead_dist.config.schema import writable
from sead_dist.errors import UserError, rejection
from sead_dist.runtime.run_log import is_finished
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm

# The number of times that submitit queues a job again after its time limit. A run may need any
# number.
ANY_NUMBER = 1_000_000
# A function that runs a recipe (distill, finetune, teach I/N, sweep) with its words. It prints a
# failure in one line and returns its exit code, and returns None on success.
Attempt = Callable[[str, Sequence[str]], int | None]


@dataclass(frozen=True)
class Launch:
    """The call of every task of a job.

    submitit pickles it, so it holds plain values and one function of a module.
    """

    attempt: Attempt
    recipe: str
    words: tuple[str, ...]
    runs: tuple[str, ...]
    folder: str

    def __call__(self) -> None:
        # the visible devices are not set, since every rank takes the GPU of its local rank
        place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        job = JobEnvironment().job_id
        exit_file = jobs.exit_file(self.folder, job, place.rank)
        code = self.attempt(self.recipe, self.words)
        exit_file.write_text(f"{code or 0}\n", encoding="utf-8")
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # a return or exception through submitit would add a traceback
        finished = all(is_finished(Path(run)) for run in self.runs)
        # a job that was cancelled, or queued again from outside, is not queued again here
        if place.rank == 0 and not finished and slurm.is_running(job):
            print(f"sead-dist: saved; job {job} is queued again", flush=True)
            signal.raise_signal(signal.SIGUSR2)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit's handler queues again: the same call, since the run has saved."""
        return DelayedSubmission(self)


def job_folder(out: Path) -> Path:
    """Make OUTPUT/.slurm, which only this user can access. submitit's pickles in it run as code.

    Raises UserError where it, or OUTPUT, belongs to another user. Raises UserError or RunError
    where it cannot be made.
    """
    folder = out.absolute() / ".slurm"
    if not writable(str(folder)):
        # the line break would begin a new line in the sbatch file
        raise UserError(
            f"the folder {str(folder)!r} has a line break in its name; give another output_dir"
        )
    for path in (out, folder):
        if path.exists() and path.stat().st_uid != os.getuid():
            raise UserError(f"{path} belongs to another user; give an output_dir of your own")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise rejection(
            f"output_dir={out} cannot be made: {error.strerror}; give another output_dir", error
        ) from None
    return folder


def folder_of(launches: Mapping[str, Launch]) -> str:
    """The job folder, which is the same for all launches."""
    (folder,) = {launch.folder for launch in launches.values()}
    return folder


def sbatch_file(launches: Mapping[str, Launch], settings: slurm.SlurmSettings, name: str) -> str:
    """The text of the sbatch file that `enqueue` submits through submitit."""
    folder = Path(folder_of(launches))
    parameters = slurm.sbatch_parameters(settings, name, folder)
    return sbatch_text(parameters, settings.python, folder, len(launches))


def sbatch_text(parameters: dict[str, Any], python: str | None, folder: Path, count: int) -> str:
    """The sbatch file of `count` jobs in submitit's form. parameters: submitit's parameters."""
    start = python or shlex.quote(sys.executable)
    command = f"{start} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": count} if count > 1 else {}
    return str(submitit_slurm._make_sbatch_string(command, folder, **array, **parameters))


def make_ready(runs: Sequence[tuple[str, ...]], out: Path, root: Path) -> None:
    """Make the folder of the jobs of these runs.

    Raises UserError where there is no SLURM, and where a job of one of the runs is in the queue
    already. Raises what `job_folder` raises.
    """
    slurm.require_program("sbatch")
    reject_queued(runs, root)
    job_folder(out)


def enqueue(
    launches: Mapping[str, Launch],
    settings: slurm.SlurmSettings,
    name: str,
    root: Path,
) -> list[jobs.Job]:
    """Submit these launches (job name -> launch) as jobs, and register the jobs in `root`.

    name: the name of the job, or of the array where there are several. Raises UserError where
    sbatch rejects them.
    """
    folder = folder_of(launches)
    parameters = slurm.sbatch_parameters(settings, name, Path(folder))
    executor = submitit_slurm.SlurmExecutor(folder, ANY_NUMBER, python=settings.python)
    executor.update_parameters(**parameters)
    try:
        # sbatch's error is raised below, in one line
        with redirect_stderr(io.StringIO()), executor.batch():
            handles = [executor.submit(launch) for launch in launches.values()]
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.startswith("sbatch: error:")]
        reason = " ".join(line.removeprefix("sbatch: error:").strip() for line in lines)
        raise UserError(f"sbatch rejected the job: {reason or error}") from None
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    made = [
        jobs.Job(name, str(handle.job_id), folder, list(launch.runs), now)
        for (name, launch), handle in zip(launches.items(), handles, strict=True)
    ]
    for job in made:
        jobs.register(root, job)
    return made


def reject_queued(runs: Sequence[tuple[str, ...]], root: Path) -> None:
    """Raises UserError where a job of one of these runs is in the queue already."""
    wanted = {*runs}
    before = [job for job in jobs.registered(root) if tuple(job.runs) in wanted]
    states = slurm.job_states([job.job for job in before])
    for job in before:
        if states.get(job.job) not in {None, *slurm.ENDED}:
            raise UserError(
                f"job {job.job} of {job.name} is {states[job.job]} already; wait for it, or cancel "
                f"it: sead-dist jobs cancel {job.name}"
            )
