"""The contract of adapters: how trainable weights are attached to a base."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from harness.contracts.plugin import C, Plugin

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapter(Plugin[C]):
    """How trainable weights are attached to a base."""

    kind = "adapter"

    def quantization(self, config: C) -> Any | None:
        """How the base is opened: None, or a transformers quantisation config."""
        return None

    @abstractmethod
    def attach(self, model: PreTrainedModel, config: C) -> Any:
        """Return the model with trainable weights attached (peft's classes and file format)."""
