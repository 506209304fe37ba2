"""Real launchers on the CPU: two processes are one world of two, and never two worlds of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sead_dist.distributed import join_world
from sead_dist.errors import UserError

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch"]


def launch(launcher, words, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "sead_dist", "distill", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "launcher",
    [TORCHRUN, [*ACCELERATE, "--config_file", str(ROOT / "launch" / "cpu2.yaml")]],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_are_one_world(launcher, words, tmp_path):
    run = tmp_path / "run"
    asked = words(run, "max_steps=3", "placement=partitioned", f"store={tmp_path / 'store'}")
    done = launch(launcher, asked, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((run / "run_summary.json").read_text("utf-8"))
    assert summary["world_size"] == 2
    assert summary["placement"] == "partitioned"
    assert len(summary["peak_memory_bytes"]) == 2
    # only rank 0 speaks, so the closing line is there once
    assert (done.stdout + done.stderr).count("teacher forwards,") == 1


def test_accelerate_launch_that_starts_one_process_for_two_is_refused(words, tmp_path):
    """`--cpu` (or the type MULTI_CPU) without mpirun: accelerate itself says nothing."""
    trap = [*ACCELERATE, "--cpu", "--num_processes", "2"]
    done = launch(trap, words(tmp_path / "run"), tmp_path)
    ours = [line for line in done.stderr.splitlines() if line.startswith("sead-dist:")]
    assert len(ours) == 1, done.stderr
    assert "started this one alone" in ours[0]
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_accelerate_launch_of_one_process_is_a_world_of_one(no_launcher):
    """What `accelerate launch --cpu --num_processes 1` sets must not be taken for the trap."""
    no_launcher.setenv("ACCELERATE_MIXED_PRECISION", "no")
    no_launcher.setenv("ACCELERATE_USE_CPU", "True")
    world = join_world()
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")


def test_a_world_without_ranks_is_refused(no_launcher):
    no_launcher.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE=2 but RANK, LOCAL_RANK is not set"):
        join_world()


def test_every_accelerate_config_is_accepted_and_leaves_precision_to_us():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = ROOT / "launch"
    configs = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert {name: config.num_processes for name, config in configs.items()} == {
        "cpu2": 2,
        "gpu1": 1,
        "gpus": 4,
    }
    assert {config.mixed_precision for config in configs.values()} == {"no"}
    # MULTI_CPU would start one process
    assert configs["cpu2"].distributed_type == configs["gpus"].distributed_type == "MULTI_GPU"
