"""The DeepSpeed settings of a run.

The key `deepspeed` or `accelerate launch` names them. They are read from a JSON file, and every
`auto` is filled from the run's own configuration. Settings of a launcher that this package would
ignore are rejected.
"""

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sead_dist.config.load import shipped_files
from sead_dist.config.schema import Precision, RunConfig
from sead_dist.errors import UserError, reason, rejection

# sections of a DeepSpeed file for which a run has its own keys
OURS = {
    "optimizer": "optim, learning_rate and weight_decay",
    "scheduler": "lr_scheduler_type and warmup_steps",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
}
OFFLOADS = ("offload_optimizer", "offload_param")
# other ways to split a student, which Accelerate has and this package does not
FOREIGN = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


@dataclass(frozen=True)
class ZeroConfig:
    """Settings for DeepSpeed. name: of the file, without its ending. values: for DeepSpeed, without
    `auto`."""

    name: str
    values: dict[str, Any]

    @property
    def stage(self) -> int:
        """1: optimiser state is split over the ranks; 2: gradients too; 3: parameters too."""
        return int(self.values["zero_optimization"]["stage"])


def zero_config(config: RunConfig, ranks: int) -> ZeroConfig | None:
    """The settings for so many ranks, from the key or the launcher; None: no DeepSpeed.

    Raises UserError where DeepSpeed is not installed, and for settings that contradict the run's or
    each other, or that would be ignored.
    """
    reject_ignored(config)
    launcher = launcher_deepspeed(config)
    if config.deepspeed and launcher and find_file(config.deepspeed) != find_file(launcher):
        raise UserError(
            f"deepspeed={config.deepspeed}, but accelerate launch names {launcher}; "
            "leave one of the two out"
        )
    asked = config.deepspeed or launcher
    if asked is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"deepspeed={asked} needs DeepSpeed, which is not installed; "
            "pip install 'sead-dist[deepspeed]', or leave deepspeed out"
        )
    path = find_file(asked)
    return ZeroConfig(path.stem, filled(path, config, ranks))


def reject_ignored(config: RunConfig) -> None:
    """Raises UserError for settings of `accelerate launch` that a run would ignore."""
    for name in FOREIGN:
        if _is_true(name):
            raise UserError(
                f"{name}=true, but only DeepSpeed can split the student; remove this setting from "
                "accelerate launch, and give deepspeed=zero3"
            )
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", config.precision):
        same = f"give precision={mixed}, or " if mixed in get_args(Precision) else ""
        raise UserError(
            f"accelerate launch has mixed_precision={mixed}, but this run uses its own key, "
            f"precision={config.precision}; {same}launch with --mixed_precision no"
        )


def launcher_deepspeed(config: RunConfig) -> str | None:
    """The file or shipped name that `accelerate launch` gives for DeepSpeed; None: it does not use
    it. Raises UserError for another gradient clipping than the run's."""
    if not _is_true("ACCELERATE_USE_DEEPSPEED"):
        return None
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return file
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping != "none" and float(clipping) != config.max_grad_norm:
        raise UserError(
            f"accelerate launch has gradient_clipping={clipping}, but this run uses its own key, "
            f"max_grad_norm={config.max_grad_norm}; leave gradient_clipping out"
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    devices = [
        os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
        for what in ("OPTIMIZER", "PARAM")
    ]
    return f"zero{stage}" + ("_offload" if devices != ["none", "none"] else "")


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1", "yes")


def find_file(asked: str) -> Path:
    """A DeepSpeed file by path, or by the name of a shipped one (`zero2`). Raises UserError for
    others."""
    if Path(asked).is_file():
        return Path(asked)
    known = shipped_files("deepspeed", "json")
    path = known.get(Path(asked).name.removesuffix(".json"))
    # so the path in a checkout finds the shipped file from any folder
    if path is not None and str(Path(asked).parent) in (".", "configs/deepspeed"):
        return path
    raise UserError(
        f"deepspeed={asked} is neither a file nor a shipped name; give a file, or one of "
        f"{', '.join(known)}"
    )


def read_file(path: Path) -> dict[str, Any]:
    """The values of a DeepSpeed file. Raises UserError where it splits nothing, keeps state on
    another device than the GPU or the CPU, or is not such a file."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        zero = values["zero_optimization"]
        stage, devices = zero["stage"], {k: zero.get(k, {}).get("device", "none") for k in OFFLOADS}
    except Exception as error:
        raise rejection(
            f"{path} is not a DeepSpeed configuration with zero_optimization.stage "
            f"({reason(error)}); for an example see {shipped_files('deepspeed', 'json')['zero2']}",
            error,
        ) from error
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path} has zero_optimization.stage={stage}; expected 1, 2 or 3; for stage 0 leave "
            "deepspeed out"
        )
    for key, device in devices.items():
        if device not in ("cpu", "none"):
            raise UserError(f"{path} has {key}.device={device}; give cpu or none")
    return values


def reject_sections(path: Path, values: dict[str, Any]) -> None:
    """Raises UserError for sections of a file that contradict keys of the run."""
    for section, keys in OURS.items():
        given = values.get(section, {"enabled": False})
        if section in ("optimizer", "scheduler") and section in values:
            raise UserError(
                f"{path} has a section {section!r}; remove it: the run's own keys are {keys}"
            )
        if given.get("enabled", True) not in ("auto", False):
            raise UserError(
                f'{path} sets {section}.enabled; the run\'s own key is {keys}; write "auto"'
            )


def from_the_run(
    path: Path, values: dict[str, Any], config: RunConfig, ranks: int
) -> dict[str, float]:
    """The batch sizes and the clipping of this run. Raises UserError where the file has other
    ones."""
    micro_batches = -(-config.global_batch_size // (config.micro_batch_size * ranks))
    ours: dict[str, float] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": config.micro_batch_size * micro_batches * ranks,
        "gradient_clipping": config.max_grad_norm,
    }
    for key, value in ours.items():
        if values.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"{path} sets {key}={values[key]}, but this run on {ranks} ranks has {value}; "
                'write "auto"'
            )
    return ours


def filled(path: Path, config: RunConfig, ranks: int) -> dict[str, Any]:
    """The file's values, with every `auto` filled or left to DeepSpeed's default. Raises UserError
    for values that this run cannot have."""
    values = read_file(path)
    reject_sections(path, values)
    if config.precision == "fp16":
        raise UserError(
            "precision=fp16 cannot be used with DeepSpeed, which would keep the weights in fp16; "
            "give precision=bf16 or fp32"
        )
    autocast: dict[str, Any] = {"enabled": config.precision == "bf16"}
    if autocast["enabled"]:
        # as without DeepSpeed: weights, gradients and their exchange stay fp32
        autocast.update(dtype="bfloat16", lower_precision_safe_modules=[])
    theirs = {key: value for key, value in values.items() if key not in OURS}
    return {
        "steps_per_print": 2**31,
        **_without_auto(theirs),
        **from_the_run(path, values, config, ranks),
        "torch_autocast": autocast,
        # the optimiser is this package's, even if its state is offloaded, so none is compiled
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_auto(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != "auto"
    }
