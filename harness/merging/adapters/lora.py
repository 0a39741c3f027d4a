"""LoRA adapters, with what may stand beside the factors: DoRA's magnitudes, biases, rows of tokens.

A LoRA layer changes a weight W by s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1). DoRA makes of it
m (W + s B A) / ||W + s B A||, norms over each output's inputs (Liu et al. 2024, arXiv 2402.09353, equation 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from harness.core.errors import UserError
from harness.merging.adapters.tensors import AdapterTensors, Change
from harness.models.lineage import scale_of

if TYPE_CHECKING:
    import torch


class LoraTensors(AdapterTensors):
    """What a LoRA does to each tensor of its base."""

    parts: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "A",
        "lora_B.weight": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_B.bias": "bias",
        "lora_magnitude_vector": "magnitude",
        "lora_magnitude_vector.weight": "magnitude",
        "token_adapter.trainable_tokens_delta": "rows",
    }
    factor_parts = frozenset({"A", "B"})

    def _made(
        self, change: Change, parts: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...], where: str
    ) -> tuple[int, ...]:
        if ("A" in parts) != ("B" in parts):
            raise UserError(where, "one of the two factors is missing", "Save the adapter again.")
        made = wanted
        if "A" in parts:
            if len(parts["A"]) != 2 or len(parts["B"]) != 2 or len(wanted) != 2:
                kind = f"factors of shapes {list(parts['A'])} and {list(parts['B'])}"
                raise UserError(where, f"{kind} for a tensor of shape {list(wanted)}", "Only linear layers work.")
            made = (parts["B"][0], parts["A"][1])
            if change.embedding or self.transposed:
                made = (made[1], made[0])
            if parts["A"][0] != parts["B"][1]:
                made = (0, 0)
        if "rows" in parts and parts["rows"][1:] != wanted[1:]:
            made = parts["rows"]
        return made

    def _factors(self, change: Change) -> tuple[torch.Tensor, torch.Tensor, float]:
        return self._part(change, "A"), self._part(change, "B"), scale_of(self.config, change.module)

    def _adapted(self, name: str, change: Change, parts: set[str], base: torch.Tensor) -> torch.Tensor:
        if parts == {"rows"}:
            adapted = base.clone()
            adapted[self._rows(name, change)] = self._part(change, "rows").to(base.device)
            return adapted
        if parts == {"bias"}:
            return base + scale_of(self.config, change.module) * self._part(change, "bias").to(base.device)
        delta = self._product(change, base)
        if "magnitude" in parts:
            adapted = base + delta
            lengthwise = 0 if self.transposed else 1
            norm = adapted.norm(dim=lengthwise)
            factor = self._part(change, "magnitude").flatten().to(base.device) / norm
            return adapted * factor.unsqueeze(lengthwise)
        return delta.add_(base)

    def _rows(self, name: str, change: Change) -> list[int]:
        given: Any = self.config.get("trainable_token_indices") or []
        if isinstance(given, Mapping):
            last = change.module.rsplit(".", 1)[-1]
            given = given.get(change.module, given.get(last, []))
        expected = self.files.entry(change.entries["rows"]).shape[0]
        if len(given) != expected:
            raise UserError(
                f"{self.label}, trainable_token_indices",
                f"names {len(given)} rows of {name}, and {expected} are stored",
                "Save the adapter again.",
            )
        return [int(row) for row in given]
