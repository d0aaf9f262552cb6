"""Statistics, against scipy, values worked out by hand, a published table, and simulations."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as theirs

from jaxeco import stats

SKEWED = np.array([1.0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 8, 11, 15, 30])


def test_a_summary_by_hand() -> None:
    found = stats.summary([1, 2, 3, 4])
    assert (found.n, found.mean) == (4, 2.5)
    assert found.sd == pytest.approx(math.sqrt(5 / 3))  # over n - 1 = 3
    reach = 3.182446 * math.sqrt(5 / 3) / 2  # t of 3 degrees of freedom, from a table
    assert (found.low, found.high) == pytest.approx((2.5 - reach, 2.5 + reach), rel=1e-6)


def test_the_bootstraps_interval_is_scipys_at_the_widened_level() -> None:
    n = len(SKEWED)
    z = math.sqrt(n / (n - 1)) * theirs.t.ppf(0.9, n - 1)
    expected = theirs.bootstrap(
        (SKEWED,), np.mean, confidence_level=2 * theirs.norm.cdf(z) - 1, method="BCa", rng=1
    ).confidence_interval
    found = stats.summary(SKEWED, 0.8)  # where few resamples tell
    assert found.low is not None and found.high is not None
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.high, abs=0.03 * width)
    assert found.high - SKEWED.mean() > SKEWED.mean() - found.low  # skewed as the values are
    assert stats.summary(SKEWED, 0.8) == found


@pytest.mark.parametrize("values", [[0.3], [0.1] * 3, [0.1] * 20, [1.0, math.nan, 2.0]])
def test_a_summary_of_what_has_no_spread(values: list[float]) -> None:
    found = stats.summary(values)
    assert found.n == len(values)
    if len(values) == 1:
        assert (found.mean, found.sd, found.low, found.high) == (0.3, None, None, None)
    elif math.isnan(sum(values)):
        assert math.isnan(found.mean) and found.low is None
    else:
        assert found.mean == pytest.approx(0.1, rel=1e-15)
        assert (found.sd, found.low, found.high) == (0.0, found.mean, found.mean)


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        stats.summary([])
    with pytest.raises(ValueError, match="finite"):
        stats.compare([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="no pairs"):
        stats.compare([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)


@pytest.mark.parametrize(
    ("mean", "sd", "percent", "expected"),
    [
        (0.97312, 0.00162, False, "0.9731 ± 0.0016"),
        (0.97312, 0.00162, True, "97.31 ± 0.16 %"),
        (1234.5, 12.3, False, "1234 ± 12"),
        (0.9731, None, True, "97.31 %"),
        (0.5, 0.0, False, "0.5 ± 0"),
        (math.nan, math.nan, False, "nan ± nan"),
    ],
)
def test_plus_minus(mean: float, sd: float | None, percent: bool, expected: str) -> None:
    assert stats.plus_minus(mean, sd, percent) == expected
    summary = stats.Summary(3, mean, sd)
    assert percent or str(summary) == f"{expected} (n = 3)"


@pytest.mark.parametrize("n", [3, 12])
def test_an_interval_holds_the_mean_19_times_in_20(n: int) -> None:
    rng, trials = np.random.default_rng(0), 500
    held = 0
    for _ in range(trials):
        found = stats.summary(rng.normal(size=n))
        assert found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
    assert abs(held / trials - 0.95) < 0.03  # three standard errors


def test_welchs_and_the_paired_t_test_are_scipys() -> None:
    rng = np.random.default_rng(3)
    for n, m in ((2, 2), (3, 5), (8, 8)):
        a, b = rng.normal(size=n), rng.normal(0.5, 3, size=m)
        found = stats.compare(a, b, alpha=0.1)
        expected = theirs.ttest_ind(b, a, equal_var=False)
        ends = expected.confidence_interval(0.9)
        assert found.test == "Welch's t" and found.least_p == 0
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
        if n == m:
            found = stats.compare(a, b, paired=True)
            expected = theirs.ttest_rel(b, a)
            ends = expected.confidence_interval(0.95)
            assert found.test == "paired t"
            assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
            assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-9)


def test_one_run_against_several_is_a_prediction_interval() -> None:
    several = np.array([1.0, 2.0, 4.0, 5.0])
    reach = 3.182446 * several.std(ddof=1) * math.sqrt(1 + 1 / 4)
    found = stats.compare(several, [several.mean() + reach])
    assert found.test == "t of one run"
    assert found.p == pytest.approx(0.05, abs=1e-6)
    assert found.low == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 6), (2, 7)])
def test_exact_permutations_are_scipys(n: int, m: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(5):
        # a coarse grid makes ties, which count as extreme on both sides
        a, b = rng.integers(0, 6, size=n) / 5, rng.integers(2, 8, size=m) / 5
        found = stats.compare(a, b, test="permutation")
        assert found.p == pytest.approx(_permutation_p(a, b, "independent"))
        assert found.least_p == pytest.approx(min(1, 2 / math.comb(n + m, n)))
        if n == m:
            found = stats.compare(a, b, paired=True, test="permutation")
            assert found.p == pytest.approx(_permutation_p(a, b, "samples"))
            assert found.least_p == 2 / 2**n


def _permutation_p(a: np.ndarray, b: np.ndarray, kind: str) -> float:
    return theirs.permutation_test(
        (b, a),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        permutation_type=kind,
        n_resamples=np.inf,
        vectorized=True,
    ).pvalue


@pytest.mark.parametrize("paired", [False, True])
def test_a_permutation_interval_ends_where_the_test_begins_to_refute(paired: bool) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=7), rng.normal(1, 2, size=7)
    found = stats.compare(a, b, paired=paired, test="permutation")
    kind = "samples" if paired else "independent"
    for end, outwards in ((found.low, -1e-6), (found.high, 1e-6)):
        assert _permutation_p(a, b - (end - outwards), kind) > 0.05
        assert _permutation_p(a, b - (end + outwards), kind) <= 0.05


def test_sampled_permutations_come_close_to_the_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=8), rng.normal(0.9, size=8)
    for paired in (False, True):
        exact = stats.compare(a, b, paired=paired, test="permutation")
        with monkeypatch.context() as patch:
            patch.setattr(stats, "EXACT", 100)
            for cached in (stats._subsets, stats._swaps):
                cached.cache_clear()
            drawn = stats.compare(a, b, paired=paired, test="permutation")
        for cached in (stats._subsets, stats._swaps):
            cached.cache_clear()
        assert drawn.p == pytest.approx(exact.p, rel=0.1) and drawn.p != exact.p
        assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.1)
        assert 0 < drawn.least_p <= exact.least_p * 1.5


def test_three_against_three_cannot_show_anything_by_permutation() -> None:
    found = stats.compare([0.0, 0.1, 0.2], [10.0, 10.1, 10.2], test="permutation")
    assert found.p == found.least_p == pytest.approx(0.1)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert stats.compare([0.0, 0.1, 0.2], [10.0, 10.1, 10.2]).p < 1e-6


def test_without_a_spread_permutations_judge() -> None:
    equal = stats.compare([0.5] * 3, [0.6] * 3)  # a t test would be sure: its error is 0
    assert (equal.test, equal.p, equal.effect) == ("permutations", 0.1, None)
    constant = stats.compare([0.1, 0.2, 0.3], [0.3, 0.4, 0.5], paired=True)  # but for rounding
    assert (constant.test, constant.p) == ("permutations of pairs", 0.25)
    single = stats.compare([0.5], [0.7])
    assert (single.p, single.low, single.high) == (1, -math.inf, math.inf)
    same = stats.compare([0.5] * 6, [0.5] * 6)
    assert (same.p, same.low, same.high) == (1, 0, 0)


def test_effect_sizes_by_hand() -> None:
    g = stats.compare([1, 2, 3], [3, 4, 5]).effect
    j = 1 / (math.sqrt(2) * math.sqrt(math.pi) / 2)  # Γ(2) / (√2 Γ(3/2)), of 4 degrees of freedom
    assert g == pytest.approx(2 * j)  # means 2 apart, pooled sd 1
    assert stats.compare([1, 2, 3], [2, 4, 6], paired=True).effect == pytest.approx(2.0)


# Cohen 1988, table 2.4.1: n of each for power 0.80 at two-sided alpha 0.05
COHEN = {0.2: 393, 0.3: 175, 0.4: 99, 0.5: 64, 0.6: 45, 0.7: 33, 0.8: 26, 1.0: 17, 1.2: 12, 1.4: 9}


@pytest.mark.parametrize(("effect", "n"), COHEN.items())
def test_runs_needed_are_those_of_cohens_table(effect: float, n: int) -> None:
    found = stats.runs_needed(effect, paired=False)
    assert found is not None and n <= found <= n + 1  # it rounds to the nearest, we up
    assert stats.power(effect, found, paired=False) >= 0.8
    assert stats.power(effect, found - 1, paired=False) < 0.8


def test_power_and_its_inverse() -> None:
    assert stats.power(0.5, 64, paired=False) == pytest.approx(0.8015, abs=5e-5)
    for effect, n in ((0.3, 4), (1.0, 2), (2.0, 3), (0.2, 100)):
        limit, shift = theirs.t.ppf(0.995, n - 1), effect * math.sqrt(n)
        expected = theirs.nct.cdf(-limit, n - 1, shift) + theirs.nct.sf(limit, n - 1, shift)
        assert stats.power(effect, n, paired=True, alpha=0.01) == pytest.approx(expected, abs=1e-4)
    assert stats.power(1e4, 300, paired=True, alpha=1e-6) == 1  # where nct.cdf is NaN
    assert stats.runs_needed(0.5, paired=True) == 34  # as for one sample
    assert stats.runs_needed(0.0, paired=True) is None
    assert stats.runs_needed(0.2, paired=False, most=100) is None
    assert stats.noticeable(math.sqrt(2 / 64), 126) == pytest.approx(0.499, abs=1e-3)
    # of 2 degrees of freedom an sd is below s times the true one with chance 1 - exp(-s²)
    limit, shift = theirs.t.ppf(0.995, 2), stats.noticeable(1.0, 2, alpha=0.01)
    drawn = np.random.default_rng(0).normal(shift, size=100_000) / limit
    assert np.mean(1 - np.exp(-(drawn**2))) == pytest.approx(0.8, abs=1e-3)
    rng = np.random.default_rng(1)  # ten pairs, of which the differences' mean is 1 sd
    found = [stats.compare(np.zeros(10), rng.normal(1, size=10), paired=True) for _ in range(1000)]
    rate = np.mean([c.p <= 0.05 for c in found])
    assert rate == pytest.approx(stats.power(1.0, 10, paired=True), abs=0.04)


def test_corrections() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]) == []
    ps = np.random.default_rng(0).uniform(size=9) ** 3
    expected = theirs.false_discovery_control(ps)
    assert stats.benjamini_hochberg(ps) == pytest.approx(expected)
    everyone = itertools.permutations([0.001, 0.02, 0.02, 0.5])
    assert all(sorted(stats.holm(p)) == pytest.approx([0.004, 0.06, 0.06, 0.5]) for p in everyone)


@pytest.mark.parametrize(
    ("n", "paired", "test", "least"),
    [(3, False, "t", 0.03), (5, True, "t", 0.035), (5, False, "permutation", 0.03)],
)
def test_without_a_difference_one_in_twenty_is_found(
    n: int, paired: bool, test: stats.Test, least: float
) -> None:
    rng, trials = np.random.default_rng(n), 1500
    found = [
        stats.compare(rng.normal(size=n), rng.normal(size=n), paired=paired, test=test)
        for _ in range(trials)
    ]
    rate = np.mean([c.p <= 0.05 for c in found])
    assert least < rate < 0.067  # Welch's of three is a little on the safe side, exact ones too
    for c in found:
        assert (c.p <= 0.05) == (not c.low <= 0 <= c.high)
