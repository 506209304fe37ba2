"""Words that lie near each other in a model's table of word embeddings.

Vectors are rounded to whole numbers, so that sums in fp32 are exact and every machine finds the
same neighbours.

Shapes: V words that are one token each, Q of them that are asked for, H hidden size.
"""

import hashlib
from collections.abc import Collection

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEAREST = 10
# the length of a vector: products of two stay below 2^24, up to which fp32 holds whole numbers
LENGTH = 4000
AT_ONCE = 256
# fewest letters of a word: shorter ones are mostly such as "of" and "the", which hold a sentence
# together
LETTERS = 4


def embedding_table(model: PreTrainedModel) -> np.ndarray | None:
    """The table of word embeddings, fp32; None where a model has none."""
    layer = model.get_input_embeddings()
    if not isinstance(layer, torch.nn.Embedding):
        return None
    table: np.ndarray = layer.weight.detach().float().cpu().numpy()
    return table


def table_hash(table_VH: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(table_VH).astype("<f4").tobytes()).hexdigest()


def near_words(
    table: np.ndarray, tokenizer: PreTrainedTokenizerBase, words: Collection[str]
) -> dict[str, list[str]]:
    """For those of `words` that are one token (as they stand, or in small letters) the ten words of
    one token whose embeddings have the highest cosine with theirs, nearest first."""
    known = whole_words(tokenizer)
    found = {word if word in known else word.lower() for word in words}
    asked = sorted(found & known.keys())
    names = list(known)
    place = {name: index for index, name in enumerate(names)}
    vectors_VH = _whole_vectors(table[list(known.values())])
    near: dict[str, list[str]] = {}
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        places_Q = np.array([place[word] for word in part])
        # one number for each pair of nearness and place: no two are equal
        keys_QV = (vectors_VH[places_Q] @ vectors_VH.T).astype(np.int64) * len(names)
        keys_QV -= np.arange(len(names))
        keys_QV[np.arange(len(part)), places_Q] = -(2**62)
        count = min(NEAREST, len(names) - 1)
        best_QK = np.argpartition(-keys_QV, count, axis=1)[:, :count] if count else keys_QV[:, :0]
        for row, word in enumerate(part):
            order = np.argsort(-keys_QV[row, best_QK[row]])
            near[word] = [names[index] for index in best_QK[row][order]]
    return near


def whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Words of letters that the tokeniser makes one token of, and that token's id, in the order of
    the ids."""
    special = set(tokenizer.all_special_ids)
    by_id = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items())
    texts = {
        id_: str(tokenizer.convert_tokens_to_string([token])).strip()
        for id_, token in by_id
        if id_ not in special
    }
    texts = {id_: t for id_, t in texts.items() if len(t) >= LETTERS and t.isalpha()}
    # as it stands inside a text: after a blank
    spaced = [f" {text}" for text in texts.values()]
    if not spaced:
        return {}
    ids = tokenizer(spaced, add_special_tokens=False)["input_ids"]
    return {text: id_ for (id_, text), own in zip(texts.items(), ids, strict=True) if own == [id_]}


def _whole_vectors(table_VH: np.ndarray) -> np.ndarray:
    exact_VH = table_VH.astype(np.float64)
    lengths_V1 = np.sqrt((exact_VH**2).sum(axis=1, keepdims=True))
    scaled_VH = np.round(exact_VH * (LENGTH / np.maximum(lengths_V1, 1e-12)))
    whole_VH: np.ndarray = scaled_VH.astype(np.float32)
    return whole_VH
