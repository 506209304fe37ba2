"""Whether a difference between two methods is larger than chance: rows and seeds as random effects.

Two things vary by chance: which rows the dev split happens to hold, and the seeds of the runs. The
difference of a seed's two runs on a row is row + seed + row by seed, each random (a crossed
analysis of variance without repetition: Searle, Casella and McCulloch 1992, chapter 4). The
variance of the mean difference is that of rows (of the mean over seeds), plus that of seeds, less
that of row by seed, which both hold, so that each part counts once. What seeds add is left out
where an F test does not see it ("sometimes pool", Bancroft 1964). Degrees of freedom are fewer than
Satterthwaite's (1946), which few seeds overstate; interval and p are Student's t. Variances over
rows come from resamples, since most metrics are no means over rows. How often it is wrong is
simulated in the tests; docs/decisions/0023-sweep-statistics.md says how the constants were chosen.

Shapes: R resamples, S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import fdtri, stdtr, stdtrit

from sead_dist.data.resampling import LEVEL, Floats

# level of the F test of what seeds add: LEAST, plus MORE times the row-by-seed share of the
# variance over rows; where it sees nothing, that share of the row-by-seed part is kept
LEAST, MORE, KEPT = 0.2, 0.4, 0.7
# degrees of freedom fall with this power of the seeds' share of the variance; Satterthwaite's is 2
POWER = 1.25


@dataclass(frozen=True)
class Difference:
    """A method's mean minus the reference's, its 95% interval and two-sided p; the variance of that
    mean, and its degrees of freedom.

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
    """The difference of two methods over the same seeds, S at least 3, its interval and p.

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
    """(variance of the mean by the spread of seeds, what of it is row by seed)."""
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
    """A two-sided p that is too small at no level, for corrections of several comparisons.

    The squared limit of level a is the sum of each part's variance times its own squared t of
    level a (Banerjee 1961). `summarise`'s p is made for 5%, and too small far below that.
    """
    spare, many = len(each_S) - 1, max(units - 1, 1)
    seeds, both = parts_of(each_S, rows, of_one)
    of_rows, square = max(rows - both, 0.0), float(each_S.mean()) ** 2
    if seeds + of_rows == 0 or square == 0:
        return 1.0 if square == 0 else 0.0
    low, high = math.log(1e-12), 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        p = math.exp(middle)
        limit = of_rows * stdtrit(many, p / 2) ** 2 + seeds * stdtrit(spare, p / 2) ** 2
        low, high = (low, middle) if square > limit else (middle, high)
    return math.exp(high)


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """The mean of differences on different tasks, whose chances are independent."""
    number = len(differences)
    variance = sum(of.variance for of in differences) / number**2
    spread = sum((of.variance / number**2) ** 2 / of.freedom for of in differences)
    freedom = variance**2 / spread if spread > 0 else 1.0
    value = float(np.mean([of.value for of in differences]))
    return summarise(value, variance, freedom)


def summarise(value: float, variance: float, freedom: float) -> Difference:
    """Student's interval and p of a difference; nothing varies where both methods say the same."""
    freedom = max(freedom, 1.0)
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)
    if variance > 0:
        p = 2 * float(stdtr(freedom, -abs(value) / math.sqrt(variance)))
    else:
        p = 1.0 if value == 0 else 0.0
    return Difference(value, (value - reach, value + reach), p, variance, freedom)


def holm(ps: Sequence[float]) -> list[float]:
    """p of each of several comparisons that are spoken of together (Holm 1979)."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=lambda n: ps[n])):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = highest
    return adjusted
