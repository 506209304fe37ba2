"""How much of a score, or of a difference between two models or methods, is chance.

`paired_gap` compares two models on the same rows. Only the rows vary, so they are resampled.
`compare` compares two methods of a sweep. Two things vary by chance: which rows the dev split
happens to hold, and the seeds of the runs. The difference of a seed's two runs on a row is row +
seed + row by seed, each random (a crossed analysis of variance without repetition: Searle, Casella
and McCulloch 1992, chapter 4). The variance of the mean difference is the part of rows (of the mean
over seeds) plus the part of seeds. Both hold the part of row by seed, so it is subtracted once. The
part of seeds is left out where an F test does not find it ("sometimes pool", Bancroft 1964). With
few seeds Satterthwaite's (1946) degrees of freedom are too many, so fewer are taken. Interval and p
are Student's t. Variances over rows come from resamples, since most metrics are not means over
rows. Simulations in the tests show how often the results are wrong.
docs/decisions/0023-sweep-statistics.md says how the constants were chosen.

Shapes: B examples, C classes, U units that are drawn whole (an example, or all examples of a
group), R resamples, S seeds, K statistics of a unit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import fdtri, stdtr, stdtrit

from sead_dist.data import metrics
from sead_dist.data.kinds import TaskKind
from sead_dist.data.metrics import Answer, MetricInputs

RESAMPLES = 2000
LEVEL = 0.95
# most numbers of one table of draws
CHUNK = 4_000_000
# the level of the F test of the part of seeds is LEAST, plus MORE times the share of row by seed in
# the variance over rows; where the test finds nothing, the share KEPT of row by seed is kept
LEAST, MORE, KEPT = 0.2, 0.4, 0.7
# degrees of freedom fall with this power of the seeds' share of the variance; Satterthwaite's is 2
POWER = 1.25

Floats = NDArray[np.float64]
# how often each unit was drawn, times_RU -> the metric of each resample, scores_R
Rescore = Callable[[Floats], Floats]


def units_of(inputs: MetricInputs) -> NDArray[np.int64]:
    """The unit of each example, units_B: examples of one group are drawn together."""
    if inputs.groups_B is None:
        return np.arange(len(inputs.labels_B))
    return np.unique(inputs.groups_B, return_inverse=True)[1].astype(np.int64)


def sampling_deviation(share: float, rows: int) -> float:
    """One standard deviation of a share of so many independent rows."""
    return math.sqrt(share * (1 - share) / rows)


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
    if kind.compute not in (metrics.of_classes, metrics.of_scores):
        return _of_drawn_rows(name, kind, logits_BC, inputs)
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


def _of_drawn_rows(
    name: str, kind: TaskKind, logits_BC: NDArray[np.float32], inputs: MetricInputs
) -> Rescore:
    """A metric that a kind of task computes itself. Each row stands there as often as it was drawn,
    and so does each group. NaN for a draw, which may lack a class, where it raises ValueError."""
    units_B = units_of(inputs)

    def score(times_U: NDArray[np.int64]) -> float:
        times_B = times_U[units_B]
        rows = np.repeat(np.arange(len(units_B)), times_B)
        drawn = _some(inputs, rows)
        if drawn.groups_B is not None:
            turn = np.arange(len(rows)) - np.repeat(np.cumsum(times_B) - times_B, times_B)
            drawn = replace(drawn, groups_B=units_B[rows] * (times_U.max() + 1) + turn)
        try:
            return kind.compute([name], logits_BC[rows], drawn)[name]
        except ValueError:
            return math.nan

    return lambda times_RU: np.array([score(t_U) for t_U in times_RU.astype(np.int64)])


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
    """What a metric reads, of some of the examples."""

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
            from scipy.stats import rankdata  # a quarter of a second of a start

            return _pearson(rankdata(drawn[0]), rankdata(drawn[1]))
        return _pearson(*drawn)

    return lambda times_RU: np.array([correlation(t_U) for t_U in times_RU.astype(np.int64)])


def _pearson(a_B: Floats, b_B: Floats) -> float:
    """0 where one of the two is the same everywhere."""
    if np.ptp(a_B) == 0 or np.ptp(b_B) == 0:
        return 0.0
    return float(np.corrcoef(a_B, b_B)[0, 1])


def resampled_scores(
    name: str,
    kind: TaskKind,
    logits_SBC: list[NDArray[np.float32]],
    inputs: MetricInputs,
    seed: int,
) -> Floats:
    """scores_SR: the score of each seed's logits on the same RESAMPLES draws of units. `seed` and
    the number of units determine the draws."""
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

    The variance is that of resampled rows, plus that of two more rows, of which each model alone
    gets one right (Bonett and Price 2012, for proportions). Without these, few rows on which the
    two never differ would give an interval without width. The interval is Student's, with one
    degree of freedom less than there are units. It is cut at the largest gap that the metric
    allows.
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
    reach = reach_of(variance, spare)
    most = widest_gap(name)
    return Gap(value, (max(value - reach, -most), min(value + reach, most)))


def reach_of(variance: float, freedom: float) -> float:
    """How far Student's interval reaches to each side."""
    return float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)


