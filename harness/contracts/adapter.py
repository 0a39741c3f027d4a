"""The contract of adapters: how trainable weights are attached to a base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.plugin import C, Plugin

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable weights that share a learning rate of their own."""

    parameters: Sequence[Parameter]
    rate: float = 1.0
    """Factor on the recipe's learning rate, throughout its schedule (no unit)."""


class Adapter(Plugin[C]):
    """How trainable weights are attached to a base."""

    kind = "adapter"

    def check(self, config: C) -> None:
        """Raise a UserError before anything runs if the adapter cannot work; asked of every plan: imports no torch."""

    def quantization(self, config: C) -> Any | None:
        """How the base is opened: None, or a transformers quantisation config."""
        return None

    @abstractmethod
    def attach(self, model: PreTrainedModel, config: C) -> Any:
        """Return the model with trainable weights attached (peft's classes and file format)."""

    def parameter_groups(self, model: Any, config: C) -> Sequence[ParameterGroup] | None:
        """Which trainable weights learn at which multiple of the recipe's rate; None: all at the recipe's own.

        Asked once, before training, with what ``attach`` returned. Every trainable weight is in exactly one group.
        Which of them decay (weight matrices do; biases and norms do not) and the schedule stay the recipe's.
        """
        return None
