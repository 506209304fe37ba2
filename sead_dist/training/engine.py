"""The student under Accelerate or DeepSpeed: prepare, forward, backward, step, save, load.

Only this file and teachers/sharding.py import accelerate. Loss terms are normalised over the valid
rows of the global batch (invariant 2). So micro-batches and ranks are summed here, never averaged.

Shapes: B rows, C classes, K text rows per example, L tokens.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, LoggerType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from sead_dist.config.automatic import averaged_steps, learning_rate
from sead_dist.config.schema import RunConfig
from sead_dist.data.order import micro_batch_seed
from sead_dist.errors import UserError, reading
from sead_dist.models.loaded import check_whole
from sead_dist.models.sequence_classifier import by_example, unshared
from sead_dist.objectives.feature_losses import Rest
from sead_dist.runtime.distributed import World
from sead_dist.training.deepspeed import ZeroStudent
from sead_dist.training.deepspeed_config import zero_config

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# Transformers' own "constant" has no warm-up
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
AVERAGE_FILE = "average.safetensors"


def build_optimizer(
    model: nn.Module, config: RunConfig, rest: Rest | None = None
) -> torch.optim.Optimizer:
    """AdamW or SGD. Only matrices have weight decay; biases and norms have none. Parameters at rest
    are in the last two groups, marked `rested`."""
    names = rest.names if rest is not None else frozenset()
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for rested in (False, True) if rest is not None else (False,):
        mine = [p for name, p in parameters if (name in names) == rested]
        marked = {} if rest is None else {"rested": rested}
        groups += [
            {"params": [p for p in mine if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in mine if p.ndim < 2], "weight_decay": 0.0},
        ]
        for group in groups[-2:]:
            group.update(marked)
    rate = learning_rate(config, width_of(model))
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def width_of(model: nn.Module) -> int:
    """The width of a student's hidden states; BERT-base's where its config does not give it."""
    return int(getattr(model.config, "hidden_size", None) or 768)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: RunConfig, total_steps: int, rest: Rest | None = None
) -> LambdaLR:
    """The learning rate over the run, for each group of the optimiser."""
    schedule: LambdaLR = get_scheduler(
        SCHEDULES[config.lr_scheduler_type],
        optimizer,
        num_warmup_steps=config.warmup(total_steps),
        num_training_steps=total_steps,
    )
    if rest is None:
        return schedule
    base = schedule.lr_lambdas[0]

    def rested(step: int) -> float:
        return float(base(step)) * rest.share(step)

    both = {False: base, True: rested}
    return LambdaLR(optimizer, [both[group["rested"]] for group in optimizer.param_groups])


class WeightAverage:
    """The mean of the student's weights after step `first` (from 1) and each later one (Izmailov et
    al. 2018; here with the run's own learning-rate schedule).

    The sums of floating-point tensors are fp32 and part of every checkpoint. So a resumed run has
    the same mean to the last bit. Only rank 0 holds them: all ranks have equal weights after every
    step (invariant 7).
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Add the student's present weights to the sums."""
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                mine = tensor.detach().float()
                if name in self.sums:
                    self.sums[name] += mine.to(self.sums[name].device)
                else:
                    self.sums[name] = mine.clone()
        self.count += 1

    def mean(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean. Tensors without floating-point numbers are taken from `weights`."""
        means = {name: total / self.count for name, total in self.sums.items()}
        return {n: means[n].to(w.dtype) if n in means else w for n, w in weights.items()}

    def save(self, folder: Path) -> None:
        """Write the sums into a checkpoint, if there are any."""
        if self.count:
            sums = {name: total.contiguous() for name, total in self.sums.items()}
            save_file(sums, folder / AVERAGE_FILE, metadata={"steps": str(self.count)})

    def load(self, folder: Path, device: torch.device) -> None:
        """Read the sums of a checkpoint; there are none if it has none."""
        path = folder / AVERAGE_FILE
        self.count, self.sums = 0, {}
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                self.count = int((file.metadata() or {})["steps"])
            self.sums = {name: total.to(device) for name, total in load_file(path).items()}


class Engine:
    """Owns the student's wrapper, optimiser and learning-rate schedule."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: RunConfig,
        world: World,
        total_steps: int,
        rest: Rest | None = None,
    ) -> None:
        zero = zero_config(config, world.size)
        # this package sums gradients of micro-batches and ranks, so Accelerate accumulates none
        with without_launcher_deepspeed():
            self.accelerator = Accelerator(
                mixed_precision=MIXED[config.precision],
                cpu=world.device.type == "cpu",
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
                log_with=config.report_to,
                project_dir=config.output_dir,
            )
        check_world(self.accelerator.num_processes, world)
        self.world = world
        self.max_grad_norm = config.max_grad_norm
        self.seed = config.seed
        self.module = model
        self.rest = rest
        self.average: WeightAverage | None = None
        if config.final_checkpoint == "average":
            first = total_steps - averaged_steps(config, total_steps) + 1
            # steps before the parameters at rest are trained do not count
            self.average = WeightAverage(first if rest is None else max(first, rest.until + 1))
        optimizer = build_optimizer(model, config, rest)
        self.schedule = build_schedule(optimizer, config, total_steps, rest)
        self.model: nn.Module
        self.zero: ZeroStudent | None = None
        self.deepspeed = zero.name if zero is not None else None
        if zero is None:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        else:
            self.zero = ZeroStudent(model, optimizer, zero, world)
            self.model, self.optimizer = self.zero.engine, optimizer

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def forward(self, inputs: dict[str, torch.Tensor], choices: int) -> torch.Tensor:
        """The student's logits_BC."""
        on_device = {name: tensor.to(self.world.device) for name, tensor in inputs.items()}
        logits: torch.Tensor = self.model(**on_device).logits.float()
        return by_example(logits, choices)

    def seed_micro_batch(self, step: int, micro: int) -> None:
        """Seed dropout's generator: only that of this rank's device."""
        seed = micro_batch_seed(self.seed, step, micro)
        device = self.world.device
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Ranks exchange gradients only in the last micro-batch of a step."""
        if self.zero is not None:
            with self.zero.accumulate(last):
                yield
        elif last or self.world.size == 1:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's share. The wrapper averages over ranks, but the loss is a
        sum over them. Hence the factor."""
        if self.zero is not None:
            self.zero.backward(loss * self.world.size)
        else:
            self.accelerator.backward(loss * self.world.size)

    def wake(self, step: int) -> None:
        """Before step `step` (from 0): reset the optimiser state of parameters at rest, if it is
        the first step that trains them. Adam would else count the steps without a gradient, treat
        its moments as settled, and take far too large a step."""
        if self.rest is None or step != self.rest.until:
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group["rested"] else ():
                # in place: DeepSpeed holds parts of these
                for value in self.optimizer.state.get(parameter, {}).values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()

    def step(self) -> float:
        """Take one optimiser step. Returns the gradient's norm before clipping."""
        if self.zero is not None:
            norm = self.zero.step()
            self.schedule.step()
            return norm
        # without clipping the norm is computed too
        most = self.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), most))
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def average_weights(self, step: int) -> None:
        """After step `step` (from 1): add the weights, if they are averaged. Every rank calls
        this."""
        if self.average is None or step < self.average.first:
            return
        weights = self.weights()
        if self.world.is_main:
            self.average.add(weights)

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole student on rank 0. Every rank calls this."""
        return self.zero.weights() if self.zero is not None else unshared(self.module)

    def save_weights(self, folder: Path, averaged: bool = False) -> None:
        """Write the student from rank 0, with its present or averaged weights. Every rank calls
        this."""
        weights = self.weights()
        if self.world.is_main:
            if averaged:
                assert self.average is not None
                weights = self.average.mean(weights)
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(tensors, folder / "student.safetensors")

    def load_weights(self, folder: Path) -> None:
        """Load what `save_weights` wrote, on every rank. RunError for missing or extra tensors."""
        weights = load_file(folder / "student.safetensors")
        check_whole(self.module, weights.keys(), folder)
        if self.zero is not None:
            self.zero.load_weights(weights)
        else:
            self.module.load_state_dict(weights, strict=False)

    def save(self, folder: Path) -> None:
        """Write student, optimiser, schedule and sums of weights, the same with and without
        DeepSpeed."""
        optimizer = self.zero.optimizer_state() if self.zero else self.optimizer.state_dict()
        self.save_weights(folder)
        if self.world.is_main:
            state = {
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            }
            torch.save(state, folder / "optimizer.pt")
            if self.average is not None:
                self.average.save(folder)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, on every rank. The optimiser's state is read without
        unpickling."""
        self.load_weights(folder)
        if self.average is not None and self.world.is_main:
            self.average.load(folder, torch.device("cpu") if self.zero else self.world.device)
        path = folder / "optimizer.pt"
        with reading(path, f"remove {folder.name} to continue from the checkpoint before it"):
            state = torch.load(path, weights_only=True, map_location="cpu")
            if self.zero is not None:
                self.zero.load_optimizer_state(state["optimizer"])
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])

    def start_tracker(self, run: str, values: dict[str, object]) -> None:
        plain = {k: v for k, v in values.items() if isinstance(v, int | float | str | bool)}
        self.accelerator.init_trackers(run, plain)

    def track(self, values: dict[str, float], step: int) -> None:
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        """Finish the trackers and reset Accelerate's process-wide state: the process's next run may
        have another precision. (Accelerate's end_training would end the process group.)"""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.zero is not None:
            self.zero.close()
        self.accelerator.free_memory()
        AcceleratorState._reset_state(reset_partial_state=True)


