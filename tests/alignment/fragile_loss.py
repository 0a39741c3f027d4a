"""Methods that break in a chosen way: a loose plugin of the tests. Environment variables say when."""

from __future__ import annotations

import os
from typing import Any

from harness import hookimpl
from harness.alignment.pairwise import PairLogps, PairwiseLoss


class Nan(PairwiseLoss):
    """A plain loss until micro batch ``NAN_AT`` of training, counted from 1, which is not a number."""

    name = "nan"
    summary = "breaks"
    needs_reference = False

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Any) -> Any:
        """Mean log-ratio of the two answers."""
        self.calls += policy.chosen.requires_grad
        factor = float("nan") if self.calls == int(os.environ["NAN_AT"]) else 1.0
        return factor * (policy.rejected - policy.chosen) / 100


class Hungry(Nan):
    """Has memory for ``ROWS_THAT_FIT`` rows in training (from ``HUNGRY_FROM`` on), ``HELD_THAT_FIT`` in evaluation."""

    name = "hungry"

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Any) -> Any:
        """As above."""
        import torch

        training = policy.chosen.requires_grad
        self.calls += training
        fits = int(os.environ.get("ROWS_THAT_FIT" if training else "HELD_THAT_FIT", "1000"))
        if len(policy.chosen) > fits and (self.calls >= int(os.environ.get("HUNGRY_FROM", "0")) or not training):
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {len(policy.chosen)} rows.\nMore text."
            )
        return (policy.rejected - policy.chosen) / 100


class Odd(Nan):
    """Returns what is no loss per pair; ``ODD`` says what."""

    name = "odd"

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Any) -> Any:
        """As above."""
        margin = policy.rejected - policy.chosen
        if os.environ["ODD"] == "seven":
            return margin.sum().repeat(7)
        if os.environ["ODD"] == "square":
            return margin[:, None] - margin
        if os.environ["ODD"] == "detached":
            return margin.detach()
        assert reference is not None
        return margin


@hookimpl
def register_aligners() -> list[PairwiseLoss]:
    """All."""
    return [Nan(), Hungry(), Odd()]
