"""`sead-dist submit`: SLURM jobs of a run, of a run for each seed, of a pool, or of a sweep.

A pool has one job for the student, and an array of jobs for its workers. So workers may be in
another partition than the student, and each is queued again by itself. The student needs no
particular worker. The jobs of a sweep share its runs. Mistakes are found on the login node, before
a job is queued.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sead_dist.cli.commands import attempt_recipe
from sead_dist.config.load import load_config
from sead_dist.config.schema import RunConfig
from sead_dist.errors import UserError
from sead_dist.reporting.hub import reject_push
from sead_dist.runs.checks import check_inputs, reject_unused_text, teacher_runs
from sead_dist.runs.claim import already_finished, has_progress, remove_student_store, try_lock
from sead_dist.runs.pool_worker import worker_folder
from sead_dist.runtime.run_log import is_finished
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm
from sead_dist.slurm.submit import Launch, enqueue, make_ready, sbatch_file
from sead_dist.sweep.checks import check_runs, needs_rows, prepare_grid
from sead_dist.sweep.grid import make_grid

# the number of seeds of one array is below this
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class RunToSubmit:
    """One job to submit: the words of its run, and the configuration that they give."""

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


def runs_to_submit(words: Sequence[str], seeds: str | None) -> tuple[Path, list[RunToSubmit]]:
    """(the output folder, a run for each seed in OUTPUT/seed-N). Without seeds there is one run.

    Raises UserError for a mistake in the words, and for unlabelled text that no teacher labels.
    """
    config = load_config(words)
    reject_unused_text(config)
    out = Path(config.output_dir)
    if seeds is None:
        return out, [RunToSubmit(out.absolute().name, tuple(words), config)]
    reject_push(config, "--seeds")
    made = []
    for seed in parse_seeds(seeds):
        own = (*words, f"seed={seed}", f"output_dir={out / f'seed-{seed}'}")
        made.append(RunToSubmit(f"{out.absolute().name}/seed-{seed}", own, load_config(own)))
    return out, made


def parse_seeds(text: str) -> list[int]:
    """The numbers in a text such as "0-4" or "0,3,7-9". Raises UserError for another form."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None:
            raise UserError(f"--seeds {text!r} is not a list of seeds; give e.g. 0,1,2 or 0-4")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)[:MOST_SEEDS]
    if not 0 < len(seeds) < MOST_SEEDS or len(set(seeds)) != len(seeds):
        raise UserError(
            f"--seeds {text!r} names no seed, a seed twice, or {MOST_SEEDS} seeds or more; give "
            "e.g. 0,1,2 or 0-4"
        )
    return seeds


def finished(one: RunToSubmit) -> bool:
    """Whether all its runs are finished. Raises UserError where a folder holds another run."""
    runs = teacher_runs(one.config) if one.recipe == "finetune" else [one.config]
    return all([already_finished(run) for run in runs])


def submit(
    words: Sequence[str],
    settings: slurm.SlurmSettings,
    seeds: str | None,
    dry_run: bool,
    root: Path,
) -> list[jobs.Job]:
    """Check and submit the run, with one job for each seed. The jobs are registered in `root`.

    dry_run: print the sbatch file, and submit nothing. Finished runs are not submitted. Raises
    UserError for a mistake in the run, and where sbatch rejects the job.
    """
    # this word comes first, so that a word of the user overrides it
    out, runs = runs_to_submit((f"preemption_notice_s={settings.signal_delay}", *words), seeds)
    for one in runs:
        check_inputs(one.config)
    open_ = [one for one in runs if not finished(one)]
    for one in runs:
        if one not in open_:
            print(f"{one.name} is finished: nothing to do")
    if not open_:
        return []
    if not dry_run:
        make_ready([one.runs for one in open_], out, root)
    folder = str(out.absolute() / ".slurm")
    launches = {
        one.name: Launch(attempt_recipe, one.recipe, one.words, one.runs, folder) for one in open_
    }
    return queue(launches, settings, out.absolute().name, dry_run, root)


def queue(
    launches: Mapping[str, Launch],
    settings: slurm.SlurmSettings,
    name: str,
    dry_run: bool,
    root: Path,
) -> list[jobs.Job]:
    """Submit as `enqueue` does, and print the command that follows each job.

    dry_run: print the sbatch file, and submit nothing.
    """
    if dry_run:
        print(sbatch_file(launches, settings, name))
        return []
    made = enqueue(launches, settings, name, root)
    for job in made:
        print(f"job {job.job} is {job.name}; its log: sead-dist jobs logs {job.name} -f")
    return made


