"""The mean on a whole set, of an arm that was asked a drawn part of it, by way of its base, which was asked all.

The difference estimator (Cochran 1977, Sampling Techniques, 3rd ed., section 7.9 with a slope of one, stratified as in
sections 5.3 and 5.4): mean of the base on the whole set, plus the difference of arm and base on the part, each stratum
weighing as in the whole. Arm and base agree on most samples, so that it is much closer than the mean of the part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.core.stats.crossed import Seeds
from harness.core.stats.intervals import Interval, t_quantile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimated:
    """The mean of an arm on `n_whole` samples, of which it was asked `n`; `plain` is its mean on these alone."""

    mean: float
    stderr: float
    degrees: float
    interval: Interval
    n: int
    n_whole: int
    plain: float


def estimated_mean(
    arm: Seeds,
    base: Floats,
    strata: Sequence[Hashable],
    whole: Floats,
    whole_strata: Sequence[Hashable],
    *,
    level: float = 0.95,
    range_of: tuple[float, float] | None = None,
) -> Estimated | None:
    """Estimate an arm's mean on the whole set; None where a stratum is not in the part, or a score is missing.

    The variance has three parts. That of the differences over the draw, W_h^2 (1 - n_h / N_h) s_h^2 / n_h summed over
    strata h, with the finite-population correction, as the part was drawn from this very whole; that of the whole,
    s^2 / N of the arm's scores, as questions like these could have been others: so the interval means what all others
    of a board do; and that of training, from three seeds on. Scores of 0 and 1 (of one range) have their differences'
    variance raised by that of one pair that was won and one that was lost, half each (Agresti and Min 2005, Statistics
    in Medicine 24:729): arms that agree on every sample of the part need not agree on all of the whole.

    Args:
        arm: seeds x samples of the part.
        base: the base's scores of the part.
        strata: stratum of each sample of the part.
        whole: the base's scores of the whole set, the part included.
        whole_strata: stratum of each of these.
        level: of the interval.
        range_of: smallest and largest score, where all others are impossible: the interval is cut there.
    """
    import numpy as np

    sizes, taken = Counter(whole_strata), Counter(strata)
    scores = arm.means
    if set(sizes) != set(taken) or any(taken[one] > sizes[one] for one in taken):
        return None
    if np.isnan(scores).any() or np.isnan(base).any() or np.isnan(whole).any() or len(scores) < 2:
        return None
    count, n = len(whole), len(scores)
    names = list(sizes)
    at = {one: np.array([other == one for other in strata]) for one in names}
    share = {one: sizes[one] / count for one in names}
    apart = scores - base
    mean = float(whole.mean()) + math.fsum(share[one] * float(apart[at[one]].mean()) for one in names)
    spread, own = (_within(values, at) for values in (apart, scores))
    if range_of is not None and set(np.unique(arm.cells)) <= set(range_of):
        spread = {one: value + (range_of[1] - range_of[0]) ** 2 / (n + 2) for one, value in spread.items()}
    drawn = math.fsum(share[one] ** 2 * (1 - taken[one] / sizes[one]) * spread[one] / taken[one] for one in names)
    drawn_degrees = max(1, n - len(names))
    inherent = math.fsum(share[one] * own[one] for one in names) / count
    training, training_degrees = arm.training
    variance = drawn + inherent + training
    parts = [(drawn + inherent, drawn_degrees), (training, training_degrees)]
    below = math.fsum(part * part / degrees for part, degrees in parts if part > 0 and degrees > 0)
    degrees = variance * variance / below if below > 0 else float(drawn_degrees)
    half = t_quantile(level, degrees) * math.sqrt(variance)
    low, high = mean - half, mean + half
    if range_of is not None:
        mean, low, high = (min(max(one, range_of[0]), range_of[1]) for one in (mean, low, high))
    interval = Interval(low, high, level, "difference_estimator")
    return Estimated(mean, math.sqrt(variance), degrees, interval, n, count, float(scores.mean()))


def _within(values: Floats, at: Mapping[Hashable, NDArray[np.bool_]]) -> dict[Hashable, float]:
    """Variance within each stratum; of one with a single sample that of all pooled (or, of such alone, of all)."""
    several = {one: values[mask] for one, mask in at.items() if mask.sum() > 1}
    if several:
        squares = math.fsum(float(((one - one.mean()) ** 2).sum()) for one in several.values())
        pooled = squares / sum(len(one) - 1 for one in several.values())
    else:
        pooled = float(values.var(ddof=1))
    return {one: float(several[one].var(ddof=1)) if one in several else pooled for one in at}
