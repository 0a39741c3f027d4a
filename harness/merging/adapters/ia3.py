"""IA3 adapters: one trained vector for each layer, which its outputs are multiplied with, or its inputs.

The weight W becomes diag(l) W, and a bias l b; of the layers that peft calls feedforward, W diag(l) (Liu et al. 2022,
arXiv 2205.05638, section 3.3). The change depends on the base and has no rank of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from harness.merging.adapters.tensors import AdapterTensors, Change, in_base
from harness.models.tensors import TensorFolder

if TYPE_CHECKING:
    import torch


class Ia3Tensors(AdapterTensors):
    """What an IA3 adapter does to each tensor of its base."""

    parts: ClassVar[Mapping[str, str]] = {"ia3_l": "l"}

    def _take(self, name: str, base: TensorFolder) -> None:
        super()._take(name, base)
        shape = self.files.entry(name).shape
        if not name.endswith(".ia3_l") or len(shape) != 2 or shape[1] != 1:
            return
        # A vector on the outputs, (out, 1), is on the bias as well; one on the inputs is (1, in).
        module = name.removeprefix("base_model.model.").removesuffix(".ia3_l")
        if (bias := in_base(f"{module}.bias", base)) is not None:
            self.changes.setdefault(bias, Change(module=module)).entries["l"] = name

    def _made(
        self, change: Change, parts: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...], where: str
    ) -> tuple[int, ...]:
        if "l" not in parts:
            return wanted
        if len(wanted) == 1:
            return wanted if parts["l"] == (*wanted, 1) else (0,)
        outputs, inputs = self.sizes(wanted) if len(wanted) == 2 else (0, 0)
        return wanted if parts["l"] in ((outputs, 1), (1, inputs)) else (0,)

    def _adapted(self, name: str, change: Change, parts: set[str], base: torch.Tensor) -> torch.Tensor:
        vector = self._part(change, "l").to(base.device)
        if base.dim() == 1:
            return base * vector.flatten()
        return base * (vector.t() if self.transposed else vector)
