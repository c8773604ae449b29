"""The statistics of a comparison: paired differences over seeds and test rows.

An arm is measured with every seed on every test row. Its differences to the reference arm, on the
same seed and row, follow D[seed, row] = mean + seed + row + rest: the seed's part (initialisation,
data order) and the row's part are drawn once each and shared, so neither more rows nor more seeds
alone makes the mean certain. The variance of the mean is estimated from the three mean squares of
this crossed design, with Satterthwaite's degrees of freedom (Searle, Casella and McCulloch,
Variance Components, 1992, section 4.3; Miller 2024, arXiv 2411.00640, has the case of one seed).

scipy and statsmodels (the extra `compare`) supply distributions, resampling, Holm and
the intervals of shares.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Verdict = Literal["wins", "loses", "undecided"]

LEVEL = 0.95
POWER = 0.8
_DRAWS = 2000
_NOTHING = 1e-12  # a spread that is rounding, relative to the largest difference
_NORMAL = 1e4  # degrees of freedom from which Student's t is normal
_FAR = 5.0  # standard errors
_CHUNK = 2**22  # numbers of a block of draws


@dataclass(frozen=True)
class Components:
    """Variances of the parts of a paired difference, in squared units of the metric.

    seeds: from seed to seed. rows: from test row to test row. rest: of single values.
    """

    seeds: float
    rows: float
    rest: float

    def squares(self, seeds: int, rows: int) -> tuple[float, float, float]:
        """Return the expected mean squares of a study of this size: seeds, rows, rest."""
        return self.rest + rows * self.seeds, self.rest + seeds * self.rows, self.rest


@dataclass(frozen=True)
class Difference:
    """The difference of an arm to the reference, in the metric's unit.

    mean: over seeds and rows. low, high: the interval. error: standard error of the mean, with
    `degrees` degrees of freedom. p: two-sided, of no difference. detectable: the smallest
    difference that a study of this size and spread detects with 80 % power. seeds, rows: how many.
    """

    mean: float
    low: float
    high: float
    error: float
    degrees: float
    p: float
    detectable: float
    seeds: int
    rows: int


# The variance of a mean ---------------------------------------------------------------------------


def mean_squares(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean squares of differences (seeds, rows): of seeds, of rows, of the rest."""
    seeds, rows = differences.shape
    mean = differences.mean()
    by_seed = differences.mean(axis=1) - mean
    by_row = differences.mean(axis=0) - mean
    rest = differences - mean - by_seed[:, None] - by_row
    return (
        rows * float(np.square(by_seed).sum()) / (seeds - 1),
        seeds * float(np.square(by_row).sum()) / (rows - 1),
        float(np.square(rest).sum()) / ((seeds - 1) * (rows - 1)),
    )


def variance_components(differences: NDArray[np.float64]) -> Components:
    """Estimate the variance components of differences (seeds, rows), none below zero.

    With one seed, the spread over seeds is unknown and taken for zero: what follows holds for that
    seed alone. With one row, such as a metric that is known for each seed only, it is all there is.
    """
    seeds, rows = differences.shape
    if seeds == 1 or rows == 1:
        spread = float(differences.var(ddof=1)) if differences.size > 1 else 0.0
        return Components(spread, 0.0, 0.0) if rows == 1 else Components(0.0, spread, 0.0)
    of_seeds, of_rows, rest = mean_squares(differences)
    return Components(max(of_seeds - rest, 0.0) / rows, max(of_rows - rest, 0.0) / seeds, rest)


