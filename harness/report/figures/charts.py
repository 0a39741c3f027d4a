"""The kinds of figures: bars by arm, differences from a base, curves, one score against another.

Each takes plain points and gives a canvas. A point without an interval is drawn without one; one without a value is
not drawn, and who calls says so in the figure's words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.core.text import MINUS, number
from harness.report.compare_text import signed
from harness.report.figures.svg import Axis, Canvas, axis_over, near, tick_text, width_of

ROW, PANEL, GAP = 22.0, 210.0, 26.0
LEFT_MOST = 300.0


@dataclass(frozen=True)
class Value:
    """A mean with its interval, in the unit of its axis."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def all(self) -> list[float]:
        """The mean and the ends of its interval."""
        return [value for value in (self.mean, self.low, self.high) if value is not None]

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{number(self.low)}, {number(self.high)}]"
        return (number(self.mean) + ends).replace("-", MINUS)


@dataclass(frozen=True)
class Panel:
    """One axis of a figure of rows; ``values`` stand in the order of the rows."""

    title: str
    says: str
    values: tuple[Value | None, ...]
    marked: float | None = None
    """A value that is marked across all rows, as 0 or the base's mean."""


@dataclass(frozen=True)
class Point:
    """A point of two scores, or of a score against what it took."""

    name: str
    series: str
    x: Value
    y: Value


@dataclass(frozen=True)
class Curve:
    """One line of a figure of curves: places on the horizontal axis, each with a value."""

    name: str
    points: tuple[tuple[float, Value], ...]


def rows(
    title: str,
    names: Sequence[str],
    groups: Sequence[str],
    panels: Sequence[Panel],
    *,
    bars: bool,
    kinds: Sequence[str] = (),
) -> Canvas:
    """Arms down, a panel for each benchmark across: bars with intervals, or points with intervals.

    Args:
        title: what it shows, in one sentence.
        names: of the rows.
        groups: what tells the rows' colours apart (the method, say), one each.
        panels: one axis each.
        bars: draw a bar from 0 to each mean; its axis then holds 0.
        kinds: all groups of a board, so that one has the same colour in every figure.
    """
    order = list(dict.fromkeys([*kinds, *groups]))
    left = min(LEFT_MOST, max(map(width_of, names), default=0.0) + 14)
    canvas = Canvas(left + len(panels) * (PANEL + GAP), 0, title)
    top = 44.0
    bottom = top + ROW * len(names)
    for place, panel in enumerate(panels):
        start = left + place * (PANEL + GAP) + 8
        known = [value for one in panel.values if one is not None for value in one.all]
        known += [panel.marked] if panel.marked is not None else []
        axis = axis_over(known, start, start + PANEL, zero=bars)
        if bars and min(known, default=0.0) >= 0:
            axis = Axis(0.0, axis.high, axis.start, axis.end)
        canvas.text(start, 14, panel.title, name="head")
        canvas.text(start, 30, panel.says, name="quiet")
        _frame(canvas, axis, top, bottom)
        if panel.marked is not None:
            canvas.line(axis.at(panel.marked), top, axis.at(panel.marked), bottom, "axis")
        for row, value in enumerate(panel.values):
            y = top + ROW * (row + 0.5)
            if value is None:
                canvas.text(start + 4, y + 4, "–", name="quiet")
                continue
            series = order.index(groups[row])
            if bars:
                zero, end = axis.at(0.0), axis.at(value.mean)
                box = f'x="{near(min(zero, end))}" y="{near(y - 6)}" width="{near(abs(end - zero))}" height="12"'
                canvas.parts.append(f'<rect class="p{series % 8}" opacity=".35" {box}/>')
            _interval(canvas, axis, value, y, series)
            canvas.mark(axis.at(value.mean), y, series, hint=f"{names[row]}, {panel.title}: {value}")
    for row, name in enumerate(names):
        canvas.text(left, top + ROW * (row + 0.5) + 4, _fit(name, left), anchor="end")
    canvas.height = bottom + 28
    if len(set(groups)) > 1:
        canvas.height += 14 + canvas.legend(left + 8, bottom + 50, _told(order, groups))
    return canvas


def scatter(
    title: str,
    says: tuple[str, str],
    points: Sequence[Point],
    front: Sequence[Point] = (),
    *,
    kinds: Sequence[str] = (),
) -> Canvas:
    """One score against another, with intervals both ways; ``front`` is joined by a line, in its order."""
    canvas = Canvas(720, 470, title)
    order = list(dict.fromkeys([*kinds, *(point.series for point in points)]))
    x = axis_over([value for point in points for value in point.x.all], 70, 690)
    y = axis_over([value for point in points for value in point.y.all], 400, 16)
    _frame(canvas, x, 16, 400)
    _side(canvas, y, 70, 690)
    canvas.text(380, 440, says[0], anchor="middle")
    canvas.text(20, 208, says[1], anchor="middle", turn=True)
    if len(front) > 1:
        data = "L".join(f"{near(x.at(point.x.mean))} {near(y.at(point.y.mean))}" for point in front)
        canvas.path(f"M{data}", "front")
    for point in points:
        series = order.index(point.series)
        across, up = x.at(point.x.mean), y.at(point.y.mean)
        _interval(canvas, x, point.x, up, series)
        if point.y.low is not None and point.y.high is not None:
            canvas.line(across, y.at(point.y.low), across, y.at(point.y.high), f"l{series % 8}")
        canvas.mark(across, up, series, size=4.5, hint=f"{point.name}: {point.x}; {point.y}")
    # With many points only those of the front are named; the others' names are hints.
    for point in points if len(points) <= 12 else front:
        end = x.at(point.x.mean) > 560
        shift = -8 if end else 8
        canvas.text(
            x.at(point.x.mean) + shift,
            y.at(point.y.mean) - 7,
            point.name,
            name="quiet",
            anchor="end" if end else "start",
        )
    told = _told(order, [point.series for point in points])
    canvas.height = 464 + (canvas.legend(70, 472, told) if len(told) > 1 else 0)
    return canvas


