"""Which DeepSpeed settings a run takes, and what is refused instead of being ignored."""

import importlib.util
import json

import pytest
from small import config

from sead_dist.errors import UserError
from sead_dist.training.deepspeed_config import zero_config

SHIPPED = {"zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}


@pytest.fixture(autouse=True)
def launched_plainly(monkeypatch):
    for name in ("MIXED_PRECISION", "USE_DEEPSPEED", "USE_FSDP", "DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_auto_is_filled_from_the_run_and_from_nothing_else(name):
    given = config(deepspeed=name, global_batch_size=24, micro_batch_size=2, max_grad_norm=0.5)
    zero = zero_config(given, 4)
    assert (zero.name, zero.stage) == (name, SHIPPED[name])
    assert zero.values["train_micro_batch_size_per_gpu"] == 2
    assert zero.values["gradient_accumulation_steps"] == 3
    assert zero.values["train_batch_size"] == 24
    assert zero.values["gradient_clipping"] == 0.5
    assert ("offload_optimizer" in zero.values["zero_optimization"]) == ("offload" in name)
    assert '"auto"' not in json.dumps(zero.values)


def test_ranks_that_do_not_divide_the_batch_all_do_the_same_number_of_micro_batches():
    zero = zero_config(config(deepspeed="zero2", global_batch_size=6, micro_batch_size=2), 2)
    assert zero.values["gradient_accumulation_steps"] == 2
    assert zero.values["train_batch_size"] == 8


def test_without_the_key_and_the_launcher_there_is_no_deepspeed():
    assert zero_config(config(), 2) is None


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero3.json"}, "zero3"),
        ({"DEEPSPEED_ZERO_STAGE": "1"}, "zero1"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "zero2_offload"),
    ],
)
def test_what_accelerate_launch_asks_for_is_what_the_key_would(monkeypatch, tmp_path, env, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for key, value in env.items():
        monkeypatch.setenv(f"ACCELERATE_{key}", value)
    assert zero_config(config(), 2) == zero_config(config(deepspeed=name), 2)
    assert zero_config(config(), 2).name == name


@pytest.mark.parametrize(
    ("env", "keys", "said"),
    [
        ({"USE_FSDP": "true"}, {}, "ACCELERATE_USE_FSDP=true.* deepspeed=zero3"),
        ({"MIXED_PRECISION": "fp8"}, {}, "precision=fp32; launch with --mixed_precision no"),
        (
            {"MIXED_PRECISION": "bf16"},
            {},
            "mixed_precision=bf16, .* precision=fp32; give precision=bf16, or",
        ),
        (
            {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"},
            {"deepspeed": "zero2"},
            "deepspeed=zero2, but accelerate launch names zero3",
        ),
        (
            {"USE_DEEPSPEED": "true", "GRADIENT_CLIPPING": "0.3"},
            {},
            "gradient_clipping=0.3, but this run uses its own key, max_grad_norm=1.0",
        ),
        (
            {},
            {"deepspeed": "zero4"},
            "neither a file nor a shipped name; give a file, or one of zero1,",
        ),
        ({}, {"deepspeed": "zero2", "precision": "fp16"}, "fp16 cannot be used with DeepSpeed"),
    ],
)
def test_what_would_be_ignored_or_contradicts_is_refused(monkeypatch, env, keys, said):
    for key, value in env.items():
        monkeypatch.setenv(f"ACCELERATE_{key}", value)
    with pytest.raises(UserError, match=said):
        zero_config(config(**keys), 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("no json", "is not a DeepSpeed configuration"),
        ({"zero_optimization": 2}, "is not a DeepSpeed configuration"),
        ({"zero_optimization": {"stage": 0}}, "stage=0; expected 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device=nvme; give cpu or none",
        ),
        (
            {"zero_optimization": {"stage": 1}, "train_batch_size": 7},
            "sets train_batch_size=7, but this run on 2 ranks has 8",
        ),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}},
            "section 'optimizer'; remove it",
        ),
        (
            {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
            "sets bf16.enabled; the run's own key is precision; write",
        ),
    ],
)
def test_a_file_of_ones_own_is_read_and_refused_where_it_contradicts_the_run(
    tmp_path, values, said
):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 9}}))
    zero = zero_config(config(deepspeed=path), 2)
    assert zero.name == "mine"
    assert zero.values["zero_optimization"]["reduce_bucket_size"] == 9
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    with pytest.raises(UserError, match=said):
        zero_config(config(deepspeed=path), 2)


def test_without_deepspeed_installed_the_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name)
    )
    with pytest.raises(UserError, match=r"pip install 'sead-dist\[deepspeed\]'"):
        zero_config(config(deepspeed="zero2"), 1)
