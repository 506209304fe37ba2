"""Nearest texts and words, for changed copies: the texts nearest to a text by TF-IDF, and the words
nearest to a word in a model's table of word embeddings.

Vectors are rounded to whole numbers. So sums are exact, and every machine finds the same.

Shapes: Q queries, P texts of the pool, V words (of the pool's texts, or those that are one token
each), K nearest, H hidden size.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEAREST = 10
# the length of a text's vector: whole weights of three digits
TEXT_LENGTH = 1000
QUERIES_AT_ONCE = 1024
FEW_TEXTS = 1000
# the length of a word's vector: products of two stay below 2^24, and fp32 holds every whole number
# up to that
WORD_LENGTH = 4000
WORDS_AT_ONCE = 256
# fewest letters of a word: most shorter ones, such as "of" and "the", are grammar rather than
# content
LETTERS = 4


def nearest_texts(queries: Sequence[str], pool: Sequence[str]) -> list[list[int]]:
    """For each query the places in `pool` of its ten nearest texts, by the cosine of their TF-IDF.
    The nearest text comes first. Equally near texts stand in the order of the pool. Texts equal to
    the query are left out, and so are those that share no word with it. In a large pool, words that
    more than a tenth of the texts have are not counted: they would take long and say little.
    """
    # imported here: scikit-learn takes long, and most runs do not need it
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"\w+", dtype=np.int64)
    try:
        counts_PV = csr_array(counter.fit_transform(pool))
    except ValueError:  # no text has a word
        return [[] for _ in queries]
    texts_V = np.bincount(counts_PV.indices, minlength=counts_PV.shape[1])
    idf_V = np.log((1 + len(pool)) / (1 + texts_V)) + 1
    idf_V[texts_V > max(FEW_TEXTS, len(pool) // 10)] = 0
    pool_VP = _whole_weights(counts_PV, idf_V).T.tocsr()
    found: list[list[int]] = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE]
        near_QP = csr_array(_whole_weights(csr_array(counter.transform(part)), idf_V) @ pool_VP)
        for query, first, after in zip(part, near_QP.indptr, near_QP.indptr[1:], strict=False):
            places, near = near_QP.indices[first:after], near_QP.data[first:after]
            order = np.lexsort((places, -near))[: NEAREST + 1]
            kept = [int(place) for place in places[order] if pool[place] != query]
            found.append(kept[:NEAREST])
    return found


def _whole_weights(counts_PV: csr_array, idf_V: np.ndarray) -> csr_array:
    """TF-IDF vectors of one length, rounded to whole numbers."""
    weights_PV = counts_PV.astype(np.float64)
    weights_PV.data *= idf_V[counts_PV.indices]
    squares_P = np.asarray((weights_PV * weights_PV).sum(axis=1)).ravel()
    row_of = np.repeat(np.arange(weights_PV.shape[0]), np.diff(weights_PV.indptr))
    scale_P = TEXT_LENGTH / np.sqrt(np.maximum(squares_P, 1e-12))
    weights_PV.data = np.round(weights_PV.data * scale_P[row_of])
    weights_PV.eliminate_zeros()
    return weights_PV.astype(np.int64)


def embedding_table(model: "PreTrainedModel") -> np.ndarray | None:
    """The table of word embeddings, fp32; None where a model has none."""
    import torch  # data are read without it

    layer = model.get_input_embeddings()
    if not isinstance(layer, torch.nn.Embedding):
        return None
    table: np.ndarray = layer.weight.detach().float().cpu().numpy()
    return table


def table_hash(table_VH: np.ndarray) -> str:
    """SHA-256 of an embedding table's values, as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(table_VH).astype("<f4").tobytes()).hexdigest()


def near_words(
    table: np.ndarray, tokenizer: "PreTrainedTokenizerBase", words: Collection[str]
) -> dict[str, list[str]]:
    """For each of `words` that is one token (as it stands, or in small letters) the ten nearest
    other words of one token. Nearness is the cosine of embeddings; the nearest word comes first."""
    known = whole_words(tokenizer)
    found = {word if word in known else word.lower() for word in words}
    asked = sorted(found & known.keys())
    names = list(known)
    place = {name: index for index, name in enumerate(names)}
    vectors_VH = _whole_vectors(table[list(known.values())])
    near: dict[str, list[str]] = {}
    for start in range(0, len(asked), WORDS_AT_ONCE):
        part = asked[start : start + WORDS_AT_ONCE]
        places_Q = np.array([place[word] for word in part])
        near_QV = vectors_VH[places_Q] @ vectors_VH.T
        near_QV[np.arange(len(part)), places_Q] = -np.inf
        count = min(NEAREST, len(names) - 1)
        # the nearness of the last word to keep; more words may be as near, and are cut off below
        last = len(names) - max(count, 1)
        least_Q = np.partition(near_QV, last, axis=1)[:, last]
        for row, word in enumerate(part):
            best = np.flatnonzero(near_QV[row] >= least_Q[row])
            order = np.lexsort((best, -near_QV[row, best]))[:count]
            near[word] = [names[index] for index in best[order]]
    return near


def whole_words(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
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
    scaled_VH = np.round(exact_VH * (WORD_LENGTH / np.maximum(lengths_V1, 1e-12)))
    whole_VH: np.ndarray = scaled_VH.astype(np.float32)
    return whole_VH
