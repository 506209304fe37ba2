"""The speed of models on a machine: the time of a batch, measured once and kept in a file.

The time of a batch is modelled as a fixed part and a part for each row, which depends on the row's
tokens (our own model). The rate of a model that was not measured is scaled by its operations. The
measured batches hold random tokens at a few lengths, and the models are the run's own. Each figure
is the median of a few turns; a first turn is not counted.

Shapes: R rows of a batch, L tokens, K measured lengths, P batches.
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.config.schema import RunConfig
from sead_dist.data.tokens import TokenTable
from sead_dist.models.pretrained import NO_EFFECT
from sead_dist.models.sequence_classifier import outline
from sead_dist.runtime.files import cache_place, written_aside
from sead_dist.runtime.memory import held, peak, reset_peak
from sead_dist.teachers.inference import Cut, batches_of
from sead_dist.teachers.teacher import Teacher, device_model
from sead_dist.teachers.whole import load_whole

# the operations of a training step, in forwards: a backward counts as two
STEP_FORWARDS = 3
FORMAT = 1


@dataclass(frozen=True)
class Rate:
    """Seconds that a model's batches take.

    batch_s: for each batch. row_s_K: for each row of lengths_K padded tokens (ascending). once_s:
    for loading a teacher, or for a step of the student's optimiser. shape_s: for the first batch of
    each shape. scaled: True where it was not measured but scaled by operations. busy: other
    processes used the processors meanwhile. work_bytes: memory in use beyond weights and state;
    None where it was not measured.
    """

    lengths_K: tuple[int, ...]
    row_s_K: tuple[float, ...]
    batch_s: float
    once_s: float
    shape_s: float = 0.0
    scaled: bool = False
    busy: bool = False
    work_bytes: int | None = None

    def row_s(self, lengths_P: ArrayLike) -> NDArray[np.float64]:
        """Seconds for a row of so many tokens.

        Between measured lengths they lie on a straight line, from 0 at no tokens. Beyond the last
        one they grow in proportion to the tokens.
        """
        needed_P = np.asarray(lengths_P, np.float64)
        inside_P = np.interp(needed_P, (0, *self.lengths_K), (0.0, *self.row_s_K))
        return np.asarray(inside_P * np.maximum(1.0, needed_P / self.lengths_K[-1]))

    def seconds(self, lengths_P: ArrayLike, rows_P: ArrayLike) -> float:
        """Seconds for all these batches. lengths_P: padded tokens of each. rows_P: rows of each."""
        batches_s = self.batch_s + np.asarray(rows_P) * self.row_s(lengths_P)
        shapes = set(zip(np.ravel(lengths_P), np.ravel(rows_P), strict=True))
        return float(np.sum(batches_s)) + self.shape_s * len(shapes)


def operations(config: PretrainedConfig, length: int, trust_remote_code: bool = False) -> float:
    """Additions and multiplications of a forward of one row of `length` tokens.

    There are two for each token and weight of a linear layer. Attention has four for each pair of
    tokens, layer and hidden dimension (Kaplan et al. 2020, section 2.1). ALBERT's layers share
    weights, which count as often as they run.
    """
    model = outline(config, trust_remote_code)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    layers = int(getattr(config, "num_hidden_layers", 1))
    shared = layers / int(getattr(config, "num_hidden_groups", layers))
    pairs = 4.0 * layers * int(getattr(config, "hidden_size", 0)) * length * length
    return 2.0 * shared * weights * length + pairs


def scaled_rate(known: Rate, ratio: float) -> Rate:
    """The rate of a model with `ratio` times as many operations for each row."""
    return replace(
        known,
        row_s_K=tuple(ratio * row_s for row_s in known.row_s_K),
        once_s=ratio * known.once_s,
        scaled=True,
    )


@dataclass(frozen=True)
class Machine:
    """Where a rate was measured: hardware, torch, threads of a process, and the number of processes
    on the machine at that time."""

    device: str
    torch: str
    threads: int
    ranks: int


def this_machine(device: torch.device) -> Machine:
    """The machine of this process."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(device_model(device), torch.__version__, torch.get_num_threads(), ranks)


def shape_name(config: PretrainedConfig) -> str:
    """The model's kind, depth and width: "bert L6-H256"."""
    depth = getattr(config, "num_hidden_layers", "?")
    return f"{config.model_type} L{depth}-H{getattr(config, 'hidden_size', '?')}"


