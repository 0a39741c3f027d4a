"""The board's page: arms as rows, tasks as columns, in each cell mean, interval, difference from the base and rank.

All rows are in the page's HTML, so that it prints and reads without its script; the script sorts, filters and unfolds
seeds. Rows of single seeds are kept as data until somebody asks for them: they are most of a large board.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from harness.contracts.report_section import SectionColumn
from harness.core.text import ARROWS, MINUS, number, visible
from harness.report.board.model import (
    Board,
    BoardRow,
    Cell,
    ClaimResult,
    Column,
    JudgePanel,
    SeedCell,
    SeedRow,
)
from harness.report.board.text import SPREAD, panel_cells, part_text, spread_of, spread_text
from harness.report.compare_text import p_text, signed
from harness.report.figures.svg import STYLE
from harness.report.pages.page import line_html, render_page, script_json
from harness.report.pages.sections import Added, column_cells, column_values

BAR_WIDTH, BAR_MARGIN = 150.0, 4.0
MOST_CHOICES = 40
"""Most values of a factor that are offered as a choice; the filter box finds the others."""
SYMBOLS = {"better": "▲", "worse": "▼"}
SHORT = {"no difference shown": "n.s.", "no difference of size": "too small"}


@dataclass(frozen=True)
class Beside:
    """What the page shows besides the board, made from the same records."""

    date: str = ""
    """Day of the newest record (UTC)."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Key of a row -> its own page, relative."""
    samples: str = ""
    """Page with all samples, relative; empty: there is none."""
    no_samples: str = ""
    """Why there is none."""
    figures: Sequence[tuple[str, Markup]] = ()
    """Heading and SVG of each figure that is shown at once."""
    more_figures: Sequence[tuple[str, Markup]] = ()
    """The same of those that are folded away."""
    added: Sequence[Added] = ()
    """What plugins add."""
    tasks: Sequence[tuple[str, Sequence[tuple[str, str]]]] = ()
    """Task and what is to be said about it."""
    pedigree: Sequence[tuple[str, str]] = ()


def render_board(board: Board, beside: Beside) -> str:
    """The page. Equal boards give equal bytes."""
    columns = shown(board)
    keys = {column.key for column in columns}
    scales = [scale_of(column, board.rows) for column in columns]
    pairs = list(zip(columns, scales, strict=True))
    bases = {row.key: row for row in board.rows}
    factors = varying(board.rows)
    more = [column for one in beside.added for column in one.columns]
    rows = [
        {
            "is_base": row.kind == "base",
            "head": _head(row, factors, beside.links.get(row.key, "")),
            "cells": Markup("".join(_cell(row, bases.get(row.base or ""), *pair) for pair in pairs))
            + column_cells(more, row.key),
        }
        for row in board.rows
    ]
    return render_page(
        "board.html.j2",
        styles=["board.css"],
        more_style=STYLE,
        scripts=["board.js"],
        kicker=" · ".join(part for part in ("Leaderboard", beside.date) if part),
        title=board.title,
        board=board,
        beside=beside,
        shared=_shared(board),
        rows=rows,
        columns=[_column(board, *pair) for pair in pairs],
        more=more,
        facets=[
            (place, name, [visible(value) for value in values])
            for place, (name, values) in enumerate(factors.items())
            if len(values) <= MOST_CHOICES
        ],
        rank_notes=list(dict.fromkeys(column.rank_note for column in columns if column.rank_note)),
        claims=[_claim(one) for one in board.claims],
        judges=[
            _panel(board, one) for one in board.judges if not keys.isdisjoint(asker.column for asker in one.askers)
        ],
        spread=SPREAD,
        remarks=_remarks(board, columns),
        data=Markup(script_json(_data(board, pairs, more, list(factors)))),
    )


def shown(board: Board) -> list[Column]:
    """The columns of primary metrics; all where there is none."""
    return [column for column in board.columns if column.primary] or list(board.columns)


def factors_of(row: BoardRow) -> dict[str, str]:
    """Factors of a row as text, its base among them."""
    found = {
        "base": row.base_name or "",
        **{name: str(value) for name, value in row.factors.items() if value is not None},
    }
    return {name: value for name, value in found.items() if value}