def curves(title: str, says: tuple[str, str], panels: Sequence[tuple[str, Sequence[Curve]]]) -> Canvas:
    """A panel for each benchmark, a line for each curve, with intervals; equal names have equal colours."""
    names = list(dict.fromkeys(curve.name for _, lines in panels for curve in lines))
    wide, across = 330.0, 2 if len(panels) > 1 else 1
    canvas = Canvas(40 + across * (wide + 60), 0, title)
    for place, (head, lines) in enumerate(panels):
        left = 60 + (place % across) * (wide + 60)
        top = 28 + (place // across) * 270.0
        x = axis_over([at for curve in lines for at, _ in curve.points], left, left + wide)
        y = axis_over([value for curve in lines for _, one in curve.points for value in one.all], top + 200, top)
        canvas.text(left, top - 10, head, name="head")
        _frame(canvas, x, top, top + 200)
        _side(canvas, y, left, left + wide)
        canvas.text(left + wide / 2, top + 234, says[0], name="quiet", anchor="middle")
        canvas.text(left - 44, top + 100, says[1], name="quiet", anchor="middle", turn=True)
        for curve in lines:
            series = names.index(curve.name)
            data = "L".join(f"{near(x.at(at))} {near(y.at(one.mean))}" for at, one in curve.points)
            canvas.path(f"M{data}", f"l{series % 8}")
            for at, one in curve.points:
                if one.low is not None and one.high is not None:
                    canvas.line(x.at(at), y.at(one.low), x.at(at), y.at(one.high), f"l{series % 8}")
                if len(curve.points) <= 40:
                    canvas.mark(x.at(at), y.at(one.mean), series, size=3.2, hint=f"{curve.name}, {at:g}: {one}")
    canvas.height = 28 + 270.0 * ((len(panels) + across - 1) // across)
    if len(names) > 1:
        canvas.height += 6 + canvas.legend(60, canvas.height + 8, list(enumerate(names)))
    return canvas


def pareto(points: Sequence[Point], x_better: bool, y_better: bool) -> list[Point]:
    """Points that no other is at least as good as on both scores and better on one; from one end to the other.

    Args:
        points: to choose from.
        x_better, y_better: whether the higher value is the better one.
    """
    signs = (1 if x_better else -1, 1 if y_better else -1)
    scored = [(signs[0] * point.x.mean, signs[1] * point.y.mean, point) for point in points]
    best: list[tuple[float, float, Point]] = []
    for one in sorted(scored, key=lambda found: (-found[0], -found[1], found[2].name)):
        if not best or one[1] > best[-1][1] or (one[0], one[1]) == (best[-1][0], best[-1][1]):
            best.append(one)
    return [point for _, _, point in best]


def _told(order: Sequence[str], used: Sequence[str]) -> list[tuple[int, str]]:
    """Series with their names, those that a figure shows."""
    return [(series, name) for series, name in enumerate(order) if name in used]


def _frame(canvas: Canvas, axis: Axis, top: float, bottom: float) -> None:
    ticks = axis.ticks
    for tick in ticks:
        canvas.line(axis.at(tick), top, axis.at(tick), bottom, "grid")
        canvas.text(axis.at(tick), bottom + 16, tick_text(tick, ticks), name="quiet", anchor="middle")
    canvas.line(axis.start, bottom, axis.end, bottom, "axis")


def _side(canvas: Canvas, axis: Axis, left: float, right: float) -> None:
    ticks = axis.ticks
    for tick in ticks:
        canvas.line(left, axis.at(tick), right, axis.at(tick), "grid")
        canvas.text(left - 6, axis.at(tick) + 4, tick_text(tick, ticks), name="quiet", anchor="end")
    canvas.line(left, axis.start, left, axis.end, "axis")


def _interval(canvas: Canvas, axis: Axis, value: Value, y: float, series: int) -> None:
    if value.low is not None and value.high is not None:
        canvas.line(axis.at(value.low), y, axis.at(value.high), y, f"l{series % 8}")


def _fit(name: str, room: float) -> str:
    return name if width_of(name) <= room else name[: max(1, int(room / 6.6) - 1)] + "…"


def difference_text(value: Value) -> str:
    """A difference with its interval, signed."""
    ends = "" if value.low is None or value.high is None else f" [{signed(value.low)}, {signed(value.high)}]"
    return (signed(value.mean) + ends).replace("-", MINUS)
