"""What is worth knowing about a merge: sizes and directions of the models' differences, per tensor, layer and in total.

For differences d_i from the base W, and the result's difference d: relative norms ||d_i|| / ||W||, cosines
<d_i, d_j> / (||d_i|| ||d_j||), the share of entries in which two models pull in opposite directions (among those that
any model changes), ||d|| / ||W||, and ||W + d|| / ||W||. Sums are kept, so that a layer's and the total's figures are
those of all its entries together, not means of means.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 17
"""Entries looked at together: what a core's cache holds of a few models."""
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass
class Sums:
    """Sums over entries from which all figures follow."""

    inputs: int
    entries: int = 0
    base: float = 0.0
    """Of squares."""
    result: float = 0.0
    delta: float = 0.0
    dots: list[list[float]] = field(default_factory=list)
    """dots[i][j]: of products of the differences of inputs i and j."""
    changed: int = 0
    """Entries that any input changes."""
    conflicts: int = 0
    """Entries that one input raises and another lowers."""
    extra: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """What the merger said, with the tensor's number of entries."""

    def __post_init__(self) -> None:
        self.dots = self.dots or [[0.0] * self.inputs for _ in range(self.inputs)]

    def placed(self, positions: Sequence[int], inputs: int) -> Sums:
        """The same with input ``i`` at ``positions[i]`` of so many: a slice need not have a part of every model.

        A position below 0 is the base itself, which has no difference.
        """
        dots = [[0.0] * inputs for _ in range(inputs)]
        for i, row in zip(positions, self.dots, strict=True):
            for j, value in zip(positions, row, strict=True):
                if min(i, j) >= 0:
                    dots[i][j] += value
        return replace(self, inputs=inputs, dots=dots)

    def add(self, other: Sums) -> None:
        """Take in the sums over other entries."""
        self.entries += other.entries
        self.base += other.base
        self.result += other.result
        self.delta += other.delta
        self.changed += other.changed
        self.conflicts += other.conflicts
        for row, more in zip(self.dots, other.dots, strict=True):
            row[:] = [a + b for a, b in zip(row, more, strict=True)]
        for name, values in other.extra.items():
            self.extra[name] += values

    def figures(self) -> dict[str, Any]:
        """The figures, JSON-ready; None where there is nothing to divide by."""
        norms = [math.sqrt(max(self.dots[i][i], 0.0)) for i in range(self.inputs)]
        base = math.sqrt(self.base)
        found: dict[str, Any] = {
            "entries": self.entries,
            "delta_norm": [_ratio(norm, base) for norm in norms],
            "cosine": {
                f"{i + 1}-{j + 1}": _ratio(self.dots[i][j], norms[i] * norms[j])
                for i, j in combinations(range(self.inputs), 2)
            },
            "sign_conflict": _ratio(self.conflicts, self.changed),
            "result_delta_norm": _ratio(math.sqrt(self.delta), base),
            "norm_ratio": _ratio(math.sqrt(self.result), base),
        }
        # Means over entries: a large tensor counts for more.
        found["merger"] = {
            name: _ratio(math.fsum(value * count for value, count in values), sum(count for _, count in values))
            for name, values in sorted(self.extra.items())
        }
        return found


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None


def sums_of(
    values: Sequence[torch.Tensor],
    base: torch.Tensor,
    result: torch.Tensor,
    *,
    deltas: bool,
    extra: Mapping[str, float],
) -> Sums:
    """The sums of one tensor.

    Args:
        values: one per input, float32, any shape: differences from the base, or whole weights.
        base: the base's tensor, float32.
        result: the merged one, float32; a difference too if ``deltas``.
        deltas: what ``values`` and ``result`` are.
        extra: what the merger said of it.
    """
    import torch

    flat = [value.reshape(-1) for value in values]
    origin, merged = base.reshape(-1), result.reshape(-1)
    count = len(flat)
    found = Sums(count, entries=origin.numel())
    gram = torch.zeros(count + 2, count + 2, dtype=torch.float64)
    for start in range(0, origin.numel(), _CHUNK):
        piece = slice(start, start + _CHUNK)
        here = origin[piece]
        # Rows: differences of the inputs, the result's difference, the result itself.
        if deltas:
            rows = torch.stack([*(one[piece] for one in flat), merged[piece], merged[piece] + here])
        else:
            rows = torch.stack([*(one[piece] for one in flat), merged[piece], merged[piece]])
            rows[: count + 1] -= here
        gram += (rows @ rows.t()).double().cpu()
        found.base += float(torch.dot(here, here))
        if count:
            low, high = rows[:count].amin(0), rows[:count].amax(0)
            up, down = high > 0, low < 0
            found.changed += int(torch.count_nonzero(up | down))
            found.conflicts += int(torch.count_nonzero(up & down))
    found.dots = [[float(gram[i, j]) for j in range(count)] for i in range(count)]
    found.delta, found.result = float(gram[count, count]), float(gram[count + 1, count + 1])
    for name, value in extra.items():
        found.extra[name].append((float(value), found.entries))
    return found


def place_of(name: str) -> tuple[int | None, str]:
    """Layer and module of a tensor: ``model.layers.3.mlp.up_proj.weight`` is (3, "mlp.up_proj")."""
    found = _LAYER.search(name)
    rest = name[found.end() :] if found is not None else name
    return (int(found[1]) if found is not None else None), rest.removesuffix(".weight")


def gathered(inputs: int, tensors: Iterable[tuple[str, Sums]]) -> dict[str, Any]:
    """Figures per tensor, per layer and in total, in the order given.

    Tensors that were copied are not among them: they have no differences.
    """
    total = Sums(inputs)
    layers: dict[int | None, Sums] = {}
    rows = []
    for name, sums in tensors:
        layer, module = place_of(name)
        rows.append({"tensor": name, "layer": layer, "module": module, **sums.figures()})
        layers.setdefault(layer, Sums(inputs)).add(sums)
        total.add(sums)
    return {
        "tensors": rows,
        "layers": [
            {"layer": layer, **layers[layer].figures()}
            for layer in sorted(layers, key=lambda one: (one is None, one or 0))
        ],
        "total": total.figures(),
    }
