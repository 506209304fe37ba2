"""The student under DeepSpeed's ZeRO: wrapper, step, and its state as whole tensors.

Only this file imports deepspeed, and only in a run that uses it. State is saved and loaded as whole
tensors, under the names and numbers that it has without DeepSpeed. So a checkpoint is the same for
all stages and numbers of ranks, and nothing is unpickled.
"""

import bisect
import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sead_dist.errors import UserError
from sead_dist.runtime.distributed import World
from sead_dist.training.deepspeed_config import ZeroConfig


class ZeroStudent:
    """A student under DeepSpeed. All ranks call each method together.

    params: the parameters in the order of the optimiser's groups; their number is the place in this
    list. engine: DeepSpeed's wrapper.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroConfig, world: World
    ) -> None:
        self.module, self.optimizer, self.world, self.stage = model, optimizer, world, zero.stage
        # in the order of the optimiser's own state, which DeepSpeed replaces by flat tensors
        self.params: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self.group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.own_group = not dist.is_initialized()
        if self.own_group:
            # DeepSpeed needs a process group and LOCAL_RANK with one rank too
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            os.environ["LOCAL_RANK"] = str(world.device.index or 0)
        self.engine = start_deepspeed(model, optimizer, zero, world)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Wrap a micro-batch. last: whether it is the last one of its step, in which ranks exchange
        gradients.

        DeepSpeed averages over ranks, as DDP does. It must not average over micro-batches.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.engine.step()  # only counts the micro-batch

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip and step. Returns the gradient's norm before clipping."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole student on rank 0's CPU, gathered one parameter at a time. Other ranks get an
        empty dict."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with self._whole(parameter):
                if self.world.is_main:
                    state[name] = parameter.detach().cpu().clone()
        if self.world.is_main:
            state.update({name: b.cpu().clone() for name, b in persistent_buffers(self.module)})
        return state

    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `weights` returned. state: the same on every rank."""
        for name, parameter in self.module.named_parameters():
            with self._whole(parameter, modifier_rank=0):
                parameter.data.copy_(state[name])
        for name, buffer in persistent_buffers(self.module):
            buffer.copy_(state[name])
        self.engine.optimizer.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state_dict as it would be without DeepSpeed. Only that of rank 0 is
        complete."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flats = self._flat_parameters()
        kept = self.optimizer.state.get(flats[0], {})
        moments = [key for key, value in kept.items() if is_moment(value)]
        if kept:
            self._link_moments()
        state: dict[int, dict[str, torch.Tensor]] = {}
        for number, parameter in enumerate(self.params):
            whole = {key: safe_get_full_optimizer_state(parameter, key) for key in moments}
            if kept and self.world.is_main:
                # groups may have different counts of steps
                counters = {
                    key: value.cpu().clone()
                    for key, value in self.optimizer.state[self._flat_of(number)].items()
                    if isinstance(value, torch.Tensor) and key not in moments
                }
                state[number] = {**counters, **{key: value.cpu() for key, value in whole.items()}}
        groups, first = [], 0
        for group, size in zip(self.optimizer.param_groups, self.group_sizes, strict=True):
            numbers = list(range(first, first + size))
            groups.append({**group, "params": numbers})
            first += size
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, saved: dict[str, Any]) -> None:
        """Load what `optimizer_state` or an optimiser's own state_dict returned. saved: the same on
        every rank."""
        for group, kept in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in kept.items() if key != "params"})
        if not saved["state"]:
            return
        # a flat tensor gets the counts of one of its parameters; its moments are set below
        some_number = {id(self._flat_of(number)): number for number in range(len(self.params))}
        for flat in self._flat_parameters():
            self.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if is_moment(value) else value.to(flat.device).clone()
                for key, value in saved["state"][some_number.get(id(flat), 0)].items()
            }
        self._link_moments()
        for number, parameter in enumerate(self.params):
            for key, value in saved["state"][number].items():
                if is_moment(value):
                    self._set_moment(parameter, key, value)

    def close(self) -> None:
        """Remove the wrapper's hooks. With one rank, also end the process group made here."""
        import deepspeed.comm

        self.engine.destroy()
        if self.own_group:
            deepspeed.comm.destroy_process_group()  # ends the groups that it keeps too
            del os.environ["LOCAL_RANK"]  # Accelerate would take it for a launcher's

    def _whole(self, parameter: nn.Parameter, **more: Any) -> AbstractContextManager[None]:
        """Inside, a parameter that is split over the ranks is whole on all of them."""
        from deepspeed.runtime.zero import GatheredParameters

        gathered: AbstractContextManager[None] = GatheredParameters(
            [parameter], enabled=self.stage == 3, **more
        )
        return gathered

    def _flat_parameters(self) -> list[torch.Tensor]:
        """This rank's parts of the parameters, as flat tensors that the optimiser steps."""
        sharded = self.engine.optimizer
        flats: list[torch.Tensor] = (
            sharded.fp32_partitioned_groups_flat
            if self.stage == 3
            else sharded.single_partition_of_fp32_groups
        )
        return flats

    def _flat_of(self, number: int) -> torch.Tensor:
        """The flat tensor whose state counts the steps of a parameter.

        Stages 1 and 2 have one for each group. In stage 3 all parameters are trained at every step
        (a feature loss, with which some are at rest, is rejected there). So they have one count.
        """
        flats = self._flat_parameters()
        if self.stage == 3:
            return flats[0]
        group = bisect.bisect_right(list(itertools.accumulate(self.group_sizes)), number)
        return flats[group]

    def _link_moments(self) -> None:
        """Make DeepSpeed find a parameter's part of the flat moments.

        In stages 1 and 2 DeepSpeed does so itself after its first step, but for the first group
        alone.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage < 3:
            groups = self.engine.optimizer.bit16_groups
            for group, flat in zip(groups, self._flat_parameters(), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self.optimizer.state)

    def _set_moment(self, parameter: nn.Parameter, key: str, whole: torch.Tensor) -> None:
        """Set this rank's part of one of the optimiser's moments."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
            return
        # equal parts; the last one is filled up
        size = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]  # DeepSpeed's own
        flat = nn.functional.pad(whole.flatten(), (0, size * self.world.size - whole.numel()))
        mine = flat.narrow(0, size * self.world.rank, size)
        safe_set_local_optimizer_state(parameter, mine, key)


def start_deepspeed(
    model: nn.Module, optimizer: torch.optim.Optimizer, zero: ZeroConfig, world: World
) -> Any:
    """DeepSpeed's engine around the student. Raises UserError for settings that it rejects, and for
    a DS_ACCELERATOR of another device."""
    kind = world.device.type
    if os.environ.setdefault("DS_ACCELERATOR", kind) != kind:
        raise UserError(
            f"DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}, but this run computes on {kind}; "
            "unset DS_ACCELERATOR"
        )
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # it uses old names of collectives, and torch warns each time
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # Only inference would use this CPU collective. It is compiled at the start, and a killed rank
    # leaves its 66 MiB in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero.values)
    except (DeepSpeedConfigError, ValidationError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"DeepSpeed rejects the settings of {zero.name}: {reason}; correct its file, or give "
            "another"
        ) from None
    return engine


def persistent_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers in a state dict, with their names."""
    kept = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def is_moment(value: object) -> bool:
    """Whether a value of the optimiser's state is a tensor like its parameter (not a count of
    steps)."""
    return isinstance(value, torch.Tensor) and value.dim() > 0
