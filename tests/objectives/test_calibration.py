"""Temperatures of teachers against values worked out by hand."""

import math

import numpy as np
import pytest

from sead_dist.objectives.teacher_weights import fit_temperature


def test_who_is_right_less_often_than_it_says_is_scaled_to_it():
    """It says .999 and is right in 80 of 100 rows: log 999 over T is to be log 4."""
    logits_BC = np.tile(np.float32([math.log(999), 0.0]), (100, 1))
    labels_B = np.array([0] * 80 + [1] * 20)
    assert fit_temperature(logits_BC, labels_B) == pytest.approx(math.log(999) / math.log(4), 1e-4)
    # a shift of a row's logits changes nothing, and who is too unsure is made surer
    shifted_BC = logits_BC / 20 + np.arange(100, dtype=np.float32)[:, None]
    assert fit_temperature(shifted_BC, labels_B) == pytest.approx(
        math.log(999) / 20 / math.log(4), 1e-3
    )


def test_a_teacher_that_is_always_right_stays_within_bounds():
    logits_BC = np.float32([[3.0, 0.0], [0.0, 3.0]] * 50)
    assert 0.05 <= fit_temperature(logits_BC, np.array([0, 1] * 50)) < 0.2
