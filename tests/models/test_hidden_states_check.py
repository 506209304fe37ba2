"""What the hooks read is compared with the model's own word, and refused where they differ."""

import pytest
import torch
from small import build_model, model_inputs
from transformers import AutoConfig, AutoModelForSequenceClassification

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.errors import UserError
from sead_dist.models import hidden_states_check as innercheck
from sead_dist.models.hidden_states_check import check_kind, check_layer_outputs
from sead_dist.models.sequence_classifier import outline

METHODS = ("distilbert", "tinybert", "minilm")
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 128,
}  # fmt: skip
OLD = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "pad_index": 0, "max_position_embeddings": 128}
KINDS = {
    "roformer": {**SIZES, "embedding_size": 32},
    "esm": {**SIZES, "position_embedding_type": "rotary", "mask_token_id": 4},
    "convbert": {**SIZES, "embedding_size": 32},
    "yoso": SIZES,
    "longformer": {**SIZES, "attention_window": [8, 8]},
    "canine": SIZES,
    "xlm": OLD,
    "flaubert": OLD,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
    "squeezebert": {**SIZES, "embedding_size": 32},
    "roberta-prelayernorm": SIZES,
}
SCORES = "the attention of layer 2 differs from the model's output by"
# what the linear maps and layers of each kind would be taken for
INPUTS = model_inputs()
MISREAD = [
    ("roformer", "tinybert", "the attention of layer 1 differs from the model's output by"),
    ("roformer", "minilm", SCORES),
    ("esm", "minilm", SCORES),
    ("convbert", "minilm", r"layer 2 has the shape \[2, 2, 32, 32\] .* outputs \[2, 1, 32, 32\]"),
    ("yoso", "minilm", r"layer 2 has the shape \[2, 2, 32, 32\] .* outputs \[2, 32, 32\]"),
    ("longformer", "minilm", r"queries, keys and values of shapes .*: \[32, 2, 32\]"),
    ("canine", "distilbert", "3 hidden states are read, but the model outputs 7"),
    ("canine", "minilm", "the attention of 2 layers is read, but the model outputs 4"),
    ("flaubert", "tinybert", "hidden states 1 differ from the model's output by"),
]


def config_of(kind):
    words = {"vocab_size": len(grammar_tokenizer()), "pad_token_id": 0}
    return AutoConfig.for_model(kind, **words, **KINDS[kind])


@pytest.mark.parametrize(("kind", "method", "said"), MISREAD)
def test_what_would_be_misread_is_told_of_the_kind_and_of_a_model_with_new_weights(
    kind, method, said
):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(kind))
    fix = "give a model built like BERT .*method=single" + (
        "" if method == "distilbert" else "|method=distilbert, which needs only hidden states"
    )
    for check, one in ((check_layer_outputs, model), (check_kind, outline(config_of(kind)))):
        with pytest.raises(
            UserError, match=rf"^it \({kind}\): its layers cannot be read: .*{said}"
        ) as told:
            check(one, INPUTS, method, "it")
        assert told.match(fix)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "kind", ["esm", "longformer", "xlm", "xlnet", "squeezebert", "roberta-prelayernorm"]
)
def test_what_a_body_gives_is_read_where_layers_hold_something_else(kind):
    # norms behind the last layer, rows lengthened inside, other orders of axes
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(kind))
    check_layer_outputs(model, INPUTS, "distilbert", "it")
    check_kind(outline(config_of(kind)), INPUTS, "distilbert", "it")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert"])
def test_what_is_read_rightly_passes(kind, method):
    model = build_model(kind)
    check_layer_outputs(model, INPUTS, method, "it")
    check_kind(outline(model.config), INPUTS, method, "it")


def test_what_a_method_does_not_read_is_not_looked_at():
    # RoFormer rotates queries and keys; XLM's layers lie side by side, each part in a list
    for kind, method in (("roformer", "distilbert"), ("xlm", "minilm")):
        model = AutoModelForSequenceClassification.from_config(config_of(kind))
        check_layer_outputs(model, INPUTS, method, "it")
        check_kind(outline(config_of(kind)), INPUTS, method, "it")


def test_a_left_padded_row_and_bf16_are_read_as_well():
    tokenizer = grammar_tokenizer()
    tokenizer.padding_side = "left"
    for method in METHODS:
        check_layer_outputs(
            build_model(num_hidden_layers=2).bfloat16(), model_inputs(32, tokenizer), method, "it"
        )


def test_weights_of_its_own_are_looked_at_where_the_kind_cannot_be_cut_down(monkeypatch):
    def fails(*_):
        raise ValueError

    monkeypatch.setattr(innercheck, "shallow", fails)
    check_kind(outline(config_of("roformer")), INPUTS, "minilm", "it")
    model = AutoModelForSequenceClassification.from_config(config_of("roformer"))
    with pytest.raises(UserError, match="its layers cannot be read"):
        check_layer_outputs(model, INPUTS, "minilm", "it")


@pytest.mark.parametrize("kind", ["bert", "roformer"])
def test_the_model_and_the_generator_are_as_before(kind):
    model = build_model("bert") if kind == "bert" else None
    model = model or AutoModelForSequenceClassification.from_config(config_of(kind))
    model.train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    kernel, drawn = model.config._attn_implementation, torch.random.get_rng_state()
    try:
        check_layer_outputs(model, INPUTS, "minilm", "it")
        check_kind(outline(model.config), INPUTS, "minilm", "it")
    except UserError:
        assert kind == "roformer"
    assert model.training
    assert model.config._attn_implementation == kernel
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_fails_when_it_is_asked_is_told(monkeypatch):
    model = build_model()
    monkeypatch.setattr(type(model), "forward", lambda *_args, **_more: 1 / 0)
    with pytest.raises(UserError, match=r"attentions fails \(division by zero\); give a model"):
        check_layer_outputs(model, INPUTS, "minilm", "it")
