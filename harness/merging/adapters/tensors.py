"""An adapter as changes of single tensors of its base, formed when they are asked for: what all kinds share.

What an adapter saved whole (``modules_to_save``, trained biases) takes the place of the base's tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from harness.contracts.merger import Factors
from harness.core.errors import UserError
from harness.core.records import AdapterInfo
from harness.models.tensors import TensorFolder, not_finite

if TYPE_CHECKING:
    import torch


@dataclass
class Change:
    """What an adapter does to one tensor of its base."""

    entries: dict[str, str] = field(default_factory=dict)
    """Part (``whole``, and those of the kind) -> name in the adapter's file."""
    module: str = ""
    embedding: bool = False


class AdapterTensors(ABC):
    """What a peft adapter does to each tensor of its base.

    Raises:
        UserError: a module that the base has not, or shapes that are not the base's.
    """

    parts: ClassVar[Mapping[str, str]]
    """End of a name in the adapter's file -> the part that it is; all else is saved whole."""
    factor_parts: ClassVar[frozenset[str]] = frozenset()
    """The parts that alone make a change of low rank; none: this kind's changes have no rank of their own."""

    def __init__(self, info: AdapterInfo, base: TensorFolder, label: str) -> None:
        self.info, self.label, self.config = info, label, info.config
        self.files = TensorFolder(sorted(Path(info.path).glob("adapter_model*.safetensors")), label)
        self.changes: dict[str, Change] = {}
        for name in self.files.names:
            self._take(name, base)
        for tensor, change in self.changes.items():
            self._check(tensor, change, tuple(base.entry(tensor).shape))

    def _take(self, name: str, base: TensorFolder) -> None:
        """Note which tensor of the base one tensor of the file changes."""
        plain = name.removeprefix("base_model.model.")
        module, part = plain, "whole"
        for suffix, meaning in self.parts.items():
            if plain.endswith(f".{suffix}"):
                module, part = plain[: -len(suffix) - 1], meaning
        if part == "whole":
            target = plain.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        else:
            target = f"{module}.bias" if part == "bias" else f"{module}.weight"
        found = in_base(target, base)
        if found is None:
            raise UserError(
                f"{self.label}, {name}",
                f"the base has no tensor {target}",
                "Give the base that the adapter was trained on.",
            )
        change = self.changes.setdefault(found, Change(module=module))
        change.entries[part] = name
        change.embedding |= "lora_embedding" in name

    def _check(self, tensor: str, change: Change, wanted: tuple[int, ...]) -> None:
        """Refuse parts that do not make a tensor of the base's shape."""
        parts = {part: tuple(self.files.entry(name).shape) for part, name in change.entries.items()}
        where = f"{self.label}, {next(iter(change.entries.values()))}"
        made = parts.get("whole", wanted)
        if made == wanted:
            made = self._made(change, parts, wanted, where)
        if made != wanted:
            shapes = " and ".join(str(list(shape)) for shape in parts.values())
            raise UserError(
                where,
                f"has shape {shapes}, and {tensor} of the base has {list(wanted)}",
                "Give the base that the adapter was trained on.",
            )

    @abstractmethod
    def _made(
        self, change: Change, parts: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...], where: str
    ) -> tuple[int, ...]:
        """The shape of the tensor that the parts make; another than ``wanted`` where they do not fit."""

    @property
    def transposed(self) -> bool:
        """Whether the base stores weights as (in, out)."""
        return bool(self.config.get("fan_in_fan_out"))

    def sizes(self, weight: tuple[int, ...]) -> tuple[int, int]:
        """Outputs and inputs of a layer whose weight has this shape."""
        first, second = weight
        return (second, first) if self.transposed else (first, second)

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor of the base."""
        return name in self.changes

    def size(self, name: str) -> int:
        """Bytes that its change to a tensor takes in the file."""
        return sum(self.files.entry(one).size for one in self.changes[name].entries.values())

    def factors(self, name: str) -> Factors | None:
        """The change as s B A with B: (out, rank), A: (rank, in), in fp32; None where it is none of that form."""
        change = self.changes.get(name)
        if change is None or not self._has_factors(change):
            return None
        a, b, scale = self._factors(change)
        if change.embedding or self.transposed:
            # The stored weight is (in, out): its change is s A^T B^T.
            a, b = b.t().contiguous(), a.t().contiguous()
        return Factors(a, b, scale)

    def apply(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The adapted tensor.

        Args:
            name: tensor of the base.
            base: its values, float32.

        Returns:
            A new tensor, float32.
        """
        change = self.changes[name]
        parts = set(change.entries)
        if "whole" in parts:
            # Beside factors it is the weight that they are added to: peft saves embeddings so.
            base = self._part(change, "whole").to(base.device)
            parts.remove("whole")
        return self._adapted(name, change, parts, base) if parts else base

    def delta(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The adapted tensor less the base's; for plain factors the product itself, free of the base's rounding."""
        change = self.changes[name]
        if self._has_factors(change):
            return self._product(change, base)
        return self.apply(name, base).sub_(base)

    @abstractmethod
    def _adapted(self, name: str, change: Change, parts: set[str], base: torch.Tensor) -> torch.Tensor:
        """A new tensor: the base's with the parts of this kind applied."""

    def _factors(self, change: Change) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A: (rank, in), B: (out, rank) and the scale of a change of low rank, for a weight stored as (out, in)."""
        raise NotImplementedError

    def _has_factors(self, change: Change) -> bool:
        return bool(self.factor_parts) and set(change.entries) == self.factor_parts

    def _product(self, change: Change, base: torch.Tensor) -> torch.Tensor:
        a, b, scale = self._factors(change)
        product = (b.to(base.device) @ a.to(base.device)).mul_(scale)
        if change.embedding or self.transposed:
            product = product.t().contiguous()
        return product

    def _part(self, change: Change, part: str) -> torch.Tensor:
        return self._read(change.entries[part])

    def _read(self, name: str) -> torch.Tensor:
        """One tensor of the file, float32, found finite."""
        import torch

        tensor = self.files.read(name)
        if problem := not_finite(tensor):
            raise UserError(f"{self.label}, {name}", f"holds {problem}", "Train or save that adapter again.")
        # Always a copy: products must not depend on where in a file a tensor happens to lie.
        return tensor.to(torch.float32, copy=True)


def in_base(target: str, base: TensorFolder) -> str | None:
    """The base's name of a tensor; checkpoints differ in whether the inner model's prefix is stored."""
    if target in base:
        return target
    ends = [name for name in base.names if name.endswith(f".{target}") or target.endswith(f".{name}")]
    return ends[0] if len(ends) == 1 else None
