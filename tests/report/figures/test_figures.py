"""Figures as SVG: places derived by hand, the same bytes every time, nothing that is not in the numbers."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from harness.contracts.registry import load_plugins
from harness.report.board.model import Board, BoardRow, Cell
from harness.report.figures.charts import Panel, Point, Value, pareto, rows
from harness.report.figures.of_board import HARMLESS, HELPFUL, MOST_ROWS, Figure, figures_of
from harness.report.figures.svg import Axis, axis_over, near, tick_text
from harness.tasks.catalog import load_catalog
from tests.report.pages.boards import board


def named(shown: Board, **more: float) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures_of(shown, more)}


def test_an_axis_puts_values_where_they_belong() -> None:
    axis = Axis(0.0, 0.5, 100.0, 300.0)
    assert [axis.at(value) for value in (0.0, 0.25, 0.5)] == [100.0, 200.0, 300.0]
    # 200 px hold two or three ticks: of 0.5 / 2.86 = 0.175 the next round step is 0.2.
    assert axis.ticks == [0.0, 0.2, 0.4]
    assert [tick_text(tick, axis.ticks) for tick in axis.ticks] == ["0.0", "0.2", "0.4"]
    # 0.4 to 0.6, a twentieth of it wider at either end.
    assert axis_over([0.4, 0.6], 0, 1) == Axis(pytest.approx(0.39), pytest.approx(0.61), 0, 1)
    assert axis_over([], 0, 1).low < axis_over([], 0, 1).high


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (-0.01, "0"), (12.0, "12"), (-3.25, "-3.2"), (0.16, "0.2")])
def test_coordinates_are_short(value: float, text: str) -> None:
    assert near(value) == text


def test_a_row_is_drawn_to_scale() -> None:
    panel = Panel("task", "metric", (Value(0.5, 0.25, 0.75), None))
    canvas = rows("what it shows", ["a", "b"], ["x", "x"], [panel], bars=False)
    # The names take 6.4 + 14 px, the panel begins 8 further; 0.25 to 0.75 with margins of 0.025 on 210 px.
    start = 6.4 + 14 + 8
    places = [start + 210 * (value - 0.225) / 0.55 for value in (0.25, 0.5, 0.75)]
    assert f'<circle class="p0" cx="{near(places[1])}" cy="55" r="4">' in canvas.inline()
    assert f'<path class="l0" d="M{near(places[0])} 55L{near(places[2])} 55"/>' in canvas.inline()
    assert canvas.inline().count("<circle") == 1 and ">–</text>" in canvas.inline()  # what is not known is no 0


def test_pareto_keeps_what_no_other_beats() -> None:
    def point(name: str, x: float, y: float) -> Point:
        return Point(name, "", Value(x), Value(y))

    # Higher x, lower y: d is beaten by c (same x, lower y), e by a and b and c.
    points = [
        point("a", 0.1, 0.1),
        point("b", 0.5, 0.2),
        point("c", 0.9, 0.6),
        point("d", 0.9, 0.7),
        point("e", 0.05, 0.9),
    ]
    assert [one.name for one in pareto(points, True, False)] == ["c", "b", "a"]
    assert [one.name for one in pareto(points, True, True)] == ["d", "e"]
    twins = [point("a", 1.0, 1.0), point("b", 1.0, 1.0)]
    assert [one.name for one in pareto(twins, True, True)] == ["a", "b"]


def test_every_figure_is_a_whole_file_of_the_same_bytes() -> None:
    hours = {row.key: 1.0 + place for place, row in enumerate(board(8).rows) if row.kind != "base"}
    first, again = named(board(8), **hours), named(board(8), **hours)
    assert set(first) == {
        *("bars", "bars-2", "differences", "differences-2", "by-gpu-hour", *(f"by-gpu-hour-{n}" for n in range(2, 6))),
        *("trade-off", *(f"trade-off-{n}" for n in range(2, 7))),
    }
    for name, figure in first.items():
        text = figure.canvas.file()
        assert text == again[name].canvas.file()
        tree = ElementTree.fromstring(text)
        assert tree.findtext("{http://www.w3.org/2000/svg}title") == figure.said
        assert not re.search(rb"nan|inf|href|script", text)


def test_names_in_a_figure_are_no_markup() -> None:
    shown = board(2)
    nasty = [row.model_copy(update={"name": f"<script>{row.key}</script>\u202e"}) for row in shown.rows]
    for figure in figures_of(shown.model_copy(update={"rows": tuple(nasty)})):
        text = figure.canvas.file().decode()
        ElementTree.fromstring(text)
        assert "<script" not in text and "\u202e" not in text


def test_many_arms_are_the_best_by_rank_and_the_figure_says_so() -> None:
    figure = named(board(100, tasks=1))["bars"]
    assert figure.said.endswith(f" Of 101 arms the {MOST_ROWS} with the best mean rank.")
    shown = re.findall(r'text-anchor="end">([^<]+)<', figure.canvas.inline())
    # Ranks are 0 to 99 (the base's is 1), so that the base and arms 0 to 58 are shown.
    assert len(shown) == MOST_ROWS and {int(name.rpartition("-")[2]) for name in shown if "-" in name} == set(range(59))


def sized(factor: str, means: dict[int, float]) -> Board:
    """One arm at several sizes of its training, on one task."""
    shown = board(1, tasks=1)
    made = []
    for size, mean in means.items():
        cells = {"mmlu@0": Cell(mean=mean, ci95=(mean - 0.1, mean + 0.1), n=9)}
        told = {"base": "base0", "base_name": "base0", "factors": {"method": "dpo", factor: size}, "cells": cells}
        made.append(BoardRow(key=str(size), name=f"dpo-{size}", kind="align", **told))
    return shown.model_copy(update={"rows": (shown.rows[0], *made)})


@pytest.mark.parametrize("factor", ["samples", "step"])
def test_curves_over_sizes_and_in_per_cent_of_the_greatest(factor: str) -> None:
    found = named(sized(factor, {1600: 0.8, 100: 0.2, 400: 0.4}))
    hints = re.findall(r"<title>score, ([^<]+)</title>", found[f"by-{factor}"].canvas.inline())
    assert hints == ["100: 0.200 [0.100, 0.300]", "400: 0.400 [0.300, 0.500]", "1600: 0.800 [0.700, 0.900]"]
    # 0.2 of 0.8 is a quarter, its interval's ends an eighth and three eighths.
    hints = re.findall(r"<title>score, ([^<]+)</title>", found[f"by-{factor}-percent"].canvas.inline())
    assert hints[0] == "100: 25.000 [12.500, 37.500]" and hints[-1] == "1600: 100.000 [87.500, 112.500]"
    assert f"by-{factor}" not in named(sized(factor, {100: 0.2}))


def test_what_is_withheld_is_not_drawn() -> None:
    shown = sized("samples", {100: 0.2, 1600: 0.8})
    rows_ = [
        row.model_copy(
            update={"cells": {key: one.model_copy(update={"withheld": "why"}) for key, one in row.cells.items()}}
        )
        for row in shown.rows
    ]
    assert figures_of(shown.model_copy(update={"rows": tuple(rows_)})) == []


def test_both_sides_of_the_trade_off_are_those_of_the_suites() -> None:
    """Tasks that the suites `helpful` and `harmless` ask; a new one must be put on its side."""
    catalog = load_catalog(load_plugins())
    for suite, names in (("helpful", HELPFUL), ("harmless", HARMLESS)):
        asked = {str(task).partition("@")[0].partition(":")[0] for task in catalog.suites[suite][0].tasks}
        assert asked <= set(names), suite
