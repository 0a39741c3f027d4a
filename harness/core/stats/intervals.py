"""Intervals of one score: Wilson's, Student's t, and those of samples that come in clusters and strata.

Nothing here imputes. An unscored sample is None (or NaN in an array), is left out of every mean and is counted.
A NaN or an infinity among scores is a bug of the caller and raises ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


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


def is_binary(values: Iterable[float | None]) -> bool:
    """Whether every scored value is exactly 0 or 1 and there is at least one."""
    scored = [value for value in values if value is not None]
    return bool(scored) and all(value in (0, 1) for value in scored)


def wilson(successes: float, n: int, *, level: float = 0.95) -> Interval:
    """Score interval for a proportion: Wilson 1927; Newcombe 1998, Statistics in Medicine 17:857, method 3.

    No continuity correction. A tie may be half a success: then it is wider than it need be.
    Raises ValueError unless 0 <= successes <= n, n >= 1 and 0 < level < 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"wilson: need 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = normal_quantile(level)
    centre, scale = 2 * successes + z * z, 2 * (n + z * z)
    half = z * math.sqrt(z * z + 4 * successes * (1 - successes / n))
    # At the edges the formula gives 0 and 1 only up to rounding.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return Interval(low, high, level, "wilson")


def summarise(
    values: Sequence[float | None],
    *,
    kind: Literal["mean", "proportion"] = "mean",
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Summary:
    """Mean, standard error and interval of one score; None values are counted as unscored and left out.

    The standard error is sd(ddof=1) / sqrt(n) for both kinds, as lm-eval computes it (`mean_stderr`); None for n < 2.
    The interval is Student's t on n - 1 degrees of freedom for "mean" (None for n < 2, of zero width when all values
    are equal) and Wilson's for "proportion" (any n >= 1, never of zero width).
    With ``clusters``, one for each value, the standard error is that of cluster totals (:class:`Design`), and a
    proportion has Wilson's interval at its effective size (:func:`wilson_effective`).
    Raises ValueError for a non-finite value, and for "proportion" when a value is neither 0 nor 1.
    """
    normal_quantile(level)  # rejects a bad level even where no interval is computed
    scored = finite(value for value in values if value is not None)
    n = len(scored)
    n_unscored = len(values) - n
    if kind == "proportion" and n and not is_binary(scored):
        raise ValueError('summarise: kind="proportion" needs values that are all 0 or 1')
    if n == 0:
        return Summary(0, n_unscored, None, None, None)
    mean = mean_of(scored)
    if clusters is not None:
        kept = [cluster for cluster, value in zip(clusters, values, strict=True) if value is not None]
        return _clustered(scored, n_unscored, kept, kind, level)
    stderr = stderr_of(scored, mean) if n > 1 else None
    interval: Interval | None = None
    if kind == "proportion":
        interval = wilson(round(math.fsum(scored)), n, level=level)
    elif stderr is not None:
        half = t_quantile(level, n - 1) * stderr
        interval = Interval(mean - half, mean + half, level, "t")
    return Summary(n, n_unscored, mean, stderr, interval)


def wilson_effective(share: float, size: float, degrees: float, *, level: float = 0.95) -> Interval:
    """Wilson's interval of a share whose ``size`` is effective: that of a simple sample with the same variance.

    The quantile is Student's, on the degrees of freedom of that variance: Korn and Graubard 1998, Survey Methodology
    24:193, who put the effective size in place of n; compared and recommended for Wilson's by Dean and Pagano 2015,
    Journal of Survey Statistics and Methodology 3:484.
    Raises ValueError unless 0 <= share <= 1 and ``size`` and ``degrees`` are positive.
    """
    if not 0.0 <= share <= 1.0 or size <= 0.0 or degrees <= 0.0:
        raise ValueError(f"wilson_effective: no share {share} of effective size {size} on {degrees} degrees of freedom")
    z = t_quantile(level, degrees)
    centre, scale = 2 * share * size + z * z, 2 * (size + z * z)
    half = z * math.sqrt(z * z + 4 * share * size * (1 - share))
    low = 0.0 if share == 0.0 else max(0.0, (centre - half) / scale)
    high = 1.0 if share == 1.0 else min(1.0, (centre + half) / scale)
    return Interval(low, high, level, "wilson_effective")


class Design:
    """How samples hang together: clusters, whose members are not independent, within strata, which are all there are.

    Several answers to one prompt, or one question under several templates, are a cluster. Subjects of MMLU are strata:
    another sample would have other questions of the same subjects, so what sets subjects apart is no sampling noise.
    A stratum of one cluster says nothing of its own noise and is pooled with the other such. A cluster that lies in
    several strata makes one of them all: then there are none.
    """

    def __init__(self, clusters: Sequence[Hashable] | None, strata: Sequence[Hashable] | None, n: int) -> None:
        """One cluster and one stratum for each of ``n`` samples; None: each its own cluster, one stratum."""
        import numpy as np

        self.n = n
        self.clustered = clusters is not None and len(set(clusters)) < n
        _, members = _numbered(clusters if clusters is not None and self.clustered else range(n))
        self.cluster: NDArray[np.intp] = members
        size = int(members.max()) + 1 if n else 0
        first = np.full(size, -1, dtype=np.intp)
        spread = strata is None
        if strata is not None:
            _, of_sample = _numbered(strata)
            first[members] = of_sample
            spread = bool((first[members] != of_sample).any())
        self.stratum: NDArray[np.intp] = np.zeros(size, dtype=np.intp) if spread else _pooled(first)
        self.sizes: NDArray[np.intp] = np.bincount(members, minlength=size)
        self.in_stratum: NDArray[np.intp] = np.bincount(self.stratum)

    @property
    def degrees(self) -> int:
        """Degrees of freedom of a variance: clusters less strata."""
        return int((self.in_stratum - 1).sum())

    def kept(self, mask: NDArray[np.bool_]) -> Design:
        """The design of those samples alone."""
        import numpy as np

        if bool(mask.all()):
            return self
        where = np.flatnonzero(mask)
        return Design(self.cluster[where].tolist(), self.stratum[self.cluster[where]].tolist(), len(where))

    def variance(self, values: Floats) -> float:
        """Variance of the mean of ``values``, one for each sample, by cluster totals of its linear form.

        With every sample its own cluster and one stratum this is s^2 / n. In general, z being (value - mean) / n and
        t its total over a cluster: the sum over strata h of m_h / (m_h - 1) times the squares of t less its mean in h
        (Cochran 1977, Sampling Techniques, 3rd ed., sections 5.3 and 9A; Miller 2024, arXiv 2411.00640, eq. 4, without
        the factor). Strata are taken as they fell, not as allotted. NaN where there is no degree of freedom.
        """
        import numpy as np

        if self.degrees < 1:
            return math.nan
        z = (values - values.mean()) / self.n
        totals = np.bincount(self.cluster, weights=z, minlength=len(self.sizes))
        means = np.bincount(self.stratum, weights=totals) / self.in_stratum
        squares = np.bincount(self.stratum, weights=(totals - means[self.stratum]) ** 2)
        several = self.in_stratum > 1
        return float((squares[several] * (self.in_stratum[several] / (self.in_stratum[several] - 1))).sum())


def _numbered(labels: Iterable[Hashable]) -> tuple[list[Hashable], NDArray[np.intp]]:
    """The distinct labels in the order in which they come, and the number of each."""
    import numpy as np

    known: dict[Hashable, int] = {}
    numbers = [known.setdefault(label, len(known)) for label in labels]
    return list(known), np.asarray(numbers, dtype=np.intp)


def _pooled(strata: NDArray[np.intp]) -> NDArray[np.intp]:
    """Strata of clusters, numbered; those of one cluster are pooled, with the smallest other where there is but one."""
    import numpy as np

    counts = np.bincount(strata)
    single = counts == 1
    if single.sum() == 1 and (counts > 1).any():
        single |= np.arange(len(counts)) == int(np.where(counts > 1, counts, counts.max() + 1).argmin())
    merged = np.where(single[strata], len(counts), strata)
    return np.asarray(_numbered(merged.tolist())[1])


def _clustered(
    scored: Sequence[float],
    n_unscored: int,
    clusters: Sequence[Hashable],
    kind: Literal["mean", "proportion"],
    level: float,
) -> Summary:
    import numpy as np

    n, mean = len(scored), mean_of(scored)
    design = Design(clusters, None, n)
    variance = design.variance(np.asarray(scored, dtype=np.float64))
    if not math.isfinite(variance):
        return Summary(n, n_unscored, mean, None, None)
    stderr = math.sqrt(variance)
    if kind == "proportion":
        # Where all are alike their spread says nothing: a cluster then counts as one sample.
        size = mean * (1 - mean) / variance if variance > 0.0 else float(len(design.sizes))
        return Summary(n, n_unscored, mean, stderr, wilson_effective(mean, size, design.degrees, level=level))
    half = t_quantile(level, design.degrees) * stderr
    return Summary(n, n_unscored, mean, stderr, Interval(mean - half, mean + half, level, "clustered_t"))


def check_draws(draws: int, level: float) -> None:
    """Refuse a number of draws or a level that is none."""
    normal_quantile(level)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")


def normal_quantile(level: float) -> float:
    """The normal quantile that bounds the middle ``level``."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def t_quantile(level: float, degrees: float) -> float:
    """Student's quantile that bounds the middle ``level``."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2))


def finite(values: Iterable[float]) -> list[float]:
    """The scores as floats; a NaN or an infinity raises ValueError."""
    result = [float(value) for value in values]
    if not all(map(math.isfinite, result)):
        raise ValueError("scores must be finite; an unscored sample is None")
    return result


def mean_of(values: Sequence[float]) -> float:
    """The mean, exactly summed."""
    low, high = min(values), max(values)
    # The rounded quotient may leave [low, high] by an ulp, which would give equal values a spread.
    return min(max(math.fsum(values) / len(values), low), high)


def stderr_of(values: Sequence[float], mean: float) -> float:
    """The standard error of a mean: sd(ddof=1) / sqrt(n)."""
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