def varying(rows: Iterable[BoardRow]) -> dict[str, list[str]]:
    """Factors that tell rows apart, each with its values in their order; empty stands for rows without."""
    told = [factors_of(row) for row in rows]
    names = dict.fromkeys(name for one in told for name in one)
    found = {name: sorted({one.get(name, "") for one in told}) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


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


def scale_of(column: Column, rows: Iterable[BoardRow]) -> Scale:
    """The axis of one column, seeds included."""
    cells: list[Cell | SeedCell] = []
    for row in rows:
        cells += [row.cells[column.key]] if column.key in row.cells else []
        cells += [seed.cells[column.key] for seed in row.seeds if column.key in seed.cells]
    known = [cell for cell in cells if cell.withheld is None]
    return Scale([value for cell in known for value in (cell.mean, *(cell.ci95 or ())) if value is not None])


# -------------------------------------------------------------------------------------------------------------- cells


def _head(row: BoardRow, several: Collection[str], link: str) -> Markup:
    name = line_html(row.name)
    linked = Markup('<a href="{}">{}</a>').format(link, name) if link else name
    told = " · ".join(visible(value) for key, value in factors_of(row).items() if key in several and value != row.name)
    parts = [Markup('<span class="arm">{}</span>').format(linked)]
    if row.kind == "base":
        parts.append(Markup('<span class="tag">base</span>'))
    if row.kind == "external":
        parts.append(Markup('<span class="tag">made elsewhere</span>'))
    if told:
        parts.append(Markup('<span class="factors">{}</span>').format(told))
    if len(row.seeds) > 1:
        fold = '<button type="button" class="fold js-only" aria-expanded="false">{} seeds</button>'
        parts.append(Markup(fold).format(len(row.seeds)))
    notes = dict.fromkeys(
        cell.difference.note for cell in row.cells.values() if cell.difference is not None and cell.difference.note
    )
    parts += [Markup('<span class="mark">{}</span>').format(line_html(note)) for note in list(notes)[:2]]
    return Markup(" ").join(parts)


def texts_of(cell: Cell | SeedCell) -> tuple[str, str]:
    """Mean and interval as text."""
    if cell.withheld is not None:
        return "withheld", ""
    ends = "" if cell.ci95 is None else " to ".join(number(end, minus=MINUS) for end in cell.ci95)
    return number(cell.mean, minus=MINUS), ends


def said_of(cell: Cell) -> tuple[str, str]:
    """What a cell says of the difference from the base, and its kind: better, worse or empty."""
    one = cell.difference
    if one is None:
        return "", ""
    if one.difference is None:
        return one.verdict, ""
    kind = one.verdict if one.verdict in SYMBOLS else ""
    symbol = f"{SYMBOLS[kind]} " if kind else ""
    return f"{symbol}{signed(one.difference).replace('-', MINUS)} {SHORT.get(one.verdict, one.verdict)}", kind


def counts_of(cell: Cell | SeedCell) -> str:
    """Samples that are not like the others, in words."""
    parts = [(cell.n_unscored, "unscored"), (cell.n_truncated, "truncated")]
    return ", ".join(f"{count:,} {word}" for count, word in parts if count)


def _title(cell: Cell) -> str:
    """What a pointer finds out: the exact figures behind a cell, and its notes."""
    one = cell.difference
    parts = [f"n {cell.n:,}"]
    if one is not None and one.ci_adjusted is not None:
        ends = ", ".join(signed(end) for end in one.ci_adjusted)
        parts.append(f"difference {signed(one.difference)} [{ends}], p {p_text(one.p_adjusted)} (Holm)")
    parts += [cell.withheld or "", cell.note or "", cell.spread_note or ""]
    parts += [(cell.part.note or "") if cell.part is not None else ""]
    return "; ".join(visible(part) for part in parts if part)


def _bar(cell: Cell, base: Cell | None, scale: Scale) -> str:
    """Mean and interval on the column's axis, the base's mean as an upright mark; its numbers stand beside it."""
    if cell.mean is None or cell.withheld is not None:
        return ""
    marks = []
    if base is not None and base.mean is not None and base.withheld is None:
        marks.append(f'<path class="at" d="M{scale.at(base.mean):g} 0V12"/>')
    if cell.ci95 is not None:
        marks.append(f'<path class="ci" d="M{scale.at(cell.ci95[0]):g} 6H{scale.at(cell.ci95[1]):g}"/>')
    marks.append(f'<circle cx="{scale.at(cell.mean):g}" cy="6" r="3.2"/>')
    return f'<svg class="bar" viewBox="0 0 150 12" aria-hidden="true">{"".join(marks)}</svg>'


def _cell(row: BoardRow, base: BoardRow | None, column: Column, scale: Scale) -> str:
    cell = row.cells.get(column.key)
    if cell is None:
        return '<td class="none">–</td>'
    mean, interval = texts_of(cell)
    said, kind = said_of(cell)
    counts = counts_of(cell)
    return (
        f'<td title="{escape(_title(cell))}"><b>{mean}</b>'
        + (f' <span class="ends">{interval}</span>' if interval else "")
        + (f' <span class="ends">{escape(part)}</span>' if (part := part_text(cell)) else "")
        + (f' <span class="ends">{escape(spread)}</span>' if (spread := spread_text(cell)) else "")
        + _bar(cell, base.cells.get(column.key) if base is not None else None, scale)
        + (f'<span class="said {kind}">{escape(said)}</span>' if said else "")
        + (f' <span class="rank">rank {cell.rank}</span>' if cell.rank is not None else "")
        + (f' <span class="counts">{counts}</span>' if counts else "")
        + "</td>"
    )


def _column(board: Board, column: Column, scale: Scale) -> dict[str, Any]:
    cells = [row.cells[column.key] for row in board.rows if column.key in row.cells]
    found = {
        number(cell.difference.detectable_adjusted)
        for cell in cells
        if cell.difference is not None and cell.difference.detectable_adjusted is not None
    }
    ends = sorted(found, key=lambda text: float(text.replace(",", "")))
    tested = any(cell.difference is not None and cell.difference.p_adjusted is not None for cell in cells)
    return {
        "label": column.label,
        "metric": column.metric,
        "arrow": ARROWS[column.higher_is_better],
        "direction": {True: "higher is better", False: "lower is better", None: ""}[column.higher_is_better],
        "n": column.n_samples,
        "detectable": " to ".join(dict.fromkeys((ends[0], ends[-1]))) if ends else "nothing" if tested else "",
        "differs": column.differs[0] if column.differs else "",
        "low": number(scale.low, minus=MINUS),
        "high": number(scale.high, minus=MINUS),
    }


# ------------------------------------------------------------------------------------------------------- what is said


def _shared(board: Board) -> list[tuple[str, str]]:
    """What holds of all arms, once."""
    engines = list(dict.fromkeys(source.engine for source in board.sources if source.engine))
    found = [("engine" if len(engines) == 1 else "engines", ", ".join(engines))] if engines else []
    arms = [factors_of(row) for row in board.rows if row.kind != "base"]
    for name in dict.fromkeys(name for one in arms for name in one):
        values = {one.get(name) for one in arms}
        if len(values) == 1 and len(arms) > 1:
            found.append((name, str(next(iter(values)))))
    seeds = sorted({len(row.seeds) for row in board.rows if row.kind != "base"})
    if seeds and seeds[-1] > 1:
        found.append(("seeds", str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"))
    return [*found, ("level", f"{board.alpha:g} after Holm, within each column")]


def _remarks(board: Board, columns: Sequence[Column]) -> list[str]:
    """What a reader must know: columns of one name, what the board notes, and what arms lack."""
    found = [f"{column.shown}, {'; '.join(column.differs)}" for column in columns if column.differs]
    found += board.notes
    found += [f"{row.name}: {note}" for row in board.rows for note in row.notes]
    return list(dict.fromkeys(found))


def _panel(board: Board, panel: JudgePanel) -> dict[str, Any]:
    """A task under every judge and wording."""
    rows = [
        (row.name, [text or "–" for text in cells], spread_of(row, panel))
        for row in board.rows
        if any(cells := panel_cells(row, panel))
    ]
    agreement = [
        (f"{one.a} and {one.b}", number(one.tau), one.n_rows, number(one.kappa), one.n_answers)
        for one in panel.agreement
    ]
    told = [*panel.remarks, *(f"no spread for {one}" for one in panel.missing)]
    return {"panel": panel, "rows": rows, "agreement": agreement, "told": told}


def _claim(one: ClaimResult) -> dict[str, Any]:
    ends = "" if one.ci95 is None else f" [{', '.join(signed(end) for end in one.ci95)}]"
    sides = [" + ".join(side) for side in (one.rows_a, one.rows_b)]
    return {
        "name": one.name,
        "text": one.summary or one.name,
        "where": f"{one.task} {one.metric}: {sides[0] or '?'} {one.direction} than {sides[1] or '?'}",
        "why": one.why,
        "status": one.status,
        "kind": one.status.partition(" ")[0],
        "effect": "–" if one.effect is None else (signed(one.effect) + ends).replace("-", MINUS),
        "p": p_text(one.p_adjusted),
        "detectable": number(one.detectable),
    }


# --------------------------------------------------------------------------------------------------------------- data


def _data(
    board: Board, pairs: Sequence[tuple[Column, Scale]], more: Sequence[SectionColumn], factors: Sequence[str]
) -> dict[str, Any]:
    """What the script sorts and filters by, and the rows of single seeds."""
    told = [factors_of(row) for row in board.rows]
    return {
        "better": [
            *(-1 if column.higher_is_better is False else 1 for column, _ in pairs),
            *(-1 if one.higher_is_better is False else 1 for one in more),
        ],
        "means": [
            [*(_mean(row.cells.get(column.key)) for column, _ in pairs), *column_values(more, row.key)]
            for row in board.rows
        ],
        "more": len(more),
        "factors": [[visible(one.get(name, "")) for name in factors] for one in told],
        "texts": [
            " ".join(visible(part).lower() for part in (row.name, *one.values()))
            for row, one in zip(board.rows, told, strict=True)
        ],
        "seeds": [[_seed(seed, pairs) for seed in row.seeds] if len(row.seeds) > 1 else [] for row in board.rows],
    }


def _mean(cell: Cell | None) -> float | None:
    return None if cell is None or cell.withheld is not None else cell.mean


def _seed(seed: SeedRow, pairs: Sequence[tuple[Column, Scale]]) -> list[Any]:
    """Name, and for each column mean, interval, what is odd about its samples, and the places on the bar."""
    cells: list[Any] = []
    for column, scale in pairs:
        cell = seed.cells.get(column.key)
        if cell is None:
            cells.append(0)
            continue
        known = cell.mean is not None and cell.withheld is None
        marks = [scale.at(value) for value in (cell.mean, *(cell.ci95 or ())) if known and value is not None]
        cells.append([*texts_of(cell), counts_of(cell), marks])
    return [visible(seed.name), cells]