def _key(kind: str, config: PretrainedConfig, machine: Machine, **more: object) -> str:
    facts = {name: value for name, value in config.to_dict().items() if name not in NO_EFFECT}
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
    """A text of all that a teacher's rate depends on."""
    shapes = json.loads(teacher.key.numerics)["shapes"]
    about = {"dtype": teacher.dtype, "weights": teacher.entry.quantization, "shapes": shapes}
    return _key("teacher", teacher.config, machine, **about)


def student_key(model: PreTrainedModel, config: RunConfig, task_kind: str, machine: Machine) -> str:
    """A text of all that the rate of the student's step depends on."""
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
    """The file of rates: SEAD_DIST_RATES, else a file in the user's cache."""
    return cache_place("rates.json", "SEAD_DIST_RATES=FILE")


def remembered(path: Path) -> dict[str, Rate]:
    """The measured rates in a file, by key. There are none where the file is missing or cannot be
    read, since they can be measured again."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["format"] != FORMAT:
            return {}
        return {key: _rate(fields) for key, fields in read["rates"].items()}
    except Exception:  # a file may hold anything
        return {}


def _rate(fields: dict[str, Any]) -> Rate:
    lengths, seconds = fields.pop("lengths_K"), fields.pop("row_s_K")
    return Rate(tuple(map(int, lengths)), tuple(map(float, seconds)), **fields)


def remember(path: Path, found: dict[str, Rate]) -> None:
    """Add measured rates to the file and replace older ones. Of two writers at once, one may lose
    its rates, which are then measured again."""
    kept = {**remembered(path), **found}
    rates = {key: asdict(rate) for key, rate in kept.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        text = json.dumps({"format": FORMAT, "rates": rates}, indent=1)
        aside.write_text(text + "\n", encoding="utf-8")


# teachers are compared at this many tokens: their relative costs hardly depend on the number
COST_TOKENS = 64


def costs(teachers: Sequence[Teacher], rates_N: Sequence[Rate | None]) -> list[float]:
    """What a row of each teacher costs: seconds if all rates are known, else its parameters."""
    known = [rate for rate in rates_N if rate is not None]
    if len(known) < len(teachers):
        return [float(teacher.parameters) for teacher in teachers]
    return [
        float(rate.row_s(min(COST_TOKENS, teacher.inputs.max_length)))
        for teacher, rate in zip(teachers, known, strict=True)
    ]


def known_costs(teachers: Sequence[Teacher], device: torch.device) -> list[float]:
    """As `costs`, with the rates in this machine's file."""
    found, machine = remembered(default_rates()), this_machine(device)
    return costs(teachers, [found.get(teacher_key(teacher, machine)) for teacher in teachers])


# measured are those of these lengths that span the task's lengths
MEASURED_LENGTHS = (8, 16, 32, 64, 128, 256, 512)
TURNS = 3
# a batch of so few rows shows the fixed part of its time
FEW_ROWS = 4


def lengths_to_measure(lengths: np.ndarray, most: int) -> list[int]:
    """The lengths to measure for rows of these lengths. None is over `most`."""
    low = max(
        (length for length in MEASURED_LENGTHS if length <= lengths.min()),
        default=MEASURED_LENGTHS[0],
    )
    high = min(
        (length for length in MEASURED_LENGTHS if length >= lengths.max()),
        default=MEASURED_LENGTHS[-1],
    )
    return sorted({min(length, most) for length in MEASURED_LENGTHS if low <= length <= high})


class Stopwatch:
    """Times batches until a moment on the monotonic clock.

    It leaves out a batch that would end after that moment. The first one must be small, and is
    always timed.
    """

    def __init__(self, device: torch.device, until: float) -> None:
        self.device, self.until = device, until
        self.speed: float | None = None
        # how much longer the first batch of each shape took than the others
        self.firsts: list[float] = []

    def time(self, do: Callable[[], None], work: float) -> float | None:
        """Median seconds of `do`, which does `work` operations; None where too little time is
        left."""
        left = self.until - time.monotonic()
        expected = 0.0 if self.speed is None else work / self.speed
        if self.speed is not None and expected * (TURNS + 1) > left:
            return None
        first = self._once(do)
        # one turn is enough where it took longer than expected
        turns = TURNS if first * TURNS <= self.until - time.monotonic() else 1
        taken = statistics.median(self._once(do) for _ in range(turns))
        self.firsts.append(first - taken)
        self.speed = max(work / taken, self.speed or 0.0)
        return taken

    @property
    def shape_s(self) -> float:
        """How many seconds longer the first batch of a shape takes. The very first batch of all is
        left out, since much else starts with it."""
        return max(0.0, statistics.median(self.firsts[1:])) if self.firsts[1:] else 0.0

    def _once(self, do: Callable[[], None]) -> float:
        began = time.perf_counter()
        do()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


