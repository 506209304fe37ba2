"""Folds of the training rows."""

import numpy as np
from small import example_set, sentences

from sead_dist.data.examples import fold_numbers, subset


def test_folds_are_of_like_size_and_do_not_depend_on_the_order_of_the_rows():
    examples = example_set(sentences(50))
    fold_B = fold_numbers(examples, 4, seed=0)
    assert sorted(np.bincount(fold_B).tolist()) == [12, 12, 13, 13]
    order_B = np.random.default_rng(0).permutation(50)
    shuffled = subset(examples, order_B)
    assert fold_numbers(shuffled, 4, seed=0).tolist() == fold_B[order_B].tolist()
    assert fold_numbers(examples, 4, seed=1).tolist() != fold_B.tolist()


def test_rows_that_share_a_sentence_are_in_one_fold_and_too_many_of_them_in_none():
    texts = sentences(30)
    examples = example_set([*texts, *texts[:5]])
    fold_B = fold_numbers(examples, 3, seed=0)
    assert fold_B[30:].tolist() == fold_B[:5].tolist()
    assert set(fold_B) == {0, 1, 2}
    many = fold_numbers(example_set([*texts, *[texts[0]] * 29]), 3, seed=0)
    assert many[0] == -1
    assert set(many[30:]) == {-1}
    assert set(many[1:30]) == {0, 1, 2}
