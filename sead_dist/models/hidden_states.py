"""Reads the hidden states, queries, keys and values of a model's layers during a forward.

Hooks on the modules read them. This works under any wrapper and any attention kernel (fused kernels
return no attentions). A model is recognised by its parts, not by its name. It has a list of layers.
Each layer has one self-attention, with linear maps for queries, keys and values.

Shapes: R text rows, L tokens, H width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sead_dist.errors import UserError

# names of the maps in BERT and models like it, and in DistilBERT; other kinds add terms to the
# scores
ATTENTION_NAMES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


@dataclass(frozen=True)
class WantedLayers:
    """Which layers to read; 1 is the first. hidden: layers whose output is read; 0 is the input of
    layer 1. attention: layers whose queries, keys and values are read."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerOutputs:
    """What one forward gave, in float32, by layer number (as in WantedLayers), each [R, L, H].
    Queries, keys and values hold all heads side by side."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def maps(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values."""
        return self.queries[layer], self.keys[layer], self.values[layer]


@dataclass(frozen=True)
class LayerParts:
    """Where a model's parts are.

    layers: in the order in which they run; a layer that runs several times stands there as often.
    attention: for each layer its maps for queries, keys and values; empty where not needed.
    body: the module that gives the last hidden states; None: the last layer gives them.
    """

    layers: list[nn.Module]
    attention: list[tuple[nn.Linear, ...]]
    width: int
    heads: int
    body: nn.Module | None = None