def standard_error(parts: Components, seeds: int, rows: int) -> tuple[float, float]:
    """Return the standard error of a mean over seeds and rows, and its degrees of freedom.

    A part that is zero takes no degrees of freedom away.
    """
    if seeds == 1 or rows == 1:
        variance = parts.seeds / seeds + parts.rows / rows
        return math.sqrt(variance), float(max(seeds, rows) - 1)
    of_seeds, of_rows, rest = parts.squares(seeds, rows)
    variance = of_seeds + of_rows - rest
    if variance <= 0:
        return 0.0, float((seeds - 1) * (rows - 1))
    weights = (
        (of_seeds if parts.seeds > 0 else 0.0) ** 2 / (seeds - 1)
        + (of_rows if parts.rows > 0 else 0.0) ** 2 / (rows - 1)
        + rest**2 / ((seeds - 1) * (rows - 1))
    )
    degrees = variance**2 / weights if weights > 0 else (seeds - 1) * (rows - 1)
    return math.sqrt(variance / (seeds * rows)), float(degrees)


# One difference -----------------------------------------------------------------------------------


def paired_difference(
    arm: NDArray[np.float64],
    reference: NDArray[np.float64],
    groups: Sequence[object] | None = None,
    level: float = LEVEL,
    seed: int = 0,
    draws: int = _DRAWS,
) -> Difference:
    """Compare an arm with the reference, measured on the same seeds and test rows.

    The interval comes from a bootstrap that draws seeds and rows, hierarchically; with one seed it
    is scipy's BCa over rows. Resampling a few seeds shows too little of their spread, and crossed
    resampling counts the rest several times (Owen 2007), so the draws are scaled to the standard
    error and to Student's t. p is the t-test's on the same scale; with one seed it is the paired
    permutation of rows. A permutation of seeds and rows at once has no exact form, and one of five
    seeds alone cannot go below 1/16.

    Args:
        arm, reference: (seeds, rows), a number for each seed and test row whose mean is the metric,
            such as 0 or 1 for accuracy. A metric without such numbers: (seeds, 1).
        groups: of each row, such as its source text; rows of a group are drawn together.
        level: of the interval. seed: of the draws. draws: of the bootstrap.

    Raises:
        ValueError: shapes that differ, or a single number, from which nothing follows.
    """
    arm, reference = np.asarray(arm, float), np.asarray(reference, float)
    if arm.shape != reference.shape or arm.ndim != 2:
        raise ValueError(
            f"the arm has the shape {arm.shape} and the reference {reference.shape}. Give (seeds, "
            "rows) for both, of the same seeds and rows."
        )
    differences = arm - reference
    if groups is not None:
        differences = _by_group(differences, groups)
    if differences.size < 2:
        raise ValueError("one seed and one row: the spread is unknown. Measure more of either.")
    seeds, rows = differences.shape
    parts = variance_components(differences)
    error, degrees = standard_error(parts, seeds, rows)
    mean = float(differences.mean())
    if error <= _NOTHING * abs(differences).max():
        error = 0.0  # but for rounding
        p, low, high = (1.0 if mean == 0 else 0.0), mean, mean
    elif seeds == 1:
        low, high = _over_rows(differences[0], level, seed, draws)
        p = _permuted(differences[0], seed)
    else:
        low, high = _over_both(differences, error, degrees, level, seed, draws)
        p = float(2 * stats.t.sf(abs(mean) / error, degrees))
    return Difference(
        mean=mean,
        low=low,
        high=high,
        error=error,
        degrees=degrees,
        p=p,
        detectable=_detectable(error, degrees, level),
        seeds=seeds,
        rows=arm.shape[1],
    )


def _by_group(differences: NDArray[np.float64], groups: Sequence[object]) -> NDArray[np.float64]:
    """Return one number for each seed and group, whose mean is that of all rows.

    A group counts as often as it has rows; the numbers are the linear part of that ratio.
    """
    names = list(dict.fromkeys(groups))
    if len(groups) != differences.shape[1]:
        raise ValueError(
            f"{len(groups)} groups for {differences.shape[1]} rows. Give the group of each row."
        )
    place = np.array([names.index(name) for name in groups])
    member = np.eye(len(names))[place]  # (rows, groups)
    sizes = member.sum(axis=0)
    means = differences.mean(axis=1, keepdims=True)
    return means + (differences @ member - means * sizes) * len(names) / len(groups)


