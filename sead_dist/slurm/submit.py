"""A SLURM job that runs what the command line runs, through submitit.

When SLURM gives notice (time limit, preemption, scancel --signal=USR2), the
run itself saves and returns unfinished, and only then submitit's own handler queues the job again
under its number: submitit alone would do so on rank 0 at once, where no rank can save.
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
from sead_dist.errors import UserError, refusal
from sead_dist.runtime.run_log import is_finished
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm

# submitit counts time limits against this; ours may be as many as the run needs
ANY_NUMBER = 1_000_000
# the run's recipe by its name (distill, finetune, teach I/N), and the words; says a failure in one
# line and gives its exit code
Attempt = Callable[[str, Sequence[str]], int | None]


@dataclass(frozen=True)
class Launch:
    """What every task of a job calls. submitit pickles it, so it holds plain values and one
    function of a module."""

    attempt: Attempt
    recipe: str
    words: tuple[str, ...]
    runs: tuple[str, ...]
    folder: str

    def __call__(self) -> None:
        # not the visible devices: every rank takes the GPU of its local rank
        place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        job = JobEnvironment().job_id
        said = jobs.exit_file(self.folder, job, place.rank)
        code = self.attempt(self.recipe, self.words)
        said.write_text(f"{code or 0}\n", encoding="utf-8")
        if code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # not through submitit, which would add a traceback
        finished = all(is_finished(Path(run)) for run in self.runs)
        # a job that was cancelled, or queued again by somebody else, is left alone
        if place.rank == 0 and not finished and slurm.is_running(job):
            print(f"sead-dist: saved; job {job} is queued again", flush=True)
            signal.raise_signal(signal.SIGUSR2)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit's handler puts into the queue again: the same, for the run has saved."""
        return DelayedSubmission(self)


def job_folder(out: Path) -> Path:
    """OUTPUT/.slurm, for this user alone: submitit's pickles in it run as code.

    Raises UserError where it, or OUTPUT, belongs to somebody else.
    """
    folder = out.absolute() / ".slurm"
    if not writable(str(folder)):
        # it would be a line of its own in the file for sbatch
        raise UserError(f"the folder {str(folder)!r} has a line end in its name; give another")
    for path in (out, folder):
        if path.exists() and path.stat().st_uid != os.getuid():
            raise UserError(f"{path} belongs to another user; give an output_dir of your own")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise refusal(
            f"output_dir={out} cannot be made: {error.strerror}; give another folder", error
        ) from None
    return folder


def folder_of(launches: Mapping[str, Launch]) -> str:
    """The job folder that all of them have."""
    (folder,) = {launch.folder for launch in launches.values()}
    return folder


def sbatch_file(launches: Mapping[str, Launch], settings: slurm.SlurmSettings, name: str) -> str:
    """The text of the file that `enqueue` has submitit hand to sbatch."""
    folder = Path(folder_of(launches))
    parameters = slurm.sbatch_parameters(settings, name, folder)
    return sbatch_text(parameters, settings.python, folder, len(launches))


def sbatch_text(parameters: dict[str, Any], python: str | None, folder: Path, count: int) -> str:
    """The sbatch file of `count` jobs, as submitit writes it. parameters: sbatch's options."""
    start = python or shlex.quote(sys.executable)
    command = f"{start} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": count} if count > 1 else {}
    return str(submitit_slurm._make_sbatch_string(command, folder, **array, **parameters))


def make_ready(runs: Sequence[tuple[str, ...]], out: Path, root: Path) -> None:
    """Make the folder of a job that is to fill these runs. Raises UserError where there is no
    SLURM, where a job of one of the runs is in the queue already, and as `job_folder`."""
    slurm.need("sbatch")
    refuse_queued(runs, root)
    job_folder(out)


def enqueue(
    launches: Mapping[str, Launch],
    settings: slurm.SlurmSettings,
    name: str,
    root: Path,
) -> list[jobs.Job]:
    """Submit these launches (name -> launch), several as an array called `name`, and register their
    jobs.

    Raises UserError where sbatch refuses.
    """
    folder = folder_of(launches)
    parameters = slurm.sbatch_parameters(settings, name, Path(folder))
    executor = submitit_slurm.SlurmExecutor(folder, ANY_NUMBER, python=settings.python)
    executor.update_parameters(**parameters)
    try:
        # sbatch's complaint is told below, in one line
        with redirect_stderr(io.StringIO()), executor.batch():
            handles = [executor.submit(launch) for launch in launches.values()]
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if line.startswith("sbatch: error:")]
        reason = " ".join(line.removeprefix("sbatch: error:").strip() for line in lines)
        raise UserError(f"sbatch refused the job: {reason or error}") from None
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    made = [
        jobs.Job(name, str(handle.job_id), folder, list(launch.runs), now)
        for (name, launch), handle in zip(launches.items(), handles, strict=True)
    ]
    for job in made:
        jobs.register(root, job)
    return made


def refuse_queued(runs: Sequence[tuple[str, ...]], root: Path) -> None:
    """Raises UserError where a job of one of these runs is in the queue already."""
    wanted = {*runs}
    before = [job for job in jobs.registered(root) if tuple(job.runs) in wanted]
    states = slurm.job_states([job.job for job in before])
    for job in before:
        if states.get(job.job) not in {None, *slurm.ENDED}:
            raise UserError(
                f"job {job.job} of {job.name} is {states[job.job]} already; wait for it, or end "
                f"it: sead-dist jobs cancel {job.name}"
            )
