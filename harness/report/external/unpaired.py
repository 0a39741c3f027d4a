"""Two means without their samples: what little can be said of their difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from harness.core.records import Row
from harness.core.stats import Interval

TEST = "unpaired_normal"


def unpaired(a: Row, b: Row) -> tuple[float, float, Callable[[float], Interval | None]] | str:
    """B minus A, its p-value, and its interval by level, from two means and standard errors; or why there is none.

    The samples of both are taken for independent. On the same questions they mostly agree, so that a paired test
    would have found more; that it would have found less is rare.
    """
    for name, row in (("A", a), ("B", b)):
        if row.mean is None or row.stderr is None:
            return f"no samples in A or B to pair, and no standard error of run {name} to test the means by"
        if row.stderr == 0.0:
            return f"no samples in A or B to pair, and run {name}'s standard error of 0 says nothing of its noise"
    if a.mean is None or b.mean is None or a.stderr is None or b.stderr is None:
        raise AssertionError("checked above")
    difference, stderr = b.mean - a.mean, math.hypot(a.stderr, b.stderr)

    def at(level: float) -> Interval:
        half = NormalDist().inv_cdf((1 + level) / 2) * stderr
        return Interval(difference - half, difference + half, level, TEST)

    return difference, math.erfc(abs(difference) / stderr / math.sqrt(2)), at
