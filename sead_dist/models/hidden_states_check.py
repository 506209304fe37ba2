"""A check that the hooks inside a model read the values that the model computes with.

A kind of model may change queries and keys after their linear maps (rotate them), order tokens in
another way inside, or normalise the output of a layer. So two rows are run before training. What
the hooks read is compared with the model's own `output_hidden_states` and `output_attentions`.

Shapes: R text rows, L tokens, H width, A heads.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sead_dist.errors import UserError
from sead_dist.models.hidden_states import (
    NEVER,
    LayerOutputs,
    LayerParts,
    WantedLayers,
    find_layer_parts,
    reading,
    scores,
)
from sead_dist.models.inputs import ModelInputs
from sead_dist.models.inputs_check import dense, enlarge_weights, shallow
from sead_dist.models.sequence_classifier import new_classifier

# allowed share of the largest value; rounding differs between the model's products and ours
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def needs_attention(method: str) -> bool:
    """Whether a method reads attention beside hidden states."""
    return method not in ("distilbert", "repair")


def check_layer_outputs(model: PreTrainedModel, inputs: ModelInputs, method: str, who: str) -> None:
    """Run two rows of unlike length, padded as for the model. Compare all that `method`
    (distilbert, tinybert, minilm or repair) reads, of the kind first, then of this model on its
    device.

    Raises UserError, naming `who`, for what differs in value or number.
    """
    # weights that are new, small or neutral may hide what the kind does
    check_kind(model, inputs, method, who)
    batches = check_batches(inputs.two_rows(), inputs, None)
    reject(model, who, method, first_difference(model, who, method, batches))


def check_kind(whole: PreTrainedModel, inputs: ModelInputs, method: str, who: str) -> None:
    """The same check of a shallow model of the kind with random weights, before any weights are
    read. whole: the model, or its outline. A kind that cannot be made shallow is not checked here,
    but by `check_layer_outputs` when the model is loaded.

    Raises UserError, naming `who`, for what differs in value or number.
    """
    attention = needs_attention(method)
    layers = find_layer_parts(whole, who, attention).layers
    try:
        rows, config = dense(inputs.two_rows(), shallow(whole.config), inputs.pad_id)
        model = random_model(config)
        if type(find_layer_parts(model, who, attention).layers[0]) is not type(layers[0]):
            return
        batches = check_batches(rows, inputs, config.pad_token_id)
        differs = first_difference(model, who, method, batches)
    except Exception:  # kinds have many ways to be no shallow model
        return
    reject(whole, who, method, differs)


def check_batches(
    rows: Sequence[dict[str, torch.Tensor]], inputs: ModelInputs, pad_id: int | None
) -> list[dict[str, torch.Tensor]]:
    """All rows as a batch, and the first alone. It is the shortest, and some kinds lengthen a short
    batch inside."""
    return [inputs.together(rows, pad_id), rows[0]]


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """A classifier in eval mode with random weights. Norms and biases are random too, because new
    ones change nothing. The state of the generator is restored."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = new_classifier(config).eval()
        enlarge_weights(model)
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layers_read_by(method: str, layer_parts: LayerParts) -> WantedLayers:
    """All that a method may read of a model."""
    last = len(layer_parts.layers)
    return {
        "distilbert": WantedLayers((last,)),
        "repair": WantedLayers(tuple(range(1, last + 1))),
        "tinybert": WantedLayers(tuple(range(last + 1)), tuple(range(1, last + 1))),
        "minilm": WantedLayers((), (last,)),
    }[method]


def reject(model: PreTrainedModel, who: str, method: str, differs: str | None) -> None:
    """Raises UserError where something differs."""
    if differs is None:
        return
    others = "a method that needs only logits (method=single)"
    if needs_attention(method):
        others = f"method=distilbert, which needs only hidden states, or {others}"
    raise UserError(
        f"{who} ({model.config.model_type}): its layers cannot be read: {differs}; give a model "
        f"built like BERT (bert, roberta, electra, distilbert), or {others}"
    )


def first_difference(
    model: PreTrainedModel,
    who: str,
    method: str,
    batches: Sequence[Mapping[str, torch.Tensor]],
) -> str | None:
    """The first difference that one of the batches shows, in words; None for none. A copy of the
    model is run, because Transformers leaves hooks in a model that has given hidden states."""
    other = copy.deepcopy(model).eval()
    # fused kernels give no attentions
    other.set_attn_implementation("eager")
    layer_parts = find_layer_parts(other, who, needs_attention(method))
    wanted = layers_read_by(method, layer_parts)
    found = (one for batch in batches for one in differences(other, layer_parts, wanted, batch))
    return next(found, None)


