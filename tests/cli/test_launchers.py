"""Real launchers on the CPU: two processes are one world of two, and never two worlds of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sead_dist.errors import UserError
from sead_dist.runtime.distributed import World, join_world
from sead_dist.training.engine import check_world

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["accelerate.commands.launch"]


def launch(launcher, words, cwd, **env):
    return subprocess.run(
        [
            sys.executable,
            *(["-m", *launcher] if launcher else []),
            "-m",
            "sead_dist",
            "distill",
            *words,
        ],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(TORCHRUN, id="torchrun"),
        pytest.param(
            [*ACCELERATE, "--config_file", str(ROOT / "launch" / "cpu2.yaml")],
            id="accelerate",
            marks=pytest.mark.slow,
        ),
    ],
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
    # only rank 0 speaks, so each line is there once
    assert (done.stdout + done.stderr).count("teacher forwards,") == 1
    told = [line.split(" ", 2)[2] for line in (run / "log.txt").read_text("utf-8").splitlines()]
    assert {line: done.stdout.splitlines().count(line) for line in told} == dict.fromkeys(told, 1)


@pytest.mark.slow
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
    with pytest.raises(
        UserError, match="WORLD_SIZE=2 but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is"
    ):
        join_world()


def refused(done, said: str) -> None:
    ours = [line for line in done.stderr.splitlines() if line.startswith("sead-dist:")]
    assert len(ours) == 1, done.stderr
    assert said in ours[0]
    assert done.returncode != 0


def run_in_two(launcher, words, tmp_path, **env) -> dict:
    run = tmp_path / "run"
    asked = words(run, "max_steps=3", f"store={tmp_path / 'store'}")
    done = launch(launcher, asked, tmp_path, **env)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((run / "run_summary.json").read_text("utf-8"))
    assert summary["world_size"] == 2
    return summary


@pytest.mark.slow
def test_accelerate_launch_with_deepspeed_is_not_ignored_where_the_cpu_is_asked_for(
    words, tmp_path
):
    """Accelerate itself would run plain DDP here and say nothing."""
    launcher = [*ACCELERATE, "--config_file", str(ROOT / "launch" / "zero2.yaml")]
    summary = run_in_two(launcher, words, tmp_path, ACCELERATE_USE_CPU="true")
    assert summary["deepspeed"] == "zero2"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_every_deepspeed_launch_file_runs_two_processes(words, tmp_path, name):
    launcher = [*ACCELERATE, "--config_file", str(ROOT / "launch" / f"{name}.yaml")]
    assert run_in_two(launcher, words, tmp_path)["deepspeed"] == name


@pytest.mark.slow
def test_the_launch_file_of_several_gpus_runs_two_processes_where_there_is_none(words, tmp_path):
    config = [*ACCELERATE, "--config_file", str(ROOT / "launch" / "gpus.yaml")]
    assert run_in_two([*config, "--num_processes", "2"], words, tmp_path)["deepspeed"] is None


@pytest.mark.slow
def test_the_launch_file_of_one_gpu_runs_one_process_where_there_is_none(words, tmp_path):
    run = tmp_path / "run"
    launcher = [*ACCELERATE, "--config_file", str(ROOT / "launch" / "gpu1.yaml")]
    done = launch(launcher, words(run, "max_steps=3"), tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((run / "run_summary.json").read_text("utf-8"))["world_size"] == 1


@pytest.mark.slow
def test_the_launch_file_of_several_nodes_makes_one_world_of_two_launches(words, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = words(tmp_path / "run", "max_steps=3", "deepspeed=zero2")
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", *ACCELERATE),
                *("--config_file", str(ROOT / "launch" / "nodes.yaml"), "--num_processes", "2"),
                *("--machine_rank", str(node), "--main_process_port", str(port)),
                *("-m", "sead_dist", "distill", *asked),
            ],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]
    try:
        assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    summary = json.loads((tmp_path / "run" / "run_summary.json").read_text("utf-8"))
    assert (summary["world_size"], summary["deepspeed"]) == (2, "zero2")


@pytest.mark.parametrize(
    ("name", "starter"),
    [
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpirun"),
        ("SLURM_STEP_NUM_TASKS", "srun"),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused(no_launcher, name, starter):
    no_launcher.setenv(name, "2")
    with pytest.raises(UserError, match=f"{starter} started 2 processes"):
        join_world()
    no_launcher.setenv(name, "1")
    assert join_world().size == 1


def test_accelerate_that_sees_another_world_is_refused():
    with pytest.raises(UserError, match=r"2 processes were launched but Accelerate counts 1"):
        check_world(1, World(0, 2, torch.device("cpu")))


@pytest.mark.slow
def test_fsdp_asked_for_by_accelerate_launch_is_refused(words, tmp_path):
    done = launch([], words(tmp_path / "run"), tmp_path, ACCELERATE_USE_FSDP="true")
    refused(done, "ACCELERATE_USE_FSDP=true")
    assert done.returncode == 2


def test_every_accelerate_config_is_accepted_and_leaves_precision_to_us():
    from accelerate.commands.config.config_args import load_config_from_file

    folder = ROOT / "launch"
    configs = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    zero = {path.stem: 2 for path in (ROOT / "configs" / "deepspeed").glob("*.json")}
    assert {name: config.num_processes for name, config in configs.items()} == {
        "cpu2": 2,
        "gpu1": 1,
        "gpus": 4,
        "nodes": 8,
        **zero,
    }
    assert {config.mixed_precision for config in configs.values()} == {"no"}
    # MULTI_CPU would start one process
    for name in ("cpu2", "gpus", "nodes"):
        assert configs[name].distributed_type == "MULTI_GPU"
    for name in zero:
        assert configs[name].distributed_type == "DEEPSPEED"
        file = configs[name].deepspeed_config["deepspeed_config_file"]
        assert file == f"configs/deepspeed/{name}.json"
