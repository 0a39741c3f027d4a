"""The weighted mean of whole weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

import harness
from harness import Config, Factors, Merged, Merger, UserError
from harness_plugins.mergers.arithmetic import combine, concatenated
from harness_plugins.mergers.spherical import TOLERANCE

if TYPE_CHECKING:
    import torch


class Linear(Merger["Linear.Config"]):
    """``sum(w_i x_i) / sum(w_i)``: model soups (arXiv 2203.05482, section 2), weighted.

    peft's ``combination_type="linear"`` is another operation: it adds the A and the B of adapters apart, so that
    cross terms ``B_i A_j`` come in (peft #3004). Here an adapter counts as the weights that it makes of its base.
    """

    name = "linear"
    summary = "weighted mean of the models"

    class Config(harness.Config):
        """Options of linear."""

        normalize: bool = Field(True, description="divide by the sum of the weights")

    def settle(self, weights: Sequence[float] | None, count: int, config: Config) -> tuple[tuple[float, ...], Any]:
        """Weights of 1/n where none are given; of any sign, but not of a sum of 0 to divide by."""
        given = tuple(weights) if weights is not None else (1 / count,) * count
        if config.normalize and math.fsum(given) == 0:
            raise UserError("weights", "the weights sum to 0", "Give others, or `normalize: false`.")
        return given, config

    def merge(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        base: torch.Tensor | None,
        weights: Sequence[float],
        config: Config,
        generator: Callable[[int], torch.Generator],
    ) -> Merged:
        """The weighted mean of the tensors."""
        return Merged(combine(tensors, self._coefficients(weights, config)))

    def keeps_equal(self, weights: Sequence[float], config: Config) -> bool:
        """Whether equal tensors stay as they are: where the coefficients sum to 1."""
        return abs(math.fsum(self._coefficients(weights, config)) - 1) <= TOLERANCE

    def merge_factors(self, factors: Sequence[Factors], *, weights: Sequence[float], config: Config) -> Factors | None:
        """The merged delta in factors where the coefficients sum to 1: then the base comes out once; None elsewhere."""
        return concatenated(factors, self._coefficients(weights, config)) if self.keeps_equal(weights, config) else None

    def _coefficients(self, weights: Sequence[float], config: Config) -> list[float]:
        divisor = math.fsum(weights) if config.normalize else 1.0
        return [weight / divisor for weight in weights]
