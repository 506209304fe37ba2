"""Metrics per class and the confusion matrix, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from sead_dist.data.metrics import PAIRS, confusion


def made(classes: int, rows: int, seed: int = 0):
    random = np.random.default_rng(seed)
    return random.integers(classes, size=rows), random.normal(size=(rows, classes))


def test_the_figures_are_scikit_learns():
    labels_B, logits_BC = made(4, 200)
    found = confusion("abcd", labels_B, logits_BC)
    predicted_B = logits_BC.argmax(axis=1)
    assert (found.counts_CC == confusion_matrix(labels_B, predicted_B)).all()
    expected = precision_recall_fscore_support(labels_B, predicted_B, zero_division=0)
    columns, rows = found.class_table()
    assert columns == ["class", "rows", "predicted", "precision", "recall", "F1"]
    for at, figures in ((3, expected[0]), (4, expected[1]), (5, expected[2]), (1, expected[3])):
        assert [row[at] for row in rows] == pytest.approx(figures)


def test_a_class_that_is_never_predicted_is_named_and_an_absent_one_is_not():
    labels_B = np.array([0, 0, 1, 2, 2, -1])  # the last has no gold label
    logits_BC = np.eye(4)[[0, 0, 0, 2, 0, 1]]
    found = confusion(("yes", "no", "maybe", "absent"), labels_B, logits_BC)
    assert found.counts_CC.sum() == 5
    assert found.never_predicted == ["no"]
    assert found.class_table()[1][1] == ["no", 1, 0, 0.0, 0.0, 0.0]
    assert found.worst_pairs()[1] == [["no", "yes", 1], ["maybe", "yes", 1]]


def test_of_many_classes_the_worst_pairs_take_the_place_of_the_matrix():
    few = confusion("abc", *made(3, 50)).tables(drawn=False)
    many = confusion([f"class {n}" for n in range(31)], *made(31, 500)).tables(drawn=False)
    assert "gold label / predicted" in few[1]
    assert "| gold label | predicted | rows |" in many[1]
    assert len(many[1].splitlines()) == 2 + PAIRS
    assert len(confusion("abc", *made(3, 50)).tables(drawn=True)) == 1