def _over_rows(
    differences: NDArray[np.float64], level: float, seed: int, draws: int
) -> tuple[float, float]:
    made = stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=level,
        n_resamples=draws,
        batch=max(1, _CHUNK // len(differences)),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(made.confidence_interval.low), float(made.confidence_interval.high)


def _permuted(differences: NDArray[np.float64], seed: int) -> float:
    made = stats.permutation_test(
        (differences, np.zeros_like(differences)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        batch=max(1, _CHUNK // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(made.pvalue)


def _over_both(
    differences: NDArray[np.float64],
    error: float,
    degrees: float,
    level: float,
    seed: int,
    count: int,
) -> tuple[float, float]:
    draws = crossed_draws(differences, count, np.random.default_rng(seed))
    mean, tail = differences.mean(), (1 - level) / 2
    widen = error / draws.std() * stats.t.isf(tail, degrees) / stats.norm.isf(tail)
    low, high = mean + (np.quantile(draws, [tail, 1 - tail]) - mean) * widen
    return float(low), float(high)


def crossed_draws(
    differences: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return means (count,) of differences (seeds, rows), seeds and rows drawn with replacement.

    A row that is drawn is drawn for all seeds, and a seed for all rows: the pigeonhole bootstrap of
    Owen (2007), The Annals of Applied Statistics 1.
    """
    seeds, rows = differences.shape
    made, step = [], max(1, _CHUNK // (seeds * rows))
    for start in range(0, count, step):
        size = min(step, count - start)
        of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size) / seeds
        of_rows = rng.multinomial(rows, np.full(rows, 1 / rows), size) / rows
        made.append(((of_seeds @ differences) * of_rows).sum(axis=1))
    return np.concatenate(made)


# Several arms -------------------------------------------------------------------------------------


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values of several arms, adjusted by Holm's method."""
    adjusted: Any = multipletests(p, method="holm")[1] if p else []
    return [float(q) for q in adjusted]


def verdicts(
    differences: Sequence[Difference],
    adjusted: Sequence[float] | None = None,
    higher_is_better: bool = True,
    level: float = LEVEL,
) -> list[Verdict]:
    """Return what can be said of each arm: it wins or loses, or the study cannot tell.

    An arm that wins or loses has an interval without zero and a p-value that stays below 1 - level
    after Holm's adjustment for the number of arms.

    adjusted: what `holm` returned for them; None: it is called here.
    """
    adjusted = holm([d.p for d in differences]) if adjusted is None else adjusted
    made: list[Verdict] = []
    for difference, p in zip(differences, adjusted, strict=True):
        if p > 1 - level or difference.low <= 0 <= difference.high:
            made.append("undecided")
        else:
            made.append("wins" if (difference.mean > 0) == higher_is_better else "loses")
    return made


# Before the study ---------------------------------------------------------------------------------


def assumed_components(rate: float, correlation: float) -> Components:
    """Return the components of a difference of two accuracies, if there is no pilot.

    rate: the accuracy of both. correlation: of two arms' answers to a row. Half of what the rows
    differ by is taken to be the same for all seeds.
    """
    spread = 2 * rate * (1 - rate) * (1 - correlation)
    return Components(0.0, spread / 2, spread / 2)


def detectable_difference(
    parts: Components, seeds: int, rows: int, level: float = LEVEL, power: float = POWER
) -> float:
    """Return the smallest difference that a study of this size detects with this power."""
    error, degrees = standard_error(parts, seeds, rows)
    return _detectable(error, degrees, level, power)


def planned_power(
    difference: float, parts: Components, seeds: int, rows: int, level: float = LEVEL
) -> float:
    """Return the probability that a study of this size detects this difference."""
    error, degrees = standard_error(parts, seeds, rows)
    if error == 0:
        return 1.0 if difference else 1 - level
    return _power(abs(difference) / error, degrees, level)


def needed(
    difference: float, parts: Components, seeds: int, rows: int, power: float = POWER
) -> tuple[int | None, int | None]:
    """Return the seeds, with as many rows, and the rows, with as many seeds, that detect it.

    difference: a true one. seeds, rows: of the study that was made. None: 1,000 times as many do
    not, such as more rows where seeds differ.
    """

    def least(enough: Callable[[int], bool], start: int) -> int | None:
        low, high = 1, max(start, 2)
        while not enough(high):
            low, high = high, 2 * high
            if high > 1000 * start:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    return (
        least(lambda n: planned_power(difference, parts, n, rows) >= power, seeds),
        least(lambda n: planned_power(difference, parts, seeds, n) >= power, rows)
        if rows > 1 and seeds > 1
        else None,
    )


def _power(shift: float, degrees: float, level: float) -> float:
    """Return the power of a two-sided t-test whose mean is `shift` standard errors from zero."""
    if degrees > _NORMAL:
        quantile = stats.norm.isf((1 - level) / 2)
        return float(stats.norm.sf(quantile - shift) + stats.norm.cdf(-quantile - shift))
    quantile = stats.t.isf((1 - level) / 2, degrees)
    power = float(stats.nct.sf(quantile, degrees, shift))
    if shift < _FAR:  # beyond, the other side has a chance below 1e-6, which scipy gives as NaN
        power += float(stats.nct.cdf(-quantile, degrees, shift))
    return power


def _detectable(error: float, degrees: float, level: float, power: float = POWER) -> float:
    if error == 0:
        return 0.0
    most = 4.0
    while _power(most, degrees, level) < power:
        most *= 2
    shift: Any = optimize.brentq(
        lambda shift: _power(shift, degrees, level) - power, 0.0, most, xtol=1e-6
    )
    return error * float(shift)


# Shares of rows, without the rows -----------------------------------------------------------------


def share_interval(share: float, rows: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval of a share of test rows, such as an accuracy."""
    ends: Any = proportion_confint(share * rows, rows, alpha=1 - level, method="wilson")
    low, high = ends
    return float(low), float(high)


def share_difference(
    share: float,
    reference: float,
    rows: int,
    correlation: float = 0.0,
    seed_spread: float = 0.0,
    level: float = LEVEL,
) -> Difference:
    """Compare two shares of the same test rows of which nothing else is known.

    The interval is Newcombe's (1998, Statistics in Medicine 17, method 10), from Wilson's intervals
    of both shares; p is that of the z-test with the pooled share.

    Args:
        share, reference: of the rows, 0 to 1.
        rows: of the test.
        correlation: assumed, of the two runs' answers to a row. 0 overstates the error of two runs
            that find the same rows hard.
        seed_spread: assumed standard deviation of the share from seed to seed; 0 compares these two
            seeds, and not the two methods.
        level: of the interval.
    """
    quantile = float(stats.norm.isf((1 - level) / 2))
    (low, high), (low_of, high_of) = (share_interval(s, rows, level) for s in (share, reference))
    below, above = share - low, high - share
    below_of, above_of = reference - low_of, high_of - reference
    seeds = 2 * (quantile * seed_spread) ** 2
    pooled = (share + reference) / 2
    mean = share - reference

    def error_at(of: float) -> float:
        return math.sqrt(2 * of * (1 - of) * (1 - correlation) / rows + 2 * seed_spread**2)

    error = error_at(pooled)
    p = float(2 * stats.norm.sf(abs(mean) / error)) if error > 0 else 1.0
    down = below**2 + above_of**2 - 2 * correlation * below * above_of + seeds
    up = above**2 + below_of**2 - 2 * correlation * above * below_of + seeds
    sum_of_quantiles = quantile + float(stats.norm.ppf(POWER))
    return Difference(
        mean=mean,
        low=max(mean - math.sqrt(down), -1.0),
        high=min(mean + math.sqrt(up), 1.0),
        error=error,
        degrees=math.inf,
        p=p,
        detectable=sum_of_quantiles * error_at(reference),
        seeds=1,
        rows=rows,
    )
