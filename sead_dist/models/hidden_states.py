"""What happens inside a model while it runs: hidden states, queries, keys and values of its layers.

They are read by hooks on the modules, which works under any wrapper and any attention kernel (fused
kernels give no attentions). Models are taken as they are built, not by their names: a list of
layers, and in each layer one self-attention with a linear map for queries, keys and values.

Shapes: R text rows, L tokens, H width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sead_dist.errors import UserError

# what BERT and its like call the maps, and DistilBERT; others add terms of their own to the scores
ATTENTION_NAMES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


@dataclass(frozen=True)
class Wanted:
    """Which layers to read, 1 the first: `hidden` states that a layer gives (0: what enters the
    first one), and the queries, keys and values of its `attention`."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerOutputs:
    """Of one forward, float32, by layer (as in Wanted): each [R, L, H]. The maps of attention hold
    all heads side by side."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerParts:
    """Where a model's parts are. attention: per layer its maps for queries, keys and values, empty
    where they were not asked for."""

    layers: list[nn.Module]
    attention: list[tuple[nn.Linear, ...]]
    width: int
    heads: int


def layer_stack(model: PreTrainedModel) -> nn.ModuleList | None:
    """The encoder's layers: the first list of modules as long as the config says, if any."""
    depth = model.config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == depth), None)


def find_layer_parts(model: PreTrainedModel, who: str, attention: bool) -> LayerParts:
    """The parts of a model that the losses over layer outputs read.

    Raises UserError, naming `who`, for a model that is not built like BERT.
    """
    kind = model.config.model_type
    layers = layer_stack(model)
    if layers is None:
        raise UserError(
            f"{who}: no list of layers found in it ({kind}), so its hidden states cannot be read; "
            "give a model built like BERT, or a method that asks for logits alone (method=single)"
        )
    maps = [attention_maps(layer) for layer in layers] if attention else []
    if not all(maps):
        raise UserError(
            f"{who}: its attention ({kind}) is not BERT's, so its scores cannot be read; give a "
            "model built like BERT (bert, roberta, electra, distilbert), or method=distilbert, "
            "which needs hidden states alone"
        )
    return LayerParts(
        list(layers),
        [found for found in maps if found is not None],
        model.config.hidden_size,
        model.config.num_attention_heads,
    )


def attention_maps(layer: nn.Module) -> tuple[nn.Linear, ...] | None:
    """The linear maps of a layer's one self-attention; None where that is not what it has."""
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
def reading(layer_parts: LayerParts, wanted: Wanted) -> Iterator[LayerOutputs]:
    """Inside, a forward of the model fills what is given. Gradients flow through it."""
    found = LayerOutputs()
    with ExitStack() as hooks:
        if 0 in wanted.hidden:
            enters = layer_parts.layers[0].register_forward_pre_hook(
                lambda _module, args, named: found.hidden.update({0: _first(args, named).float()}),
                with_kwargs=True,
            )
            hooks.callback(enters.remove)
        for number in wanted.hidden:
            if number > 0:
                hooks.callback(_keep(layer_parts.layers[number - 1], found.hidden, number))
        for number in wanted.attention:
            kept = (found.queries, found.keys, found.values)
            for module, into in zip(layer_parts.attention[number - 1], kept, strict=True):
                hooks.callback(_keep(module, into, number))
        yield found


def _first(args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    tensor: torch.Tensor = args[0] if args else named["hidden_states"]
    return tensor


def _keep(module: nn.Module, into: dict[int, torch.Tensor], number: int) -> Callable[[], None]:
    """Put what the module gives into `into[number]`; returns what ends that."""

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        # some layers give a tuple whose first member is the hidden state
        into[number] = (output[0] if isinstance(output, tuple) else output).float()

    remove: Callable[[], None] = module.register_forward_hook(note).remove
    return remove


@dataclass(frozen=True)
class TeacherLogits:
    """logits_NBC in task class order, float32; present_NB False where a teacher was not asked.
    layer outputs: of the run's feature teacher, where the method asks for them."""

    logits_NBC: torch.Tensor
    present_NB: torch.Tensor
    layer_outputs: LayerOutputs | None = None


# a score that no key with it has any weight
NEVER = -1e9


def scores(left_RLH: torch.Tensor, right_RLH: torch.Tensor, heads: int) -> torch.Tensor:
    """scores_RALL: products of tokens' vectors, by head, over the root of a head's width. (Vaswani
    et al. 2017, eq. 1, inside the softmax.)"""
    left_RALD, right_RALD = by_head(left_RLH, heads), by_head(right_RLH, heads)
    return left_RALD @ right_RALD.transpose(-1, -2) / math.sqrt(left_RALD.shape[-1])


def by_head(vectors_RLH: torch.Tensor, heads: int) -> torch.Tensor:
    R, L, H = vectors_RLH.shape
    return vectors_RLH.reshape(R, L, heads, H // heads).transpose(1, 2)
