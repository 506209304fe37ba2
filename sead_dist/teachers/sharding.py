"""One teacher's parameters split over all ranks by torch's FSDP2, and loaded slice by slice.

Every rank holds an equal part of each parameter. A forward gathers the whole of one layer at a time
and frees it again. So all ranks do the same number of forwards together, each on a batch of its own
(invariant 8). Gathering copies bits and computes nothing, so the logits are those of the unsharded
teacher. The weights travel over the exchange group, in the one thread that uses it.

Shapes: R rows of a request, P rows of one batch, C the model's own classes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sead_dist.data.tokens import TokenTable
from sead_dist.errors import LostRankError, RunError, UserError, reading
from sead_dist.models.inputs_check import CheckRows, check_teacher, reset_attention
from sead_dist.models.loaded import reject_leftovers
from sead_dist.models.pretrained import COPY, weight_files
from sead_dist.models.sequence_classifier import new_classifier
from sead_dist.runtime.distributed import World, gather_objects, raise_first
from sead_dist.runtime.heartbeat import StopRequestedError
from sead_dist.teachers.inference import Cut, batches_of, own_logits
from sead_dist.teachers.packing import use_packs
from sead_dist.teachers.teacher import Teacher

T = TypeVar("T")
# dtypes of plain numbers; other dtypes are codes whose scales are stored elsewhere
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
FIX = "give its entry placement: partitioned or colocated"


class TornForwardError(LostRankError, RuntimeError):
    """A common forward failed on this rank, which can no longer agree on anything with the others.

    It is also a RuntimeError, like the error of a collective that fails because another rank ended.
    """


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The layers in a model's outermost module lists. A forward gathers and frees them one by
    one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers_of(child)


def empty_model(teacher: Teacher, trust_remote_code: bool) -> PreTrainedModel:
    """The teacher with parameters that have shapes and no memory.

    Its buffers have memory, since computed ones (position ids) are in no file.
    """
    with init_empty_weights(include_buffers=False):
        model = new_classifier(copy.deepcopy(teacher.config), trust_remote_code, teacher.dtype)
    model.tie_weights()  # the context makes each parameter again, tied ones twice
    return model.eval().requires_grad_(False)


def check_shardable(teacher: Teacher, trust_remote_code: bool) -> None:
    """Check, before anything is loaded, that a teacher can be split and read in slices.

    Raises UserError with the reason where it cannot.
    """
    model = empty_model(teacher, trust_remote_code)
    tensor_files(teacher, model)
    layers = list(layers_of(model))
    if not layers:
        raise UserError(
            f"teacher {teacher.name}: placement=sharded cannot split {type(model).__name__}: it "
            f"has no list of layers; {FIX}"
        )
    units = [list(layer.modules()) for layer in dict.fromkeys(layers)]
    inside = {id(module) for modules in units for module in modules}
    units.append([module for module in model.modules() if id(module) not in inside])
    seen: set[int] = set()
    for modules in units:
        own = {id(p): p for module in modules for p in module.parameters(recurse=False)}
        if seen & own.keys() or any(parameter.dim() == 0 for parameter in own.values()):
            raise UserError(
                f"teacher {teacher.name}: placement=sharded cannot split {type(model).__name__}: "
                f"its layers share parameters or hold scalars; {FIX}"
            )
        seen |= own.keys()


def tensor_files(teacher: Teacher, model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """For each parameter (by its first name) and each saved buffer: its file, and its name there.

    Tied parameters are in a file under one of their names. Raises UserError where the checkpoint is
    not in safetensors, is quantised, lacks a parameter or holds other tensors of the model.
    """
    files = weight_files(teacher.checkpoint)
    if files[0].suffix != ".safetensors":
        raise UserError(
            f"teacher {teacher.name}: placement=sharded reads slices of safetensors, and its "
            f"weights are {files[0].name}; save it again with save_pretrained, or {FIX}"
        )
    stored, coded = stored_tensors(files)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, tuple[Path, str]] = {}
    for name, parameter in model.named_parameters():
        known = [one for one in names[id(parameter)] if one in stored]
        if not known or stored[known[0]][1] != tuple(parameter.shape):
            shape = list(parameter.shape)
            raise UserError(
                f"teacher {teacher.name}: placement=sharded found no tensor {name} of shape "
                f"{shape} in its files; save it again with save_pretrained, or {FIX}"
            )
        if known[0] in coded:
            raise UserError(
                f"teacher {teacher.name}: the weights of {name} are quantised in its files, and "
                f"placement=sharded reads plain numbers; save it again in bf16, or {FIX}"
            )
        found[name] = (stored[known[0]][0], known[0])
    for name, buffer in model.named_buffers():
        if name in stored and stored[name][1] == tuple(buffer.shape):
            found[name] = (stored[name][0], name)
    used = {name for twins in names.values() for name in twins} | found.keys()
    reject_leftovers(f"teacher {teacher.name}", model, stored.keys() - used)
    return found


def stored_tensors(
    files: Sequence[Path],
) -> tuple[dict[str, tuple[Path, tuple[int, ...]]], set[str]]:
    """(file and shape of each tensor, names of the quantised tensors)."""
    stored: dict[str, tuple[Path, tuple[int, ...]]] = {}
    coded: set[str] = set()
    for path in files:
        with reading(path, COPY), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                about = file.get_slice(name)
                stored[name] = (path, tuple(about.get_shape()))
                if about.get_dtype() not in PLAIN_DTYPES:
                    coded.add(name)
    return stored, coded


def by_file(files: dict[str, tuple[Path, str]]) -> Iterator[tuple[str, Any, str]]:
    """For each tensor: its name, the open file that holds it, and its name there; file by file."""
    for path in dict.fromkeys(path for path, _ in files.values()):
        with safe_open(path, framework="pt") as file:
            for name, (place, stored) in files.items():
                if place == path:
                    yield name, file, stored


def check_sharded(model: PreTrainedModel, teacher: Teacher, rows: CheckRows) -> None:
    """Try a split teacher on these rows. All ranks call this with the same rows, and do the same
    forwards.

    A teacher that takes packs cannot take padded batches and is not tried here:
    `packing.packs_from` has compared the two for its kind. Raises UserError on all ranks, and
    TornForwardError where a forward failed on this one.
    """
    if teacher.cut.pack_from is not None:
        return
    try:
        check_teacher(model, rows, teacher.cut.padding, teacher.name)
    except UserError:
        raise
    except Exception as error:
        raise TornForwardError(f"{type(error).__name__}: {error}") from error


def build_sharded(teacher: Teacher, world: World, trust_remote_code: bool) -> PreTrainedModel:
    """The teacher in eval mode, with its parameters split over the ranks.

    This rank reads and holds only its own slices. With offload they stay in the CPU's memory, and
    come to the GPU layer by layer. Raises UserError where the files cannot be used.
    """
    model = empty_model(teacher, trust_remote_code)
    files = tensor_files(teacher, model)
    mesh = DeviceMesh.from_group(_group(world), world.device.type)
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    policy = offload if teacher.entry.offload else OffloadPolicy()
    # embeddings and head are one more unit, which is freed after the forward too
    for unit in [*dict.fromkeys(layers_of(model)), model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    if teacher.cut.pack_from is not None:
        use_packs(model)
    buffers = dict(model.named_buffers())
    model.to_empty(device="cpu" if teacher.entry.offload else world.device)
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(world.device))
    with reading(teacher.checkpoint.folder, COPY, f"teacher {teacher.name}: its weights"):
        _read_slices(model, files, mesh)
    reset_attention(model)
    return model


def _group(world: World) -> dist.ProcessGroup:
    """The exchange group. A single rank has none, and gets a group for FSDP, which needs one."""
    if world.exchange is not None:
        return world.exchange
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    alone = dist.group.WORLD
    assert alone is not None
    return alone


def _read_slices(
    model: PreTrainedModel, files: dict[str, tuple[Path, str]], mesh: DeviceMesh
) -> None:
    """Read this rank's part of every parameter and the saved buffers, one tensor at a time. Rows
    are cut as torch.chunk cuts them."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    for name, file, stored in by_file(files):
        tensor = tensors[name]
        if not isinstance(tensor, DTensor):
            tensor.copy_(file.get_tensor(stored))
            continue
        local = tensor.to_local()
        start = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size())
        if len(local):
            local.copy_(file.get_slice(stored)[start : start + len(local)])


