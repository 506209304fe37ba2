"""The texts of a pool that are nearest to a text by TF-IDF.

Weights are rounded to whole numbers, so that sums are exact and every machine finds the same texts.

Shapes: Q queries, P texts of the pool, K nearest, V words.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import CountVectorizer

NEAREST = 10
# the length of a text's vector: whole weights of three digits
LENGTH = 1000
QUERIES_AT_ONCE = 1024
FEW_TEXTS = 1000


def nearest_texts(queries: Sequence[str], pool: Sequence[str]) -> list[list[int]]:
    """For each query the places in `pool` of its ten nearest texts by the cosine of TF-IDF vectors,
    nearest first, of equally near ones the first. Texts equal to the query, and those without a
    word of it, are left out. Of a large pool words of more than a tenth of the texts say little of
    any, would take long, and are passed over.
    """
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
    scale_P = LENGTH / np.sqrt(np.maximum(squares_P, 1e-12))
    weights_PV.data = np.round(weights_PV.data * scale_P[row_of])
    weights_PV.eliminate_zeros()
    return weights_PV.astype(np.int64)
