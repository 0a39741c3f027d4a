"""Figures of a judge's verdicts: agreement, and leanings to a place or to length.

Shares have Wilson intervals; means Student's t; kappa, correlations and slopes percentile bootstraps over pairs
(Efron & Tibshirani 1993, ch. 13). A verdict is what is preferred: the model's output, the reference's, or neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.records import digest_of
from harness.core.stats import cohen_kappa, summarise, wilson

DRAWS = 2000
"""Bootstrap draws of an interval."""

STEEPEST = 30.0
"""A logistic slope beyond this has no finite maximum: length separates the verdicts."""


@dataclass(frozen=True)
class Figure:
    """One number over ``n`` pairs (or models), with its 95 % interval; None where it is not defined."""

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}


@dataclass
class Seen:
    """One pair with a published verdict and the judge's preferences (0 to 1) for the model's output.

    ``drawn`` is in the order that was drawn, ``again`` the same question asked anew.
    """

    model: str
    published: float
    longer: float
    """Characters that the model's output has more than the reference's."""
    drawn: float | None = None
    again: float | None = None
    reference_first: float | None = None
    answer_first: float | None = None


def figures(seen: Sequence[Seen]) -> dict[str, Figure]:
    """Every figure that these pairs allow."""
    judged = [(one.published, one.drawn, one) for one in seen if one.drawn is not None]
    both = [
        (one.reference_first, one.answer_first)
        for one in seen
        if one.reference_first is not None and one.answer_first is not None
    ]
    twice = [(one.drawn, one.again) for one in seen if one.drawn is not None and one.again is not None]
    decided = [(a, b) for a, b in both if 0.5 not in (a, b)]
    # The first place holds the reference's output in one order, the model's in the other.
    first = [((1 - a) + b) / 2 for a, b in both]
    theirs = [verdict(a) for a, _, _ in judged]
    ours = [verdict(b) for _, b, _ in judged]
    return {
        "agreement": share([a == b for a, b in zip(theirs, ours, strict=True)]),
        "kappa": bootstrapped(list(zip(theirs, ours, strict=True)), kappa),
        "preference_correlation": bootstrapped([(a, b) for a, b, _ in judged], correlation),
        "position_flips": share([verdict(a) != verdict(b) for a, b in decided]),
        "first_preferred": _mean(first),
        "longer_preferred": _mean([b if one.longer > 0 else 1 - b for _, b, one in judged if one.longer]),
        "longer_preferred_published": _mean([a if one.longer > 0 else 1 - a for a, _, one in judged if one.longer]),
        "length_slope": bootstrapped(_standardised([(one.longer, b) for _, b, one in judged]), slope),
        "length_slope_published": bootstrapped(_standardised([(one.longer, a) for a, _, one in judged]), slope),
        "repeat_agreement": share([verdict(a) == verdict(b) for a, b in twice]),
        "repeat_difference": _mean([abs(a - b) for a, b in twice]),
        "win_rate_correlation": _of_models(seen),
    }


def verdict(preference: float) -> str:
    """What is preferred."""
    return "draw" if preference == 0.5 else "model" if preference > 0.5 else "reference"


def by_model(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """Win rates (proportion) by published verdicts and by the judge, on the pairs that both scored."""
    found = []
    for model in dict.fromkeys(one.model for one in seen):
        pairs = [(one.published, one.drawn) for one in seen if one.model == model and one.drawn is not None]
        difference = _mean([b - a for a, b in pairs])
        published, judge = _mean([a for a, _ in pairs]), _mean([b for _, b in pairs])
        found.append(
            {
                "model": model,
                "published_win_rate": published.to_json(),
                "judge_win_rate": judge.to_json(),
                "difference": difference.to_json(),
            }
        )
    return found


def _of_models(seen: Sequence[Seen]) -> Figure:
    """Pearson correlation of win rates over models; Fisher's z interval from four models on."""
    rates = [(one["published_win_rate"]["value"], one["judge_win_rate"]["value"]) for one in by_model(seen)]
    known = [(a, b) for a, b in rates if a is not None and b is not None]
    value = correlation(known) if len(known) > 2 else None
    if value is None or len(known) < 4 or abs(value) >= 1:
        return Figure(value, len(known))
    half = 1.959963984540054 / math.sqrt(len(known) - 3)
    return Figure(value, len(known), math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half))


def share(hits: Sequence[bool]) -> Figure:
    """A share and its Wilson interval."""
    if not hits:
        return Figure(None, 0)
    interval = wilson(sum(hits), len(hits))
    return Figure(sum(hits) / len(hits), len(hits), interval.low, interval.high)


def _mean(values: Sequence[float]) -> Figure:
    summary = summarise(list(values))
    interval = summary.interval
    return Figure(summary.mean, summary.n, interval.low if interval else None, interval.high if interval else None)


def bootstrapped(pairs: Sequence[tuple[Any, Any]], statistic: Callable[[Sequence[Any]], float | None]) -> Figure:
    """A statistic of pairs and its percentile interval; draws in which it is not defined are left out."""
    value = statistic(pairs) if len(pairs) > 1 else None
    if value is None:
        return Figure(None, len(pairs))
    import numpy as np

    generator = np.random.default_rng(int(digest_of([statistic.__name__, len(pairs)])[:8], 16))
    drawn = [statistic([pairs[i] for i in generator.integers(0, len(pairs), len(pairs))]) for _ in range(DRAWS)]
    defined = [one for one in drawn if one is not None]
    # With draws that have no finite value the tail is unknown.
    if len(defined) < 0.975 * DRAWS:
        return Figure(value, len(pairs))
    low, high = np.quantile(defined, [0.025, 0.975])
    return Figure(value, len(pairs), float(low), float(high))


def kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """Cohen's kappa of two raters' labels; None where one label explains it all."""
    return cohen_kappa([a for a, _ in pairs], [b for _, b in pairs])[0]


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's r; None where one side does not vary."""
    import numpy as np

    a, b = np.asarray(pairs, dtype=float).T
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 1e-12 else None


def _standardised(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Differences of length in units of their root mean square: 0 stays equal length."""
    scale = math.sqrt(math.fsum(length * length for length, _ in pairs) / len(pairs)) if pairs else 0.0
    return [(length / scale, preference) for length, preference in pairs] if scale else []


def slope(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Logistic slope of the preference on the difference of length, with an intercept (Newton's method).

    In log-odds per root mean square of the differences. None where the maximum is not finite.
    """
    import numpy as np

    lengths, preferences = np.asarray(pairs, dtype=float).T
    level = steepness = 0.0
    for _ in range(50):
        shares = 1 / (1 + np.exp(-np.clip(level + steepness * lengths, -STEEPEST, STEEPEST)))
        weights, off = shares * (1 - shares), preferences - shares
        # The two by two Hessian, solved by hand.
        a, b, c = float(weights.sum()), float(weights @ lengths), float(weights @ (lengths * lengths))
        g, h = float(off.sum()), float(off @ lengths)
        determinant = a * c - b * b
        if determinant <= 1e-12 * max(a * c, 1e-12):
            return None
        step = ((c * g - b * h) / determinant, (a * h - b * g) / determinant)
        level, steepness = level + step[0], steepness + step[1]
        if max(abs(level), abs(steepness)) > STEEPEST:
            return None
        if max(map(abs, step)) < 1e-10:
            return steepness
    return None
