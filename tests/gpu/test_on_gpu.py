"""What only a GPU can show: invariant 3 with its kernels, a whole run on it, NCCL between two."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="torch.cuda sees no GPU on this machine"),
]


@pytest.mark.parametrize(
    ("dtype", "packed"), [("fp32", False), ("bf16", False), ("bf16", True), ("fp16", True)]
)
def test_a_prediction_on_a_gpu_has_the_same_bits_whatever_its_neighbours(
    grammar: Path, teachers: list[Path], dtype: str, packed: bool
) -> None:
    from rows import load_split

    from sead_dist.config.schema import TeacherConfig
    from sead_dist.data.examples import build_examples
    from sead_dist.data.order import make_split
    from sead_dist.data.tasks import load_task
    from sead_dist.models.pretrained import load_tokenizer, locate
    from sead_dist.models.sequence_classifier import build_teacher
    from sead_dist.teachers.inference import predict
    from sead_dist.teachers.packing import use_packs
    from sead_dist.teachers.teacher import cut_of

    task = load_task(str(grammar / "task.yaml"))
    rows = load_split(task, "train", grammar, None, None, False)
    checkpoint = locate(str(teachers[0]))
    split = make_split(build_examples(task, rows, "train"), load_tokenizer(checkpoint), 64)
    device = torch.device("cuda", 0)
    model = build_teacher(TeacherConfig(path=str(teachers[0])), dtype, device, False)
    cut = cut_of(model.config, dtype, device, None)
    if packed:
        assert cut.pack_from is not None, "no packs on this GPU with this PyTorch"
        use_packs(model)
    else:
        cut = replace(cut, pack_from=None)

    def ask(rows_R: np.ndarray) -> np.ndarray:
        logits_RC = np.zeros((len(rows_R), 2), np.float32)

        def keep(part: np.ndarray, logits: np.ndarray) -> None:
            logits_RC[part] = logits

        predict(model, split.tokens, rows_R, device, cut, keep)
        return logits_RC

    everything_B = ask(np.arange(len(split)))
    random = np.random.Generator(np.random.PCG64(0))
    for count in (1, 2, 7, 33, 150):
        some_R = random.permutation(len(split))[:count]
        np.testing.assert_array_equal(ask(some_R), everything_B[some_R])


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("hidden", [128, 768])
def test_packs_on_a_gpu_say_what_padded_batches_say(kind: str, hidden: int) -> None:
    from transformers import AutoConfig

    from sead_dist.data.order import TokenTable
    from sead_dist.models.sequence_classifier import new_classifier
    from sead_dist.teachers.inference import predict
    from sead_dist.teachers.packing import use_packs
    from sead_dist.teachers.teacher import cut_of

    config = AutoConfig.for_model(
        kind, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, vocab_size=1000, initializer_range=0.1,
        max_position_embeddings=130,
    )  # fmt: skip
    device = torch.device("cuda", 0)
    random = np.random.default_rng(0)
    counts = random.integers(2, 120, 600)
    tokens = TokenTable(
        random.integers(5, 1000, counts.sum()).astype(np.int32), None,
        np.concatenate([[0], np.cumsum(counts)]), 1, 1, 0, np.zeros(0, np.int64),
    )  # fmt: skip
    torch.manual_seed(0)
    model = new_classifier(config).to(device, torch.bfloat16).eval()
    cut = cut_of(config, "bf16", device, None)
    assert cut.pack_from is not None

    def ask(how: object, rows_R: np.ndarray) -> np.ndarray:
        logits_RC = np.zeros((len(rows_R), 2), np.float32)

        def keep(part: np.ndarray, logits: np.ndarray) -> None:
            logits_RC[part] = logits

        predict(model, tokens, rows_R, device, how, keep)
        return logits_RC

    everyone = np.arange(len(counts))
    padded = ask(replace(cut, pack_from=None), everyone)
    use_packs(model)
    packed = ask(cut, everyone)
    spread = float(padded.std())
    assert float(np.abs(packed - padded).mean()) < 0.05 * spread
    assert float(np.abs(packed - padded).max()) < 0.5 * spread
    for count in (1, 3, 50, 400):
        some_R = random.permutation(everyone)[:count]
        np.testing.assert_array_equal(ask(cut, some_R), packed[some_R])


def test_a_bf16_run_on_a_gpu_names_its_packs_in_the_numerics_class(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    from sead_dist.runtime.run_log import read_json

    launch(1, words(tmp_path / "run", "teacher_precision=bf16"))
    manifest = read_json(tmp_path / "run" / "teacher_manifest.json")
    assert str(manifest).count("packs-1") >= 1


def launch(ranks: int, words: list[str]) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    subprocess.run([sys.executable, *command, "-m", "sead_dist", "distill", *words], check=True)


def test_a_deterministic_run_on_one_gpu_gives_the_same_student_twice(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    whole = words(tmp_path / "whole", "precision=bf16", "deterministic=true", "num_train_epochs=2")
    launch(1, whole)
    weights = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    again = words(tmp_path / "again", "precision=bf16", "deterministic=true", "num_train_epochs=2")
    launch(1, again)
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs for NCCL; torch.cuda sees {GPUS}")
def test_two_gpus_exchange_logits_over_nccl(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    from sead_dist.runtime.run_log import read_json

    launch(2, words(tmp_path / "two", "placement=partitioned"))
    launch(1, words(tmp_path / "one"))
    two, one = (read_json(tmp_path / name / "scores.json") for name in ("two", "one"))
    for split in two["splits"]:
        assert two["splits"][split]["teachers"] == one["splits"][split]["teachers"]


@pytest.mark.parametrize("offload", ["false", "true"])
def test_a_sharded_teacher_on_gpus_says_what_the_whole_one_says(
    words: Callable[..., list[str]], teachers: list[Path], tmp_path: Path, offload: str
) -> None:
    from sead_dist.runtime.run_log import read_json

    ranks = min(GPUS, 2)
    entry = f"{{path: {teachers[0]}, placement: sharded, offload: {offload}, dtype: bf16}}"
    launch(ranks, [*words(tmp_path / "split", f"teachers=[{entry}]"), f"store={tmp_path / 'one'}"])
    entry = f"{{path: {teachers[0]}, dtype: bf16}}"
    launch(1, [*words(tmp_path / "whole", f"teachers=[{entry}]"), f"store={tmp_path / 'two'}"])
    split, whole = (read_json(tmp_path / name / "scores.json") for name in ("split", "whole"))
    for name in whole["splits"]:
        assert split["splits"][name]["teachers"] == whole["splits"][name]["teachers"]
