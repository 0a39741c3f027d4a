"""How often one answer is preferred to another, as it stands and at equal length.

An outcome is 1 for a win, 0 for a loss and 1/2 for a tie, or a judge's preference between them. Where longer answers
are preferred, a win rate says how long the answers are; so it stands beside two that do not: of the pairs whose lengths
are alike, and what a regression on the difference of length gives where that is 0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.core.stats.intervals import Design, Interval, finite, mean_of, wilson, wilson_effective

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

LEAST_PAIRS = 50
"""Least number of pairs for a win rate at equal length."""
LEAST_OF_EACH = 10
"""Least number of wins and of losses in a fit, of pairs on either side of equal length, and of clusters."""
WITHIN = 0.1
"""Most that lengths differ which count as alike, as a share of the longer one."""
DRAWS = 1_000
"""Bootstrap draws of a fit."""
_STEPS, _FURTHEST = 60, 30.0
_CELLS = 500_000


@dataclass(frozen=True, slots=True)
class WinShare:
    """Share of ``n`` pairs that were won, a tie being half a win; or why it is withheld."""

    n: int
    share: float | None = None
    interval: Interval | None = None
    withheld: str | None = None


def outcome(own: float, other: float, *, higher_is_better: bool = True) -> float:
    """1 where ``own`` is the better score, 0 where ``other`` is, 1/2 where they are equal; both are finite."""
    own, other = finite((own, other))
    return 0.5 if own == other else float((own > other) is higher_is_better)


def win_share(
    outcomes: Sequence[float], *, clusters: Sequence[Hashable] | None = None, level: float = 0.95
) -> WinShare:
    """The mean outcome with Wilson's interval.

    Where outcomes lie between 0 and 1 the interval is wider than it need be: their variance is below that of wins and
    losses with the same mean. With ``clusters``, one for each pair, it is Wilson's at the effective size
    (:func:`wilson_effective`), which is at most the number of pairs; None where there is but one cluster.
    Raises ValueError for an outcome outside 0 to 1.
    """
    values = finite(outcomes)
    if any(not 0.0 <= value <= 1.0 for value in values):
        raise ValueError("win_share: every outcome must lie in [0, 1]")
    n = len(values)
    if n == 0:
        return WinShare(0, withheld="no pair was scored")
    share = mean_of(values)
    design = Design(clusters, None, n)
    if not design.clustered:
        return WinShare(n, share, wilson(math.fsum(values), n, level=level))
    if design.degrees < 1:
        return WinShare(n, share)
    import numpy as np

    variance = design.variance(np.asarray(values, dtype=np.float64))
    spread = share * (1 - share)
    # Where all are alike their spread says nothing: a cluster then counts as one pair.
    size = min(spread / variance, float(n)) if variance > 0.0 else float(len(design.sizes))
    return WinShare(n, share, wilson_effective(share, size, design.degrees, level=level))


def alike(own: float, other: float) -> bool:
    """Whether two lengths differ by at most ``WITHIN`` of the longer; two empty answers are alike."""
    return abs(own - other) <= WITHIN * max(own, other)


def share_at_matched_length(
    outcomes: Sequence[float],
    lengths: Sequence[tuple[float, float]],
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> WinShare:
    """:func:`win_share` of the pairs whose lengths, (own, other), are :func:`alike`; withheld under ``LEAST_PAIRS``.

    Raises ValueError for a length that is negative or not finite.
    """
    _differences(lengths)
    kept = [place for place, pair in enumerate(lengths) if alike(*pair)]
    if len(kept) < LEAST_PAIRS:
        said = f"{len(kept)} of {len(lengths)} pairs have lengths within {WITHIN:.0%}, and {LEAST_PAIRS} are needed"
        return WinShare(len(kept), withheld=said)
    of = None if clusters is None else [clusters[place] for place in kept]
    return win_share([outcomes[place] for place in kept], clusters=of, level=level)


def share_at_equal_length(
    outcomes: Sequence[float],
    lengths: Sequence[tuple[float, float]],
    *,
    seed: int,
    clusters: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    level: float = 0.95,
) -> WinShare:
    """What logit p = a + b d gives where d = own - other length is 0, with a percentile bootstrap interval.

    d is in standard deviations of the differences. Where length alone tells won from lost b has no finite maximum, so
    it has a weak prior, log F(1, 1), which is half a win and half a loss at a + b d = b (Greenland and Mansournia 2015,
    Statistics in Medicine 34:3133). Of m clusters m - 1 are drawn, and weigh m / (m - 1).

    Withheld under ``LEAST_PAIRS`` pairs; where wins, losses, pairs with d <= 0 or d >= 0, or clusters, are fewer than
    ``LEAST_OF_EACH``; and where all lengths of a pair are equal, as the win rate is then at equal length already.
    Raises ValueError for a length that is negative or not finite.
    """
    import numpy as np

    y = np.asarray(finite(outcomes), dtype=np.float64)
    d = np.asarray(_differences(lengths), dtype=np.float64)
    n = len(y)
    _, cluster = np.unique([str(one) for one in clusters] if clusters is not None else range(n), return_inverse=True)
    if why := _unfit(y, d, int(cluster.max()) + 1 if n else 0):
        return WinShare(n, withheld=why)
    d /= d.std()
    start = _fit(y, d, np.ones((1, n)), np.zeros((1, 2)))
    m = int(cluster.max()) + 1
    generator = np.random.Generator(np.random.PCG64(seed))
    found = []
    for first in range(0, draws, step := max(1, _CELLS // n)):
        counts = generator.multinomial(m - 1, np.full(m, 1 / m), size=min(step, draws - first))
        weights: Floats = np.asarray(counts[:, cluster] * (m / (m - 1)), dtype=np.float64)
        found.append(_fit(y, d, weights, np.repeat(start, len(weights), axis=0))[:, 0])
    low, high = np.quantile(_sigmoid(np.concatenate(found)), [(1 - level) / 2, (1 + level) / 2])
    share = float(_sigmoid(start[:, 0])[0])
    return WinShare(n, share, Interval(float(low), float(high), level, "bootstrap"))


def _differences(lengths: Sequence[tuple[float, float]]) -> list[float]:
    flat = finite(length for pair in lengths for length in pair)
    if any(length < 0 for length in flat):
        raise ValueError("a length must not be negative")
    return [own - other for own, other in zip(flat[::2], flat[1::2], strict=True)]


def _unfit(y: Floats, d: Floats, clusters: int) -> str | None:
    """Why there is nothing to fit."""
    n, wins = len(y), float(y.sum())
    if n < LEAST_PAIRS:
        return f"{n} pairs, and a fit needs {LEAST_PAIRS}"
    if not d.any():
        return "both answers of every pair are of one length: the win rate is at equal length already"
    if min(wins, n - wins) < LEAST_OF_EACH:
        return f"{wins:g} wins in {n} pairs, and a fit needs {LEAST_OF_EACH} wins and as many losses"
    for word, count in (("longer", int((d <= 0).sum())), ("shorter", int((d >= 0).sum()))):
        if count < LEAST_OF_EACH:
            said = f"in all but {count} of {n} pairs the answer is the {word} one"
            return f"{said}: equal length lies outside of what was seen"
    if clusters < LEAST_OF_EACH:
        return f"the pairs hang together in {clusters} clusters, and a fit needs {LEAST_OF_EACH}"
    return None


def _fit(y: Floats, d: Floats, weights: Floats, start: Floats) -> Floats:
    """Intercept and slope of each row of weights, by Newton's method from ``start`` (draws x 2)."""
    import numpy as np

    theta = start.copy()
    for _ in range(_STEPS):
        p = _sigmoid(theta[:, :1] + theta[:, 1:] * d)
        rest, w = weights * (y - p), weights * p * (1 - p)
        prior = _sigmoid(theta[:, 1])
        score = np.stack([rest.sum(axis=1), rest @ d + 0.5 - prior], axis=1)
        a, b, c = w.sum(axis=1) + 1e-12, w @ d, w @ (d * d) + prior * (1 - prior)
        inverse = 1 / (a * c - b * b)
        moves = np.stack([c * score[:, 0] - b * score[:, 1], a * score[:, 1] - b * score[:, 0]], axis=1)
        # Where a draw holds no loss the intercept has no maximum; its limit is a share of 1.
        moves = np.clip(moves * inverse[:, None], -2.0, 2.0)
        theta = np.clip(theta + moves, -_FURTHEST, _FURTHEST)
        if np.abs(moves).max() < 1e-9:
            break
    return theta


def _sigmoid(x: Any) -> Floats:
    from scipy.special import expit

    found: Floats = expit(x)
    return found