def measure_batches(
    timer: Stopwatch,
    lengths_K: Sequence[int],
    rows_of: Callable[[int], int],
    batch: Callable[[int, int], Callable[[], None]],
    work: Callable[[int], float],
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """(measured lengths, seconds of a row at each, seconds of a batch apart from its rows).

    batch(rows, length): gives the function to time. work(length): gives the operations of a row.
    Where time is short, batches get fewer rows; then the longest lengths are left out.
    """
    first = lengths_K[0]
    few = min(FEW_ROWS, rows_of(first))
    few_s = timer.time(batch(few, first), few * work(first))
    assert few_s is not None
    measured: dict[int, tuple[int, float]] = {}
    for length in lengths_K:
        rows = rows_of(length)
        taken = timer.time(batch(rows, length), rows * work(length))
        while taken is None and rows > few:
            rows = max(few, rows // 4)
            taken = timer.time(batch(rows, length), rows * work(length))
        if taken is None:
            break
        measured[length] = (rows, taken)
    rows, taken = measured.setdefault(first, (few, few_s))
    batch_s = (few_s * rows - taken * few) / (rows - few) if rows > few else 0.0
    # an outlier in one of the two times must not make rows free
    batch_s = min(max(0.0, batch_s), 0.9 * min(taken for _, taken in measured.values()))
    row_s_K = tuple((taken - batch_s) / rows for rows, taken in measured.values())
    return tuple(measured), row_s_K, batch_s


def random_inputs(
    model: PreTrainedModel, rows: int, length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Inputs [R, L] of random tokens. The last row is one token long, as in a teacher's batch."""
    words = int(getattr(model.config, "vocab_size", 100))
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, 1:] = 0
    ids = torch.randint(min(3, words - 1), words, (rows, length))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def random_pack(
    model: PreTrainedModel, rows: int, length: int, device: torch.device, pack_from: int
) -> dict[str, Any]:
    """A pack of so many rows of random tokens."""
    words = int(getattr(model.config, "vocab_size", 100))
    ids = np.random.default_rng(0).integers(min(3, words - 1), words, rows * length)
    ends = np.arange(rows + 1, dtype=np.int64) * length
    tokens = TokenTable(ids.astype(np.int32), None, ends, 1, 0, 0, np.zeros(0, np.int64))
    cut = Cut(length, None, pack_from)
    return next(batches_of(tokens, np.arange(rows), device, cut, model.config))[1]


def full_batch(teacher: Teacher, device: torch.device, length: int) -> int:
    """The most rows in a batch of this teacher, for texts of this length."""
    return int(teacher.cut.full_rows(np.array([length]), device.type)[0])


def measure_teacher(
    teacher: Teacher,
    device: torch.device,
    trust_remote_code: bool,
    lengths_K: Sequence[int],
    until: float,
) -> Rate:
    """The rate of a teacher's forward, loaded as a run loads it.

    Raises UserError where its weights cannot be read.
    """
    held_before = held(device) if reset_peak(device) else None
    began = time.perf_counter()
    model = load_whole(teacher, device, trust_remote_code, {})
    load_s = time.perf_counter() - began
    pack_from = teacher.cut.pack_from

    def batch(rows: int, length: int) -> Callable[[], None]:
        if pack_from is None:
            inputs = random_inputs(model, rows, length, device)
        else:
            inputs = random_pack(model, rows, length, device, pack_from)

        @torch.inference_mode()
        def forward() -> None:
            model(**inputs).logits.float().cpu()

        return forward

    timer = Stopwatch(device, until)
    found = measure_batches(
        timer,
        lengths_K,
        partial(full_batch, teacher, device),
        batch,
        lambda length: operations(model.config, length, trust_remote_code),
    )
    work_bytes = beyond(device, held_before, teacher.bytes)
    return Rate(*found, once_s=load_s, shape_s=timer.shape_s, work_bytes=work_bytes)


def beyond(device: torch.device, held_before: int | None, known: int) -> int | None:
    """Bytes of the memory peak beyond `held_before` and `known`; None where it was not measured."""
    most = peak(device)
    if held_before is None or most is None:
        return None
    return max(0, most - held_before - known)
