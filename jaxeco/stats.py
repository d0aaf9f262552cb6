"""What the numbers of several runs say: a mean and how sure it is, a difference and its odds.

Pure functions on numbers, one of each run; numpy and scipy, no JAX. docs/statistics.md says which
test serves when.

Sources: Welch 1947 (unequal variances); Efron 1987 (BCa) with levels that are widened as Hesterberg
2015 has it; Pitman 1937 and Hartigan 1969 (permutations, and the bounds that they give); Phipson
and Smyth 2010 (p-values of a sample of permutations); Hedges 1981 (g); Holm 1979; Benjamini and
Hochberg 1995.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Literal

import numpy as np

BOOTSTRAPPED = 10  # values, from which on an interval is the bootstrap's
RESAMPLES = 19_999
SEED = 0  # of all resampling: the same numbers give the same interval
EXACT = 200_000  # rearrangements; of more than that a sample is drawn
NOISE = 1e-12  # of the largest value: differences below that are rounding

Test = Literal["t", "permutation"]


@dataclass(frozen=True)
class Summary:
    """Some values in short.

    Attributes:
      sd: sample standard deviation, over n - 1; None of one value.
      low, high: an interval that holds the mean of all such values, in 95 % of cases; None where
        there is none: of one value, or of values that are not finite (their mean is NaN).
    """

    n: int
    mean: float
    sd: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{plus_minus(self.mean, self.sd)} (n = {self.n})"


@dataclass(frozen=True)
class Comparison:
    """How the values b differ from the values a.

    Attributes:
      n: how many values a and b have.
      difference: the mean of b less that of a.
      low, high: an interval of it at 1 - alpha, by the same test as p: it leaves out 0 just if
        p <= alpha. Infinite where the test has no bound to give.
      p: two-sided.
      test: what p and the interval come from.
      effect: the difference over the sd: Hedges' g, or d_z of pairs, over the sd of the pairs'
        differences. None where there is no spread.
      least_p: the smallest p that this test can give with so many values.
    """

    n: tuple[int, int]
    difference: float
    low: float
    high: float
    p: float
    test: str
    paired: bool
    effect: float | None
    least_p: float


def summary(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """n, mean, sd and an interval of the mean.

    Below 10 values the interval is Student's: a bootstrap's cannot reach beyond the least and the
    largest value, and of three there a symmetric distribution's mean lies in 75 % of cases only.
    From 10 on it is the bootstrap's (`_bca`).

    Raises:
      ValueError: no values.
    """
    x_N = np.asarray(values, np.float64)
    n = len(x_N)
    if n == 0:
        raise ValueError("no values: expected one at least")
    if not np.isfinite(x_N).all():
        return Summary(n, math.nan, math.nan if n > 1 else None)
    mean = float(x_N.mean())
    if n == 1:
        return Summary(1, mean, None)
    if not (sd := _sd(x_N)):
        return Summary(n, mean, 0.0, mean, mean)
    if n >= BOOTSTRAPPED:
        return Summary(n, mean, sd, *_bca(x_N, confidence))
    reach = _quantile(n - 1, confidence) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - reach, mean + reach)


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    paired: bool = False,
    alpha: float = 0.05,
    test: Test = "t",
) -> Comparison:
    """Whether b differs from a by more than chance.

    The test is Welch's t, or Student's of the pairs' differences. One value against several is held
    against their spread alone. Where there is no spread to go by (all values of a and of b are
    equal, or there is one of each) and on demand, it is a permutation test of the means; it assumes
    only that without a difference values could be exchanged, or a pair's signs, but with few values
    cannot come to a small p: not below 0.1 with three against three.

    Args:
      paired: a[i] and b[i] belong together, as of one seed.

    Raises:
      ValueError: no values, values that are not finite, or pairs that are none.
    """
    x_N, y_M = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not (len(x_N) and len(y_M) and np.isfinite(x_N).all() and np.isfinite(y_M).all()):
        raise ValueError(f"{a} and {b}: expected finite values, one of each at least")
    if paired and len(x_N) != len(y_M):
        raise ValueError(f"{len(x_N)} and {len(y_M)} values are no pairs")
    n, difference = (len(x_N), len(y_M)), float(y_M.mean() - x_N.mean())
    scale = float(max(abs(x_N).max(), abs(y_M).max()))
    error: tuple[float, float] | None
    if paired:
        sd = _sd(y_M - x_N, scale)
        error = (sd / math.sqrt(n[0]), n[0] - 1) if n[0] > 1 else None
        effect = difference / sd if sd else None
    else:
        short = [Summary(len(z), float(z.mean()), _sd(z, scale)) for z in (x_N, y_M)]
        error, effect = standard_error(*short), hedges_g(*short)
    if test == "t" and error and error[0]:
        name = "paired t" if paired else "Welch's t" if min(n) > 1 else "t of one run"
        p, low, high = t_test(difference, error[0], error[1], alpha)
        return Comparison(n, difference, low, high, p, name, paired, effect, 0.0)
    p, low, high, least = _permutations(x_N, y_M, paired, alpha, NOISE * scale)
    name = "permutations of pairs" if paired else "permutations"
    return Comparison(n, difference, low, high, p, name, paired, effect, least)


def standard_error(a: Summary, b: Summary) -> tuple[float, float] | None:
    """Of the difference of two means, with its degrees of freedom (Welch, Satterthwaite).

    Where only one of the two has an sd, the other's single value is taken to spread alike, which
    makes the interval of the difference a prediction interval. None if neither has one.
    """
    if a.n > 1 and b.n > 1 and a.sd is not None and b.sd is not None:
        u, v = a.sd**2 / a.n, b.sd**2 / b.n
        if u + v == 0:
            return 0.0, a.n + b.n - 2
        return math.sqrt(u + v), (u + v) ** 2 / (u**2 / (a.n - 1) + v**2 / (b.n - 1))
    several = a if a.n > 1 else b
    if several.n == 1 or several.sd is None:
        return None
    return several.sd * math.sqrt(1 / a.n + 1 / b.n), several.n - 1


def t_test(
    difference: float, error: float, df: float, alpha: float = 0.05
) -> tuple[float, float, float]:
    """Two-sided p of a difference with a standard error, and the ends of its interval."""
    from scipy import special

    if error == 0:
        return float(difference == 0), difference, difference
    reach = _quantile(df, 1 - alpha) * error
    p = 2 * special.stdtr(df, -abs(difference) / error)
    return float(p), difference - reach, difference + reach


def spread_p(a: Summary, b: Summary) -> float:
    """One-sided p of b spreading more than a, by Fisher's F; 1 where one of them has no sd."""
    from scipy import special

    if not a.sd or not b.sd:
        return float(not b.sd or a.sd is None)
    return float(special.fdtrc(b.n - 1, a.n - 1, (b.sd / a.sd) ** 2))


