"""The statistics of a comparison, checked by simulated studies whose truth is known.

PLAIT_SIMULATIONS=1 runs 1,000 studies for each case instead of a few.
"""

import math
import os
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("statsmodels")

from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep

from plait.run.compare.statistics import (
    Components,
    Difference,
    _power,
    assumed_components,
    crossed_draws,
    detectable_difference,
    holm,
    mean_squares,
    paired_difference,
    planned_power,
    share_difference,
    share_interval,
    standard_error,
    variance_components,
    verdicts,
)

LONG = bool(os.environ.get("PLAIT_SIMULATIONS"))
STUDIES, DRAWS = (1000, 2000) if LONG else (120, 200)

# Seeds, rows and variance components of a study: what dominates differs.
SHAPES: dict[str, tuple[int, int, Components]] = {
    "rows dominate": (5, 200, Components(0.0, 0.05, 0.10)),
    "seeds dominate": (5, 200, Components(4e-4, 0.01, 0.02)),
    "both": (5, 120, Components(3e-4, 0.04, 0.08)),
    "ten seeds": (10, 100, Components(1e-3, 0.02, 0.05)),
    "three seeds": (3, 200, Components(2e-4, 0.04, 0.08)),
}


def study(
    rng: np.random.Generator, seeds: int, rows: int, parts: Components, effect: float = 0.0
) -> NDArray[Any]:
    """Differences (seeds, rows) of one simulated study."""
    return (
        effect
        + rng.normal(0, math.sqrt(parts.seeds), (seeds, 1))
        + rng.normal(0, math.sqrt(parts.rows), (1, rows))
        + rng.normal(0, math.sqrt(parts.rest), (seeds, rows))
    )


def compared(differences: NDArray[Any], seed: int = 0) -> Difference:
    zero = np.zeros_like(differences)
    return paired_difference(differences, zero, seed=seed, draws=DRAWS)


def within(what: str, count: int, total: int, low: float, high: float) -> bool:
    """Whether a share of studies is from low to high; a few studies may miss it by chance."""
    if LONG:
        print(f"{what}: {100 * count / total:.1f} % of {total:,} studies")
    slack = 0.0 if LONG else 3 * math.sqrt(high * (1 - high) / total) + 1 / total
    return low - slack <= count / total <= high + slack


# ------------------------------------------------------------------------------- simulated studies


@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_hold_the_truth_in_95_of_100_studies(shape: str) -> None:
    seeds, rows, parts = SHAPES[shape]
    rng, held = np.random.default_rng(1), 0
    for number in range(STUDIES):
        made = compared(study(rng, seeds, rows, parts, effect=0.02), number)
        held += made.low <= 0.02 <= made.high
    assert within(f"coverage, {shape}", held, STUDIES, 0.93, 0.97)


def test_intervals_of_accuracies_hold_the_truth() -> None:
    """Right and wrong answers: rows are hard for both arms, and each seed moves an arm."""
    rng, held = np.random.default_rng(2), 0
    seeds, rows, gain = 5, 200, 0.03
    for number in range(STUDIES):
        hard = rng.normal(0, 1.2, (1, rows))
        moved = rng.normal(0, 0.1, (2, seeds, 1))
        chance = stats.norm.cdf(0.3 + hard + moved)
        truth = np.clip(chance[0] + gain, 0, 1)
        right = rng.random((2, seeds, rows)) < np.stack([truth, chance[1]])
        made = paired_difference(right[0], right[1], seed=number, draws=DRAWS)
        held += made.low <= gain * 0.97 <= made.high  # a few chances are cut at 1
    assert within("coverage, accuracies", held, STUDIES, 0.93, 0.97)


def test_no_effect_is_called_in_at_most_5_of_100_studies() -> None:
    """Of four arms against one reference, all equal: family-wise, after Holm."""
    seeds, rows, parts = SHAPES["both"]
    half = Components(parts.seeds / 2, parts.rows / 2, parts.rest / 2)
    rng, called = np.random.default_rng(3), 0
    for number in range(STUDIES):
        reference = study(rng, seeds, rows, half)
        arms = [study(rng, seeds, rows, half) for _ in range(4)]
        made = [paired_difference(a, reference, seed=number, draws=DRAWS) for a in arms]
        called += any(verdict != "undecided" for verdict in verdicts(made))
    assert within("four equal arms, any called", called, STUDIES, 0.0, 0.05)


