"""The settings of a SLURM job, its options for sbatch, and the states of jobs.

Settings come from configs/slurm/base.yaml, the file of --slurm and the command line, in this order.
"""

import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from sead_dist.config.load import shipped_files
from sead_dist.config.mistakes import explain
from sead_dist.config.names import did_you_mean
from sead_dist.config.schema import Section
from sead_dist.config.yaml_text import read_yaml
from sead_dist.errors import UserError

NUMBER = "[0-9]{1,6}"
# States that a job does not leave by itself.
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED "
    "TIMEOUT".split()
)
SQUEUE = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]
# Seconds that srun waits for the other ranks once the first has ended. They print their errors
# in this time.
SRUN_WAIT_S = 60
# Runs before srun. It removes the exit codes of an earlier start's ranks.
CLEAR = """\
folder={folder}
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
rm -f "$folder/$job".*.exit"""
# Runs after srun. Each rank that ends by itself writes its exit code to JOB.RANK.exit. A rank
# without this file was killed, or lost with its node. Then the job is queued again, at most
# `restarts` times. It is also queued again after a notice that came before the run could handle it.
# Both need the job's state RUNNING: in another state it was cancelled, or queued again already.
RESTART = """\
code=$?
ended=$(cat "$folder/$job".*.exit 2>/dev/null | wc -l)
lost=$(cat "$folder/$job.lost" 2>/dev/null | wc -l)
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$code" -ne 0 ] && [ "$ended" -lt {tasks} ] && [ "$state" = RUNNING ]; then
    if [ "$code" -eq {early} ]; then
        echo "sead-dist: the notice came before the run could save; job $job is queued again"
        scontrol requeue "$SLURM_JOB_ID"
    elif [ "$lost" -lt {restarts} ]; then
        echo "$code" >>"$folder/$job.lost"
        echo "sead-dist: a rank was killed or lost (exit code $code);" \\
            "starting again from the last checkpoint, $((lost + 1)) of at most {restarts} times"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "sead-dist: a rank was killed or lost (exit code $code), after $lost restarts;" \\
            "remove the cause, then submit the same command again to continue"
    fi
fi
exit $code"""


class SlurmSettings(Section):
    """The settings of a job. Every key is explained in configs/slurm/base.yaml."""

    any_text: ClassVar[frozenset[str]] = frozenset({"setup"})  # lines of shell, used unchanged

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    gres: str | None
    nodes: Annotated[int, Field(gt=0)]
    gpus_per_node: Annotated[int | None, Field(gt=0)]
    cpus_per_task: Annotated[int | None, Field(gt=0)]
    mem: str | None
    time: str
    exclusive: bool
    signal_delay: Annotated[int, Field(gt=0)]
    concurrent: Annotated[int | None, Field(gt=0)]
    restarts: Annotated[int, Field(ge=0)]
    setup: list[str]
    srun: list[str]
    python: str | None
    sbatch: dict[str, str | int | bool]


def load_settings(name: str | None, options: Mapping[str, Any]) -> SlurmSettings:
    """The settings of base.yaml, of the file `name` where it is given, and of `options`.

    Later ones override earlier ones. An option that is None is not given. Raises UserError, which
    names the key, its value and the allowed values.
    """
    base = shipped_files("slurm")["base"]
    merged: dict[str, Any] = {}
    for path in (base, *([] if name is None else [_find(name)])):
        layer = read_yaml(path)
        if not isinstance(layer, Mapping):
            raise UserError(f"{path} holds no settings; give a YAML mapping of keys to values")
        merged.update(layer)
    merged.update({key: value for key, value in options.items() if value is not None})
    try:
        settings = SlurmSettings.model_validate(merged)
    except ValidationError as error:
        known = list(SlurmSettings.model_fields)
        raise UserError(explain(error, known, SlurmSettings.model_validate, merged)) from None
    if minutes(settings.time) * 60 < 2 * settings.signal_delay:
        raise UserError(
            f"signal_delay={settings.signal_delay} seconds is more than half of "
            f"time={settings.time}, so the run would stop soon after its start; give a longer time "
            "or a shorter signal_delay"
        )
    return settings


