"""Words that are near in a table of embeddings: the same on every machine, and of whole words."""

import numpy as np
import torch
from small import build_model

from sead_dist.cli.grammar import grammar_tokenizer
from sead_dist.data.neighbors import (
    embedding_table,
    near_words,
    table_hash,
    whole_words,
)


def test_the_nearest_words_have_the_highest_cosine():
    tokenizer, model = grammar_tokenizer(), build_model()
    table = embedding_table(model)
    known = whole_words(tokenizer)
    asked = ["music", "Plot", "of", "unknownword"]
    near = near_words(table, tokenizer, asked)
    assert set(near) == {"music", "plot"}
    unit = table / np.linalg.norm(table, axis=1, keepdims=True).clip(1e-12)
    for word, found in near.items():
        cosine = {other: float(unit[known[word]] @ unit[known[other]]) for other in known}
        del cosine[word]
        best = sorted(cosine.values(), reverse=True)[:10]
        # vectors are rounded
        np.testing.assert_allclose([cosine[other] for other in found], best, atol=2e-3)


def test_words_are_one_token_of_letters_as_it_stands_in_a_text():
    known = whole_words(grammar_tokenizer())
    assert "music" in known
    assert not [word for word in known if not word.isalpha() or len(word) < 4]
    assert "[MASK]" not in known


def test_neighbours_do_not_depend_on_how_sums_are_taken():
    tokenizer, table = grammar_tokenizer(), embedding_table(build_model())
    words = list(whole_words(tokenizer))
    near = near_words(table, tokenizer, words)
    # other columns first: sums in fp32 of what is not whole would round in another way
    turned = np.ascontiguousarray(table[:, ::-1])
    assert near_words(turned, tokenizer, words[::-1]) == near
    assert table_hash(table) != table_hash(turned)


def test_a_model_without_a_table_of_words_has_none():
    model = build_model()
    model.set_input_embeddings(torch.nn.Linear(2, 2))
    assert embedding_table(model) is None
