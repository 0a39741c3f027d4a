"""VeRA adapters: two trained vectors for each layer, and two random matrices that all layers share.

A layer's change is diag(b) B diag(d) A (Kopiczko et al. 2023, arXiv 2310.11454, equation 2), of which peft cuts B and A
for each layer from the shared ones. A file without them says from which seed peft drew them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from harness.core.errors import UserError
from harness.core.records import AdapterInfo
from harness.merging.adapters.tensors import AdapterTensors, Change
from harness.models.tensors import TensorFolder

if TYPE_CHECKING:
    import torch

SHARED = {"base_model.vera_A": "A", "base_model.vera_B": "B"}
"""The shared matrices' names in the file."""


class VeraTensors(AdapterTensors):
    """What a VeRA adapter does to each tensor of its base."""

    parts: ClassVar[Mapping[str, str]] = {"vera_lambda_b": "b", "vera_lambda_d": "d"}
    factor_parts = frozenset({"b", "d"})

    def __init__(self, info: AdapterInfo, base: TensorFolder, label: str) -> None:
        self._inputs: dict[str, int] = {}
        """Module -> how many inputs it has: no tensor of its own in the file says so."""
        super().__init__(info, base, label)

    def _take(self, name: str, base: TensorFolder) -> None:
        if name not in SHARED:
            super()._take(name, base)

    def _made(
        self, change: Change, parts: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...], where: str
    ) -> tuple[int, ...]:
        if not {"b", "d"} & set(parts):
            return wanted
        if not {"b", "d"} <= set(parts):
            raise UserError(where, "one of the two vectors is missing", "Save the adapter again.")
        if len(wanted) != 2 or parts["b"] != (self.sizes(wanted)[0],) or len(parts["d"]) != 1:
            return (0,)
        if self.config.get("save_projection", True):
            self._check_shared(where, parts["d"], *self.sizes(wanted))
        return wanted

    def _check_shared(self, where: str, d: tuple[int, ...], outputs: int, inputs: int) -> None:
        """Refuse shared matrices that a layer cannot be cut from."""
        missing = [name for name in SHARED if name not in self.files]
        if missing:
            raise UserError(f"{self.label}, {missing[0]}", "is missing", "Save the adapter again.")
        a, b = (tuple(self.files.entry(name).shape) for name in SHARED)
        fits = len(a) == len(b) == 2 and (a[0],) == d == (b[1],) and a[1] >= inputs and b[0] >= outputs
        if not fits:
            raise UserError(
                where,
                f"a vector of {d[0]} with shared matrices of shapes {list(a)} and {list(b)}, for a layer of {inputs} "
                f"inputs and {outputs} outputs",
                "Give the base that the adapter was trained on.",
            )

    def _adapted(self, name: str, change: Change, parts: set[str], base: torch.Tensor) -> torch.Tensor:
        return self._product(change, base).add_(base)

    def _factors(self, change: Change) -> tuple[torch.Tensor, torch.Tensor, float]:
        a, b = self._shared
        of_outputs, of_rank = self._part(change, "b"), self._part(change, "d")
        inner = self._inputs[change.module]
        return of_rank[:, None] * a[:, :inner], of_outputs[:, None] * b[: len(of_outputs)], 1.0

    def _check(self, tensor: str, change: Change, wanted: tuple[int, ...]) -> None:
        super()._check(tensor, change, wanted)
        if "b" in change.entries:
            self._inputs[change.module] = self.sizes(wanted)[1]

    @cached_property
    def _shared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices A: (rank, most inputs) and B: (most outputs, rank), as saved or as peft draws them."""
        if self.config.get("save_projection", True):
            a, b = (self._read(name) for name in SHARED)
            return a, b
        import torch

        layers = [change for change in self.changes.values() if "b" in change.entries]
        outputs = max(self.files.entry(change.entries["b"]).shape[0] for change in layers)
        rank = self.files.entry(layers[0].entries["d"]).shape[0]
        drawn = torch.Generator().manual_seed(int(self.config.get("projection_prng_key", 0)))
        a = _drawn((rank, max(self._inputs.values())), drawn)
        return a, _drawn((outputs, rank), drawn)


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A random matrix as ``peft.tuners.vera.model`` draws it: uniform, variance 2 / inputs (He et al. 2015)."""
    import torch

    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
