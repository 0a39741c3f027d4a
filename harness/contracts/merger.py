"""The contract of mergers: models into one, tensor by tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from harness.contracts.plugin import C, Plugin
from harness.core.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Merged:
    """One merged tensor and what is worth knowing about how it came about."""

    tensor: torch.Tensor
    stats: Mapping[str, float] = field(default_factory=dict)
    """Finite numbers, per tensor: kept density, slerp angle (radians), ... They go into the record as they are."""


@dataclass(frozen=True)
class Factors:
    """One low-rank delta, ``scale * B @ A``: what a LoRA layer adds to a weight."""

    A: torch.Tensor
    """(rank, in)"""
    B: torch.Tensor
    """(out, rank)"""
    scale: float


class Merger(Plugin[C]):
    """Merges models tensor by tensor; pure, with randomness from ``generator`` alone."""

    kind = "merger"
    operates_on: ClassVar[Literal["weights", "deltas"]] = "weights"
    """What ``tensors`` are and what is returned: whole weights, or differences from the base.

    Deltas are formed exactly, also those of an adapter; the harness adds the merged delta to the base itself."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """Least and greatest number of models; None: any number."""
    per_model: ClassVar[tuple[str, ...]] = ()
    """Fields of Config of the type ``float | tuple[float, ...]``: one value, or one for each model in their order."""

    def settle(self, weights: Sequence[float] | None, count: int, config: C) -> tuple[tuple[float, ...], Any]:
        """Weights and options with everything filled in, for ``count`` models; asked before anything is read.

        Args:
            weights: as the user gave them; None: not at all.

        Raises:
            UserError: they make no sense together; ``where`` is ``weights`` or the option.
        """
        given = tuple(weights) if weights is not None else (1 / count,) * count
        if any(weight < 0 for weight in given):
            shown = ", ".join(f"{weight:g}" for weight in given)
            raise UserError("weights", f"{self.name} takes no weight below 0, found {shown}", "Give weights from 0 on.")
        return given, config

    def prepare(self, models: Sequence[Mapping[str, Callable[[], torch.Tensor]]], config: C) -> Merger[C]:
        """Optional look at whole models before the first tensor.

        Args:
            models: one per model, in order: tensor's name -> a function that reads it, in float32; weights or deltas,
                as ``operates_on`` says. Nothing is read before it is asked for.
            config: the options in force for the first tensor.

        Returns:
            The merger to use: this one, or a copy that knows more.
        """
        return self

    @abstractmethod
    def merge(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        base: torch.Tensor | None,
        weights: Sequence[float],
        config: C,
        generator: Callable[[int], torch.Generator],
    ) -> Merged:
        """Merge one tensor of each model.

        Args:
            tensors: one per model, float32, of one shape; weights or deltas, as ``operates_on`` says. Never changed.
            base: the base's tensor, where there is a base.
            weights: one per model.
            config: options in force for this very tensor.
            generator: ``generator(i)`` is a CPU generator for model ``i``, seeded by (seed, tensor name, i).
        """

    def keeps_equal(self, weights: Sequence[float], config: C) -> bool:
        """Whether equal weights (zero deltas) come back as they are.

        Then tensors that no input changes are copied from the base byte for byte, without being merged.
        """
        return False

    def merge_factors(self, factors: Sequence[Factors], *, weights: Sequence[float], config: C) -> Factors | None:
        """The same merge on low-rank deltas, exact, where the method is linear; None where it is not."""
        return None
