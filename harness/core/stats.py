"""Intervals, paired comparisons and corrections for many comparisons: the arithmetic behind every number in a report.

Plain Python where exactness is cheap (sums by `math.fsum`, binomial tails in integers), so that a result does not
depend on the order of its inputs or on the machine. numpy and scipy are imported inside the functions that need them:
planning and `--help` import this module and must start at once.

Nothing here imputes. An unscored sample is None (or NaN in a matrix), is left out of every mean and is counted.
A NaN or an infinity among scores is a bug of the caller and raises ValueError.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

NOTE_FEW_SEEDS = "training noise not estimated"
MIN_SEEDS = 3
# Cells (draws x samples) held at once by a bootstrap: about 12 bytes each for index and gathered value.
CHUNK_CELLS = 1_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval `[low, high]`, in the unit of the score; `level` is a fraction such as 0.95."""

    low: float
    high: float
    level: float
    method: str


@dataclass(frozen=True, slots=True)
class Summary:
    """One score over `n` scored samples; `n_unscored` more had none. What cannot be known is None."""

    n: int
    n_unscored: int
    mean: float | None
    stderr: float | None
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`a` against `b` on the `n` samples scored in both. `difference` and `interval` are of mean_a - mean_b.

    `wins` counts samples with a > b, `losses` a < b, `ties` a == b: raw order, so for a score where lower is better a
    win is the worse outcome. `n_dropped` counts ids that are missing or unscored on either side. `at` gives the
    interval at another level, from the same draws.
    """

    n: int
    n_dropped: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    interval: Interval | None
    p_value: float | None
    test: Literal["mcnemar_exact", "paired_bootstrap", "none"]
    wins: int
    losses: int
    ties: int
    at: Callable[[float], Interval | None] = field(default=lambda level: None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class CrossedSummary:
    """One score over seeds x samples. `p_value` is for a mean of 0, so it means something only for differences.

    `n_seeds` and `n_samples` count rows and columns with any score; `n_unscored` counts cells without one, those of
    dropped rows and columns included. `note` says what the interval leaves out, or is None.
    """

    n_seeds: int
    n_samples: int
    n_unscored: int
    mean: float | None
    stderr: float | None
    interval: Interval | None
    p_value: float | None
    note: str | None


def is_binary(values: Iterable[float | None]) -> bool:
    """Whether every scored value is exactly 0 or 1 and there is at least one."""
    scored = [value for value in values if value is not None]
    return bool(scored) and all(value in (0, 1) for value in scored)


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Score interval for a proportion: Wilson 1927; Newcombe 1998, Statistics in Medicine 17:857, method 3.

    No continuity correction. Raises ValueError unless 0 <= successes <= n, n >= 1 and 0 < level < 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = _normal_quantile(level)
    centre, scale = 2 * successes + z * z, 2 * (n + z * z)
    half = z * math.sqrt(z * z + 4 * successes * (1 - successes / n))
    # At the edges the formula gives 0 and 1 only up to rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(low, high, level, "wilson")


def summarise(
    values: Sequence[float | None], *, kind: Literal["mean", "proportion"] = "mean", level: float = 0.95
) -> Summary:
    """Mean, standard error and interval of one score; None values are counted as unscored and left out.

    The standard error is sd(ddof=1) / sqrt(n) for both kinds, as lm-eval computes it (`mean_stderr`); None for n < 2.
    The interval is Student's t on n - 1 degrees of freedom for "mean" (None for n < 2, of zero width when all values
    are equal) and Wilson's for "proportion" (any n >= 1, never of zero width).
    Raises ValueError for a non-finite value, and for "proportion" when a value is neither 0 nor 1.
    """
    _normal_quantile(level)  # rejects a bad level even where no interval is computed
    scored = _finite(value for value in values if value is not None)
    n = len(scored)
    n_unscored = len(values) - n
    if kind == "proportion" and n and not is_binary(scored):
        raise ValueError('summarise: kind="proportion" needs values that are all 0 or 1')
    if n == 0:
        return Summary(0, n_unscored, None, None, None)
    mean = _mean(scored)
    stderr = _stderr(scored, mean) if n > 1 else None
    interval: Interval | None = None
    if kind == "proportion":
        interval = wilson(round(math.fsum(scored)), n, level=level)
    elif stderr is not None:
        half = _t_quantile(level, n - 1) * stderr
        interval = Interval(mean - half, mean + half, level, "t")
    return Summary(n, n_unscored, mean, stderr, interval)


def mcnemar_exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar p-value from the two counts of discordant pairs; 1.0 when there are none.

    min(1, 2 * P(X <= min(wins, losses))), X ~ Binomial(wins + losses, 1/2): Fagerland, Lydersen and Laake 2013, BMC
    Medical Research Methodology 13:91, "exact conditional test". Not the mid-p variant. Summed in integers: exact.
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"mcnemar_exact: counts must not be negative, got {wins} and {losses}")
    discordant = wins + losses
    term = tail = 1
    for k in range(min(wins, losses)):
        term = term * (discordant - k) // (k + 1)  # C(discordant, k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**discordant)


def newcombe_paired(both: int, only_a: int, only_b: int, neither: int, *, level: float = 0.95) -> Interval:
    """Interval for p_a - p_b from paired 0/1 outcomes: square-and-add of two Wilson intervals.

    Newcombe 1998, Statistics in Medicine 17:2635, method 10 (phi corrected for continuity when positive). The interval
    and the exact McNemar test are different procedures and can disagree about 0 when the evidence is borderline.
    Raises ValueError for a negative count or an empty table.
    """
    n = both + only_a + only_b + neither
    if min(both, only_a, only_b, neither) < 0 or n == 0:
        raise ValueError("newcombe_paired: needs four counts, none negative and not all 0")
    ones_a, ones_b = both + only_a, both + only_b
    margins = ones_a * (n - ones_a) * ones_b * (n - ones_b)
    cross = both * neither - only_a * only_b
    corrected = max(cross - n / 2, 0.0) if cross > 0 else float(cross)
    phi = corrected / math.sqrt(margins) if margins else 0.0
    p_a, p_b = ones_a / n, ones_b / n
    wilson_a, wilson_b = wilson(ones_a, n, level=level), wilson(ones_b, n, level=level)

    def reach(x: float, y: float) -> float:
        # |phi| <= 1 makes the radicand a square of a distance; rounding alone could push it below 0.
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    difference = (only_a - only_b) / n
    low = difference - reach(p_a - wilson_a.low, wilson_b.high - p_b)
    high = difference + reach(wilson_a.high - p_a, p_b - wilson_b.low)
    return Interval(max(-1.0, low), min(1.0, high), level, "newcombe_paired")


def compare_paired(
    a: Mapping[str, float | None],
    b: Mapping[str, float | None],
    *,
    seed: int,
    draws: int = 10_000,
    level: float = 0.95,
) -> Comparison:
    """Compare two score sets, sample id -> score, on the ids scored in both; the rest is dropped and counted.

    When all paired values are 0 or 1: exact McNemar test and Newcombe's paired interval; `seed` and `draws` are unused.
    Otherwise a paired bootstrap of the differences d (length n): percentile interval (Efron and Tibshirani 1993,
    section 13.3), and p = (1 + #{|mean*(d) - mean(d)| >= |mean(d)|}) / (draws + 1), the two-sided test on differences
    centred to obey the null (ibid., section 16.4; the added 1: Davison and Hinkley 1997, eq. 4.11). As a bootstrap
    of a handful of pairs claims too much, p is kept at or above 2 ** (1 - m), m being the pairs with d != 0: the
    smallest p that the exact sign-flip test could give.
    With n = 0 nothing is known (test "none"); one pair of a non-binary score gives no interval and no p-value.
    The result depends on the ids and values only, not on the order in which they were inserted.
    Raises ValueError for a non-finite score, draws < 1 or a level outside (0, 1).
    """
    _check(draws, level)
    ids = sorted(key for key in a.keys() & b.keys() if a[key] is not None and b[key] is not None)
    n, n_dropped = len(ids), len(a.keys() | b.keys()) - len(ids)
    if n == 0:
        return Comparison(0, n_dropped, None, None, None, None, None, "none", 0, 0, 0)
    left = _finite(value for key in ids if (value := a[key]) is not None)
    right = _finite(value for key in ids if (value := b[key]) is not None)
    pairs = list(zip(left, right, strict=True))
    wins = sum(x > y for x, y in pairs)
    losses = sum(x < y for x, y in pairs)
    ties = n - wins - losses
    difference = _mean([x - y for x, y in pairs])
    at: Callable[[float], Interval | None]
    p_value: float | None
    test: Literal["mcnemar_exact", "paired_bootstrap"]
    if is_binary(left) and is_binary(right):
        both = sum(x == 1 and y == 1 for x, y in pairs)
        at = partial(_newcombe_at, (both, wins, losses, ties - both))
        p_value, test = mcnemar_exact(wins, losses), "mcnemar_exact"
    else:
        test = "paired_bootstrap"
        at, p_value = _bootstrap_differences([x - y for x, y in pairs], seed=seed, draws=draws)
    means = _mean(left), _mean(right)
    return Comparison(n, n_dropped, *means, difference, at(level), p_value, test, wins, losses, ties, at)


def crossed_bootstrap(values: NDArray[Any], *, seed: int, draws: int = 10_000, level: float = 0.95) -> CrossedSummary:
    """Mean of a seeds x samples matrix (NaN = unscored) with the noise of training and of sampling in its interval.

    The pigeonhole bootstrap of Owen 2007, Annals of Applied Statistics 1(2):386, section 3: rows and columns are
    resampled independently, a cell weighs the product of its row's and column's counts, and the statistic is the ratio
    of weighted sums over the scored cells. Percentile interval; stderr is the sd (ddof=1) of the draws; p tests a mean
    of 0 on centred draws as in `compare_paired`: give it differences, arm minus base.
    With fewer than three seeds that have any score only samples are resampled and `note` says so. With fewer than two
    samples there is no interval.

    Caution: a bootstrap cannot see tails that a few rows do not show. Where training noise dominates, three seeds give
    at best the range of the three seed means, which covers 1 - 2 / 2**3 = 75 %, five about 81 %, ten 90 %. So that no
    arm is called better on that ground, p is never below that of Student's t test on the seed means.

    Draws depend on the order of rows and columns: sort ids first. Raises ValueError unless `values` is
    two-dimensional, for an infinite cell, fewer than two useful draws or a level outside (0, 1).
    """
    import numpy as np

    _check(draws, level)
    cells: Floats = np.asarray(values, dtype=np.float64)
    if cells.ndim != 2 or np.isinf(cells).any():
        raise ValueError(f"crossed_bootstrap: need finite or NaN cells, seeds x samples, got shape {cells.shape}")
    scored = ~np.isnan(cells)
    n_unscored = int(cells.size - scored.sum())
    cells = cells[scored.any(axis=1)][:, scored.any(axis=0)]
    n_seeds, n_samples = cells.shape
    few = n_seeds < MIN_SEEDS
    note = NOTE_FEW_SEEDS if few else None
    mean = _mean(cells[~np.isnan(cells)].tolist()) if cells.size else None
    if mean is None or n_samples < 2:
        return CrossedSummary(n_seeds, n_samples, n_unscored, mean, None, None, None, note)
    statistics = _crossed_draws(cells, seed=seed, draws=draws, resample_seeds=not few)
    if len(statistics) < 2:
        raise ValueError("crossed_bootstrap: fewer than two draws met a scored cell; raise draws")
    method = "sample_bootstrap" if few else "crossed_bootstrap"
    stderr = float(np.std(statistics, ddof=1))
    p_value = _centred_p(statistics, mean, float(np.nanmax(np.abs(cells))))
    if not few:
        p_value = max(p_value, _t_test([_mean(row[~np.isnan(row)].tolist()) for row in cells]))
    interval = _percentile(statistics, level, method)
    return CrossedSummary(n_seeds, n_samples, n_unscored, mean, stderr, interval, p_value, note)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Step-down adjusted p-values in the order given: Holm 1979, Scandinavian Journal of Statistics 6:65.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) * p_(j)). None stays None and is not counted
    in m. Raises ValueError for a value outside [0, 1].
    """
    known = [(p, position) for position, p in enumerate(p_values) if p is not None]
    if not all(0.0 <= p <= 1.0 for p, _ in known):
        raise ValueError("holm: every p-value must lie in [0, 1]")
    adjusted: list[float | None] = [None] * len(p_values)
    running = 0.0
    for step, (p, position) in enumerate(sorted(known)):
        running = max(running, min(1.0, (len(known) - step) * p))
        adjusted[position] = running
    return adjusted


def holm_levels(p_values: Sequence[float | None], *, alpha: float = 0.05) -> list[float | None]:
    """Levels of intervals that go with :func:`holm`, in the order given: 1 - alpha / k, where k are tested at its step.

    The procedure stops at the first p-value that it does not reject, and those after it share its k. So as far as test
    and interval agree at all, an interval at this level leaves 0 out exactly where the adjusted p-value is below alpha;
    those of what is not rejected hold simultaneously (Strassburger and Bretz 2008, Statistics in Medicine 27:4914).
    Equal p-values have one level. None stays None.
    """
    known = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    levels: list[float | None] = [None] * len(p_values)
    left, last, stopped = len(known), -1.0, False
    for step, (p, position) in enumerate(known):
        if not stopped and p != last:
            left = len(known) - step
            stopped = left * p >= alpha
        levels[position], last = 1 - alpha / left, p
    return levels


def rank_by_significance(better: Sequence[Sequence[bool]]) -> list[int]:
    """Rank of each arm: 1 + the number of arms significantly better than it. Arms may share a rank.

    `better` is arms x arms and `better[i][j]` says that arm i is significantly better than arm j.
    Raises ValueError if it is not square, or if two arms (or one arm and itself) are each better than the other.
    """
    size = len(better)
    if any(len(row) != size for row in better):
        raise ValueError("rank_by_significance: need a square matrix, arms x arms")
    for i, j in itertools.combinations_with_replacement(range(size), 2):
        if better[i][j] and better[j][i]:
            raise ValueError(f"rank_by_significance: arms {i} and {j} cannot each be better than the other")
    return [1 + sum(bool(better[i][j]) for i in range(size)) for j in range(size)]


def cohen_kappa(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[float | None, float]:
    """(kappa, observed agreement) of two raters over the same items: Cohen 1960, eq. 1, (p_o - p_e) / (1 - p_e).

    kappa is None when p_e = 1: both raters gave one and the same label throughout, and chance explains it all.
    Raises ValueError for sequences that are empty or of unequal length.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"cohen_kappa: need two label sequences of one length, not empty; got {len(a)} and {len(b)}")
    n = len(a)
    agreed = sum(x == y for x, y in zip(a, b, strict=True))
    count_a, count_b = Counter(a), Counter(b)
    chance = sum(count * count_b[label] for label, count in count_a.items())  # p_e * n**2, exact
    kappa = None if chance == n * n else (n * agreed - chance) / (n * n - chance)
    return kappa, agreed / n


def _check(draws: int, level: float) -> None:
    _normal_quantile(level)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")


def _normal_quantile(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def _t_quantile(level: float, degrees: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2))


def _t_test(values: Sequence[float]) -> float:
    """Two-sided p-value of Student's test of a mean of 0."""
    from scipy.special import stdtr

    mean = _mean(values)
    stderr = _stderr(values, mean)
    if stderr == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return float(2 * stdtr(len(values) - 1, -abs(mean) / stderr))


def _finite(values: Iterable[float]) -> list[float]:
    result = [float(value) for value in values]
    if not all(map(math.isfinite, result)):
        raise ValueError("scores must be finite; an unscored sample is None")
    return result


def _mean(values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    # The rounded quotient may leave [low, high] by an ulp, which would give equal values a spread.
    return min(max(math.fsum(values) / len(values), low), high)


def _stderr(values: Sequence[float], mean: float) -> float:
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _newcombe_at(counts: tuple[int, int, int, int], level: float) -> Interval:
    return newcombe_paired(*counts, level=level)


def _bootstrap_differences(
    differences: Sequence[float], *, seed: int, draws: int
) -> tuple[Callable[[float], Interval | None], float | None]:
    """The interval by level, and the p-value."""
    import numpy as np

    n = len(differences)
    if n < 2:
        return lambda level: None, None
    values: Floats = np.asarray(differences, dtype=np.float64)
    means: Floats = np.empty(draws)
    for rows, index in _indices(np.random.Generator(np.random.PCG64(seed)), draws, n):
        means[rows] = values[index].mean(axis=1)
    p_value = _centred_p(means, _mean(differences), float(np.abs(values).max()))
    floor = min(1.0, 2.0 ** (1 - int(np.count_nonzero(values))))
    return partial(_percentile, means, method="paired_bootstrap"), max(p_value, floor)


def _crossed_draws(cells: Floats, *, seed: int, draws: int, resample_seeds: bool) -> Floats:
    """The statistic of each draw; draws that met no scored cell are left out, having no value."""
    import numpy as np

    n_seeds, n_samples = cells.shape
    generator = np.random.Generator(np.random.PCG64(seed))
    weights: Floats = np.ones((draws, n_seeds))
    if resample_seeds:
        chosen = generator.integers(0, n_seeds, size=(draws, n_seeds), dtype=np.int32)
        weights = (chosen[:, :, None] == np.arange(n_seeds)).sum(axis=1).astype(np.float64)
    scored = ~np.isnan(cells)
    filled = np.where(scored, cells, 0.0)
    complete = bool(scored.all())
    sums: Floats = np.empty(draws)
    counts: Floats = np.full(draws, float(n_seeds * n_samples))
    for rows, index in _indices(generator, draws, n_samples):
        index += np.arange(len(index), dtype=np.int32)[:, None] * n_samples  # into the flattened draws x samples
        sums[rows] = _weighted(weights[rows], filled).ravel()[index].sum(axis=1)
        if not complete:
            counts[rows] = _weighted(weights[rows], scored.astype(np.float64)).ravel()[index].sum(axis=1)
    met = counts > 0
    return np.asarray(sums[met] / counts[met])


def _weighted(weights: Floats, cells: Floats) -> Floats:
    """weights (draws x seeds) times cells (seeds x samples), added seed by seed: BLAS may round by thread count."""
    total = weights[:, :1] * cells[0]
    for row in range(1, len(cells)):
        total += weights[:, row, None] * cells[row]
    return total


def _indices(generator: np.random.Generator, draws: int, n: int) -> Iterator[tuple[slice, NDArray[np.int32]]]:
    """Sample indices of all draws, a bounded number of rows at a time; the chunk size does not change the stream."""
    import numpy as np

    step = max(1, CHUNK_CELLS // n)
    for start in range(0, draws, step):
        rows = slice(start, min(start + step, draws))
        yield rows, generator.integers(0, n, size=(rows.stop - start, n), dtype=np.int32)


def _centred_p(statistics: Floats, observed: float, scale: float) -> float:
    # Scores with few distinct values tie often; rounding must not decide whether a tie counts as extreme.
    slack = 1e-12 * scale
    extreme = int((abs(statistics - observed) >= abs(observed) - slack).sum())
    return (1 + extreme) / (len(statistics) + 1)


def _percentile(statistics: Floats, level: float, method: str) -> Interval:
    import numpy as np

    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, method)