def hedges_g(a: Summary, b: Summary) -> float | None:
    """The difference of means over the pooled sd, freed of its bias; None without a spread."""
    from scipy import special

    df = a.n + b.n - 2
    squares = sum((s.n - 1) * s.sd**2 for s in (a, b) if s.sd is not None)
    if df < 2 or squares == 0:
        return None
    log_j = special.gammaln(df / 2) - special.gammaln((df - 1) / 2) - math.log(df / 2) / 2
    return float(math.exp(log_j) * (b.mean - a.mean) / math.sqrt(squares / df))


def power(effect: float, n: int, *, paired: bool, alpha: float = 0.05) -> float:
    """How often a t test finds a true effect (in units of the sd) with n values, or pairs, each."""
    df = n - 1 if paired else 2 * n - 2
    return _found(abs(effect) * math.sqrt(n if paired else n / 2), df, alpha)


def runs_needed(
    effect: float, *, paired: bool, alpha: float = 0.05, often: float = 0.8, most: int = 10_000
) -> int | None:
    """How many values each, or pairs, a t test needs to find an effect that often.

    None if that is more than `most`.
    """
    least, enough = 1, 2  # too few, and enough
    while power(effect, enough, paired=paired, alpha=alpha) < often:
        least, enough = enough, 2 * enough
        if least >= most:
            return None
    while enough - least > 1:
        middle = (least + enough) // 2
        if power(effect, middle, paired=paired, alpha=alpha) < often:
            least = middle
        else:
            enough = middle
    return enough if enough <= most else None


