"""The smallest true difference that a comparison of this many samples would have shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

POWER = 0.8
"""Share of repetitions in which a difference of that size would have been found."""


def smallest_detectable(differences: Sequence[float], *, exact: bool, level: float) -> float | None:
    """Two quantiles' sum in standard errors: Bloom 1995, Evaluation Review 19:547, eq. 2. In the metric's unit.

    None where that is more than any difference between proportions: so few samples show nothing.

    Args:
        differences: B minus A of every pair.
        exact: whether McNemar's test is taken. Its few discordant pairs understate the noise, so two are added to the
            table (Agresti and Min 2005, Statistics in Medicine 24:729), and fewer pairs than it can reject do not do.
        level: of the interval that goes with the test, 1 - alpha; after Holm, with the alpha of its step.
    """
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    squares = math.fsum(one * one for one in differences)
    fewest = 0.0
    if exact:
        size = n + 2
        stderr = math.sqrt(max(0.0, (squares + 2) / size - (mean * n / size) ** 2) / size)
        fewest = math.ceil(math.log2(2 / (1 - level))) / n
    else:
        stderr = math.sqrt(math.fsum((one - mean) ** 2 for one in differences) / (n - 1) / n)
        if stderr == 0.0:
            return None  # pairs that all differ by the same say nothing of their noise
    normal = NormalDist()
    found = max((normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(POWER)) * stderr, fewest)
    return None if exact and found > 1 else found
