"""Tiny models with random weights of every kind that docs/models.md lists."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small import sentences
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from sead_dist.cli.grammar import LABELS, grammar_tokenizer
from sead_dist.models.hidden_states import layer_stack
from sead_dist.models.inputs_check import enlarge_weights

POSITIONS = 128
WIDE = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
DEEP = {**WIDE, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
# positions that begin after the padding id, which is 0 here
OFFSET = {**DEEP, "max_position_embeddings": POSITIONS + 1}
GROUPED = {**DEEP, "num_key_value_heads": 1, "head_dim": 16}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS, "eos_token_id": 3, "decoder_start_token_id": 3,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "eos_token_id": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip
XLM = {
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_index": 0,
}
DEBERTA = {
    **DEEP, "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0,
    "pooler_hidden_size": 32, "max_relative_positions": -1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "albert": {**DEEP, "embedding_size": 16},
    "bart": SEQ2SEQ,
    "bert": DEEP,
    "big_bird": {**DEEP, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    "biogpt": DEEP,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "camembert": OFFSET,
    "convbert": {**DEEP, "embedding_size": 32},
    "ctrl": {**GPT, "dff": 48},
    "data2vec-text": OFFSET,
    "deberta": {**DEBERTA, "pos_att_type": "c2p|p2c"},
    "deberta-v2": {
        **DEBERTA,
        "pos_att_type": "p2c|c2p",
        "position_buckets": 16,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
    },
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
    "electra": {**DEEP, "embedding_size": 16},
    "ernie": DEEP,
    "esm": {**OFFSET, "mask_token_id": 4},
    "eurobert": GROUPED,
    "falcon": {**DEEP, "multi_query": True},
    "flaubert": XLM,
    "fnet": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": POSITIONS,
    },
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48},
    "gemma": GROUPED,
    "gemma2": GROUPED,
    "gemma3_text": GROUPED,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": POSITIONS,
        "intermediate_size": 48,
    },
    "gpt_neox": DEEP,
    "gptj": {**GPT, "rotary_dim": 8},
    "ibert": OFFSET,
    "layoutlm": DEEP,
    "llama": GROUPED,
    "longformer": {**OFFSET, "attention_window": [8, 8]},
    "luke": {**OFFSET, "entity_vocab_size": 10, "entity_emb_size": 16},
    "markuplm": OFFSET,
    "mbart": SEQ2SEQ,
    "megatron-bert": DEEP,
    "mistral": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 2},
    "mobilebert": {
        **DEEP,
        "intra_bottleneck_size": 16,
        "embedding_size": 16,
        "num_feedforward_networks": 1,
        "intermediate_size": 32,
    },
    "modernbert": {**DEEP, "local_attention": 16, "global_attn_every_n_layers": 2},
    "mpnet": {**DEEP, "max_position_embeddings": POSITIONS + 2},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": POSITIONS},
    "mra": DEEP,
    "mt5": T5,
    "mvp": SEQ2SEQ,
    "nomic_bert": DEEP,
    "nystromformer": {**DEEP, "num_landmarks": 4, "segment_means_seq_len": 4},
    "olmo": GROUPED,
    "openai-gpt": GPT,
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": POSITIONS,
    },
    "persimmon": DEEP,
    "phi": DEEP,
    "phi3": GROUPED,
    "plbart": SEQ2SEQ,
    "qwen2": {**GROUPED, "vocab_size": 128},  # its own tokeniser knows a word more
    "qwen3": GROUPED,
    "reformer": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 48,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "max_position_embeddings": POSITIONS,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "is_decoder": False,
    },
    "rembert": {**DEEP, "input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": OFFSET,
    "roberta-prelayernorm": OFFSET,
    "roc_bert": {**DEEP, "pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "roformer": {**DEEP, "embedding_size": 32},
    "squeezebert": {
        **DEEP,
        "embedding_size": 32,
        "q_groups": 2,
        "k_groups": 2,
        "v_groups": 2,
        "post_attention_groups": 1,
        "intermediate_groups": 2,
        "output_groups": 2,
    },
    "stablelm": {**DEEP, "num_key_value_heads": 2},
    "starcoder2": GROUPED,
    "t5": T5,
    "umt5": T5,
    "xlm": XLM,
    "xlm-roberta": OFFSET,
    "xlm-roberta-xl": OFFSET,
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48},
    "xmod": {**OFFSET, "languages": ["en_XX"], "default_language": "en_XX"},
    "yoso": DEEP,
}

# those that are asked for today
BACKBONES = (
    *("albert", "bert", "deberta-v2", "distilbert", "electra", "eurobert", "gemma3_text", "gpt2"),
    *("llama", "modernbert", "mpnet", "nomic_bert", "qwen3", "roberta", "t5", "xlm-roberta"),
)
# what four layers of a kind are, where its config says so under another name or by layer
NAMES_OF_DEPTH = {
    "n_layers": ("flaubert", "xlm", "distilbert", "mpt"),
    "n_layer": ("bloom", "ctrl", "gpt2", "gpt_bigcode", "gptj", "openai-gpt", "xlnet"),
    "num_layers": ("mt5", "t5", "umt5"),
    "encoder_layers": ("bart", "mbart", "mvp", "plbart"),
}
FOUR_LAYERS: dict[str, dict[str, Any]] = {
    **{kind: {name: 4} for name, kinds in NAMES_OF_DEPTH.items() for kind in kinds},
    "funnel": {"block_sizes": [1, 1, 1, 1]},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "longformer": {"num_hidden_layers": 4, "attention_window": [8, 8, 8, 8]},
    "reformer": {"attn_layers": ["local"] * 4},
}


def build_kind(kind: str, **more: Any) -> PreTrainedModel:
    """A classifier of two classes whose weights tell texts apart, and see the padding where they
    look at it."""
    tokenizer = grammar_tokenizer()
    marks = {
        "bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id,
        "cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id,
    }  # fmt: skip
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    fields = {"vocab_size": len(tokenizer), "pad_token_id": 0, **marks, **names}
    config = AutoConfig.for_model(kind, **{**fields, **KINDS[kind], **more})
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        enlarge_weights(model)
    return model.eval()


def save_kind(folder: Path, kind: str, side: str = "right", **more: Any) -> Path:
    build_kind(kind, **more).save_pretrained(folder)
    tokenizer = grammar_tokenizer()
    tokenizer.padding_side = side
    tokenizer.save_pretrained(folder)
    return folder


def assert_layers_work_as(
    cut: PreTrainedModel, whole: PreTrainedModel, layers: Sequence[int]
) -> None:
    """Each layer of `cut` makes of what it gets what that layer of `whole` makes of it."""
    seen: list[tuple[Any, Any, Any]] = []

    def recorded(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        output = forward(*args, **named)
        seen.append((args, named, output))
        return output

    for layer in layer_stack(cut):
        # not a hook: some bodies call a layer's forward
        layer.forward = partial(recorded, layer.forward)
    ids = torch.arange(40)[None] + 5
    given = {"use_cache": False} if "use_cache" in cut.config.to_dict() else {}
    with torch.inference_mode():
        cut(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    for layer in layer_stack(cut):
        del layer.forward
    assert len(seen) == len(layers)
    for layer, (args, named, output) in zip(layers, seen, strict=True):
        with torch.inference_mode():
            again = layer_stack(whole)[layer](*args, **named)
        one, other = (first_of(given) for given in (output, again))
        assert torch.equal(one, other)
        assert not torch.equal(one, args[0] if args else named["hidden_states"])


def first_of(given: Any) -> torch.Tensor:
    """The tensor that a layer gives, alone, in a tuple or in a dict."""
    if isinstance(given, torch.Tensor):
        return given
    return next(iter(given.values() if isinstance(given, dict) else given))


def texts(rows: int = 24) -> list[str]:
    """Of 2 to about 60 tokens."""
    some = sentences(rows)
    return [" ".join([text] * (1 + 4 * (n % 3 == 0))) for n, text in enumerate(some)]


def alone(folder: Path, lines: list[str], max_length: int = 64) -> np.ndarray:
    """What plain Transformers says of each text, without padding and by a model of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    untouched = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    said = []
    for line in lines:
        model = copy.deepcopy(untouched)
        with torch.inference_mode():
            inputs = tokenizer(line, truncation=True, max_length=max_length, return_tensors="pt")
            said.append(model(**inputs).logits)
    return torch.cat(said).numpy()
