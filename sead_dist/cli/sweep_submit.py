"""`sead-dist submit` with the words of a sweep: workers that share its runs, as one SLURM array."""

from collections.abc import Sequence
from pathlib import Path

from sead_dist.runtime.run_log import is_finished
from sead_dist.slurm import jobs
from sead_dist.slurm import settings as slurm
from sead_dist.slurm.submit import Attempt, Launch, enqueue, job_folder, refuse_queued, sbatch_text
from sead_dist.sweep.checks import check_runs, needs_rows, settle
from sead_dist.sweep.grid import make_plan


def submit_sweep(
    attempt: Attempt,
    words: Sequence[str],
    settings: slurm.SlurmSettings,
    workers: int,
    dry_run: bool,
    root: Path,
) -> list[jobs.Job]:
    """Check the sweep and submit its workers, OUTPUT/worker-0, ...; they are registered in `root`.
    With `dry_run` only the sbatch file is printed. A sweep that is done is passed over.

    Raises UserError for whatever is found wrong, sbatch's refusal included.
    """
    # first, so that a word of the person's own counts
    asked = (f"preemption_notice_s={settings.signal_delay}", *words)
    plan = make_plan(asked)
    check_runs(plan)
    plan, _ = settle(plan, [name for name in plan.tasks if needs_rows(plan, name)])
    out = plan.output.absolute()
    if all(is_finished(unit.folder) for unit in plan.units):
        print(f"{out.name} is finished: sead-dist sweep writes its report again")
        return []
    folder = out / ".slurm"
    parameters = slurm.sbatch_parameters(settings, out.name, folder)
    if dry_run:
        print(sbatch_text(parameters, settings.python, folder, workers))
        return []
    slurm.need("sbatch")
    runs = tuple(str(unit.folder.absolute()) for unit in plan.units)
    refuse_queued([runs], root)
    job_folder(plan.output)
    launch = Launch(attempt, "sweep", asked, runs, str(folder))
    named = {f"{out.name}/worker-{n}": launch for n in range(workers)}
    return enqueue(named, parameters, settings.python, root)
