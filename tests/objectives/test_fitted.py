"""Weights fitted to gold labels, against other ways to find them. N teachers, B rows, C classes."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from sead_dist.objectives.teacher_weights import CLOSE, fit_probabilities, fit_scores
from sead_dist.objectives.weightings import WEIGHTINGS, Known


def made(teachers: int, rows: int = 250, classes: int = 3, seed: int = 0):
    """(logits_NBC, labels_B) of teachers of unlike worth."""
    random = np.random.default_rng(seed)
    labels_B = random.integers(classes, size=rows)
    logits_NBC = random.normal(size=(teachers, rows, classes))
    worth_N = np.linspace(0.0, 2.0, teachers)
    logits_NBC[:, np.arange(rows), labels_B] += worth_N[:, None]
    return logits_NBC.astype(np.float32), labels_B


def likelihood(weights_N, logits_NBC, labels_B) -> float:
    p_NBC = torch.from_numpy(logits_NBC).double().softmax(-1).numpy()
    return float(np.log(weights_N @ p_NBC[:, np.arange(len(labels_B)), labels_B]).mean())


def test_two_teachers_get_the_weights_that_a_search_finds():
    logits_NBC, labels_B = made(2)
    found_N = fit_probabilities(logits_NBC, labels_B)
    tried = np.linspace(0, 1, 10_001)
    best = max(tried, key=lambda w: likelihood(np.array([w, 1 - w]), logits_NBC, labels_B))
    assert found_N[0] == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("teachers", [1, 5, 16])
def test_no_weights_give_the_gold_labels_a_higher_likelihood(teachers):
    logits_NBC, labels_B = made(teachers, seed=teachers)
    found_N = fit_probabilities(logits_NBC, labels_B)
    assert found_N.sum() == pytest.approx(1)
    assert (found_N >= 0).all()
    best = likelihood(found_N, logits_NBC, labels_B)
    random = np.random.default_rng(1)
    for other_N in [*np.eye(teachers), *random.dirichlet(np.full(teachers, 0.3), 2000)]:
        assert likelihood(other_N, logits_NBC, labels_B) <= best + CLOSE


def test_a_teacher_that_is_always_wrong_counts_nothing_even_with_certainty():
    logits_NBC, labels_B = made(2)
    # float32 gives the gold label no probability at all
    logits_NBC[0] = 1000 * np.eye(3)[(labels_B + 1) % 3]
    found_N = fit_probabilities(logits_NBC, labels_B)
    assert found_N == pytest.approx([0, 1], abs=1e-4)


def test_weights_of_scores_have_the_least_squared_error():
    random = np.random.default_rng(0)
    labels_B = random.normal(size=300)
    noise_N1 = np.array([[0.3], [0.5], [2.0]])
    scores_NB = labels_B + noise_N1 * random.normal(size=(3, 300)) + [[0.1], [-0.1], [3.0]]
    found_N = fit_scores(scores_NB, labels_B)

    def error(weights_N) -> float:
        return float(((weights_N @ scores_NB - labels_B) ** 2).mean())

    other = minimize(
        error, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, tol=1e-12,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )  # fmt: skip
    assert found_N == pytest.approx(other.x, abs=1e-4)
    assert found_N.sum() == pytest.approx(1)
    assert fit_scores(1000 * scores_NB, 1000 * labels_B) == pytest.approx(found_N)
    assert fit_scores(np.stack([labels_B] * 2), labels_B).tolist() == [0.5, 0.5]


def test_rows_without_a_gold_label_do_not_count():
    logits_NBC, labels_B = made(3)
    weighting = WEIGHTINGS["fitted"]
    plain_N = weighting.frozen(Known([1.0] * 3, logits_NBC=logits_NBC, labels_B=labels_B))
    more_NBC = np.concatenate([logits_NBC, -logits_NBC[:, :50]], axis=1)
    more_B = np.append(labels_B, np.full(50, -1))
    found_N = weighting.frozen(Known([1.0] * 3, logits_NBC=more_NBC, labels_B=more_B))
    assert torch.equal(found_N, plain_N)
    scores_NB1, gold_B = logits_NBC[..., :1], logits_NBC[0, :, 1].astype(float)
    plain_N = weighting.frozen(Known([1.0] * 3, logits_NBC=scores_NB1, labels_B=gold_B))
    gold_B = np.append(gold_B, np.full(50, np.nan))
    found_N = weighting.frozen(Known([1.0] * 3, logits_NBC=more_NBC[..., :1], labels_B=gold_B))
    assert torch.equal(found_N, plain_N)
