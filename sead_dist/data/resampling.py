"""How much of a score is chance of which rows a split holds: the metrics of resampled rows, and the
interval of a difference between two models on the same rows.

Shapes: B examples, C classes, U units that are drawn whole (an example, or all examples of a
group), R resamples, S seeds, K statistics of a unit.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

from sead_dist.data import metrics
from sead_dist.data.kinds import TaskKind
from sead_dist.data.metrics import Answer, MetricInputs

RESAMPLES = 2000
LEVEL = 0.95
# most numbers of one table of draws
CHUNK = 4_000_000

Floats = NDArray[np.float64]
# how often each unit was drawn, times_RU -> the metric of each resample, scores_R
Rescore = Callable[[Floats], Floats]


def units_of(inputs: MetricInputs) -> NDArray[np.int64]:
    """The unit of each example, units_B: examples of one group are drawn together."""
    if inputs.groups_B is None:
        return np.arange(len(inputs.labels_B))
    return np.unique(inputs.groups_B, return_inverse=True)[1].astype(np.int64)


def draw_units(units: int, seed: int) -> Iterator[Floats]:
    """RESAMPLES draws of as many units as there are, as times_RU, in tables of bounded size."""
    random = np.random.default_rng(seed)
    left = RESAMPLES
    while left:
        rows = min(left, max(1, CHUNK // units))
        left -= rows
        drawn_RU = random.integers(units, size=(rows, units))
        shifted_RU = drawn_RU + units * np.arange(rows)[:, None]
        times = np.bincount(shifted_RU.ravel(), minlength=rows * units)
        yield times.reshape(rows, units).astype(np.float64)


def rescorer(
    name: str, kind: TaskKind, logits_BC: NDArray[np.float32], inputs: MetricInputs
) -> Rescore:
    """The metric `name` of these logits as a function of how often each unit counts.

    With every unit counted once it is the kind's own value.
    """
    if name in metrics.REGRESSION:
        return _correlation(name, inputs.labels_B, logits_BC[:, 0].astype(np.float64))
    if inputs.answers is not None or name == "exact_match":
        return _mean_of_groups(name, kind, logits_BC, inputs)
    classes = logits_BC.shape[1]
    cells_B = inputs.labels_B * classes + logits_BC.argmax(axis=1)
    units_B = units_of(inputs)
    counts_UK = np.zeros((units_B.max() + 1, classes * classes))
    np.add.at(counts_UK, (units_B, cells_B), 1.0)

    def scores(times_RU: Floats) -> Floats:
        return CONFUSION[name]((times_RU @ counts_UK).reshape(-1, classes, classes))

    return scores


def _accuracy(table_RCC: Floats) -> Floats:
    shares_R: Floats = np.trace(table_RCC, axis1=1, axis2=2) / table_RCC.sum(axis=(1, 2))
    return shares_R


def _f1_of_classes(table_RCC: Floats) -> Floats:
    """f1_RC; 0 for a class that is neither there nor predicted."""
    right_RC: Floats = np.diagonal(table_RCC, axis1=1, axis2=2)
    either_RC = table_RCC.sum(axis=1) + table_RCC.sum(axis=2)
    return _ratio(2 * right_RC, either_RC)


def _f1_macro(table_RCC: Floats) -> Floats:
    """Mean over the classes that are there or predicted, as scikit-learn's."""
    seen_RC = table_RCC.sum(axis=1) + table_RCC.sum(axis=2) > 0
    means_R: Floats = _f1_of_classes(table_RCC).sum(axis=1) / seen_RC.sum(axis=1)
    return means_R


def _matthews(table_RCC: Floats) -> Floats:
    """Gorodkin 2004's R_K; 0 where labels or predictions are all alike."""
    gold_RC, said_RC = table_RCC.sum(axis=2), table_RCC.sum(axis=1)
    rows_R = table_RCC.sum(axis=(1, 2))
    right_R = np.trace(table_RCC, axis1=1, axis2=2)
    together_R = right_R * rows_R - (gold_RC * said_RC).sum(axis=1)
    spread_R = np.sqrt((rows_R**2 - (said_RC**2).sum(1)) * (rows_R**2 - (gold_RC**2).sum(1)))
    return _ratio(together_R, spread_R)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """0 where the divisor is 0."""
    shares: Floats = np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom > 0)
    return shares


CONFUSION: dict[str, Callable[[Floats], Floats]] = {
    "accuracy": _accuracy,
    "f1": lambda table_RCC: _f1_of_classes(table_RCC)[:, 1],
    "f1_a": lambda table_RCC: _f1_of_classes(table_RCC)[:, 1],
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
}


