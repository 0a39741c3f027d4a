"""The board's page: arms as rows, tasks as columns, in each cell mean, interval, difference from the base and rank.

All rows are in the page's HTML, so that it prints and reads without its script; the script sorts, filters and unfolds
seeds. Rows of single seeds are kept as data until somebody asks for them: they are most of a large board.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from harness.core.text import ARROWS, MINUS, number, visible
from harness.report.compare_text import p_text, signed
from harness.report.pages.page import line_html, render_page, script_json
from harness.report.pages.view import BoardView, Cell, Column, Line
from harness.report.text import HOW_TO_READ

BAR_WIDTH, BAR_MARGIN = 150.0, 4.0
MOST_CHOICES = 40
"""Most values of a factor that are offered as a choice; the filter box finds the others."""
SYMBOLS = {"better": "▲", "worse": "▼"}
SHORT = {"no difference shown": "n.s.", "no difference of size": "too small"}


def render_board(view: BoardView, *, figures: Sequence[tuple[str, Markup]] = (), more: Sequence[Any] = ()) -> str:
    """The page. Equal views give equal bytes.

    Args:
        view: what it shows.
        figures: heading and SVG of each figure, in order.
        more: sections that plugins add.
    """
    scales = [scale_of(column, place, view.lines) for place, column in enumerate(view.columns)]
    factors = varying(view.lines)
    rows = []
    for line in view.lines:
        base = view.base_of(line)
        cells = [_cell(line, base, place, scale) for place, scale in enumerate(scales)]
        rows.append({"line": line, "head": _head(line, factors), "cells": Markup("".join(cells))})
    return render_page(
        "board.html.j2",
        styles=["board.css", "figures.css"],
        scripts=["board.js"],
        kicker=" · ".join(part for part in ("Leaderboard", view.date) if part),
        title=view.title,
        view=view,
        rows=rows,
        columns=[_column(column, scale) for column, scale in zip(view.columns, scales, strict=True)],
        facets=[
            (place, name, [visible(value) for value in values])
            for place, (name, values) in enumerate(factors.items())
            if len(values) <= MOST_CHOICES
        ],
        figures=figures,
        more=more,
        how_to_read=[(word, text.replace("`", "")) for word, text in HOW_TO_READ],
        data=Markup(script_json(_data(view, scales, list(factors)))),
    )


def varying(lines: Iterable[Line]) -> dict[str, list[str]]:
    """Factors that tell rows apart, each with its values in their order."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        for name, value in line.factors.items():
            found.setdefault(name, {})[value] = None
    return {name: sorted(values) for name, values in found.items() if len(values) > 1}


# ------------------------------------------------------------------------------------------------------------- scales