def body_of(model: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """(name, encoder) inside a classifier; None for a model that is built otherwise.

    In a model with code of its own `base_model_prefix` may name no attribute.
    """
    named = getattr(model, model.base_model_prefix or " ", None)
    if isinstance(named, nn.Module) and named is not model:
        return model.base_model_prefix, named
    inner = (pair for pair in model.named_children() if isinstance(pair[1], PreTrainedModel))
    return next(inner, None)


def layer_lists(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists of modules that are as long as the config's number of layers, by name. Lists inside
    such a list are left out. A model whose layers are one list has one. A model whose layers are
    spread over several lists has more."""
    depth = getattr(model.config, "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        long = isinstance(module, nn.ModuleList) and len(module) == depth
        if long and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def layer_stack(model: PreTrainedModel) -> nn.ModuleList | None:
    """The encoder's layers: the first of `layer_lists`, or None."""
    return next(iter(layer_lists(model).values()), None)


def running_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers in the order in which they run. Where a model has fewer layers than its config
    gives (ALBERT), each runs several times in a row. Empty where none are found."""
    if (stack := layer_stack(model)) is not None:
        return list(stack)
    depth = getattr(model.config, "num_hidden_layers", None) or 0
    groups = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
    if groups is None or depth % len(groups):
        return []
    return [group for group in groups for _ in range(depth // len(groups))]


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """For each student layer (from 1) the number of the teacher layer that belongs to it. These are
    evenly spaced. The last student layer gets the last teacher layer. (Jiao et al. 2020: the
    uniform map g(m) = m * N / M, here rounded up where M does not divide N.)"""
    return [-(-m * teacher_layers // student_layers) for m in range(1, student_layers + 1)]


def find_layer_parts(model: PreTrainedModel, who: str, attention: bool) -> LayerParts:
    """The parts of a model that the losses over layer outputs read.

    Raises UserError, naming `who`, for a model that is not built like BERT.
    """
    kind = model.config.model_type
    layers = running_layers(model)
    if not layers:
        raise UserError(
            f"{who}: no list of layers found in it ({kind}), so its hidden states cannot be read; "
            "give a model built like BERT, or a method that needs only logits (method=single)"
        )
    maps = [attention_maps(layer) for layer in layers] if attention else []
    if not all(maps):
        raise UserError(
            f"{who}: its attention ({kind}) is not built like BERT's, so its scores cannot be "
            "read; give a model built like BERT (bert, roberta, electra, distilbert), or "
            "method=distilbert, which needs only hidden states"
        )
    body = body_of(model)
    return LayerParts(
        layers,
        [found for found in maps if found is not None],
        model.config.hidden_size,
        getattr(model.config, "num_attention_heads", 0),  # FNet has none
        None if body is None else body[1],
    )


def attention_maps(layer: nn.Module) -> tuple[nn.Linear, ...] | None:
    """The linear maps of a layer's one self-attention; None where a layer has none or several."""
    found: list[tuple[nn.Linear, ...]] = []
    for module in layer.modules():
        children = dict(module.named_children())
        for names in ATTENTION_NAMES:
            maps = [children[name] for name in names if name in children]
            linear = tuple(one for one in maps if isinstance(one, nn.Linear))
            if len(linear) == len(names):
                found.append(linear)
    return found[0] if len(found) == 1 else None


@contextmanager
def reading(layer_parts: LayerParts, wanted: WantedLayers) -> Iterator[LayerOutputs]:
    """Inside the `with`, one forward of the model fills the LayerOutputs. Gradients flow through
    them.

    The last hidden states are the body's output: many kinds normalise once more after the last
    layer.
    """
    found, last = LayerOutputs(), len(layer_parts.layers)
    with ExitStack() as hooks:
        if 0 in wanted.hidden:
            enters = layer_parts.layers[0].register_forward_pre_hook(
                # only its first run counts: the layer may run again (ALBERT)
                lambda _module, args, named: _note_first(found, args, named),
                with_kwargs=True,
            )
            hooks.callback(enters.remove)
        for number in wanted.hidden:
            if number == last and layer_parts.body is not None:
                hooks.callback(_keep(layer_parts.body, found.hidden, number, 0))
            elif number > 0:
                run = _run(layer_parts.layers, number)
                hooks.callback(_keep(layer_parts.layers[number - 1], found.hidden, number, run))
        for number in wanted.attention:
            kept = (found.queries, found.keys, found.values)
            run = _run(layer_parts.layers, number)
            for module, into in zip(layer_parts.attention[number - 1], kept, strict=True):
                hooks.callback(_keep(module, into, number, run))
        yield found


def _run(layers: list[nn.Module], number: int) -> int:
    """How often the module of this layer has run before it runs as layer `number`."""
    return sum(before is layers[number - 1] for before in layers[: number - 1])


def _note_first(found: LayerOutputs, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    tensor: torch.Tensor = args[0] if args else named["hidden_states"]
    found.hidden.setdefault(0, tensor.float())


def _keep(
    module: nn.Module, into: dict[int, torch.Tensor], number: int, run: int
) -> Callable[[], None]:
    """Store the output of the module's run number `run` (0 is the first) in `into[number]`. Returns
    the function that removes the hook."""
    runs = count()

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if next(runs) == run:
            # some layers and all bodies return several outputs, and the hidden state is the first
            into[number] = (output if isinstance(output, torch.Tensor) else output[0]).float()

    remove: Callable[[], None] = module.register_forward_hook(note).remove
    return remove


@dataclass(frozen=True)
class TeacherLogits:
    """logits_NBC: in task class order, float32. present_NB: False where a teacher was not needed.
    layer_outputs: those of the run's feature teacher, where the method compares them."""

    logits_NBC: torch.Tensor
    present_NB: torch.Tensor
    layer_outputs: LayerOutputs | None = None


# a score so low that the softmax gives its key no weight
NEVER = -1e9


def scores(left_RLH: torch.Tensor, right_RLH: torch.Tensor, heads: int) -> torch.Tensor:
    """scores_RALL (A heads): products of tokens' vectors in each head, divided by the root of a
    head's width. (Vaswani et al. 2017, eq. 1, inside the softmax.)"""
    left_RALD, right_RALD = by_head(left_RLH, heads), by_head(right_RLH, heads)
    return left_RALD @ right_RALD.transpose(-1, -2) / math.sqrt(left_RALD.shape[-1])


def by_head(vectors_RLH: torch.Tensor, heads: int) -> torch.Tensor:
    """[R, L, H] -> [R, heads, L, H / heads]."""
    R, L, H = vectors_RLH.shape
    return vectors_RLH.reshape(R, L, heads, H // heads).transpose(1, 2)