def _mean_of_groups(
    name: str, kind: TaskKind, logits_BC: NDArray[np.float32], inputs: MetricInputs
) -> Rescore:
    """A metric that is the mean of each group's own score."""
    units_B = units_of(inputs)
    order_B = np.argsort(units_B, kind="stable")
    groups = np.split(order_B, np.flatnonzero(np.diff(units_B[order_B])) + 1)
    own_U = np.array(
        [kind.compute([name], logits_BC[rows], _some(inputs, rows))[name] for rows in groups]
    )

    def scores(times_RU: Floats) -> Floats:
        means_R: Floats = times_RU @ own_U / times_RU.sum(axis=1)
        return means_R

    return scores


@dataclass(frozen=True)
class _Some:
    """Some examples' part of what a metric reads."""

    labels_B: NDArray[np.int64]
    groups_B: NDArray[np.int64] | None
    answers: list[Answer] | None


def _some(inputs: MetricInputs, rows: NDArray[np.int64]) -> _Some:
    answers = None if inputs.answers is None else [inputs.answers[row] for row in rows]
    groups_B = None if inputs.groups_B is None else inputs.groups_B[rows]
    return _Some(inputs.labels_B[rows], groups_B, answers)


def _correlation(name: str, labels_B: Floats, scores_B: Floats) -> Rescore:
    def correlation(times_U: NDArray[np.int64]) -> float:
        drawn = np.repeat(labels_B, times_U), np.repeat(scores_B, times_U)
        if name == "spearmanr":
            return _pearson(rankdata(drawn[0]), rankdata(drawn[1]))
        return _pearson(*drawn)

    return lambda times_RU: np.array([correlation(t_U) for t_U in times_RU.astype(np.int64)])


def _pearson(a_B: Floats, b_B: Floats) -> float:
    a_B, b_B = a_B - a_B.mean(), b_B - b_B.mean()
    spread = float(np.sqrt((a_B @ a_B) * (b_B @ b_B)))
    return float(a_B @ b_B) / spread if spread > 0 else 0.0


def resampled_scores(
    name: str,
    kind: TaskKind,
    logits_SBC: list[NDArray[np.float32]],
    inputs: MetricInputs,
    seed: int,
) -> Floats:
    """scores_SR of each seed's logits on the same RESAMPLES draws of units, which `seed` and the
    number of units decide."""
    rescorers = [rescorer(name, kind, logits_BC, inputs) for logits_BC in logits_SBC]
    units = int(units_of(inputs).max()) + 1
    pieces = [
        np.stack([rescore(times_RU) for rescore in rescorers])
        for times_RU in draw_units(units, seed)
    ]
    return np.concatenate(pieces, axis=1)


@dataclass(frozen=True)
class Gap:
    """The score of one model less that of another on the same rows, and its 95% interval."""

    value: float
    interval: tuple[float, float]


def paired_gap(
    name: str,
    kind: TaskKind,
    logits_BC: NDArray[np.float32],
    reference_BC: NDArray[np.float32],
    inputs: MetricInputs,
    seed: int = 0,
) -> Gap:
    """How much better `logits_BC` score than `reference_BC` under the metric `name`.

    The variance is that of resampled rows, plus that of one more row right in each of the two
    (Bonett and Price 2012, for proportions): few rows on which the two never differ say little.
    The interval is Student's with as many degrees of freedom as there are units, less one, cut at
    the largest gap that the metric allows.
    """
    everything_1U = np.ones((1, int(units_of(inputs).max()) + 1))
    scores = [
        float(rescorer(name, kind, one_BC, inputs)(everything_1U)[0])
        for one_BC in (logits_BC, reference_BC)
    ]
    value, units = scores[0] - scores[1], everything_1U.shape[1]
    mine_R, other_R = resampled_scores(name, kind, [logits_BC, reference_BC], inputs, seed)
    drawn_R = mine_R - other_R
    spare = max(units - 1, 1)
    variance = float(np.nanvar(drawn_R)) * units / spare + 2 / (units + 2) ** 2
    reach = float(stdtrit(spare, (1 + LEVEL) / 2)) * math.sqrt(variance)
    most = widest_gap(name)
    return Gap(value, (max(value - reach, -most), min(value + reach, most)))


def widest_gap(name: str) -> float:
    """The largest difference between two scores under a metric: correlations go from -1 to 1."""
    return 2.0 if name in (*metrics.REGRESSION, "matthews_correlation") else 1.0
