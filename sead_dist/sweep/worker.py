"""`python -m sead_dist.sweep.worker WORDS`: a process that the key `jobs` of a sweep starts."""

import os
import sys

from sead_dist.errors import RunError, UserError, one_line
from sead_dist.runtime.distributed import in_world
from sead_dist.sweep.run import run_worker


def main() -> int:
    """Exit codes as those of `sead-dist`."""
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
