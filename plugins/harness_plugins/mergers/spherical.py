"""Spherical mergers of whole weights: slerp, slerp_delta, nuslerp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

import harness
from harness import Config, Factors, Merged, Merger, UserError
from harness_plugins.mergers.arithmetic import BLOCK, combine, concatenated, inner_of_factors, inner_products

if TYPE_CHECKING:
    import torch

NEARLY_PARALLEL = 0.9995
"""Above this |cosine| slerp is linear interpolation; the value is mergekit's (``DOT_THRESHOLD``)."""
NO_DIRECTION = 1e-8
"""A vector of at most this norm is not divided by it; mergekit's as well."""
COLINEAR = 1e-14
"""NuSLERP is linear up to this ``1 - cos^2``; mergekit asks for 1e-16 in float32, which cannot tell 1e-8 from 0."""
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Arc:
    """How far two vectors are apart, and what interpolation between them takes of each."""

    coefficients: tuple[float, float]
    angle: float
    """radians, between 0 and pi"""
    lerp: bool

    @property
    def stats(self) -> dict[str, float]:
        """The figures of this arc that a record keeps."""
        return {"slerp_angle_rad": self.angle, "lerp_fallback": float(self.lerp)}


def arc(inner_products: tuple[float, float, float], t: float, zero_is_linear: bool) -> Arc:
    """Coefficients of ``x`` and ``y`` at ``t``, from ``<x, x>``, ``<x, y>``, ``<y, y>``.

    ``sin((1 - t) theta) / sin(theta)`` and ``sin(t theta) / sin(theta)``; ``1 - t`` and ``t`` where the vectors are
    nearly parallel or opposite.

    Args:
        zero_is_linear: what becomes of a vector without direction. mergekit takes it as orthogonal to all others.
    """
    xx, xy, yy = inner_products
    norms = [math.sqrt(xx), math.sqrt(yy)]
    without = [length <= NO_DIRECTION for length in norms]
    x, y = (1.0 if none else length for none, length in zip(without, norms, strict=True))
    cosine = max(-1.0, min(1.0, xy / x / y))
    angle = math.acos(cosine)
    if abs(cosine) > NEARLY_PARALLEL or (zero_is_linear and any(without)):
        return Arc((1 - t, t), angle, True)
    return Arc((math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)), angle, False)


class SlerpConfig(Config):
    """Options of spherical mergers: where on the arc."""

    t: float | None = Field(
        None,
        ge=0,
        le=1,
        description="place between the first model (0) and the second (1), no unit; the second's share of the weights "
        "when absent, 0.5 where there are none (our choice: the trade-offs paper states none)",
    )


class Slerp(Merger["Slerp.Config"]):
    """Spherical interpolation of two tensors' weights, all entries as one vector.

    ``sin((1 - t) theta) / sin(theta) x + sin(t theta) / sin(theta) y`` with theta the angle between x and y
    (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, section 3.3). Norms are not made equal.
    As in mergekit, it is linear where ``|cos theta| > 0.9995``: with deltas below some 3 % of the weights' norm, so
    with nearly every LoRA arm, always. The share of such tensors is in the record; ``slerp_delta`` is the operation
    that bends. peft has no slerp.
    """

    name = "slerp"
    summary = "spherical interpolation between the weights of two models"
    models = (2, 2)
    zero_is_linear: ClassVar[bool] = False

    class Config(SlerpConfig):
        """Options of slerp."""

    def settle(self, weights: Sequence[float] | None, count: int, config: Config) -> tuple[tuple[float, ...], Any]:
        """Weights become ``t = w_2 / (w_1 + w_2)``, or ``t`` becomes weights."""
        if weights is not None and config.t is not None:
            raise UserError("t", "both weights and t are given", "Weights w1, w2 mean t = w2 / (w1 + w2): give one.")
        given, _ = super().settle(weights, count, config)
        if not sum(given):
            raise UserError("weights", "the weights sum to 0", "Give weights w1, w2 with t = w2 / (w1 + w2), or t.")
        t = _place(given, config)
        return (1 - t, t), config.model_copy(update={"t": t})

    def merge(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        base: torch.Tensor | None,
        weights: Sequence[float],
        config: Config,
        generator: Callable[[int], torch.Generator],
    ) -> Merged:
        """Interpolate between two tensors, the first at ``t = 0``."""
        x, y = tensors
        found = arc(inner_products(x, y), _place(weights, config), self.zero_is_linear)
        return Merged(combine(tensors, found.coefficients), found.stats)

    def keeps_equal(self, weights: Sequence[float], config: Config) -> bool:
        """Whether equal tensors stay as they are: they are parallel, so they are interpolated linearly."""
        return True


