"""How quick models are on a machine: what a batch takes, measured once and remembered in a file.

What a batch of a shape takes is taken to be a fixed part and a part for each row, which depends on
the row's tokens (our own model). What was not measured is scaled by operations.

Shapes: K measured lengths, P batches.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.models.pretrained import SILENT
from sead_dist.models.sequence_classifier import outline
from sead_dist.runtime.files import user_folder
from sead_dist.runtime.own_files import written_aside
from sead_dist.teachers.teacher import Teacher, device_model

# a training step's operations, in forwards: one forward, and a backward of two
STEP_FORWARDS = 3
FORMAT = 1


@dataclass(frozen=True)
class Rate:
    """Seconds of a model's batches: batch_s for each batch, and row_s_K for each row of lengths_K
    padded tokens (lengths_K ascending). once_s: to load a teacher; an optimiser's step of the
    student. shape_s: for the first batch of each shape. scaled: not measured, but scaled by
    operations. busy: others had the processors meanwhile. work_bytes: memory at work beyond
    weights and state, where it was measured."""

    lengths_K: tuple[int, ...]
    row_s_K: tuple[float, ...]
    batch_s: float
    once_s: float
    shape_s: float = 0.0
    scaled: bool = False
    busy: bool = False
    work_bytes: int | None = None

    def row_s(self, lengths_P: ArrayLike) -> NDArray[np.float64]:
        """Seconds for a row of so many tokens: between measured lengths on a straight line, which
        starts at nothing for no tokens, and beyond the last as its tokens."""
        asked_P = np.asarray(lengths_P, np.float64)
        inside_P = np.interp(asked_P, (0, *self.lengths_K), (0.0, *self.row_s_K))
        return np.asarray(inside_P * np.maximum(1.0, asked_P / self.lengths_K[-1]))

    def seconds(self, lengths_P: ArrayLike, rows_P: ArrayLike) -> float:
        """Seconds of all these batches, each of rows_P rows padded to lengths_P tokens."""
        batches_s = self.batch_s + np.asarray(rows_P) * self.row_s(lengths_P)
        shapes = set(zip(np.ravel(lengths_P), np.ravel(rows_P), strict=True))
        return float(np.sum(batches_s)) + self.shape_s * len(shapes)


def operations(config: PretrainedConfig, length: int, trust_remote_code: bool = False) -> float:
    """Additions and multiplications of a forward of one row of `length` tokens: two for each weight
    of a linear layer and token, and attention's four for each pair of tokens, layer and width.

    (Kaplan et al. 2020, section 2.1.) ALBERT's weights, which its layers share, count as often as
    they run.
    """
    model = outline(config, trust_remote_code)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    layers = int(getattr(config, "num_hidden_layers", 1))
    shared = layers / int(getattr(config, "num_hidden_groups", layers))
    pairs = 4.0 * layers * int(getattr(config, "hidden_size", 0)) * length * length
    return 2.0 * shared * weights * length + pairs


def scaled_rate(known: Rate, ratio: float) -> Rate:
    """The rate of a model that does `ratio` as many operations a row."""
    return replace(
        known,
        row_s_K=tuple(ratio * row_s for row_s in known.row_s_K),
        once_s=ratio * known.once_s,
        scaled=True,
    )


@dataclass(frozen=True)
class Machine:
    """Where something was measured: hardware, torch, a process's threads, and the processes of one
    machine that ran at the same time."""

    device: str
    torch: str
    threads: int
    ranks: int


def this_machine(device: torch.device) -> Machine:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(device_model(device), torch.__version__, torch.get_num_threads(), ranks)


def shape_name(config: PretrainedConfig) -> str:
    """The model's kind, depth and width: "bert L6-H256"."""
    depth = getattr(config, "num_hidden_layers", "?")
    return f"{config.model_type} L{depth}-H{getattr(config, 'hidden_size', '?')}"


def _key(kind: str, config: PretrainedConfig, machine: Machine, **more: object) -> str:
    facts = {name: value for name, value in config.to_dict().items() if name not in SILENT}
    text = json.dumps(facts, sort_keys=True, default=str)
    about = {
        "kind": kind,
        "model": shape_name(config),
        "shape": hashlib.sha256(text.encode()).hexdigest()[:16],
        **more,
        **asdict(machine),
    }
    return json.dumps(about, sort_keys=True)


def teacher_key(teacher: Teacher, machine: Machine) -> str:
    """What a teacher's rate depends on."""
    shapes = json.loads(teacher.key.numerics)["shapes"]
    about = {"dtype": teacher.dtype, "weights": teacher.entry.quantization, "shapes": shapes}
    return _key("teacher", teacher.config, machine, **about)


def student_key(model: PreTrainedModel, config: RunConfig, task_kind: str, machine: Machine) -> str:
    """What the rate of the student's step depends on."""
    return _key(
        "student",
        model.config,
        machine,
        dtype=config.precision,
        optimizer=config.optim,
        rows=config.micro_batch_size,
        task=task_kind,
    )


def default_rates() -> Path:
    """SEAD_DIST_RATES, else a file in the user's cache."""
    named = os.environ.get("SEAD_DIST_RATES")
    if named:
        return Path(named)
    cache = user_folder("XDG_CACHE_HOME", ".cache", "SEAD_DIST_RATES=FILE")
    return cache / "sead_dist" / "rates.json"


def remembered(path: Path) -> dict[str, Rate]:
    """The measured rates in a file; none where it is missing or cannot be used: what is only
    remembered can be measured again."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["format"] != FORMAT:
            return {}
        return {key: _rate(fields) for key, fields in read["rates"].items()}
    except Exception:  # whatever may stand there
        return {}


def _rate(fields: dict[str, Any]) -> Rate:
    lengths, seconds = fields.pop("lengths_K"), fields.pop("row_s_K")
    return Rate(tuple(map(int, lengths)), tuple(map(float, seconds)), **fields)


def remember(path: Path, found: dict[str, Rate]) -> None:
    """Add measured rates to the file, in the place of older ones. Two writers at once may lose one
    another's, which are then measured again."""
    kept = {**remembered(path), **found}
    rates = {key: asdict(rate) for key, rate in kept.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        text = json.dumps({"format": FORMAT, "rates": rates}, indent=1)
        aside.write_text(text + "\n", encoding="utf-8")


# teachers are compared at this many tokens: what they cost in proportion hardly depends on it
COST_TOKENS = 64


def costs(teachers: Sequence[Teacher], rates_N: Sequence[Rate | None]) -> list[float]:
    """What a row of each teacher costs: seconds where every teacher's rate is known, else its
    parameters."""
    known = [rate for rate in rates_N if rate is not None]
    if len(known) < len(teachers):
        return [float(teacher.parameters) for teacher in teachers]
    return [
        float(rate.row_s(min(COST_TOKENS, teacher.inputs.max_length)))
        for teacher, rate in zip(teachers, known, strict=True)
    ]


def known_costs(teachers: Sequence[Teacher], device: torch.device) -> list[float]:
    """The same, by what is remembered of this machine."""
    found, machine = remembered(default_rates()), this_machine(device)
    return costs(teachers, [found.get(teacher_key(teacher, machine)) for teacher in teachers])
