"""What plugins add to a board's page: their data drawn and escaped by us; one that raises is named and left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from harness.contracts.report_section import (
    Mark,
    ReportSection,
    SectionBlock,
    SectionCell,
    SectionColumn,
    SectionFigure,
    SectionTable,
    SectionText,
)
from harness.core.text import MINUS, first_line, number, visible
from harness.report.board.model import Board
from harness.report.figures.svg import Canvas
from harness.report.pages.page import line_html


@dataclass(frozen=True)
class Added:
    """What one plugin adds."""

    name: str
    heading: str
    body: Markup
    columns: tuple[SectionColumn, ...]
    figures: tuple[Canvas, ...]
    problem: str | None = None


def added_by(sections: Sequence[ReportSection], board: Board) -> list[Added]:
    """What plugins add, in their order; one that raises says so in its place."""
    return [_added(section, board) for section in sections]


def _added(section: ReportSection, board: Board) -> Added:
    heading = section.heading or section.name
    try:
        config = section.Config()
        # Each gets a copy of its own: none can change what the page or another one shows.
        columns = tuple(section.columns(board.model_dump(mode="json"), config))
        blocks = list(section.blocks(board.model_dump(mode="json"), config))
        keys = {row.key for row in board.rows}
        for column in columns:
            check_column(column, keys)
        figures = tuple(canvas_of(block) for block in blocks if isinstance(block, SectionFigure))
        body = Markup("\n").join(block_html(block) for block in blocks)
    except Exception as error:
        what = f"{section.name} did not come about: {type(error).__name__}: {first_line(str(error))}"
        return Added(section.name, heading, Markup("<p class='note warn'>{}</p>").format(line_html(what)), (), (), what)
    return Added(section.name, heading, body, columns, figures)


def check_column(column: SectionColumn, keys: set[str]) -> None:
    """Raise for what is no column, or has a value for a row that is not there."""
    if not isinstance(column, SectionColumn):
        raise TypeError(f"columns() yielded {type(column).__name__}, which is no SectionColumn")
    unknown = sorted(set(column.values) - keys)
    if unknown:
        raise ValueError(f"column {column.title!r} has a value for {unknown[0]!r}, which is the key of no row")


def cell_text(value: SectionCell) -> str:
    """A cell as text; what is no finite number is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool | str):
        return visible(str(value))
    return f"{value:,}".replace("-", MINUS) if isinstance(value, int) else number(value, minus=MINUS)


def is_number(value: Any) -> bool:
    """Whether a cell is aligned and sorted as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def block_html(block: SectionBlock) -> Markup:
    """One block as HTML.

    Raises:
        TypeError: it is none.
        ValueError: a table's row has another length than its head.
    """
    if isinstance(block, SectionText):
        return Markup("<p>{}</p>").format(line_html(block.text))
    if isinstance(block, SectionFigure):
        said = Markup("<figure tabindex='0'><figcaption>{}</figcaption>{}</figure>")
        return said.format(line_html(block.title), canvas_of(block).inline())
    if isinstance(block, SectionTable):
        return _table(block)
    raise TypeError(f"blocks() yielded {type(block).__name__}; yield SectionText, SectionTable or SectionFigure")


def _table(block: SectionTable) -> Markup:
    lines = []
    for row in block.rows:
        if len(row) != len(block.head):
            raise ValueError(f"a row of {len(row)} cells under a head of {len(block.head)}")
        cells = [
            Markup('<td class="{}">{}</td>').format("num" if is_number(value) else "", cell_text(value))
            for value in row[1:]
        ]
        first = Markup('<th scope="row" class="name">{}</th>').format(cell_text(row[0])) if row else Markup("")
        lines.append(Markup("<tr>{}{}</tr>").format(first, Markup("").join(cells)))
    numeric = [any(is_number(row[place]) for row in block.rows) for place in range(len(block.head))]
    heads = Markup("").join(
        Markup('<th scope="col" class="{}">{}</th>').format("num" if place and some else "", line_html(text))
        for place, (text, some) in enumerate(zip(block.head, numeric, strict=True))
    )
    caption = Markup("<caption>{}</caption>").format(line_html(block.caption)) if block.caption else Markup("")
    whole = Markup("<table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>")
    table = whole.format(caption, heads, Markup("").join(lines))
    return Markup('<div class="scroll" tabindex="0" role="group">{}</div>').format(table)


def canvas_of(figure: SectionFigure) -> Canvas:
    """A plugin's figure, drawn.

    Raises:
        ValueError: a place is no finite number, or a shape is unknown.
    """
    canvas = Canvas(float(figure.width), float(figure.height), figure.title)
    for mark in figure.marks:
        places = [mark.x, mark.y, mark.to_x or 0.0, mark.to_y or 0.0, canvas.width, canvas.height]
        if not all(math.isfinite(place) for place in places):
            raise ValueError(f"a {mark.shape} of figure {figure.title!r} stands at no finite place")
        _draw(canvas, mark)
    return canvas


def _draw(canvas: Canvas, mark: Mark) -> None:
    right, down = mark.to_x if mark.to_x is not None else mark.x, mark.to_y if mark.to_y is not None else mark.y
    if mark.shape == "line":
        canvas.line(mark.x, mark.y, right, down, f"l{mark.series % 8}")
    elif mark.shape == "bar":
        left, top = min(mark.x, right), min(mark.y, down)
        size = f'x="{left:g}" y="{top:g}" width="{abs(right - mark.x):g}" height="{abs(down - mark.y):g}"'
        canvas.parts.append(f'<rect class="p{mark.series % 8}" {size}/>')
    elif mark.shape == "point":
        canvas.mark(mark.x, mark.y, mark.series, hint=mark.text)
    elif mark.shape == "words":
        canvas.text(mark.x, mark.y, mark.text)
    else:
        raise ValueError(f"shape {str(escape(mark.shape))!r} is none of line, bar, point, words")


def column_cells(columns: Sequence[SectionColumn], key: str) -> Markup:
    """The cells that plugins add to one row of the board."""
    return Markup("").join(
        Markup('<td class="added">{}</td>').format(cell_text(column.values.get(key))) for column in columns
    )


def column_values(columns: Sequence[SectionColumn], key: str) -> list[float | None]:
    """What the board sorts by, of the columns that plugins add."""
    values: list[Mapping[str, Any]] = [column.values for column in columns]
    return [float(one[key]) if is_number(one.get(key)) else None for one in values]