@pytest.mark.parametrize("shape", ["rows dominate", "both", "ten seeds"])
def test_the_planned_power_is_met(shape: str) -> None:
    seeds, rows, parts = SHAPES[shape]
    effect = detectable_difference(parts, seeds, rows)
    assert planned_power(effect, parts, seeds, rows) == pytest.approx(0.8, abs=1e-6)
    rng, seen = np.random.default_rng(4), 0
    for number in range(STUDIES):
        seen += verdicts([compared(study(rng, seeds, rows, parts, effect), number)]) == ["wins"]
    assert within(f"power of 80 % planned, {shape}", seen, STUDIES, 0.75, 0.85)


# --------------------------------------------------------------------------------------- the parts


def test_mean_squares_are_those_of_a_crossed_design() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 4))
    of_seeds, of_rows, rest = mean_squares(values)
    total = values.mean()
    assert of_seeds == pytest.approx(sum(4 * (row.mean() - total) ** 2 for row in values) / 2)
    assert of_rows == pytest.approx(sum(3 * (col.mean() - total) ** 2 for col in values.T) / 3)
    everything = np.square(values - total).sum()
    assert 2 * of_seeds + 3 * of_rows + 6 * rest == pytest.approx(everything)


def test_components_are_estimated() -> None:
    rng, parts = np.random.default_rng(0), Components(0.5, 0.3, 0.2)
    made = [variance_components(study(rng, 8, 60, parts)) for _ in range(300)]
    for name in ("seeds", "rows", "rest"):
        mean = np.mean([getattr(m, name) for m in made])
        assert mean == pytest.approx(getattr(parts, name), rel=0.1)


def test_crossed_draws_have_the_error_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    values = study(rng, 12, 80, Components(0.5, 0.5, 0.0))
    draws = crossed_draws(values, 4000, rng)
    error, _ = standard_error(variance_components(values), 12, 80)
    assert draws.mean() == pytest.approx(values.mean(), abs=5 * error / math.sqrt(4000))
    assert draws.std() == pytest.approx(error, rel=0.1)


def test_one_seed_is_scipys_bootstrap_and_permutation() -> None:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=60) - 0.6
    made = paired_difference(values[None], np.zeros((1, 60)))
    plain = stats.ttest_1samp(values, 0)
    assert made.seeds == 1
    assert made.p == pytest.approx(plain.pvalue, abs=0.02)
    interval = plain.confidence_interval()
    assert made.low == pytest.approx(interval.low, abs=0.08)
    assert made.high == pytest.approx(interval.high, abs=0.12)
    assert made.high - made.mean > made.mean - made.low  # BCa: skewed as the values are
    assert made.error == pytest.approx(stats.sem(values))


def test_a_metric_for_each_seed_alone_is_a_t_interval() -> None:
    values = np.array([[0.1], [0.3], [0.2], [0.25], [0.15]])
    made = paired_difference(values, np.zeros((5, 1)), draws=20_000)
    plain = stats.ttest_1samp(values[:, 0], 0)
    assert made.p == pytest.approx(plain.pvalue)
    interval = plain.confidence_interval()
    assert (made.low, made.high) == pytest.approx((interval.low, interval.high), abs=0.02)