# no_grad: with one rank FSDP reads version counters, which tensors of inference_mode lack
@torch.no_grad()
def predict_together(
    model: PreTrainedModel,
    tokens: TokenTable,
    rows_R: np.ndarray,
    world: World,
    cut: Cut,
    done: Callable[[np.ndarray, np.ndarray], None],
) -> None:
    """As `inference.predict`, for a teacher that is split over the ranks. All ranks call this, each
    with its own rows, which may be none.

    Before each forward the ranks agree whether there is one. They go on while any rank has a batch
    left and none has failed. A rank without a batch runs a filler. So a failure on one rank ends
    the pass on all ranks after the same forward. That rank raises it, and the others return early.

    Raises NotFiniteError and the errors of `done`; TornForwardError where the forward itself
    failed.
    """
    try:
        batches = batches_of(tokens, rows_R, world.device, cut, model.config)
        filler = _filler(tokens, world, cut, model)
    except Exception as error:
        raise TornForwardError(f"{type(error).__name__}: {error}") from error
    failure: Exception | None = None
    while True:
        try:
            batch = next(batches, None)
            more, failed = _any_rank(world, batch is not None, failure is not None)
            if failed or not more:
                break
            part_P, inputs = (None, filler) if batch is None else batch
            logits = model(**inputs).logits
        except Exception as error:
            raise TornForwardError(f"{type(error).__name__}: {error}") from error
        if part_P is not None:
            try:
                done(part_P, own_logits(logits, part_P, tokens.choices))
            except Exception as error:  # raised after the ranks' next agreement
                failure = error
    if failure is not None:
        raise failure


