"""`sead-dist submit`: a run as a SLURM job, through submitit.

What can be wrong is looked for on the login node, before the queue. The job runs the very recipe
of the command line. When SLURM gives notice (time limit, preemption, scancel --signal=USR2), the
run itself saves and returns unfinished, and only then submitit's own handler queues the job again
under its number: submitit alone would do so on rank 0 at once, where no rank can save.
"""

import io
import os
import re
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

from sead_dist import jobs, slurm
from sead_dist.config import RunConfig
from sead_dist.configfiles import load_config
from sead_dist.errors import UserError
from sead_dist.hub import refuse_push
from sead_dist.inputs import check_inputs, refuse_unused_text
from sead_dist.runfolder import already_finished
from sead_dist.runlog import is_finished

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


@dataclass(frozen=True)
class Request:
    """One job to submit: the words of the run and what they mean."""

    name: str
    words: tuple[str, ...]
    config: RunConfig

    @property
    def recipe(self) -> str:
        return "finetune" if self.config.encoders else "distill"

    @property
    def runs(self) -> tuple[str, ...]:
        out = Path(self.config.output_dir).absolute()
        teachers = range(len(self.config.encoders))
        return tuple(str(out / f"teacher-{n}") for n in teachers) or (str(out),)


def requests(words: Sequence[str], seeds: str | None) -> tuple[Path, list[Request]]:
    """The output folder, and a request for each seed (OUTPUT/seed-N), or one.

    Raises UserError for words that cannot be, and for text that nothing can use."""
    config = load_config(words)
    refuse_unused_text(config)
    out = Path(config.output_dir)
    if seeds is None:
        return out, [Request(out.absolute().name, tuple(words), config)]
    refuse_push(config, "--seeds")
    made = []
    for seed in parse_seeds(seeds):
        own = (*words, f"seed={seed}", f"output_dir={out / f'seed-{seed}'}")
        made.append(Request(f"{out.absolute().name}/seed-{seed}", own, load_config(own)))
    return out, made


def parse_seeds(text: str) -> list[int]:
    """ "0-4" or "0,3,7-9" as numbers. Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise UserError(f"--seeds {text!r} is no list of seeds; give e.g. 0,1,2 or 0-4")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {text!r} names no seed, or one twice; give e.g. 0,1,2 or 0-4")
    return seeds


def job_folder(out: Path) -> Path:
    """OUTPUT/.slurm, for this user alone: submitit's pickles in it run as code.

    Raises UserError where it, or OUTPUT, belongs to somebody else.
    """
    folder = out.absolute() / ".slurm"
    for path in (out, folder):
        if path.exists() and path.stat().st_uid != os.getuid():
            raise UserError(f"{path} belongs to another user; give an output_dir of your own")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"output_dir={out} cannot be made: {error.strerror}; give another folder"
        ) from None
    return folder


def sbatch_text(parameters: dict[str, Any], python: str | None, folder: Path, count: int) -> str:
    """The file that submitit hands to sbatch."""
    start = python or shlex.quote(sys.executable)
    command = f"{start} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    array: dict[str, Any] = {"map_count": count} if count > 1 else {}
    return str(submitit_slurm._make_sbatch_string(command, folder, **array, **parameters))


def submit(
    attempt: Attempt,
    words: Sequence[str],
    settings: slurm.SlurmSettings,
    seeds: str | None,
    dry_run: bool,
    root: Path,
) -> list[jobs.Job]:
    """Check and submit the run, a job for each seed; they are registered in `root`. With `dry_run`
    only the sbatch file is printed. Runs that are finished are passed over.

    Raises UserError for whatever is found wrong, sbatch's refusal included.
    """
    # first, so that a word of the person's own counts
    out, asked = requests((f"grace_s={settings.signal_delay}", *words), seeds)
    for request in asked:
        check_inputs(request.config)
    open_ = [request for request in asked if not finished(request)]
    for request in asked:
        if request not in open_:
            print(f"{request.name} is finished: nothing to do")
    if not open_:
        return []
    folder = out.absolute() / ".slurm"
    parameters = slurm.sbatch_parameters(settings, out.absolute().name, folder)
    if dry_run:
        print(sbatch_text(parameters, settings.python, folder, len(open_)))
        return []
    slurm.need("sbatch")
    refuse_queued([request.runs for request in open_], root)
    job_folder(out)
    launches = {
        request.name: Launch(attempt, request.recipe, request.words, request.runs, str(folder))
        for request in open_
    }
    return enqueue(launches, parameters, settings.python, root)


def enqueue(
    launches: Mapping[str, Launch], parameters: Mapping[str, Any], python: str | None, root: Path
) -> list[jobs.Job]:
    """Submit these launches (name -> launch), several as an array, and register their jobs.

    Raises UserError where sbatch refuses.
    """
    (folder,) = {launch.folder for launch in launches.values()}
    executor = submitit_slurm.SlurmExecutor(folder, ANY_NUMBER, python=python)
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
        print(f"job {job.job} is {job.name}: sead-dist jobs logs {job.name} -f")
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


def finished(request: Request) -> bool:
    if request.recipe == "distill":
        return already_finished(request.config)
    return all(is_finished(Path(run)) for run in request.runs)