class Scale:
    """The axis of a column: what its means and intervals span, a little wider."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        pad = 0.06 * (high - low) or max(abs(high) * 0.1, 0.01)
        self.low, self.high = low - pad, high + pad

    def at(self, value: float) -> float:
        """Where a value stands on a bar (in its own units of length)."""
        share = min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        return round(BAR_MARGIN + share * (BAR_WIDTH - 2 * BAR_MARGIN), 1)


def scale_of(column: Column, place: int, lines: Iterable[Line]) -> Scale:
    """The axis of one column, seeds included."""
    values = [
        value
        for line in lines
        for one in (line, *line.seeds)
        if (cell := one.cells[place]) is not None and cell.withheld is None
        for value in (cell.mean, cell.low, cell.high)
        if value is not None and math.isfinite(value)
    ]
    return Scale(values)


# -------------------------------------------------------------------------------------------------------------- cells


def _head(line: Line, several: Collection[str]) -> Markup:
    name = line_html(line.name)
    linked = Markup('<a href="{}">{}</a>').format(line.link, name) if line.link else name
    factors = " · ".join(
        visible(value) for key, value in line.factors.items() if key in several and value and value != line.name
    )
    parts = [Markup('<span class="arm">{}</span>').format(linked)]
    if line.is_base:
        parts.append(Markup('<span class="tag">base</span>'))
    if factors:
        parts.append(Markup('<span class="factors">{}</span>').format(factors))
    if len(line.seeds) > 1:
        parts.append(
            Markup('<button type="button" class="fold js-only" aria-expanded="false">{} seeds</button>').format(
                len(line.seeds)
            )
        )
    if line.note:
        parts.append(Markup('<span class="mark">{}</span>').format(line_html(line.note)))
    return Markup(" ").join(parts)


def texts_of(cell: Cell) -> tuple[str, str]:
    """Mean and interval as text."""
    if cell.withheld is not None:
        return "withheld", ""
    if cell.mean is None:
        return "–", ""
    ends = "" if cell.low is None or cell.high is None else f"{number(cell.low, minus=MINUS)} to {number(cell.high, minus=MINUS)}"
    return number(cell.mean, minus=MINUS), ends


def said_of(cell: Cell) -> tuple[str, str]:
    """What a cell says of the difference from the base, and its kind: better, worse or empty."""
    if cell.difference is None:
        return ("not comparable" if cell.verdict == "not comparable" else ""), ""
    kind = cell.verdict if cell.verdict in SYMBOLS else ""
    word = SHORT.get(cell.verdict or "", cell.verdict or "")
    symbol = f"{SYMBOLS[kind]} " if kind else ""
    return f"{symbol}{signed(cell.difference).replace('-', MINUS)} {word}".rstrip(), kind or ""


def _counts(cell: Cell) -> str:
    parts = [(cell.n_unscored, "unscored"), (cell.n_truncated, "truncated")]
    return ", ".join(f"{count:,} {word}" for count, word in parts if count)


def _title(cell: Cell) -> str:
    """What a pointer finds out: the exact figures behind a cell, and its notes."""
    parts = [f"n {cell.n:,}", _counts(cell)]
    if cell.difference is not None and cell.difference_low is not None and cell.difference_high is not None:
        ends = (signed(cell.difference_low), signed(cell.difference_high))
        parts.append(f"difference {signed(cell.difference)} [{ends[0]}, {ends[1]}], p {p_text(cell.p)} (Holm)")
    parts += [cell.withheld or "", *cell.notes]
    return "; ".join(visible(part) for part in parts if part)


def _bar(cell: Cell, base: Cell | None, scale: Scale) -> str:
    """Mean and interval on the column's axis, the base's mean as an upright mark. Decoration: its numbers stand beside."""
    if cell.mean is None or cell.withheld is not None:
        return ""
    marks = []
    if base is not None and base.mean is not None and base.withheld is None:
        marks.append(f'<path class="at" d="M{scale.at(base.mean):g} 0V12"/>')
    if cell.low is not None and cell.high is not None:
        marks.append(f'<path class="ci" d="M{scale.at(cell.low):g} 6H{scale.at(cell.high):g}"/>')
    marks.append(f'<circle cx="{scale.at(cell.mean):g}" cy="6" r="3.2"/>')
    return f'<svg class="bar" viewBox="0 0 150 12" aria-hidden="true">{"".join(marks)}</svg>'


def _cell(line: Line, base: Line | None, place: int, scale: Scale) -> str:
    cell = line.cells[place]
    if cell is None:
        return '<td class="none">–</td>'
    mean, interval = texts_of(cell)
    said, kind = said_of(cell)
    reference = base.cells[place] if base is not None else None
    counts = _counts(cell)
    return (
        f'<td title="{escape(_title(cell))}"><b>{mean}</b>'
        + (f' <span class="ends">{interval}</span>' if interval else "")
        + _bar(cell, reference, scale)
        + (f'<span class="said {kind}">{escape(said)}</span>' if said else "")
        + (f'<span class="rank">rank {cell.rank}</span>' if cell.rank is not None else "")
        + (f'<span class="counts">{counts}</span>' if counts else "")
        + "</td>"
    )


def _column(column: Column, scale: Scale) -> dict[str, Any]:
    direction = {True: "higher is better", False: "lower is better", None: ""}[column.higher_is_better]
    return {
        "task": column.task,
        "metric": column.metric,
        "arrow": ARROWS[column.higher_is_better],
        "direction": direction,
        "n": column.n,
        "detectable": column.detectable,
        "low": number(scale.low, minus=MINUS),
        "high": number(scale.high, minus=MINUS),
    }


# --------------------------------------------------------------------------------------------------------------- data


def _data(view: BoardView, scales: Sequence[Scale], factors: Sequence[str]) -> dict[str, Any]:
    """What the script sorts and filters by, and the rows of single seeds."""
    return {
        "better": [-1 if column.higher_is_better is False else 1 for column in view.columns],
        "means": [
            [cell.mean if cell is not None and cell.withheld is None else None for cell in line.cells]
            for line in view.lines
        ],
        "factors": [[visible(line.factors.get(name, "")) for name in factors] for line in view.lines],
        "texts": [_sought(line.name, line.factors) for line in view.lines],
        "seeds": [[_seed(seed, scales) for seed in line.seeds] if len(line.seeds) > 1 else [] for line in view.lines],
    }


def _sought(name: str, factors: Mapping[str, str]) -> str:
    return " ".join(visible(part).lower() for part in (name, *factors.values()))


def _seed(seed: Line, scales: Sequence[Scale]) -> list[Any]:
    """Name, and for each column mean, interval, what is said of it, its kind, and the three places on the bar."""
    cells: list[Any] = []
    for place, scale in enumerate(scales):
        cell = seed.cells[place]
        if cell is None:
            cells.append(0)
            continue
        marks = [] if cell.mean is None or cell.withheld is not None else [scale.at(cell.mean)]
        if marks and cell.low is not None and cell.high is not None:
            marks += [scale.at(cell.low), scale.at(cell.high)]
        cells.append([*texts_of(cell), *said_of(cell), marks])
    return [visible(seed.name), cells]
