"""The contract of report sections: equal blocks for equal boards, and nothing that a page cannot draw."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from harness.contracts.report_section import ReportSection, SectionColumn
from harness.core.text import visible
from harness.report.board.model import BaseDifference, Board, BoardRow, Cell, Column, SeedCell, SeedRow
from harness.report.pages.sections import block_html, check_column
from harness.testing.common import check_plugin, demand, options_of

NASTY = "<script>alert(1)</script>"


def example_board() -> Board:
    """A small board: a base, an arm of two seeds whose name is markup, a number that is withheld."""
    fields: dict[str, Any] = {
        "variant": "raw",
        "scorer": "match",
        "unit": "proportion",
        "primary": True,
        "n_samples": 10,
    }
    columns = (
        Column(key="c1", label="sums:raw", task="sums", metric="exact_match", higher_is_better=True, **fields),
        Column(key="c2", label="story:raw", task="story", metric="toxicity", higher_is_better=False, **fields),
    )
    less = BaseDifference(base="base", n=10, difference=0.2, verdict="better", ci_adjusted=(0.1, 0.3), p_adjusted=0.01)
    seeds = tuple(
        SeedRow(name=f"arm-s{seed}", seed=seed, cells={"c1": SeedCell(mean=0.6 + seed / 5, n=10)}) for seed in (0, 1)
    )
    cells = {
        "c1": Cell(mean=0.7, ci95=(0.5, 0.9), n=10, n_seeds=2, rank=1, difference=less),
        "c2": Cell(withheld="too many samples are unscored"),
    }
    base = {"c1": Cell(mean=0.5, ci95=(0.3, 0.7), n=10, rank=2), "c2": Cell(mean=0.1, n=10)}
    rows = (
        BoardRow(key="base", name="base", kind="base", base_name="base", cells=base),
        BoardRow(key="arm", name=NASTY, kind="align", base="base", base_name="base", cells=cells, seeds=seeds),
    )
    return Board(harness="0", title="an example", columns=columns, rows=rows)


def check_section(
    section: ReportSection, *, options: Mapping[str, Any] | None = None, board: Board | None = None
) -> None:
    """Try a report section against its contract.

    Args:
        section: the instance that the hook yields.
        options: for its Config.
        board: what it is shown; a small example when absent. It is tried on an empty board, too.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(section, ReportSection)
    config = options_of(section, options)
    for shown in (board or example_board(), Board(harness="0", title="empty")):
        given = shown.model_dump(mode="json")
        kept = copy.deepcopy(given)
        first = list(section.blocks(given, config)), list(section.columns(given, config))
        demand(given == kept, "`blocks` and `columns` leave the board as it is.", "it was changed")
        keys = {row.key for row in shown.rows}
        for block in first[0]:
            try:
                html = block_html(block)
            except (TypeError, ValueError, AttributeError) as error:
                raise AssertionError(f"The page can draw every block.\n  seen: {error}") from error
            demand(NASTY not in html, "What a section gives is data, never markup.", visible(html[:200]))
        for column in first[1]:
            demand(isinstance(column, SectionColumn), "`columns` yields SectionColumn.", type(column).__name__)
            try:
                check_column(column, keys)
            except (TypeError, ValueError) as error:
                raise AssertionError(f"A column has values for keys of rows alone.\n  seen: {error}") from error
        again = list(section.blocks(given, config)), list(section.columns(given, config))
        demand(first == again, "Equal boards give equal blocks: a report is rebuilt byte for byte.", "they differ")