class SlerpDelta(Slerp):
    """Spherical interpolation of two task vectors: the formula of ``slerp`` on ``x = W_1 - W_0``, ``y = W_2 - W_0``.

    Two fine-tuned models of one base lie so close together, seen from the origin, that ``slerp`` is a mean; seen from
    the base their angle is what it is. A delta of zero has no direction: then interpolation is linear.
    """

    name = "slerp_delta"
    summary = "spherical interpolation between the differences of two models from their base"
    operates_on: ClassVar[Literal["weights", "deltas"]] = "deltas"
    zero_is_linear = True

    class Config(SlerpConfig):
        """Options of slerp_delta."""

    def merge_factors(self, factors: Sequence[Factors], *, weights: Sequence[float], config: Any) -> Factors | None:
        """The merged delta in factors, exact: the angle follows from them, and with it the coefficients of a sum."""
        x, y = factors
        products = (inner_of_factors(x, x), inner_of_factors(x, y), inner_of_factors(y, y))
        # Rounding may leave the square of a zero just below it.
        found = arc((max(products[0], 0), products[1], max(products[2], 0)), _place(weights, config), True)
        return concatenated(factors, found.coefficients)


def _place(weights: Sequence[float], config: Any) -> float:
    return float(config.t) if config.t is not None else weights[1] / (weights[0] + weights[1])


class Nuslerp(Merger["Nuslerp.Config"]):
    """mergekit's NuSLERP: ``slerp`` at ``t = w_2 / (w_1 + w_2)``, of task vectors where there is a base.

    Without a linear stretch near parallel vectors (only where they cannot be told from parallel), and by rows if so
    asked. ``row_wise`` and ``flatten`` mean what ``nuslerp_row_wise`` and ``nuslerp_flatten`` mean in mergekit.
    """

    name = "nuslerp"
    summary = "spherical interpolation by weights, of differences from the base where there is one"
    models = (2, 2)

    class Config(harness.Config):
        """Options of nuslerp."""

        flatten: bool = Field(True, description="all entries of a tensor as one vector")
        row_wise: bool = Field(
            False, description="without flatten: vectors along the first axis instead of along the last"
        )

    def merge(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        base: torch.Tensor | None,
        weights: Sequence[float],
        config: Config,
        generator: Callable[[int], torch.Generator],
    ) -> Merged:
        """Interpolate between two tensors, from both of which the base is subtracted first."""
        x, y = tensors if base is None else [combine([tensor, base], [1, -1]) for tensor in tensors]
        total = math.fsum(weights)
        t = 0.5 if abs(total) < 1e-6 else weights[1] / total
        if config.flatten or x.ndim == 0:
            result, stats = _whole(x, y, t)
        else:
            axis = 0 if config.row_wise else -1
            rows, stats = _by_rows(x.movedim(axis, -1), y.movedim(axis, -1), t)
            result = rows.movedim(-1, axis).contiguous()
        return Merged(result if base is None else combine([base, result], [1, 1]), stats)

    def keeps_equal(self, weights: Sequence[float], config: Config) -> bool:
        """Whether equal tensors stay as they are: they are parallel."""
        return True


def _whole(x: torch.Tensor, y: torch.Tensor, t: float) -> tuple[torch.Tensor, dict[str, float]]:
    xx, xy, yy = inner_products(x, y)
    cosine = xy / max(math.sqrt(xx), 1e-7) / max(math.sqrt(yy), 1e-7)
    coefficients, angles, linear = _bend([cosine], t)
    first, second = (float(values[0]) for values in coefficients)
    return combine([x, y], [first, second]), {"slerp_angle_rad": float(angles[0]), "lerp_fallback": float(linear[0])}


def _by_rows(x: torch.Tensor, y: torch.Tensor, t: float) -> tuple[torch.Tensor, dict[str, float]]:
    """Vectors along the last axis; the angle reported is their mean."""
    import numpy as np
    import torch

    a, b = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (x, y))
    if not a.numel():
        return x.clone(), {}
    cosines = []
    step = max(1, BLOCK["cpu" if a.device.type == "cpu" else "other"] // a.shape[1])
    for start in range(0, len(a), step):
        xx, xy, yy = _row_products(a[start : start + step], b[start : start + step])
        cosines.append(xy / xx.sqrt().clamp(min=1e-7) / yy.sqrt().clamp(min=1e-7))
    (first, second), angles, linear = _bend(torch.cat(cosines).cpu().numpy(), t)
    result = torch.empty_like(a)
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        u, v = (torch.from_numpy(np.float32(c[part]))[:, None].to(a.device) for c in (first, second))
        result[part] = u * a[part].float() + v * b[part].float()
    stats = {"slerp_angle_rad": float(np.mean(angles)), "lerp_fallback": float(np.mean(linear))}
    return result.reshape(x.shape), stats


def _row_products(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`inner_products`, for each row."""
    import torch

    if len(a) == 1:  # One row would be one sum, which torch may split among its threads.
        xx, xy, yy = (torch.tensor([one], dtype=torch.float64, device=a.device) for one in inner_products(a, b))
        return xx, xy, yy
    p, q = a.double(), b.double()
    return (p * p).sum(1), (p * q).sum(1), (q * q).sum(1)


def _bend(cosines: Any, t: float) -> tuple[tuple[Any, Any], Any, Any]:
    """Coefficients of both vectors, angles and whether it is linear, for each cosine; numpy on one thread."""
    import numpy as np

    cosine = np.clip(np.asarray(cosines, dtype=np.float64), -1, 1)
    linear = 1 - cosine**2 <= COLINEAR
    angle = np.arccos(np.where(linear, 0.0, cosine))
    first = np.where(linear, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    second = np.where(linear, t, np.sin(t * angle) / np.sin(angle))
    return (first, second), np.arccos(cosine), linear
