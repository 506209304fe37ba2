"""Weights of teachers for one row, by their answers to it; and two fits to gold labels. One gives
weights for all rows by stacking (Wolpert 1992; with weights that are not negative, Breiman 1996).
The other gives the temperature under which a teacher's confidence is as high as its accuracy (Guo
et al. 2017, section 4.2).

Each function of one row takes the logits and the gold labels, whether or not it reads the labels.
Labels are class indices, -1 for none; or scores, NaN for none, with logits of one class.

Shapes: N teachers, B rows (labelled ones, where something is fitted), C classes.
"""

import math

import numpy as np
import torch
from scipy.optimize import minimize_scalar, nnls
from scipy.special import log_softmax

from sead_dist.objectives.losses import known

# the fit ends where the mean log-likelihood is at most so far from the highest (nats a row)
CLOSE = 1e-6
MOST_ROUNDS = 100_000
# a temperature needs at least so many labelled rows of the selection split
FEWEST_ROWS = 200
# the least and the largest temperature
TEMPERATURE_BOUNDS = (0.05, 50.0)


def entropy(logits_NBC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor:
    """weights_NB: the softmax over teachers of -entropy, as in EBKD (Kwon et al. 2020). Confident
    teachers count more. Gold labels are not read."""
    log_p_NBC = torch.log_softmax(logits_NBC, dim=-1)
    entropy_NB = -(log_p_NBC.exp() * log_p_NBC).sum(-1)
    return torch.softmax(-entropy_NB, dim=0)


def confidence(logits_NBC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor:
    """weights_NB by the cross-entropy l with the gold label, as in CA-MKD (Zhang et al. 2022,
    eq. 4): (1 - exp(l_n) / sum_m exp(l_m)) / (N - 1). Equal weights where there is no gold
    label."""
    if labels_B is None or len(logits_NBC) == 1:
        return equal(logits_NBC)
    loss_NB = errors(logits_NBC, labels_B)
    weights_NB = (1.0 - torch.softmax(loss_NB, dim=0)) / (len(logits_NBC) - 1)
    return torch.where(known(labels_B)[None], weights_NB, equal(logits_NBC))


def answers(logits_NBC: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor:
    """weights_NB in proportion to the probability of the gold label, or for scores to
    exp(-e_n / mean_m e_m) with the squared errors e (our own). Equal weights where a row has no
    gold label."""
    if labels_B is None or len(logits_NBC) == 1:
        return equal(logits_NBC)
    weights_NB = torch.softmax(-errors(logits_NBC, labels_B), dim=0)
    return torch.where(known(labels_B)[None], weights_NB, equal(logits_NBC))


def equal(logits_NBC: torch.Tensor) -> torch.Tensor:
    """weights_NB of equal weights: 1 / N."""
    N, B, _ = logits_NBC.shape
    return torch.full((N, B), 1.0 / N, device=logits_NBC.device)


def errors(logits_NBC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """loss_NB: how wrong each teacher is on each labelled row. This is the cross-entropy with the
    gold label, or for scores the squared error divided by the mean one of the teachers, so that the
    scale does not count."""
    # a function of tensors; the type of the labels is the `label_type` of the kind
    if labels_B.is_floating_point():
        error_NB = (logits_NBC[..., 0] - labels_B[None]) ** 2
        return error_NB / error_NB.mean(0, keepdim=True).clamp(min=1e-12)
    N, B, _ = logits_NBC.shape
    gold_NB1 = labels_B.clamp(min=0)[None, :, None].expand(N, B, 1)
    log_p_NBC = torch.log_softmax(logits_NBC, dim=-1)
    return -log_p_NBC.gather(-1, gold_NB1).squeeze(-1)


def fit_probabilities(logits_NBC: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """weights_N, not negative, sum 1, under which the mean of the teachers' probabilities gives the
    gold labels the highest likelihood.

    The weights come from expectation-maximisation, from equal weights on. The likelihood never
    falls (Dempster et al. 1977: a mixture of fixed components). The mean log-likelihood is a
    concave function of the weights. So its highest value is at most
    max_n mean_b(p_nb / sum_m w_m p_mb) - 1 above that of weights w. The rounds end where this bound
    is small.
    """
    log_p_NBC = log_softmax(logits_NBC.astype(np.float64), axis=-1)
    log_p_NB = np.take_along_axis(log_p_NBC, labels_B[None, :, None], axis=-1)[..., 0]
    # A factor of a whole row has no effect. With this factor no row is 0 for all teachers.
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

    The weights sum to 1, so the error of the mean is sum_n w_n e_n, where e_n are the teachers'
    errors. The weights with the least q = |sum_n w_n e_n|^2 are sought. Non-negative least squares
    of [e; 1] against [0; 1] finds them (Lawson and Hanson 1974). Its solution is v = t w, with
    sum_n w_n = 1. For given w the best t leaves the squared residual q / (1 + q), which is least
    where q is least.
    """
    errors_BN = scores_NB.T.astype(np.float64) - labels_B[:, None]
    size = np.sqrt((errors_BN**2).sum(axis=0).max())
    if size == 0:
        return np.full(len(scores_NB), 1 / len(scores_NB))
    rows = np.vstack([errors_BN / size, np.ones((1, len(scores_NB)))])
    found_N, _ = nnls(rows, np.append(np.zeros(len(labels_B)), 1.0))
    return np.asarray(found_N / found_N.sum())


def fit_temperature(logits_BC: np.ndarray, labels_B: np.ndarray) -> float:
    """The temperature T under which softmax(logits / T) gives these labels the highest likelihood.

    The log-likelihood is concave in 1/T, so it has one maximum.
    """
    # less the largest logit of the row, on which the softmax does not depend
    shifted_BC = logits_BC.astype(np.float64) - logits_BC.max(axis=1, keepdims=True)

    def loss(log_t: float) -> float:
        log_p_BC = log_softmax(shifted_BC * math.exp(-log_t), axis=1)
        return -float(log_p_BC[np.arange(len(labels_B)), labels_B].mean())

    low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
