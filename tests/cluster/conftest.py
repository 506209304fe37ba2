"""The cluster that the tests of this folder run on, and what they distil.

make test-slurm needs SLURM_CONF of a running cluster; .ci/run starts one, and sets
SEAD_DIST_NEED_SLURM=1 so that nothing is skipped there.
"""

import os
import shutil
from pathlib import Path

import pytest
from ranks import run_ranks
from small import model_bytes, run_distill, save_teacher, words, write_task
from submitted import KEYS, needed


@pytest.fixture(scope="session")
def cluster() -> Path:
    """The folder of a running cluster of two nodes that start.sh made."""
    folder = Path(os.environ.get("SLURM_CONF", "none/slurm.conf")).parent
    reason = None
    if shutil.which("sbatch") is None:
        reason = "there is no sbatch"
    elif not (folder / "slurmctld.pid").is_file():
        reason = "SLURM_CONF names no running cluster of tests/cluster/start.sh"
    if reason:
        needed(reason)
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    root = tmp_path_factory.mktemp("task")
    teachers = [save_teacher(root / "a"), save_teacher(root / "b", "roberta", seed=1)]
    return write_task(root / "data"), teachers


@pytest.fixture(scope="session")
def reference(task, tmp_path_factory) -> bytes:
    """The student of two ranks on one machine, without SLURM."""
    root = tmp_path_factory.mktemp("reference")
    run_ranks(2, root / "ranks", run_distill, words(*task, root / "run", **KEYS))
    return model_bytes(root / "run")