def check_tracker(name: str | None) -> None:
    """Raises UserError for a tracker that Accelerate does not have, or that is not installed."""
    known = [str(kind) for kind in LoggerType if str(kind) != "all"]
    if name is not None and name not in known:
        raise UserError(f"report_to={name} is not a tracker; give one of {', '.join(known)}")
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(
            f"report_to={name} needs the package {name}, which is not installed; pip install "
            f"{name}, or leave report_to out"
        )


def check_arithmetic(precision: str, device: torch.device) -> None:
    """Raises UserError for fp16 on a CPU, where autocast silently computes in fp32."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU; on a CPU give precision=bf16 or fp32")


def slow_arithmetic(config: RunConfig, device: torch.device) -> list[str]:
    """A line if the run computes in numbers that this processor is slow in; else an empty list."""
    dtypes = {entry.dtype or config.teacher_precision for entry in config.teachers}
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu" or capability != "AVX2" or "bf16" not in {config.precision, *dtypes}:
        return []
    return [
        "this processor (AVX2) has no instructions for bf16, which takes several times as long as "
        "fp32; precision=fp32, teacher_precision=fp32, or dtype: fp32 in a teacher's entry, is "
        "faster"
    ]


def check_world(counted: int, world: World) -> None:
    """Raises UserError where Accelerate counts another number of ranks: under some launchers it
    silently trains alone."""
    if counted != world.size:
        setting = os.environ.get("ACCELERATE_USE_CPU", "unset")
        raise UserError(
            f"{world.size} processes were launched but Accelerate counts {counted} "
            f"(ACCELERATE_USE_CPU={setting}); start with "
            f"torchrun --nproc_per_node {world.size} -m sead_dist ..."
        )


@contextmanager
def without_launcher_deepspeed() -> Iterator[None]:
    """Within the block, Accelerate does not read its launcher's setting for DeepSpeed. On a CPU it
    would ignore that silently; on a GPU it would wrap the student a second time."""
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = asked


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Within the block, Accelerate has no process-wide state at first, whatever the caller's own
    Accelerator or Trainer has set. Afterwards it has the caller's again."""
    kinds = (AcceleratorState, PartialState, GradientState)
    before = [dict(kind._shared_state) for kind in kinds]
    try:
        for kind in kinds:
            kind._shared_state.clear()
        yield
    finally:
        for kind, callers in zip(kinds, before, strict=True):
            # cleared and filled, since each Accelerator holds this same mapping
            kind._shared_state.clear()
            kind._shared_state.update(callers)
