"""The temperature that makes a teacher as sure as it is right (Guo et al. 2017, section 4.2).

Shapes: B labelled rows, C classes.
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar

# fewer labelled rows of the selection split do not say how sure a teacher may be
FEWEST_ROWS = 200
# the least and the largest temperature
BOUNDS = (0.05, 50.0)


def fit_temperature(logits_BC: np.ndarray, labels_B: np.ndarray) -> float:
    """The temperature T under which softmax(logits / T) gives these labels the highest likelihood.

    The likelihood is concave in 1/T, so that it has one maximum.
    """
    spread_BC = logits_BC.astype(np.float64) - logits_BC.max(axis=1, keepdims=True)
    gold_B = spread_BC[np.arange(len(labels_B)), labels_B]

    def loss(log_t: float) -> float:
        scaled = math.exp(-log_t)
        return float((np.log(np.exp(spread_BC * scaled).sum(axis=1)) - gold_B * scaled).mean())

    low, high = (math.log(bound) for bound in BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return math.exp(float(found.x))