def _find(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    known = shipped_files("slurm")
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, f"shipped: {', '.join(known)}")
    raise UserError(f"--slurm {name!r} is neither a file nor the name of shipped settings; {hint}")


def minutes(text: str) -> int:
    """The minutes of a time limit in SLURM's form, rounded up.

    Its forms are 30, 30:00, 1:00:00, 2-12 and 2-12:30:00. Raises UserError for another form.
    """
    match = re.fullmatch(
        rf"(?:(?P<days>{NUMBER})-)?({NUMBER})(?::({NUMBER}))?(?::({NUMBER}))?", text.strip()
    )
    if match is None:
        raise UserError(
            f"time={text!r} is not a time limit; give MINUTES, H:MM:SS or DAYS-HH:MM:SS"
        )
    days, *parts = match.groups()
    given = [int(part) for part in parts if part is not None]
    # without days, one number is minutes, and two are minutes and seconds
    units = (3600, 60, 1) if days is not None or len(given) == 3 else (60, 1)
    seconds = int(days or 0) * 86400
    seconds += sum(number * unit for number, unit in zip(given, units, strict=False))
    if seconds == 0:
        raise UserError(f"time={text!r} is zero; give MINUTES, H:MM:SS or DAYS-HH:MM:SS above zero")
    return -(-seconds // 60)


def sbatch_parameters(settings: SlurmSettings, name: str, folder: Path) -> dict[str, Any]:
    """The settings as submitit's parameters, for a job called `name` with its files in `folder`."""
    srun = [f"--wait={SRUN_WAIT_S}"]
    setup = CLEAR.format(folder=shlex.quote(str(folder))).splitlines()
    if settings.cpus_per_task is not None:
        # srun does not inherit this option from sbatch
        srun.append(f"--cpus-per-task={settings.cpus_per_task}")
        setup.append(f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{settings.cpus_per_task}}}")
    tasks = settings.gpus_per_node or 1
    early = 128 + signal.SIGUSR2
    restart = RESTART.format(tasks=settings.nodes * tasks, restarts=settings.restarts, early=early)
    given = {
        "job_name": name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "gres": settings.gres,
        "nodes": settings.nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": settings.gpus_per_node,
        "cpus_per_task": settings.cpus_per_task,
        "mem": settings.mem,
        "time": minutes(settings.time),
        "exclusive": settings.exclusive or None,
        "signal_delay_s": settings.signal_delay,
        "array_parallelism": settings.concurrent,
        "setup": [*setup, *settings.setup],
        "teardown": restart.splitlines(),
        "srun_args": [*srun, *settings.srun],
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **settings.sbatch},
    }
    return {key: value for key, value in given.items() if value is not None}


def require_program(program: str) -> None:
    """Raises UserError where this command of SLURM is not installed."""
    if shutil.which(program) is None:
        instead = ", or print the job: sead-dist submit ... --dry-run" * (program == "sbatch")
        raise UserError(
            f"there is no {program} on this machine; use a login node of a SLURM cluster{instead}"
        )


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """The state of each job that SLURM still lists.

    It comes from squeue, which also lists jobs that ended recently. For other jobs it comes from
    sacct, where the cluster has accounting.
    """
    if not jobs:
        return {}
    found = dict(_pairs(_output_of(SQUEUE)))
    forgotten = [job for job in jobs if job not in found]
    if forgotten:
        numbers = ",".join(forgotten)
        account = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={numbers}"]
        found.update(_pairs(_output_of([*account, "--format=JobID,State"])))
    return {job: found[job] for job in jobs if job in found}


def _output_of(command: Sequence[str]) -> str:
    """The output of a SLURM command; empty where the command is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _pairs(text: str) -> Iterable[tuple[str, str]]:
    for line in text.splitlines():
        job, _, state = line.strip().partition("|")
        # sacct prints `CANCELLED by 1000`; the first word is the state
        if job and state:
            yield job, state.split()[0]


def is_running(job: str) -> bool:
    """Whether this job runs, and is neither cancelled nor queued again."""
    return job_states([job]).get(job) == "RUNNING"


def cancel(job: str) -> None:
    """Cancel a job. Raises UserError where scancel fails."""
    require_program("scancel")
    done = subprocess.run(["scancel", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"job {job} was not cancelled: {done.stderr.strip() or 'scancel failed'}")