def noticeable(error: float, df: float, alpha: float = 0.05, often: float = 0.8) -> float:
    """The true difference that a t test with this standard error finds that often."""
    below, above = 0.0, 1.0
    while _found(above, df, alpha) < often:
        below, above = above, 2 * above
    while above - below > 1e-6 * above:
        middle = (below + above) / 2
        below, above = (middle, above) if _found(middle, df, alpha) < often else (below, middle)
    return above * error


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number: if each is held against alpha, the chance that any
    difference is found where there is none stays below alpha."""
    return _adjusted(ps, lambda p_M: np.maximum.accumulate(p_M * np.arange(len(p_M), 0, -1)))


def benjamini_hochberg(ps: Sequence[float]) -> list[float]:
    """p-values corrected so that, held against alpha, a share of alpha of what is found is false,
    on average; for independent tests."""

    def adjust(p_M: np.ndarray) -> np.ndarray:
        return np.minimum.accumulate((p_M * len(p_M) / np.arange(1, len(p_M) + 1))[::-1])[::-1]

    return _adjusted(ps, adjust)


def plus_minus(mean: float, sd: float | None, percent: bool = False) -> str:
    """0.9731 ± 0.0016, or 97.31 ± 0.16 %: two digits of the sd, and what is before them."""
    mean, sd = (mean * 100, sd and sd * 100) if percent else (mean, sd)
    if sd is None:
        said = f"{mean:.4g}"
    elif sd == 0 or not math.isfinite(sd):
        said = f"{mean:.4g} ± {sd:g}"
    else:
        said = f"{mean:.{decimals(sd)}f} ± {sd:.{decimals(sd)}f}"
    return said + " %" * percent


def decimals(spread: float) -> int:
    """How many a number is worth that is sure to about `spread`: two digits of that."""
    return max(0, 1 - math.floor(math.log10(float(f"{spread:.1e}"))))


def _sd(x_N: np.ndarray, scale: float | None = None) -> float:
    """0 where the values are equal but for rounding, of numbers as large as `scale`."""
    scale = float(abs(x_N).max()) if scale is None else scale
    return float(x_N.std(ddof=1)) if len(x_N) > 1 and np.ptp(x_N) > NOISE * scale else 0.0


def _quantile(df: float, confidence: float) -> float:
    """How many standard errors a two-sided interval of Student's t reaches."""
    from scipy import special

    return float(special.stdtrit(df, (1 + confidence) / 2))


def _found(shift: float, df: float, alpha: float) -> float:
    """The chance that |t| is significant, where t is shifted by so many standard errors.

    The tails of noncentral t, as the mean over the estimated sd's quantiles of what is normal given
    that sd: scipy's nctdtr is NaN where they are far away.
    """
    from scipy import special

    limit_Q = _limits(df, alpha)
    return float(np.mean(special.ndtr(shift - limit_Q) + special.ndtr(-shift - limit_Q)))


@lru_cache(maxsize=256)  # the same for all pairs of many settings, and slow
def _limits(df: float, alpha: float) -> np.ndarray:
    """From where on t is significant, in true standard errors, at the estimated sd's quantiles."""
    from scipy import special

    levels_Q = (np.arange(2000) + 0.5) / 2000
    return _quantile(df, 1 - alpha) * np.sqrt(special.gammaincinv(df / 2, levels_Q) * 2 / df)


def _bca(x_N: np.ndarray, confidence: float) -> tuple[float, float]:
    """Ends of the bootstrap's bias-corrected and accelerated interval of the mean.

    The bootstrap's means spread by sqrt((n - 1)/n) too little, and normal quantiles leave out that
    the sd is estimated, too. So a normal quantile is replaced by sqrt(n/(n - 1)) times Student's.
    """
    from scipy import special

    n, mean = len(x_N), x_N.mean()
    draws = np.random.default_rng(SEED).integers(n, size=(RESAMPLES, n))
    means_R = x_N[draws].mean(1)
    bias = special.ndtri((np.mean(means_R < mean) + np.mean(means_R <= mean)) / 2)
    away_N = x_N - mean  # proportional to what the mean loses where one value is left out
    acceleration = (away_N**3).sum() / (6 * (away_N**2).sum() ** 1.5)
    z = math.sqrt(n / (n - 1)) * _quantile(n - 1, confidence)
    ends = bias + np.array([-z, z])
    shrunk = np.maximum(1 - acceleration * ends, 1e-9)  # at 0 the end is the farthest mean
    low, high = np.quantile(means_R, special.ndtr(bias + ends / shrunk))
    return float(low), float(high)