def widest_gap(name: str) -> float:
    """The largest difference between two scores under a metric. Correlations go from -1 to 1. A
    metric that is not built in has no known limit."""
    if name in (*metrics.REGRESSION, "matthews_correlation"):
        return 2.0
    return 1.0 if name in (*CONFUSION, *metrics.GROUPED, *metrics.ANSWERS) else math.inf


@dataclass(frozen=True)
class Difference:
    """A method's mean minus the reference's (value), with 95% interval, two-sided p, variance and
    degrees of freedom.

    p_among: the p for a comparison among several (`cautious_p`); None for a mean over tasks.
    """

    value: float
    interval: tuple[float, float]
    p: float
    variance: float
    freedom: float
    p_among: float | None = None

    @property
    def beyond_chance(self) -> bool:
        low, high = self.interval
        return low > 0 or high < 0


def compare(
    scores_S: list[float],
    reference_S: list[float],
    scores_SR: Floats,
    reference_SR: Floats,
    units: int,
) -> Difference:
    """The difference of two methods over the same seeds, with interval and p. S is at least 3.

    scores_S: on the whole split; scores_SR: on the resamples; units: what the resamples draw.
    """
    each_S = np.asarray(scores_S, np.float64) - np.asarray(reference_S, np.float64)
    of_seeds_SR = scores_SR - reference_SR
    rows = float(of_seeds_SR.mean(axis=0).var(ddof=1))
    of_one = float(of_seeds_SR.var(axis=1, ddof=1).mean())
    variance, freedom = variance_of_mean(each_S, rows, of_one, units)
    found = summarise(float(each_S.mean()), variance, freedom)
    return replace(found, p_among=cautious_p(each_S, rows, of_one, units))


def parts_of(each_S: Floats, rows: float, of_one: float) -> tuple[float, float]:
    """(variance of the mean by the spread of seeds, the part of row by seed in it)."""
    spare = len(each_S) - 1
    return float(each_S.var(ddof=1)) / len(each_S), max(of_one - rows, 0.0) / spare


def variance_of_mean(each_S: Floats, rows: float, of_one: float, units: int) -> tuple[float, float]:
    """(variance, degrees of freedom) of the mean difference over seeds.

    each_S: the difference of each seed; rows: the variance over rows of their mean; of_one: the
    mean variance over rows of one seed's difference.
    """
    spare, many = len(each_S) - 1, max(units - 1, 1)
    seeds, both = parts_of(each_S, rows, of_one)
    level = LEAST + MORE * (min(both / rows, 1.0) if rows > 0 else 1.0)
    if seeds > both * float(fdtri(spare, spare * many, 1 - level)):
        variance = rows + max(seeds - both, 0.0)
        share = max(seeds, both) / variance
    else:
        variance, share = rows - (1 - KEPT) * min(both, rows), 0.0
    if variance <= 0:
        return 0.0, 1.0
    return variance, 1 / (min(share, 1.0) ** POWER / spare + min(rows / variance, 1.0) ** 2 / many)


def cautious_p(each_S: Floats, rows: float, of_one: float, units: int) -> float:
    """A two-sided p that is too small at no level. Corrections of several comparisons need this.

    The squared limit at level a is the sum over the parts of their variance times their squared t
    at level a (Banerjee 1961). The p of `summarise` is made for 5%, and is too small far below.
    """
    spare, many = len(each_S) - 1, max(units - 1, 1)
    seeds, both = parts_of(each_S, rows, of_one)
    of_rows, square = max(rows - both, 0.0), float(each_S.mean()) ** 2
    if seeds + of_rows == 0 or square == 0:
        return 1.0 if square == 0 else 0.0

    def beyond(log_p: float) -> float:
        half = math.exp(log_p) / 2
        limit = of_rows * stdtrit(many, half) ** 2 + seeds * stdtrit(spare, half) ** 2
        return square - float(limit)

    least = math.log(1e-12)
    return math.exp(least if beyond(least) > 0 else brentq(beyond, least, 0.0))


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The mean of differences on different tasks, whose errors are independent."""
    number = len(differences)
    variance = sum(of.variance for of in differences) / number**2
    spread = sum((of.variance / number**2) ** 2 / of.freedom for of in differences)
    freedom = variance**2 / spread if spread > 0 else 1.0
    value = float(np.mean([of.value for of in differences]))
    return summarise(value, variance, freedom)


def summarise(value: float, variance: float, freedom: float) -> Difference:
    """Student's interval and p of a difference. The variance is 0 where both methods give the
    same."""
    freedom = max(freedom, 1.0)
    reach = reach_of(variance, freedom)
    if variance > 0:
        p = 2 * float(stdtr(freedom, -abs(value) / math.sqrt(variance)))
    else:
        p = 1.0 if value == 0 else 0.0
    return Difference(value, (value - reach, value + reach), p, variance, freedom)


def holm(ps: Sequence[float]) -> list[float]:
    """The corrected p of each of several comparisons that are reported together (Holm 1979)."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda n: ps[n])):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = highest
    return adjusted
