"""Several runs of a sweep at once on one machine: workers in processes of their own.

They share the runs as workers started by hand do; the process that starts them passes on what they
say. Each is `python -m sead_dist.sweep.jobs WORDS`.
"""

import os
import subprocess
import sys
import threading
import time
from typing import IO

import torch

from sead_dist.errors import RunError, UserError, one_line
from sead_dist.runtime.distributed import StopFlag, World, in_world
from sead_dist.sweep.grid import Plan
from sead_dist.sweep.rounds import is_done

POLL_S = 0.1


def check_jobs(plan: Plan, world: World) -> None:
    """Raises UserError where several runs at once would share what one of them needs alone."""
    if plan.jobs > 1 and (world.size > 1 or world.device.type != "cpu"):
        what = f"{world.size} ranks" if world.size > 1 else "a GPU"
        raise UserError(
            f"jobs={plan.jobs} divides the threads of one process without a GPU, and here is "
            f"{what}; leave jobs out (the same line, started several times, shares the runs too)"
        )


def run_jobs(plan: Plan, stop: StopFlag) -> bool:
    """Start `jobs` workers and wait until they end; False when the sweep was asked to stop before.

    Raises RunError where one ended otherwise and runs are left over.
    """
    workers = [start_worker(plan) for _ in range(plan.jobs)]
    readers = [pass_on(worker, number) for number, worker in enumerate(workers)]
    try:
        told = False
        while any(worker.poll() is None for worker in workers):
            if stop.signal is not None and not told:
                told = True
                for worker in workers:
                    worker.terminate()
            time.sleep(POLL_S)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
    for reader in readers:
        reader.join()
    # a run that fails is written down, and its worker goes on
    bad = [worker.returncode for worker in workers if worker.returncode]
    if bad and stop.signal is None and not all(is_done(plan, unit) for unit in plan.units):
        raise RunError(
            f"{len(bad)} of {plan.jobs} workers of the sweep ended with code {bad[0]}; what they "
            "said stands above; give the same command again to go on"
        )
    return stop.signal is None


def start_worker(plan: Plan) -> subprocess.Popen[str]:
    """A process with its share of the threads."""
    threads = str(max(1, torch.get_num_threads() // plan.jobs))
    return subprocess.Popen(
        [sys.executable, "-m", "sead_dist.sweep.jobs", *plan.words, "jobs=1"],
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def pass_on(worker: subprocess.Popen[str], number: int) -> threading.Thread:
    """A thread that prints what a worker says, with its number before each line."""

    def read(said: IO[str]) -> None:
        for line in said:
            print(f"[{number + 1}] {line}" if line.strip() else line, end="", flush=True)

    assert worker.stdout is not None
    thread = threading.Thread(target=read, args=(worker.stdout,), daemon=True)
    thread.start()
    return thread


def main() -> int:
    """A worker's whole life. Exit codes as those of `sead-dist`."""
    from sead_dist.sweep.run import run_worker  # which imports this file

    try:
        with in_world() as world:
            run_worker(sys.argv[1:], world)
    except (UserError, RunError) as error:
        print(f"sead-dist: {one_line(str(error))}", flush=True)
        return 2 if isinstance(error, UserError) else 3
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # threads of libraries may be in the middle of something
    os._exit(code)
