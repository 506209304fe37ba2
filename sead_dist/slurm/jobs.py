"""`sead-dist jobs`: the runs that this user has submitted, their progress, and their logs.

Each job is registered as a small file in the user's state folder. Its state comes from SLURM.
Everything else comes from the run directory and the job's folder, so a run can be followed after
SLURM no longer lists the job.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sead_dist.errors import RunError, UserError, reading
from sead_dist.runtime.files import user_folder
from sead_dist.runtime.run_log import is_finished, read_as, read_metrics, write_json
from sead_dist.slurm import settings as slurm

POLL_S = 2.0
# SLURM may not list a job for a short time, for example while its controller restarts.
FORGOTTEN_S = 60.0
COLUMNS = ("run", "job", "state", "step", "score", "examples/s", "restarts", "last line")


@dataclass(frozen=True)
class Job:
    """A submitted job.

    job: SLURM's number. folder: the folder of the job's own files. runs: the run directories that
    the job fills one after the other; several for a fine-tuning or a sweep.
    """

    name: str
    job: str
    folder: str
    runs: list[str]
    submitted: str

    @property
    def finished(self) -> bool:
        return all(is_finished(Path(run)) for run in self.runs)

    @property
    def at_work_on(self) -> Path:
        """The first run that is not finished, else the last."""
        return next((Path(r) for r in self.runs if not is_finished(Path(r))), Path(self.runs[-1]))

    def log(self, rank: int) -> Path:
        return Path(self.folder) / f"{self.job}_{rank}_log.out"

    def exit_codes(self) -> list[int]:
        """The exit codes of the ranks that ended by themselves when the job ran last."""
        files = Path(self.folder).glob(f"{self.job}.*.exit")
        texts = [file.read_text("utf-8", errors="replace").strip() for file in files]
        return [int(text) for text in texts if re.fullmatch("[0-9]{1,3}", text)]


@dataclass(frozen=True)
class Progress:
    """The progress of a run. A value is None until the run has logged it."""

    step: int | None = None
    total: int | None = None
    score: float | None = None
    examples_per_s: float | None = None
    restarts: int = 0


def state_folder(root: str | None) -> Path:
    """The folder of registered jobs.

    It is `root`, else sead_dist/jobs in XDG_STATE_HOME, else in ~/.local/state.
    """
    if root is not None:
        return Path(root)
    state = user_folder("XDG_STATE_HOME", ".local/state", "give --root DIR")
    return state / "sead_dist" / "jobs"


def register(folder: Path, job: Job) -> None:
    """Write a job's file. It replaces the file of an earlier job of the same run and name."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # the name is in the key, since all workers of a sweep have the same runs
    key = hashlib.sha256(f"{job.runs[0]}\n{job.name}".encode()).hexdigest()[:16]
    write_json(folder / f"{key}.json", asdict(job))


def registered(folder: Path) -> list[Job]:
    """All registered jobs, oldest first. Raises UserError for a file that describes no job."""
    found: list[Job] = []
    for path in folder.glob("[!.]*.json"):
        try:
            job: Job = read_as(Job, path)
        except UserError as error:
            raise UserError(f"{path} describes no job of sead-dist; remove this file") from error
        if not job.runs:
            raise UserError(f"{path} describes a job without runs; remove this file")
        if any(len(os.fsencode(part)) > 255 for run in job.runs for part in Path(run).parts):
            raise UserError(
                f"{path} names a run directory with a name of more than 255 bytes; remove this file"
            )
        found.append(job)
    return sorted(found, key=lambda job: (job.submitted, job.name))


def find(folder: Path, word: str) -> Job:
    """The newest job of this name, number or run directory. Raises UserError without one."""
    jobs = registered(folder)
    run = str(Path(word).absolute())
    for job in reversed(jobs):
        if word in (job.name, job.job) or run in job.runs:
            return job
    names = ", ".join(job.name for job in jobs) or "none"
    raise UserError(
        f"{word!r} is not the name, job number or run directory of a submitted run; names: {names}"
    )


