"""Mergers of differences from a base: task_arithmetic, ties, dare_linear, dare_ties.

peft's ``add_weighted_adapter`` has methods of these names. With "linear", "ties", "dare_linear" and "dare_ties" it
works on the A and the B of the adapters apart, each times the root of weight and scale, so that cross terms
``B_i A_j`` come in (peft #3004). Its "..._svd" kinds form whole deltas, but elect signs on the deltas before they are
weighted and divide by the number of those that agree, not by the sum of their weights. Here deltas are formed whole
and weighted first, as in mergekit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from harness import Config, Factors, Merged, Merger
from harness_plugins.mergers.arithmetic import (
    absolute_sum,
    blocks,
    combine,
    concatenated,
    largest_mask,
    random_mask,
    weighted,
)

if TYPE_CHECKING:
    import torch

NO_NORM = 1e-7
"""mergekit rescales no delta whose sum of magnitudes is below this, before or after."""
NO_WEIGHT = 1e-8
"""mergekit divides by no sum of weights below this."""
Density = Annotated[float, Field(ge=0, le=1)]


class DeltaConfig(Config):
    """What all mergers of deltas take."""

    normalize: bool = Field(False, description="divide by the sum of the weights")
    scale: float = Field(1.0, description="factor on the merged delta (no unit); mergekit's `lambda`")


D = TypeVar("D", bound=DeltaConfig)


class DeltaMerger(Merger[D]):
    """Sparsify each delta, weigh it, agree on signs perhaps, add up."""

    operates_on: ClassVar[Literal["weights", "deltas"]] = "deltas"
    elects: ClassVar[bool] = False
    """Whether only those deltas count, entry by entry, whose sign is that of the weighted sum."""

    def settle(self, weights: Sequence[float] | None, count: int, config: D) -> tuple[tuple[float, ...], Any]:
        """Weights of 1/n where none are given; a negative one subtracts: negation (arXiv 2212.04089, section 3)."""
        return (tuple(weights) if weights is not None else (1 / count,) * count), config

    def merge(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        base: torch.Tensor | None,
        weights: Sequence[float],
        config: D,
        generator: Callable[[int], torch.Generator],
    ) -> Merged:
        """The merged delta."""
        masks, factors = [], []
        for index, delta in enumerate(tensors):
            mask = self.mask(delta, index, config, generator)
            masks.append(mask)
            factors.append(rescaled(delta, mask, config, self.density(index, config)))
        stats = {}
        if "density" in type(config).model_fields and tensors[0].numel():
            kept = sum(
                delta.numel() if m is None else int(m.count_nonzero()) for delta, m in zip(tensors, masks, strict=True)
            )
            stats["kept_density"] = kept / (len(tensors) * tensors[0].numel())
        scaled = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        if self.elects:
            merged, conflict = elected(tensors, scaled, weights, masks, config)
            return Merged(merged, {**stats, "sign_conflict": conflict})
        outer = config.scale / _divisor(weights, config)
        return Merged(combine(tensors, [c * outer for c in scaled], masks), stats)

    def mask(self, delta: torch.Tensor, index: int, config: D, generator: Any) -> torch.Tensor | None:
        """The entries of one delta that count, flattened; None: all."""
        return None

    def density(self, index: int, config: D) -> float:
        """The density of one model."""
        value = getattr(config, "density", 1.0)
        return float(value[index] if isinstance(value, tuple) else value)

    def keeps_equal(self, weights: Sequence[float], config: D) -> bool:
        """Whether equal tensors stay as they are: no difference stays none, whatever the weights."""
        return True

    def merge_factors(self, factors: Sequence[Factors], *, weights: Sequence[float], config: D) -> Factors | None:
        """The merged delta in factors: exact where nothing is dropped and no sign is elected; None elsewhere."""
        whole = all(self.density(index, config) >= 1 for index in range(len(factors)))
        if self.elects or not whole:
            return None
        outer = config.scale / _divisor(weights, config)
        return concatenated(factors, [weight * outer for weight in weights])


def _divisor(weights: Sequence[float], config: DeltaConfig) -> float:
    total = math.fsum(weights)
    return total if config.normalize and abs(total) >= NO_WEIGHT else 1.0


def rescaled(delta: torch.Tensor, mask: torch.Tensor | None, config: DeltaConfig, density: float) -> float:
    """The factor on what is left of a delta."""
    how = getattr(config, "rescale", "none")
    if mask is None or how == "none" or density <= 0:
        return 1.0
    if how == "density":
        return 1 / density
    before, after = absolute_sum(delta), absolute_sum(delta, mask)
    return 1.0 if before < NO_NORM or after < NO_NORM else before / after


def elected(
    tensors: Sequence[torch.Tensor],
    scaled: Sequence[float],
    weights: Sequence[float],
    masks: Sequence[torch.Tensor | None],
    config: Any,
) -> tuple[torch.Tensor, float]:
    """Entry by entry the sum of those weighted deltas whose sign is that of their sum (+ where it is 0).

    With ``normalize`` divided by the sum of the weights of those that agree (1 where it is 0).

    Returns:
        The merged delta, and of the entries that any model keeps the share in which two kept deltas have opposite
        signs.
    """
    import torch

    flat = [tensor.reshape(-1) for tensor in tensors]
    result = torch.empty_like(flat[0])
    kept = conflicts = 0
    for part in blocks(result):
        terms = [weighted(x, c, mask, part) for x, c, mask in zip(flat, scaled, masks, strict=True)]
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        positive = total >= 0
        mixed, divisor = torch.zeros_like(total), torch.zeros_like(total)
        above, below = torch.zeros_like(positive), torch.zeros_like(positive)
        for term, weight in zip(terms, weights, strict=True):
            up, down = term > 0, term < 0
            above |= up
            below |= down
            agrees = (up & positive) | (down & ~positive)
            mixed += term.mul_(agrees)
            if config.normalize:
                divisor += agrees * weight
        if config.normalize:
            divisor += divisor == 0
            mixed /= divisor
        result[part] = mixed.mul_(config.scale) if config.scale != 1 else mixed
        kept += int((above | below).count_nonzero())
        conflicts += int((above & below).count_nonzero())
    return result.reshape(tensors[0].shape), conflicts / kept if kept else 0.0


# ---------------------------------------------------------------------------------------------------- the methods


class TaskArithmetic(DeltaMerger["TaskArithmetic.Config"]):
    """``W_0 + scale * sum(w_i delta_i)`` (arXiv 2212.04089, section 2)."""

    name = "task_arithmetic"
    summary = "weighted sum of the differences from the base"

    class Config(DeltaConfig):
        """Options of task_arithmetic."""


class Ties(DeltaMerger["Ties.Config"]):
    """TIES (arXiv 2306.01708, algorithm 1): trim, elect signs, mean of those that agree.

    1. Trim: of each delta the ``max(1, floor(density * n))`` entries of greatest magnitude stay, tensor by tensor.
    2. Elect: the sign of ``sum(w_i delta_i)``, entry by entry; + where the sum is 0.
    3. ``scale * sum(w_i delta_i) / sum(w_i)`` over the models whose entry has that sign.

    The paper trims over the whole task vector and has no weights; by tensor and on weighted deltas is mergekit's way.
    """

    name = "ties"
    summary = "trim each difference to its largest entries, elect signs, mean of those that agree"
    per_model = ("density",)
    elects = True

    class Config(DeltaConfig):
        """Options of ties."""

        normalize: bool = Field(True, description="divide by the sum of the weights that agree")
        density: Density | tuple[Density, ...] = Field(
            0.5, description="share of entries kept, largest first (no unit); one, or one for each model. Our default"
        )
        rescale: Literal["none", "l1"] = Field(
            "none", description="`l1`: what is left of a delta gets the sum of magnitudes that the whole had"
        )

    def mask(self, delta: torch.Tensor, index: int, config: Config, generator: Any) -> torch.Tensor | None:
        """The largest entries of one delta."""
        return largest_mask(delta, self.density(index, config))


class DareConfig(DeltaConfig):
    """What is dropped at random, and how the rest makes up for it."""

    density: Density | tuple[Density, ...] = Field(
        0.5, description="probability that an entry is kept; one, or one for each model. Our default"
    )
    rescale: Literal["density", "l1", "none"] = Field(
        "density",
        description="`density`: what is left is divided by the density (the paper, and mergekit before 0.1); `l1`: it "
        "gets the sum of magnitudes that the whole had (mergekit since 0.1)",
    )


class DareLinear(DeltaMerger["DareLinear.Config"]):
    """DARE (arXiv 2311.03099, section 3): drop entries at random, rescale the rest, weighted sum.

    ``m ~ Bernoulli(density)``, ``m * delta / density`` in place of ``delta``: its mean is the delta. The paper's p is
    ``1 - density``. With ``rescale: l1`` the mean is the delta only approximately, as the divisor is
    ``sum(m |delta|) / sum(|delta|)`` of this very mask.
    """

    name = "dare_linear"
    summary = "drop entries of each difference at random, rescale the rest, weighted sum"
    per_model = ("density",)

    class Config(DareConfig):
        """Options of dare_linear."""

    def mask(self, delta: torch.Tensor, index: int, config: Config, generator: Any) -> torch.Tensor | None:
        """Entries of one delta drawn at random, from the generator of this model."""
        density = self.density(index, config)
        return random_mask(delta, density, generator(index)) if density < 1 else None


class DareTies(DareLinear):
    """DARE's sparsification, then the sign election of TIES; without ``normalize`` the sum of those that agree.

    At density 1 two equal deltas of weight 1 give twice the delta.
    """

    name = "dare_ties"
    summary = "drop entries of each difference at random, rescale, elect signs, sum of those that agree"
    elects = True

    class Config(DareConfig):
        """Options of dare_ties."""

        normalize: bool = Field(False, description="divide by the sum of the weights that agree")
