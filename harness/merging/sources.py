"""The models of a merge: checkpoints and adapters, as tensors that are formed when they are asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.merging.adapters.tensors import AdapterTensors
from harness.merging.controls import Controlled
from harness.models.inspect import weight_files
from harness.models.tensors import FLOATS, Entry, TensorFolder, not_finite

if TYPE_CHECKING:
    import torch

_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEADS = ("lm_head.weight", "embed_out.weight")


def is_embedding(name: str) -> bool:
    """Whether a tensor holds the input embeddings."""
    return _EMBEDDINGS.search(name) is not None


def open_checkpoint(model: ModelInfo, label: str) -> TensorFolder:
    """A checkpoint's tensors; a head that is tied to the embeddings can be read under its own name.

    Raises:
        UserError: the weights are quantised.
    """
    if (quantised := model.config.get("quantization_config")) is not None:
        raise UserError(
            label,
            f"its weights are quantised ({quantised.get('quant_method', 'unknown method')})",
            "Give the checkpoint in its own precision: differences of quantised weights mean nothing.",
        )
    folder = TensorFolder(weight_files(model), label)
    head, embedding = head_of(folder.names), next((n for n in folder.names if is_embedding(n)), None)
    if is_tied(model, folder.names) and embedding is not None:
        folder.aliases[head] = embedding
    return folder


def head_of(names: Sequence[str]) -> str:
    """The name of the output embeddings (also where they are tied and not stored)."""
    stored = next((n for n in names for head in _HEADS if n == head or n.endswith(f".{head}")), None)
    return stored or ("embed_out.weight" if any("embed_in" in n for n in names) else "lm_head.weight")


def is_tied(model: ModelInfo, names: Sequence[str]) -> bool:
    """Whether output and input embeddings are one tensor; where config.json is silent, what is stored decides."""
    text = model.config.get("text_config") or {}
    stated = text.get("tie_word_embeddings", model.config.get("tie_word_embeddings"))
    return bool(stated) if stated is not None else head_of(names) not in names


@dataclass
class MergeModel:
    """One model of a merge: a checkpoint, or an adapter on one."""

    label: str
    """For messages: `input 2 (name)`."""
    name: str
    digest: str
    checkpoint: TensorFolder
    info: ModelInfo
    """The checkpoint's; under an adapter, its base's."""
    adapter: AdapterTensors | None = None
    template: str | None = None
    revision: str | None = None
    controlled: Controlled | None = None
    """Of an adapter with a conditioning: the control that it is taken under."""

    @property
    def kind(self) -> str:
        """``adapter`` or ``checkpoint``."""
        return "checkpoint" if self.adapter is None else "adapter"

    def entry(self, name: str) -> Entry:
        """The type and shape of one of the model's tensors."""
        return self.checkpoint.entry(name)

    def touches(self, name: str) -> bool:
        """Whether an adapter changes a tensor of its base; True for every tensor of a checkpoint."""
        return self.adapter is None or self.adapter.touches(name)

    def stored(self, name: str) -> torch.Tensor:
        """The checkpoint's tensor in its stored type, found finite.

        Raises:
            UserError: NaN or infinity, with the names of model and tensor.
        """
        tensor = self.checkpoint.read(name)
        if problem := not_finite(tensor):
            raise UserError(
                f"{self.checkpoint.label}, {name}", f"holds {problem}", "Fetch, train or save that model again."
            )
        return tensor

    def weight(self, name: str, device: str = "cpu") -> torch.Tensor:
        """A tensor as this model has it: float32, new."""
        import torch

        if self.entry(name).dtype not in FLOATS:
            raise UserError(
                f"{self.label}, {name}",
                f"is stored as {self.entry(name).dtype}, which has no differences",
                f"Save the model again in one of: {', '.join(FLOATS)}.",
            )
        base = self.stored(name).to(device=device, dtype=torch.float32, copy=True)
        return self.adapter.apply(name, base) if self.adapter is not None and self.adapter.touches(name) else base