def progress(job: Job) -> Progress:
    """The progress of the first run that is not finished, from its run directory.

    The score is the latest on the selection split. Once the run is finished, it is the score on the
    first official split. Raises UserError for damaged files.
    """
    run = job.at_work_on
    with reading(run, "restore the files of this run directory"):
        records = [record for record in read_metrics(run) if isinstance(record.get("event"), str)]
        starts = [record for record in records if record["event"] == "start"]
        steps = [record for record in records if record["event"] == "train"]
        evals = [record for record in records if record["event"] == "eval"]
        score = next(iter(evals[-1]["metrics"].values()), None) if evals else None
        if is_finished(run):
            scores = read_as(dict[str, Any], run / "scores.json")
            official = [name for name in scores["splits"] if name != "selection"]
            score = scores["splits"][(official or ["selection"])[0]]["student"][scores["metric"]]
        found = Progress(
            step=steps[-1]["step"] if steps else None,
            total=starts[-1]["total_steps"] if starts else None,
            score=score,
            examples_per_s=steps[-1]["examples_per_second"] if steps else None,
            restarts=max(len(starts) - 1, 0),
        )
        checked: Progress = TypeAdapter(Progress).validate_python(asdict(found))
        return checked


def state_of(job: Job, known: str | None) -> str:
    """The state that SLURM gives (`known`), else the one that the run directory shows."""
    if known == "COMPLETED" and not job.finished:
        return "STOPPED"  # the run saved and stopped on a signal, and was not queued again
    if known is not None:
        return known
    return "COMPLETED" if job.finished else "GONE"


def last_line(job: Job) -> str:
    """The last line of rank 0's log that is the run's own, and not of SLURM or submitit."""
    try:
        lines = job.log(0).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    filled = [line.strip() for line in lines if line.strip()]
    own = [line for line in filled if not line.startswith(("submitit ", "srun:", "slurmstepd:"))]
    return (own or filled or [""])[-1]


def rows_of(jobs: Sequence[Job]) -> list[list[object]]:
    """A row for each job, with the columns of `COLUMNS`."""
    known = slurm.job_states([job.job for job in jobs])
    rows: list[list[object]] = []
    for job in jobs:
        at = progress(job)
        step = "" if at.step is None else f"{at.step}/{at.total or '?'}"
        state = state_of(job, known.get(job.job))
        line = last_line(job)
        line = line if len(line) <= 60 else line[:57] + "..."
        row: list[object] = [
            job.name,
            job.job,
            state,
            step,
            at.score,
            at.examples_per_s,
            at.restarts,
            line,
        ]
        rows.append(["" if cell is None else cell for cell in row])
    return rows


def wait(jobs: Sequence[Job]) -> None:
    """Wait until all jobs have ended and their runs are finished.

    Raises UserError (exit code 2) where a run ended by a person's mistake. Raises RunError (3)
    where an unfinished run ended in any other way, or SLURM no longer lists its job.
    """
    for job in jobs:
        state = state_of(job, _end_of(job))
        if job.finished:
            continue
        reason = f"{job.name} (job {job.job}) ended with the state {state}: "
        reason += f"{last_line(job) or 'it printed nothing'}; see its log {job.log(0)}"
        raise UserError(reason) if 2 in job.exit_codes() else RunError(reason)


def _end_of(job: Job) -> str | None:
    """The state that a job ended in; None where SLURM no longer lists it."""
    last_known = time.monotonic()
    while True:
        state = slurm.job_states([job.job]).get(job.job)
        if state in slurm.ENDED:
            return state
        if state is not None:
            last_known = time.monotonic()
        elif job.finished or time.monotonic() - last_known > FORGOTTEN_S:
            return None
        time.sleep(POLL_S)


def log_text(job: Job, rank: int, follow: bool) -> Iterator[str]:
    """The text of a rank's log. With `follow`, also the text added until the job has ended.

    Raises UserError where there is no log yet and `follow` is False.
    """
    path = job.log(rank)
    if not follow and not path.exists():
        state = state_of(job, slurm.job_states([job.job]).get(job.job))
        raise UserError(
            f"the log {path} does not exist: job {job.job} is {state}; give -f to wait for the log"
        )
    position, unknown = 0, 0
    while True:
        known = slurm.job_states([job.job]).get(job.job) if follow else None
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            yield text.decode("utf-8", errors="replace")
        unknown = unknown + 1 if known is None else 0
        if not follow or known in slurm.ENDED or unknown * POLL_S > FORGOTTEN_S:
            return
        time.sleep(POLL_S)


def exit_file(folder: str, job: str, rank: int) -> Path:
    """The file in which a rank that ends by itself writes its exit code."""
    return Path(folder) / f"{job}.{rank}.exit"
