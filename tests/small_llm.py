"""Tiny causal language models with random weights and a byte-level tokeniser, and what plain
Transformers says of words behind a prompt."""

from pathlib import Path

import numpy as np
import torch
from small import sentences
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},
    "bert": {"intermediate_size": 64, "num_hidden_layers": 2},
}
PROMPT = '"Review: {sentence}\\nSentiment:"'
# of one token, and of several
WORDS = '{positive: [" good", " very great"], negative: [" bad"]}'


def llm_tokenizer(bos: bool = False, chat: str | None = None) -> PreTrainedTokenizerFast:
    """Merges that it has learnt from the sentences of the tests, and any other byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"Review: {line}" for line in sentences(200)], trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    tokenizer.chat_template = chat
    return tokenizer


def save_llm(
    folder: Path, kind: str = "llama", seed: int = 0, bos: bool = False, chat: str | None = None
) -> Path:
    """A model whose answers differ from text to text."""
    tokenizer = llm_tokenizer(bos, chat)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, **SIZES[kind]}
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        max_position_embeddings=160,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        **sizes,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def entry(folder: Path, prompt: str = PROMPT, words: str = WORDS, more: str = "") -> str:
    """A teacher's entry on the command line."""
    return f"{{model: {folder}, prompt: {prompt}, words: {words}{more}}}"


def plain_scores(folder: Path, prompt: str, words: list[str], special: bool = True) -> np.ndarray:
    """Of each word behind a prompt, each alone: the sum of its tokens' log-probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    count = len(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    scores = []
    for word in words:
        ids = tokenizer(prompt + word, add_special_tokens=special, return_tensors="pt").input_ids
        with torch.inference_mode():
            logp = torch.log_softmax(model(ids).logits[0].double(), -1)
        scores.append(sum(float(logp[i - 1, ids[0, i]]) for i in range(count, ids.shape[1])))
    return np.array(scores)