def _filler(tokens: TokenTable, world: World, cut: Cut, model: PreTrainedModel) -> dict[str, Any]:
    """Inputs for a rank without a batch: the first example, as any input will do."""
    first = np.zeros(1, np.int64)
    if cut.pack_from is not None:
        return next(batches_of(tokens, first, world.device, cut, model.config))[1]
    inputs = tokens.pad(first, int(tokens.lengths_B()[0]), cut.padding)
    return {name: tensor.to(world.device) for name, tensor in inputs.items()}


def _any_rank(world: World, *mine: bool) -> list[bool]:
    """For each of `mine`, whether it is true on any rank. The result is the same on all ranks."""
    if world.size == 1:
        return list(mine)
    said = torch.tensor(mine, dtype=torch.int32, device=world.device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=world.exchange)
    return [bool(answer) for answer in said.tolist()]


def agreed(world: World, what: str, do: Callable[[], T]) -> T:
    """The result of `do()` on this rank. Its failure on any rank is raised on all ranks.

    what: the place in the teachers' pass, for messages. Raises RunError, UserError or
    StopRequestedError, the lowest rank's first. Only TornForwardError is raised on one rank alone:
    the others are still in the forward, and end when this process ends.
    """
    failure: Exception | None = None
    rank = world.rank
    try:
        result = do()
    except TornForwardError as error:
        raise TornForwardError(
            f"rank {rank}: a sharded teacher's forward failed at {what}: {error}"
        ) from error
    except (RunError, UserError, StopRequestedError) as error:
        failure = error
    except OSError as error:
        failure = RunError(f"rank {rank} failed in the teachers' pass at {what}: {error}")
    except Exception as error:  # any other error is sent to the other ranks as well
        failure = RunError(
            f"rank {rank} failed in the teachers' pass at {what}: {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
    raise_first(gather_objects(world, failure, world.exchange))
    return result
