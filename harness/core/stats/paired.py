"""Two runs on the same samples: paired tests and intervals.

Plain Python where exactness is cheap (sums by `math.fsum`, binomial tails in integers), so that a result does not
depend on the order of its inputs or on the machine. numpy is imported inside the functions that need it: planning
imports this module and must start at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from harness.core.stats.intervals import (
    Design,
    Interval,
    check_draws,
    finite,
    is_binary,
    mean_of,
    wilson,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Cells (draws x samples) held at once by a bootstrap: about 12 bytes each for index and gathered value.
CHUNK_CELLS = 1_000_000


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
    test: Literal["mcnemar_exact", "paired_bootstrap", "clustered_bootstrap", "none"]
    wins: int
    losses: int
    ties: int
    at: Callable[[float], Interval | None] = field(default=lambda level: None, compare=False, repr=False)


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
    clusters: Mapping[str, Hashable] | None = None,
    strata: Mapping[str, Hashable] | None = None,
) -> Comparison:
    """Compare two score sets, sample id -> score, on the ids scored in both; the rest is dropped and counted.

    When all paired values are 0 or 1: exact McNemar test and Newcombe's paired interval; `seed` and `draws` are unused.
    Otherwise a paired bootstrap of the differences d (length n): percentile interval (Efron and Tibshirani 1993,
    section 13.3), and p = (1 + #{|mean*(d) - mean(d)| >= |mean(d)|}) / (draws + 1), the two-sided test on differences
    centred to obey the null (ibid., section 16.4; the added 1: Davison and Hinkley 1997, eq. 4.11). As a bootstrap
    of a handful of pairs claims too much, p is kept at or above 2 ** (1 - m), m being the pairs with d != 0: the
    smallest p that the exact sign-flip test could give.
    With n = 0 nothing is known (test "none"); one pair of a non-binary score gives no interval and no p-value.
    ``clusters`` and ``strata`` (sample id -> label; an id without one is its own cluster) say how samples hang
    together, see :class:`Design`: where samples share a cluster the test is a bootstrap of whole clusters, for 0/1
    scores too, as McNemar's takes every pair for independent; a bootstrap draws within strata. McNemar's needs none:
    it holds whatever the strata.
    The result depends on the ids and values only, not on the order in which they were inserted.
    Raises ValueError for a non-finite score, draws < 1 or a level outside (0, 1).
    """
    check_draws(draws, level)
    ids = sorted(key for key in a.keys() & b.keys() if a[key] is not None and b[key] is not None)
    n, n_dropped = len(ids), len(a.keys() | b.keys()) - len(ids)
    if n == 0:
        return Comparison(0, n_dropped, None, None, None, None, None, "none", 0, 0, 0)
    left = finite(value for key in ids if (value := a[key]) is not None)
    right = finite(value for key in ids if (value := b[key]) is not None)
    pairs = list(zip(left, right, strict=True))
    wins = sum(x > y for x, y in pairs)
    losses = sum(x < y for x, y in pairs)
    ties = n - wins - losses
    difference = mean_of([x - y for x, y in pairs])
    at: Callable[[float], Interval | None]
    p_value: float | None
    test: Literal["mcnemar_exact", "paired_bootstrap", "clustered_bootstrap"]
    design = _design(ids, clusters, strata)
    clustered = design is not None and design.clustered
    if is_binary(left) and is_binary(right) and not clustered:
        both = sum(x == 1 and y == 1 for x, y in pairs)
        at = partial(_newcombe_at, (both, wins, losses, ties - both))
        p_value, test = mcnemar_exact(wins, losses), "mcnemar_exact"
    else:
        test = "clustered_bootstrap" if clustered else "paired_bootstrap"
        at, p_value = _bootstrap_differences([x - y for x, y in pairs], design, test, seed=seed, draws=draws)
    means = mean_of(left), mean_of(right)
    return Comparison(n, n_dropped, *means, difference, at(level), p_value, test, wins, losses, ties, at)


def _newcombe_at(counts: tuple[int, int, int, int], level: float) -> Interval:
    return newcombe_paired(*counts, level=level)


def _design(
    ids: Sequence[str], clusters: Mapping[str, Hashable] | None, strata: Mapping[str, Hashable] | None
) -> Design | None:
    """None where every sample stands for itself."""
    if not clusters and not strata:
        return None
    # A cluster is never taken for the sample of the same name.
    of = [("cluster", clusters[key]) if clusters and key in clusters else ("sample", key) for key in ids]
    return Design(of, [strata.get(key) for key in ids] if strata else None, len(ids))


def _bootstrap_differences(
    differences: Sequence[float], design: Design | None, method: str, *, seed: int, draws: int
) -> tuple[Callable[[float], Interval | None], float | None]:
    """The interval by level, and the p-value."""
    import numpy as np

    n = len(differences)
    if n < 2 or (design is not None and design.degrees < 1):
        return lambda level: None, None
    values: Floats = np.asarray(differences, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    effective = n
    if design is None or (not design.clustered and len(design.in_stratum) < 2):
        means: Floats = np.empty(draws)
        for rows, index in _indices(generator, draws, n):
            means[rows] = values[index].mean(axis=1)
        nonzero = int(np.count_nonzero(values))
    else:
        totals: Floats = np.bincount(design.cluster, weights=values).astype(np.float64)
        means = _resampled(totals, design, generator, draws)
        nonzero, effective = int(np.count_nonzero(totals)), len(totals)
    p_value = _centred_p(means, mean_of(differences), float(np.abs(values).max()))
    floor = min(1.0, 2.0 ** (1 - min(nonzero, effective)))
    return partial(_percentile, means, method=method), max(p_value, floor)


def _resampled(totals: Floats, design: Design, generator: np.random.Generator, draws: int) -> Floats:
    """Means of draws of whole clusters within each stratum: totals over sizes, both as drawn.

    Of m clusters m - 1 are drawn, and count m / (m - 1) times: drawing m would lose a share 1/m of the variance, a
    quarter with four (Rao and Wu 1988, Journal of the American Statistical Association 83:231).
    """
    import numpy as np

    sums: Floats = np.zeros(draws)
    counts: Floats = np.zeros(draws)
    for stratum in range(len(design.in_stratum)):
        inside = design.stratum == stratum
        some, sizes = totals[inside], design.sizes[inside].astype(np.float64)
        drawn = max(1, len(some) - 1)
        for rows, index in _indices(generator, draws, len(some), drawn):
            sums[rows] += some[index].sum(axis=1) * (len(some) / drawn)
            counts[rows] += sizes[index].sum(axis=1) * (len(some) / drawn)
    return np.asarray(sums / counts)


def _indices(
    generator: np.random.Generator, draws: int, n: int, drawn: int | None = None
) -> Iterator[tuple[slice, NDArray[np.int32]]]:
    """Sample indices of all draws, a bounded number of rows at a time; the chunk size does not change the stream."""
    import numpy as np

    step = max(1, CHUNK_CELLS // n)
    for start in range(0, draws, step):
        rows = slice(start, min(start + step, draws))
        yield rows, generator.integers(0, n, size=(rows.stop - start, drawn or n), dtype=np.int32)


def _centred_p(statistics: Floats, observed: float, scale: float) -> float:
    # Scores with few distinct values tie often; rounding must not decide whether a tie counts as extreme.
    slack = 1e-12 * scale
    extreme = int((abs(statistics - observed) >= abs(observed) - slack).sum())
    return (1 + extreme) / (len(statistics) + 1)


def _percentile(statistics: Floats, level: float, method: str) -> Interval:
    import numpy as np

    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, method)
