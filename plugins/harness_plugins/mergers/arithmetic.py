"""What mergers share: weighted sums, inner products and masks whose bytes depend on nothing but the tensors.

All of it runs over blocks, so that what is needed beside the tensors themselves is small, and none of it lets the
number of threads choose the order of a sum (torch splits a reduction to one number among its threads).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from harness import Factors

if TYPE_CHECKING:
    import torch

BLOCK = {"cpu": 1 << 18, "other": 1 << 24}
"""Entries worked on at once: on a CPU what its caches hold, elsewhere what is worth a launch."""
ROW = 4096
"""Entries that torch adds up by itself; sums of rows are added exactly."""
DRAWN_BITS = 31


def blocks(tensor: torch.Tensor) -> Iterator[slice]:
    """The slices that cover a flattened tensor, block by block."""
    size = BLOCK["cpu" if tensor.device.type == "cpu" else "other"]
    for start in range(0, tensor.numel(), size):
        yield slice(start, min(start + size, tensor.numel()))


def combine(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[float], masks: Sequence[torch.Tensor | None] | None = None
) -> torch.Tensor:
    """``sum(c_i * m_i * x_i)`` in float32, as a new tensor of the inputs' dtype.

    Args:
        tensors: of one shape.
        coefficients: one for each.
        masks: for each the entries that count, flattened; None: all.
    """
    import torch

    flat = [tensor.reshape(-1) for tensor in tensors]
    result = torch.empty_like(flat[0])
    for part in blocks(result):
        terms = (
            weighted(x, c, mask, part)
            for x, c, mask in zip(flat, coefficients, masks or [None] * len(flat), strict=True)
        )
        total = next(terms)
        for term in terms:
            total += term
        result[part] = total
    return result.reshape(tensors[0].shape)


def weighted(flat: torch.Tensor, coefficient: float, mask: torch.Tensor | None, part: slice) -> torch.Tensor:
    """One block of ``c * m * x``, in float32.

    Products and sums stay apart: a fused multiply-add rounds once, and which entries get one depends on threads.
    """
    term = flat[part].float() * coefficient
    return term if mask is None else term.mul_(mask[part])


def inner_products(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
    """``<x, x>``, ``<x, y>``, ``<y, y>`` over all entries, in float64."""
    a, b = x.reshape(-1), y.reshape(-1)
    sums: tuple[list[float], list[float], list[float]] = ([], [], [])
    for part in blocks(a):
        p, q = a[part].double(), b[part].double()
        for held, product in zip(sums, (p * p, p * q, q.mul_(q)), strict=True):
            held += _row_sums(product)
    return math.fsum(sums[0]), math.fsum(sums[1]), math.fsum(sums[2])


def absolute_sum(x: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """``sum(|x|)`` over all entries, or over those of a flattened mask, in float64."""
    a = x.reshape(-1)
    sums: list[float] = []
    for part in blocks(a):
        values = a[part].double().abs_()
        sums += _row_sums(values if mask is None else values.mul_(mask[part]))
    return math.fsum(sums)


def _row_sums(values: torch.Tensor) -> list[float]:
    whole = values.numel() // ROW * ROW
    rows = values[:whole].reshape(-1, ROW).sum(1).tolist() if whole else []
    return [*rows, float(values[whole:].sum())]


def random_mask(like: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor | None:
    """Each entry kept with probability ``density``, flattened; None: all are.

    Drawn on the CPU whatever the device, one whole number of 31 bits for each entry in their order.
    """
    import torch

    if density >= 1:
        return None
    mask = torch.empty(like.numel(), dtype=torch.bool)
    drawn = torch.empty(min(like.numel(), BLOCK["cpu"]), dtype=torch.int32)
    last = round(density * 2**DRAWN_BITS) - 1
    for part in blocks(mask):
        mask[part] = drawn[: part.stop - part.start].random_(generator=generator) <= last
    return mask.to(like.device)


def largest_mask(tensor: torch.Tensor, density: float) -> torch.Tensor | None:
    """The ``max(1, floor(density * n))`` entries of greatest magnitude, flattened; None: all.

    Among equal magnitudes the first ones. A density of 0 keeps nothing.
    """
    import torch

    flat, size = tensor.reshape(-1), tensor.numel()
    if density >= 1:
        return None
    mask = torch.zeros(size, dtype=torch.bool, device=tensor.device)
    if density <= 0 or size == 0:
        return mask
    keep = max(1, int(density * size))
    # Magnitudes in the order of the upper half of their bits: counting settles all but one of 2^15 groups.
    counts = torch.zeros(1 << 15, dtype=torch.int64, device=tensor.device)
    for part in blocks(flat):
        counts += torch.bincount(_group(flat[part]), minlength=1 << 15)
    at_least = counts.flip(0).cumsum(0).flip(0)
    last = int((at_least >= keep).nonzero().max())
    found = []
    for part in blocks(flat):
        group = _group(flat[part])
        mask[part] = group > last
        found.append((group == last).nonzero().flatten() + part.start)
    open_places = torch.cat(found)
    magnitudes = flat[open_places].float().abs()
    wanted = keep - int(at_least[last] - counts[last])
    least = torch.kthvalue(magnitudes, len(magnitudes) - wanted + 1).values
    above, equal = open_places[magnitudes > least], open_places[magnitudes == least]
    mask[above] = True
    mask[equal[: wanted - len(above)]] = True
    return mask


def _group(values: torch.Tensor) -> torch.Tensor:
    """Upper 15 bits of the magnitudes: greater groups hold greater float32 numbers only."""
    import torch

    return values.float().abs().view(torch.int32) >> 16


def concatenated(factors: Sequence[Factors], coefficients: Sequence[float]) -> Factors:
    """The sum ``sum(c_i * delta_i)`` of low-rank deltas, exact: the ranks add up.

    ``sum(c_i s_i B_i A_i) = [c_1 s_1 B_1 | c_2 s_2 B_2 | ...] [A_1; A_2; ...]``
    """
    import torch

    scaled = [f.B * (f.scale * c) for f, c in zip(factors, coefficients, strict=True)]
    return Factors(A=torch.cat([f.A for f in factors], 0), B=torch.cat(scaled, 1), scale=1.0)


def inner_of_factors(x: Factors, y: Factors) -> float:
    """``<delta_x, delta_y>`` over all entries, without forming either: ``s_x s_y sum((B_x^T B_y) * (A_x A_y^T))``."""
    b = x.B.double().T @ y.B.double()
    a = x.A.double() @ y.A.double().T
    return x.scale * y.scale * math.fsum((a * b).flatten().tolist())
