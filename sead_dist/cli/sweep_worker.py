"""A process that a sweep with `jobs=N` starts: `python -m sead_dist.cli.sweep_worker WORDS`.

It takes part in the sweep's runs. Its exit codes are those of `sead-dist`.
"""

import sys

from sead_dist.cli.exits import attempt, leave
from sead_dist.runtime.distributed import in_world
from sead_dist.sweep.run import run_worker


def work() -> None:
    words = sys.argv[1:]
    with in_world(command=("sweep", *words)) as world:
        run_worker(words, world)


if __name__ == "__main__":
    leave(attempt(work) or 0)
