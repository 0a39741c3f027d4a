"""A small canvas for figures: marks and words by class, written as a file of its own or into a page.

Of our own, since what a figure here needs is points, intervals and words on linear axes: a charting library would bring
a script of hundreds of kilobytes under the page's policy or, as matplotlib does, its version and fonts into the bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from harness.core.text import MINUS, visible

# Told apart by shape, too, and each at least 3 : 1 against both papers.
SERIES = ("#2a6fb0", "#c2500a", "#0f8060", "#a1497f", "#8a6a00", "#4d7c8a", "#7a6bb5", "#7d7d7d")
SHAPES = ("circle", "square", "triangle", "diamond")
STYLE = (
    "svg.figure text{font:12px system-ui,'Liberation Sans',Arial,sans-serif;fill:currentColor}"
    ".figure .quiet{opacity:.72;font-size:11px}.figure .head{font-weight:600}"
    ".figure .grid{stroke:currentColor;opacity:.14;fill:none}.figure .axis{stroke:currentColor;opacity:.5;fill:none}"
    ".figure .front{stroke:currentColor;opacity:.6;fill:none;stroke-dasharray:5 4}"
    + "".join(
        f".figure .l{k}{{stroke:{c};stroke-width:1.6;fill:none}}.figure .p{k}{{fill:{c}}}" for k, c in enumerate(SERIES)
    )
)
"""Style of all figures; a page has it in its style sheet, a file of its own has it within."""


def near(value: float) -> str:
    """A coordinate: one decimal, without zeros that say nothing."""
    return (
        f"{value:.1f}".removesuffix(".0").replace("-0", "0") if abs(value) < 0.05 else f"{value:.1f}".removesuffix(".0")
    )


def width_of(text: str) -> float:
    """About how wide a text of 12 px is; figures leave room by it, and nothing depends on it being exact."""
    return sum(11.5 if ord(char) > 0x2E80 else 6.4 for char in text)


@dataclass
class Canvas:
    """A figure in the making; ``title`` says in one sentence what it shows, for who cannot see it."""

    width: float
    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def path(self, data: str, name: str) -> None:
        """A line, by SVG path data."""
        self.parts.append(f'<path class="{name}" d="{data}"/>')

    def line(self, x0: float, y0: float, x1: float, y1: float, name: str) -> None:
        """A straight line."""
        self.path(f"M{near(x0)} {near(y0)}L{near(x1)} {near(y1)}", name)

    def text(self, x: float, y: float, text: str, *, name: str = "", anchor: str = "start", turn: bool = False) -> None:
        """Words; ``turn``: upwards, as along an axis."""
        kind = f' class="{name}"' if name else ""
        side = f' text-anchor="{anchor}"' if anchor != "start" else ""
        turned = f' transform="rotate(-90 {near(x)} {near(y)})"' if turn else ""
        self.parts.append(f'<text x="{near(x)}" y="{near(y)}"{kind}{side}{turned}>{escape(visible(text))}</text>')

    def mark(self, x: float, y: float, series: int, *, size: float = 4.0, hint: str = "") -> None:
        """A point in colour and shape of its series; ``hint`` is what a pointer finds out."""
        name, told = f"p{series % len(SERIES)}", f"<title>{escape(visible(hint))}</title>" if hint else ""
        shape = SHAPES[series % len(SHAPES)]
        if shape == "circle":
            self.parts.append(f'<circle class="{name}" cx="{near(x)}" cy="{near(y)}" r="{near(size)}">{told}</circle>')
            return
        corners = {
            "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
            "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        }[shape]
        data = "L".join(f"{near(x + size * dx)} {near(y + size * dy)}" for dx, dy in corners)
        self.parts.append(f'<path class="{name}" d="M{data}Z">{told}</path>')

    def legend(self, x: float, y: float, names: Sequence[tuple[int, str]]) -> float:
        """Names of series in lines no wider than the canvas; returns the height that they take."""
        left, line = x, 0
        for series, name in names:
            room = width_of(name) + 34
            if left + room > self.width and left > x:
                left, line = x, line + 1
            self.mark(left + 5, y + 20 * line - 4, series)
            self.text(left + 14, y + 20 * line, name)
            left += room
        return 20.0 * (line + 1)

    def inline(self) -> Markup:
        """The figure for a page whose style sheet holds `STYLE`."""
        return Markup(self._whole(""))

    def file(self) -> bytes:
        """The figure as a file of its own, dark on white."""
        return (
            self._whole(' xmlns="http://www.w3.org/2000/svg" color="#1d1f22"', f"<style>{STYLE}</style>{self._paper()}")
            + "\n"
        ).encode()

    def _paper(self) -> str:
        return f'<rect width="{near(self.width)}" height="{near(self.height)}" fill="#fff"/>'

    def _whole(self, more: str, before: str = "") -> str:
        wide, high, title = near(self.width), near(self.height), escape(visible(self.title))
        size = f'viewBox="0 0 {wide} {high}" width="{wide}" height="{high}"'
        inner = f"<title>{title}</title>{before}{''.join(self.parts)}"
        return f'<svg{more} class="figure" {size} role="img" aria-label="{title}">{inner}</svg>'


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high`` (in the data's unit), drawn between two places."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value is drawn."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values within, about one in 70 px."""
        count = max(2.0, abs(self.end - self.start) / 70)
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_over(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Axis:
    """The axis that holds some values with a margin; ``zero``: and 0."""
    known = [value for value in values if math.isfinite(value)] + ([0.0] if zero else [])
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    pad = 0.05 * (high - low) or max(abs(high) * 0.1, 0.01)
    return Axis(low - pad, high + pad, start, end)


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick with as many decimals as its axis needs."""
    steps = [abs(b - a) for a, b in itertools.pairwise(ticks)] or [abs(value) or 1.0]
    digits = max(0, min(6, -math.floor(math.log10(min(steps)) + 1e-9)))
    if digits < 6 and abs(min(steps) * 10**digits - round(min(steps) * 10**digits)) > 1e-6:
        digits += 1  # steps of 2.5
    return f"{value + 0.0:,.{digits}f}".replace("-", MINUS)
