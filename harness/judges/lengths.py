"""How long both outputs of judged pairs are, and the win rate among pairs that are alike in length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.stats import WinShare, share_at_equal_length, share_at_matched_length
from harness.report.external.annotations import JudgedPair


@dataclass(frozen=True)
class WinsByLength:
    """Lengths (characters) of scored pairs, and win rates (proportions) that length has no part in."""

    n: int
    """Pairs that have both outputs and a verdict."""
    length: float | None
    """Mean of the model's outputs."""
    reference_length: float | None
    matched: WinShare
    """Of the pairs whose lengths differ by 10 % of the longer, or less."""
    fitted: WinShare
    """Of a logistic regression on the difference of length, where it is 0."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        found = {"n": self.n, "length": self.length, "reference_length": self.reference_length}
        return {**found, "matched": _plain(self.matched), "fitted": _plain(self.fitted)}

    def lines(self) -> tuple[str, ...]:
        """One sentence for each."""
        if self.length is None or self.reference_length is None:
            return ()
        lengths = f"{self.length:,.1f} characters of the answers and {self.reference_length:,.1f} of the reference's"
        return (
            f"mean length of {self.n:,} scored pairs: {lengths}",
            f"win rate within 10 % of length: {_said(self.matched, of=True)}",
            f"win rate at equal length, by a logistic regression: {_said(self.fitted)}",
        )


def wins_by_length(pairs: Sequence[JudgedPair], *, seed: int = 0) -> WinsByLength:
    """Of the pairs with two outputs and a verdict; ``seed`` is that of the bootstrap."""
    scored = [
        (pair.preference - 1, (float(len(pair.output_2)), float(len(pair.output_1))))
        for pair in pairs
        if pair.preference is not None and pair.output_1 is not None and pair.output_2 is not None
    ]
    outcomes, lengths = [one for one, _ in scored], [pair for _, pair in scored]
    return WinsByLength(
        len(scored),
        math.fsum(own for own, _ in lengths) / len(scored) if scored else None,
        math.fsum(other for _, other in lengths) / len(scored) if scored else None,
        share_at_matched_length(outcomes, lengths),
        share_at_equal_length(outcomes, lengths, seed=seed),
    )


def _plain(one: WinShare) -> dict[str, Any]:
    ends = None if one.interval is None else [one.interval.low, one.interval.high]
    return {"n": one.n, "share": one.share, "ci95": ends, "withheld": one.withheld}


def _said(one: WinShare, *, of: bool = False) -> str:
    if one.share is None or one.interval is None:
        return f"withheld: {one.withheld}"
    more = f", {one.n:,} pairs" if of else ""
    return f"{one.share:.1%} [{one.interval.low:.1%}, {one.interval.high:.1%}]{more}"
