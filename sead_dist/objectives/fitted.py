"""Weights of teachers fitted to gold labels: stacking (Wolpert 1992; with weights that are not
negative, Breiman 1996).

Shapes: N teachers, B labelled rows, C classes.
"""

import numpy as np
from scipy.optimize import nnls

# the mean log-likelihood is at most so far from the highest one (nats a row)
CLOSE = 1e-6
MOST_ROUNDS = 100_000


def fit_probabilities(logits_NBC: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """weights_N, not negative, sum 1, under which the mean of the teachers' probabilities gives the
    gold labels the highest likelihood.

    By expectation and maximisation from equal weights, which only rises (Dempster et al. 1977: a
    mixture of fixed components). It ends by a bound: at weights w the highest mean log-likelihood
    is at most max_n mean_b(p_nb / sum_m w_m p_mb) - 1 above theirs (the function is concave).
    """
    top_NB1 = logits_NBC.max(axis=-1, keepdims=True)
    spread_NBC = logits_NBC.astype(np.float64) - top_NB1
    total_NB = np.log(np.exp(spread_NBC).sum(axis=-1))
    log_p_NB = spread_NBC[:, np.arange(len(labels_B)), labels_B] - total_NB
    # a row's scale does not count: no row is 0 for all teachers
    p_NB = np.exp(log_p_NB - log_p_NB.max(axis=0))
    weights_N = np.full(len(p_NB), 1 / len(p_NB))
    for _ in range(MOST_ROUNDS):
        gain_N = (p_NB / (weights_N @ p_NB)).mean(axis=1)
        if gain_N.max() - 1 <= CLOSE:
            break
        weights_N = weights_N * gain_N
    return np.asarray(weights_N / weights_N.sum())


def fit_scores(scores_NB: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """weights_N, not negative, sum 1, under which the mean of the teachers' scores has the least
    squared error.

    Errors e_n of weights that sum to 1 add up as the scores do, so the least |sum_n w_n e_n|^2 is
    sought. Non-negative least squares of [e; 1] against [0; 1] finds it: of v = t w the best t
    leaves q / (1 + q), q = |sum_n w_n e_n|^2, which is least where q is (Lawson and Hanson 1974).
    """
    errors_BN = scores_NB.T.astype(np.float64) - labels_B[:, None]
    size = np.sqrt((errors_BN**2).sum(axis=0).max())
    if size == 0:
        return np.full(len(scores_NB), 1 / len(scores_NB))
    rows = np.vstack([errors_BN / size, np.ones((1, len(scores_NB)))])
    found_N, _ = nnls(rows, np.append(np.zeros(len(labels_B)), 1.0))
    return np.asarray(found_N / found_N.sum())