def differences(
    model: PreTrainedModel,
    layer_parts: LayerParts,
    wanted: WantedLayers,
    batch: Mapping[str, torch.Tensor],
) -> Iterator[str]:
    """The differences between what is read and what the model itself gives, in words."""
    on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
    asks = {"output_hidden_states": True, "output_attentions": True, "return_dict": True}
    try:
        with torch.no_grad(), torch.random.fork_rng(), reading(layer_parts, wanted) as found:
            torch.manual_seed(0)  # some attention draws
            own = model(**on_device, **asks)
    except Exception as error:  # models with code of their own raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        yield f"a forward that outputs hidden states and attentions fails ({reason})"
        return
    mask_RL, layers = on_device["attention_mask"].bool(), len(layer_parts.layers)
    close = CLOSE.get(model.dtype, 1e-4)
    states = getattr(own, "hidden_states", None) or ()
    if wanted.hidden and len(states) != layers + 1:
        yield f"{layers + 1} hidden states are read, but the model outputs {len(states)}"
        return
    for number in wanted.hidden:
        if differs := hidden_difference(found, number, states[number], mask_RL, close):
            yield differs
    attentions = getattr(own, "attentions", None) or ()
    if wanted.attention and len(attentions) != layers:
        yield f"the attention of {layers} layers is read, but the model outputs {len(attentions)}"
        return
    for number in wanted.attention:
        own_RALL, heads = attentions[number - 1], layer_parts.heads
        if differs := attention_difference(found, number, own_RALL, heads, mask_RL, close):
            yield differs


def hidden_difference(
    found: LayerOutputs, number: int, own_RLH: torch.Tensor, mask_RL: torch.Tensor, close: float
) -> str | None:
    """How hidden states differ at text tokens, in words; None where they do not."""
    if number not in found.hidden:
        return f"no layer was found that outputs hidden states {number}"
    read_RLH = found.hidden[number]
    if read_RLH.shape != own_RLH.shape or read_RLH.shape[:2] != mask_RL.shape:
        return (
            f"hidden states {number} have the shape {list(read_RLH.shape)} where they are read, "
            f"but the model outputs {list(own_RLH.shape)}"
        )
    off = share(read_RLH, own_RLH, mask_RL)
    if not off <= close:
        return (
            f"hidden states {number} differ from the model's output by {off:.2g} of the largest "
            "value"
        )
    return None


def attention_difference(
    found: LayerOutputs, number: int, own_RALL: torch.Tensor, heads: int, mask_RL: torch.Tensor,
    close: float,
) -> str | None:  # fmt: skip
    """How the softmax of what is read differs from a layer's attention at text tokens, or None."""
    if not all(number in part for part in (found.queries, found.keys, found.values)):
        return f"layer {number} does not use its linear maps for queries, keys and values"
    maps = query_RLH, key_RLH, value_RLH = found.maps(number)
    layer = f"the attention of layer {number}"
    if query_RLH.shape != key_RLH.shape or value_RLH.shape[:2] != mask_RL.shape:
        shapes = ", ".join(str(list(one.shape)) for one in maps)
        return f"{layer} has queries, keys and values of shapes that do not match: {shapes}"
    if query_RLH.shape[:2] != mask_RL.shape or query_RLH.shape[-1] % heads:
        return f"{layer} has queries of shape {list(query_RLH.shape)} for {heads} heads"
    read_RALL = scores(query_RLH, key_RLH, heads)
    read_RALL = read_RALL.masked_fill(~mask_RL[:, None, None, :], NEVER).softmax(-1)
    if read_RALL.shape != own_RALL.shape:
        return (
            f"{layer} has the shape {list(read_RALL.shape)} where it is read, but the model "
            f"outputs {list(own_RALL.shape)}"
        )
    off = share(read_RALL.transpose(1, 2), own_RALL.transpose(1, 2), mask_RL)
    if not off <= close:
        return f"{layer} differs from the model's output by {off:.2g} of the largest value"
    return None


def share(read: torch.Tensor, own: torch.Tensor, mask_RL: torch.Tensor) -> float:
    """The largest difference at text tokens (first two dimensions) over the largest value."""
    # a NaN in both does not differ; other checks report it
    mine, theirs = (one.float()[mask_RL].nan_to_num() for one in (read, own))
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