def test_rows_of_a_group_count_together() -> None:
    rng = np.random.default_rng(0)
    of_group = study(rng, 4, 30, Components(0.0, 1.0, 0.1), 0.1)
    values = np.repeat(of_group, 5, axis=1)  # five equal rows of each source
    groups = [i // 5 for i in range(150)]
    apart = paired_difference(values, np.zeros((4, 150)))
    together = paired_difference(values, np.zeros((4, 150)), groups)
    alone = paired_difference(of_group, np.zeros((4, 30)))
    assert together.error == pytest.approx(alone.error)
    assert together.mean == pytest.approx(apart.mean)
    assert together.error > 1.5 * apart.error
    assert together.rows == 150
    uneven = paired_difference(values, np.zeros((4, 150)), [0] * 50 + list(range(1, 101)))
    assert uneven.mean == pytest.approx(apart.mean)
    with pytest.raises(ValueError, match=r"^2 groups for 150 rows\. Give the group of each row"):
        paired_difference(values, np.zeros((4, 150)), [0, 1])


def test_arms_that_are_equal_or_differ_by_a_constant() -> None:
    values = np.random.default_rng(0).normal(size=(3, 20))
    same = paired_difference(values, values)
    assert (same.mean, same.low, same.high, same.p, same.detectable) == (0, 0, 0, 1, 0)
    above = paired_difference(values + 0.3, values)
    assert above.p == 0
    assert above.low == pytest.approx(0.3)
    assert verdicts([same, above]) == ["undecided", "wins"]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the arm has the shape \(2, 3\) and the reference \(3,"):
        paired_difference(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"one seed and one row: the spread is unknown"):
        paired_difference(np.zeros((1, 1)), np.zeros((1, 1)))


def test_verdicts_follow_the_metrics_direction_and_holm() -> None:
    def difference(mean: float, p: float) -> Difference:
        half = abs(mean) / 2
        return Difference(mean, mean - half, mean + half, 0.1, 4, p, 0.3, 5, 100)

    made = [difference(0.5, 0.001), difference(-0.5, 0.02), difference(0.5, 0.03)]
    assert holm([d.p for d in made]) == pytest.approx([0.003, 0.04, 0.04])
    assert verdicts(made) == ["wins", "loses", "wins"]
    assert verdicts(made, higher_is_better=False) == ["loses", "wins", "loses"]
    more = [*made, difference(0.5, 0.04), difference(0.5, 0.2)]
    assert verdicts(more) == ["wins", *["undecided"] * 4]
    assert holm([]) == []


def test_more_of_either_helps_and_pairing_does() -> None:
    parts = assumed_components(0.5, 0.6)
    assert (parts.rows, parts.rest) == pytest.approx((0.1, 0.1))
    small = detectable_difference(parts, 5, 200)
    assert detectable_difference(parts, 5, 800) == pytest.approx(small / 2, rel=0.02)
    assert detectable_difference(parts, 20, 200) < small
    assert detectable_difference(assumed_components(0.5, 0.8), 5, 200) < small
    few = detectable_difference(Components(0.01, 0.0, 0.0), 3, 200)
    assert few > 2 * detectable_difference(Components(0.01, 0.0, 0.0), 6, 200)


def test_power_is_known_for_few_degrees_of_freedom() -> None:
    """scipy's noncentral t is NaN on its far side; here against an integral over the variance."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for degrees in (1.0, 2.03, 3.28, 8.0):
        spread = np.sqrt(stats.chi2.ppf((nodes + 1) / 2, degrees) / degrees)
        quantile = stats.t.isf(0.025, degrees)
        for shift in (0.5, 4.0, 8.0, 16.0):
            above = stats.norm.sf(quantile * spread - shift)
            below = stats.norm.cdf(-quantile * spread - shift)
            expected = float((weights / 2 * (above + below)).sum())
            assert _power(shift, degrees, 0.95) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------ shares without rows


@pytest.mark.parametrize(("share", "reference"), [(0.526, 0.478), (0.02, 0.0), (0.35, 0.51)])
def test_two_shares_are_compared_as_by_newcombe(share: float, reference: float) -> None:
    rows = 500
    counts = [round(share * rows), round(reference * rows)]
    made = share_difference(counts[0] / rows, counts[1] / rows, rows)
    low, high = confint_proportions_2indep(
        counts[0], rows, counts[1], rows, method="newcomb", compare="diff"
    )
    assert (made.low, made.high) == pytest.approx((low, high), abs=1e-9)
    assert (made.low > 0) == (made.p < 0.05 and made.mean > 0)


def test_a_pairing_narrows_and_a_spread_over_seeds_widens() -> None:
    alone = share_difference(0.5, 0.48, 1000)
    paired = share_difference(0.5, 0.48, 1000, correlation=0.5)
    spread = share_difference(0.5, 0.48, 1000, seed_spread=0.01)
    widths = [d.high - d.low for d in (paired, alone, spread)]
    assert widths == sorted(widths)
    assert [d.detectable for d in (paired, alone, spread)] == sorted(
        d.detectable for d in (paired, alone, spread)
    )
    assert paired.p < alone.p < spread.p
    assert alone.detectable == pytest.approx(2.8016 * math.sqrt(2 * 0.48 * 0.52 / 1000), rel=1e-3)
    assert share_interval(0.5, 1000) == pytest.approx((0.4691, 0.5309), abs=1e-3)