def submit_pool(
    words: Sequence[str],
    settings: slurm.SlurmSettings,
    of_workers: slurm.SlurmSettings,
    workers: int,
    dry_run: bool,
    root: Path,
) -> list[jobs.Job]:
    """Submit the workers, and the student, which starts after the first worker has started.

    dry_run: print the sbatch files, and submit nothing. Raises UserError for a mistake in the run,
    and where sbatch rejects a job. Then jobs that are queued already are cancelled.
    """
    # this word comes first, so that a word of the user overrides it
    words = ("placement=pool", *words)
    out, (student,) = runs_to_submit(words, None)
    if not student.config.pooled:
        raise UserError(
            f"--teacher-workers {workers} is for teachers with placement=pool, and none has it; "
            "leave placement or --teacher-workers out"
        )
    check_inputs(student.config)
    if finished(student):
        print(f"{student.name} is finished: nothing to do")
        return []
    launches = launches_of(student, workers, out.absolute() / ".slurm")
    if not dry_run:
        make_ready([student.runs, *(launch.runs for launch in launches.values())], out, root)
        remove_expectations(Path(student.config.output_dir))
    # a worker is one process on one node, with a GPU where there are any
    gpus = None if of_workers.gpus_per_node is None else 1
    one = {"nodes": 1, "gpus_per_node": gpus, "concurrent": workers}
    own = of_workers.model_copy(update=one)
    made = queue(launches, own, f"{out.absolute().name}-teachers", dry_run, root)
    if dry_run:
        return submit(words, settings, None, dry_run, root)
    # a student that runs while its workers are still in the queue wastes nodes
    later = {"dependency": f"after:{made[0].job}", **settings.sbatch}
    try:
        waiting = settings.model_copy(update={"sbatch": later})
        return [*submit(words, waiting, None, dry_run, root), *made]
    except UserError:
        for job in made:
            with suppress(UserError):
                slurm.cancel(job.job)
        raise


def launches_of(student: RunToSubmit, workers: int, folder: Path) -> dict[str, Launch]:
    """By job name, the launch of each worker of this student's pool."""
    (run,) = student.runs
    return {
        f"{student.name}/worker-{number}": Launch(
            attempt_recipe,
            f"teach {number}/{workers}",
            student.words,
            (str(worker_folder(Path(run), number, workers)),),
            str(folder),
        )
        for number in range(1, workers + 1)
    }


def remove_expectations(run: Path) -> None:
    """Remove what an earlier student of this run directory expected of its workers.

    New workers would compare themselves with it and end. It is the earlier student's store, and
    its teachers where the run has no progress. Nothing is removed while a student runs.
    """
    if not run.is_dir():
        return
    with try_lock(run / ".lock") as free:
        if free:
            remove_student_store(run)
            if not has_progress(run):
                (run / "teacher_manifest.json").unlink(missing_ok=True)


def submit_sweep(
    words: Sequence[str], settings: slurm.SlurmSettings, workers: int, dry_run: bool, root: Path
) -> list[jobs.Job]:
    """Check the sweep, and submit its workers OUTPUT/worker-0, ... They are registered in `root`.

    dry_run: print the sbatch file, and submit nothing. A finished sweep is not submitted. Raises
    UserError for a mistake in the sweep, and where sbatch rejects the jobs.
    """
    # this word comes first, so that a word of the user overrides it
    all_words = (f"preemption_notice_s={settings.signal_delay}", *words)
    grid = make_grid(all_words)
    check_runs(grid)
    grid, _ = prepare_grid(grid, [name for name in grid.tasks if needs_rows(grid, name)])
    out = grid.output.absolute()
    if all(is_finished(unit.folder) for unit in grid.units):
        print(f"{out.name} is finished: nothing to do; sead-dist sweep writes its report again")
        return []
    runs = tuple(str(unit.folder.absolute()) for unit in grid.units)
    if not dry_run:
        make_ready([runs], grid.output, root)
    launch = Launch(attempt_recipe, "sweep", all_words, runs, str(out / ".slurm"))
    named = {f"{out.name}/worker-{n}": launch for n in range(workers)}
    return queue(named, settings, out.name, dry_run, root)
