"""`sead-dist submit --teacher-workers N`: a student and the workers of its pool, as SLURM jobs.

The workers are an array of jobs of their own, so they may be in another partition than the student,
each is queued again by itself, and the student needs none in particular.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sead_dist import jobs, slurm
from sead_dist.errors import UserError
from sead_dist.inputs import check_inputs
from sead_dist.launcher import (
    Attempt,
    Launch,
    Request,
    enqueue,
    finished,
    job_folder,
    refuse_queued,
    requests,
    sbatch_text,
    submit,
)
from sead_dist.runfolder import forget_followed, has_progress, try_lock
from sead_dist.teach import worker_folder


def worker_settings(settings: slurm.SlurmSettings, workers: int) -> slurm.SlurmSettings:
    """The same for a worker, which is one process on one node, with a GPU where there are any."""
    gpus = None if settings.gpus_per_node is None else 1
    return settings.model_copy(update={"nodes": 1, "gpus_per_node": gpus, "concurrent": workers})


def submit_pool(
    attempt: Attempt,
    words: Sequence[str],
    settings: slurm.SlurmSettings,
    of_workers: slurm.SlurmSettings,
    workers: int,
    dry_run: bool,
    root: Path,
) -> list[jobs.Job]:
    """Submit the workers, and the student to start when the first of them has. With `dry_run` only
    the sbatch files are printed.

    Raises UserError for whatever is found wrong; no job is left in the queue then.
    """
    # first, so that a word of the person's own counts
    words = ("placement=pool", *words)
    out, (student,) = requests(words, None)
    if not student.config.pooled:
        raise UserError(
            "--teacher-workers are for teachers with placement=pool, and none has it; leave the "
            "placement out, or the workers"
        )
    check_inputs(student.config)
    if finished(student):
        print(f"{student.name} is finished: nothing to do")
        return []
    folder = out.absolute() / ".slurm"
    own = worker_settings(of_workers, workers)
    parameters = slurm.sbatch_parameters(own, f"{out.absolute().name}-teachers", folder)
    launches = launches_of(attempt, student, workers, folder)
    if dry_run:
        print(sbatch_text(parameters, own.python, folder, workers))
        return submit(attempt, words, settings, None, dry_run, root)
    slurm.need("sbatch")
    refuse_queued([student.runs, *(launch.runs for launch in launches.values())], root)
    job_folder(out)
    forget_refused(Path(student.config.output_dir))
    made = enqueue(launches, parameters, own.python, root)
    # a student that waits in a job of its own while its workers are in the queue wastes nodes
    later = {"dependency": f"after:{made[0].job}", **settings.sbatch}
    try:
        waiting = settings.model_copy(update={"sbatch": later})
        return [*submit(attempt, words, waiting, None, dry_run, root), *made]
    except UserError:
        for job in made:
            with suppress(UserError):
                slurm.cancel(job.job)
        raise


def forget_refused(run: Path) -> None:
    """What an earlier student expected does not count, since workers that start before the next one
    would end by it: of its store, and, where it never took a step, of its teachers."""
    if not run.is_dir():
        return
    with try_lock(run / ".lock") as free:
        if free:
            forget_followed(run)
            if not has_progress(run):
                (run / "teacher_manifest.json").unlink(missing_ok=True)


def launches_of(
    attempt: Attempt, student: Request, workers: int, folder: Path
) -> dict[str, Launch]:
    """A launch for each worker of this student's pool, by the name of its job."""
    (run,) = student.runs
    return {
        f"{student.name}/worker-{number}": Launch(
            attempt,
            f"teach {number}/{workers}",
            student.words,
            (str(worker_folder(Path(run), number, workers)),),
            str(folder),
        )
        for number in range(1, workers + 1)
    }
