"""What is read inside a model is what the model itself works with."""

import pytest
import torch
from small import build_model

from sead_dist.errors import UserError
from sead_dist.models.hidden_states import WantedLayers, find_layer_parts, reading, scores

KINDS = ["bert", "roberta", "electra", "distilbert"]


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_attention_are_the_models_own(kind):
    model = build_model(kind, attn_implementation="eager")
    layer_parts = find_layer_parts(model, "it", attention=True)
    layers = range(1, len(layer_parts.layers) + 1)
    with torch.no_grad(), reading(layer_parts, WantedLayers((0, *layers), tuple(layers))) as found:
        own = model(**inputs(), output_hidden_states=True, output_attentions=True)
    assert layer_parts.width == 32
    assert sorted(found.hidden) == [0, *layers]
    for number in found.hidden:
        assert torch.equal(found.hidden[number], own.hidden_states[number])
    outside = inputs()["attention_mask"][:, None, None, :] == 0
    for number in layers:
        score_RALL = scores(found.queries[number], found.keys[number], layer_parts.heads)
        mine = score_RALL.masked_fill(outside, -1e9).softmax(-1)
        torch.testing.assert_close(mine, own.attentions[number - 1])
        # the values: what attention makes of them is what the layer goes on with
        assert found.values[number].shape == (3, 7, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_any_attention_kernel_is_read_and_nothing_stays_behind(kind):
    model = build_model(kind, attn_implementation="sdpa")
    layer_parts = find_layer_parts(model, "it", attention=True)
    with reading(layer_parts, WantedLayers((0, 1), (1,))) as found:
        model(**inputs())
    assert found.hidden[1].requires_grad
    assert found.queries[1].shape == found.keys[1].shape == found.values[1].shape == (3, 7, 32)
    before = {**found.hidden}
    model(**inputs())
    assert found.hidden == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_values_are_those_that_attention_sums():
    model = build_model("bert", attn_implementation="eager")
    layer_parts = find_layer_parts(model, "it", attention=True)
    attention = model.bert.encoder.layer[0].attention.self
    seen = []
    hook = attention.register_forward_hook(lambda _m, _a, output: seen.append(output[0]))
    with torch.no_grad(), reading(layer_parts, WantedLayers((), (1,))) as found:
        own = model(**inputs(), output_attentions=True)
    hook.remove()
    value_RALD = found.values[1].reshape(3, 7, 2, 16).transpose(1, 2)
    context = (own.attentions[0] @ value_RALD).transpose(1, 2).reshape(3, 7, 32)
    torch.testing.assert_close(context, seen[0])


@pytest.mark.parametrize(
    ("kind", "attention", "said"),
    [
        ("deberta-v2", True, r"teacher x: its attention \(deberta-v2\) is not built like BERT's"),
        ("mpnet", True, r"teacher x: its attention \(mpnet\) is not built like BERT's"),
        # three layers of two groups: which runs when is a rule of its own
        ("albert", False, r"teacher x: no list of layers found in it \(albert\)"),
    ],
)
def test_a_model_that_cannot_be_read_is_told_by_name(kind, attention, said):
    model = build_model(kind, **({"num_hidden_groups": 2} if kind == "albert" else {}))
    with pytest.raises(UserError, match=said):
        find_layer_parts(model, "teacher x", attention)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_that_runs_several_times_is_read_each_time(groups):
    model = build_model("albert", num_hidden_layers=4, num_hidden_groups=groups)
    model.set_attn_implementation("eager")
    layer_parts = find_layer_parts(model, "it", attention=True)
    numbers = (1, 2, 3, 4)
    with torch.no_grad(), reading(layer_parts, WantedLayers((0, *numbers), numbers)) as found:
        own = model(**inputs(), output_hidden_states=True, output_attentions=True)
    for number in (0, *numbers):
        assert torch.equal(found.hidden[number], own.hidden_states[number])
    for number in numbers:
        score_RALL = scores(found.queries[number], found.keys[number], layer_parts.heads)
        outside_R11L = ~inputs()["attention_mask"].bool()[:, None, None, :]
        read_RALL = score_RALL.masked_fill(outside_R11L, -1e9).softmax(-1)
        torch.testing.assert_close(read_RALL, own.attentions[number - 1])


def test_the_last_hidden_states_are_those_behind_the_last_norm():
    model = build_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(3.0)
    layer_parts = find_layer_parts(model, "it", attention=False)
    with torch.no_grad(), reading(layer_parts, WantedLayers((1,))) as found:
        own = model(**inputs(), output_hidden_states=True)
    assert torch.equal(found.hidden[1], own.hidden_states[1])


def test_hidden_states_alone_are_read_of_other_attentions_too():
    model = build_model("deberta-v2")
    layer_parts = find_layer_parts(model, "it", attention=False)
    with torch.no_grad(), reading(layer_parts, WantedLayers((1,))) as found:
        own = model(**inputs(), output_hidden_states=True)
    assert torch.equal(found.hidden[1], own.hidden_states[1])
