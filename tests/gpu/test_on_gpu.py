"""What only a GPU can show: invariant 3 with its kernels, a whole run on it, NCCL between two."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="torch.cuda sees no GPU on this machine"),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_prediction_on_a_gpu_has_the_same_bits_whatever_its_neighbours(
    grammar: Path, teachers: list[Path], dtype: str
) -> None:
    from sead_dist.config import TeacherConfig
    from sead_dist.data import make_split
    from sead_dist.examples import build_examples
    from sead_dist.loading import load_split
    from sead_dist.models import build_teacher
    from sead_dist.pretrained import load_tokenizer, locate
    from sead_dist.tasks import load_task
    from sead_dist.teachers.forward import free_rows_from, predict

    task = load_task(str(grammar / "task.yaml"))
    rows = load_split(task, "train", grammar, None, None, False)
    checkpoint = locate(str(teachers[0]))
    split = make_split(build_examples(task, rows, "train"), load_tokenizer(checkpoint), 64)
    device = torch.device("cuda", 0)
    model = build_teacher(TeacherConfig(path=str(teachers[0])), dtype, device, False)
    free = free_rows_from(model.config, dtype, device)

    def ask(rows_R: np.ndarray) -> np.ndarray:
        logits_RC = np.zeros((len(rows_R), 2), np.float32)

        def keep(part: np.ndarray, logits: np.ndarray) -> None:
            logits_RC[part] = logits

        predict(model, split.tokens, rows_R, device, 64, free, keep)
        return logits_RC

    everything_B = ask(np.arange(len(split)))
    random = np.random.Generator(np.random.PCG64(0))
    for count in (1, 2, 7, 33, 150):
        some_R = random.permutation(len(split))[:count]
        np.testing.assert_array_equal(ask(some_R), everything_B[some_R])


def launch(ranks: int, words: list[str]) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    subprocess.run([sys.executable, *command, "-m", "sead_dist", "distill", *words], check=True)


def test_a_deterministic_run_on_one_gpu_gives_the_same_student_twice(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole = words(tmp_path / "whole", "precision=bf16", "deterministic=true", "epochs=2")
    launch(1, whole)
    weights = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    again = words(tmp_path / "again", "precision=bf16", "deterministic=true", "epochs=2")
    launch(1, again)
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs for NCCL; torch.cuda sees {GPUS}")
def test_two_gpus_exchange_logits_over_nccl(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    from sead_dist.runlog import read_json

    launch(2, words(tmp_path / "two", "placement=partitioned"))
    launch(1, words(tmp_path / "one"))
    two, one = (read_json(tmp_path / name / "scores.json") for name in ("two", "one"))
    for split in two["splits"]:
        assert two["splits"][split]["teachers"] == one["splits"][split]["teachers"]


@pytest.mark.parametrize("offload", ["false", "true"])
def test_a_sharded_teacher_on_gpus_says_what_the_whole_one_says(
    words: Callable[..., list[str]], teachers: list[Path], tmp_path: Path, offload: str
) -> None:
    from sead_dist.runlog import read_json

    ranks = min(GPUS, 2)
    entry = f"{{path: {teachers[0]}, placement: sharded, offload: {offload}, dtype: bf16}}"
    launch(ranks, [*words(tmp_path / "split", f"teachers=[{entry}]"), f"store={tmp_path / 'one'}"])
    entry = f"{{path: {teachers[0]}, dtype: bf16}}"
    launch(1, [*words(tmp_path / "whole", f"teachers=[{entry}]"), f"store={tmp_path / 'two'}"])
    split, whole = (read_json(tmp_path / name / "scores.json") for name in ("split", "whole"))
    for name in whole["splits"]:
        assert split["splits"][name]["teachers"] == whole["splits"][name]["teachers"]