def _permutations(
    x_N: np.ndarray, y_M: np.ndarray, paired: bool, alpha: float, noise: float
) -> tuple[float, float, float, float]:
    """p, the ends of the interval, and the least p possible, by rearranging values.

    If b were a shifted by d, exchanging some values of a for as many of b would make the difference
    of means at least as large as it is just if d is no less than the exchanged values' own
    difference. So the differences of exchanged values, sorted, say how many rearrangements are as
    extreme, for any d: at d = 0 that is p; and the d that are not refuted lie between two of them.
    The same holds of pairs whose two values are exchanged.
    """
    moved_R, same = _exchanged_pairs(y_M - x_N) if paired else _exchanged(x_N, y_M)
    moved_R = np.sort(moved_R)
    everything = len(moved_R) + same
    as_extreme = min(np.sum(moved_R <= noise), np.sum(moved_R >= -noise)) + same
    p = min(1.0, 2 * as_extreme / everything)
    least = min(1.0, 2 * same / everything)
    place = math.floor(alpha / 2 * everything + 1e-9) - same
    if place < 0 or not len(moved_R):
        return p, -math.inf, math.inf, least
    return p, float(moved_R[place]), float(moved_R[-1 - place]), least


def _exchanged_pairs(away_N: np.ndarray) -> tuple[np.ndarray, int]:
    """Mean differences of the pairs that are exchanged; how many arrangements exchange none."""
    chosen_RxN, same = _subsets(len(away_N))
    return chosen_RxN @ away_N / chosen_RxN.sum(1), same


def _exchanged(x_N: np.ndarray, y_M: np.ndarray) -> tuple[np.ndarray, int]:
    """What values exchanged between a and b differ by, on average; how many exchange none."""
    leave_RxN, join_RxM, same = _swaps(len(x_N), len(y_M))
    return (join_RxM @ y_M - leave_RxN @ x_N) / leave_RxN.sum(1), same


@lru_cache(maxsize=4)
def _subsets(n: int) -> tuple[np.ndarray, int]:
    """Every subset of n but the empty one, f64[R, n] of 0 and 1, or a sample; how many are empty.

    The arrangement that was observed counts as one of a sample.
    """
    if 2**n <= EXACT:
        return ((np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64), 1
    drawn = np.random.default_rng(SEED).integers(2, size=(RESAMPLES, n))
    return _moving(drawn, drawn)[0], 1 + int(np.sum(~drawn.any(1)))


@lru_cache(maxsize=4)
def _swaps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Who leaves a, f64[R, n], and who leaves b for it, f64[R, m]; how often nobody does."""
    if math.comb(n + m, n) <= EXACT:
        in_a = np.zeros((math.comb(n + m, n), n + m), bool)
        chosen = np.array(list(combinations(range(n + m), n)))
        np.put_along_axis(in_a, chosen, True, 1)
        same = 0  # it is among them
    else:
        in_a = np.random.default_rng(SEED).random((RESAMPLES, n + m)).argsort(1) < n
        same = 1
    leave, join = _moving(~in_a[:, :n], in_a[:, n:])
    return leave, join, same + len(in_a) - len(leave)


def _moving(leave: np.ndarray, join: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those rows in which something moves, as numbers."""
    moves_R = leave.any(1)
    return leave[moves_R].astype(np.float64), join[moves_R].astype(np.float64)


def _adjusted(ps: Sequence[float], adjust: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """`adjust` works on sorted p-values; they come back in their order, none above 1."""
    p_M = np.asarray(ps, np.float64)
    order = np.argsort(p_M, kind="stable")
    out_M = np.empty_like(p_M)
    out_M[order] = np.minimum(1.0, adjust(p_M[order]))
    return out_M.tolist()
