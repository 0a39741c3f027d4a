"""A package by a third party that adds a section, a figure and a column to a report."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from harness.contracts.report_section import (
    Mark,
    ReportSection,
    SectionBlock,
    SectionColumn,
    SectionFigure,
    SectionTable,
    SectionText,
)
from harness.report.board.build import board_of
from harness.report.board.gather import gather
from harness.report.pages.board import Beside, render_board
from harness.report.pages.sections import added_by
from harness.report.pages.write import write_pages
from harness.testing import check_section, example_board
from tests.browser import Browser
from tests.report.pages.boards import board
from tests.report.pages.conftest import browser  # noqa: F401 - a fixture here, too
from tests.report.pages.test_comparison import write_run

PACKAGE = Path(__file__).parent / "harness_margin"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PACKAGE))
    return importlib.import_module("harness_margin")


def test_it_uses_public_names_alone() -> None:
    source = (PACKAGE / "harness_margin" / "__init__.py").read_text(encoding="utf-8")
    assert {line.split()[1] for line in source.splitlines() if line.startswith(("from harness", "import harness"))} == {
        "harness"
    }


def test_it_passes_the_contract_kit(package: ModuleType) -> None:
    check_section(package.Margin())


def test_its_section_figure_and_column_are_on_the_page(
    browser: Browser,  # noqa: F811
    package: ModuleType,
    tmp_path: Path,
) -> None:
    found = gather([write_run(tmp_path / "a", "first"), write_run(tmp_path / "b", "second")])
    shown = board_of(found)
    path = write_pages(shown, found, tmp_path / "out", sections=[package.Margin()])
    assert (tmp_path / "out" / "figures" / "margin-1.svg").is_file()
    with browser.page(path.as_uri()) as page:
        assert "Distance from the best" in page.texts("h2")
        # 120 of 130 less 25 of 129.
        assert page.texts("td.added") == ["0.000", f"{120 / 130 - 25 / 129:.3f}"]
        assert page.complaints == []
        page.click("#board thead th:last-child button")
        assert page.texts("#board tbody tr .arm") == ["first", "second"]
        page.click("#board thead th:last-child button")
        assert page.texts("#board tbody tr .arm") == ["second", "first"]


COUNT = itertools.count()


class Hostile(ReportSection):
    """Everything that it says is markup."""

    name = "hostile"
    heading = "<h1>free</h1>"
    summary = "says markup"

    def blocks(self, board: Mapping[str, Any], config: Any) -> Iterator[SectionBlock]:
        nasty = "</section><img src=x onerror=\"document.title='pwned'\"><style>*{display:none}</style>\u202e"
        yield SectionText(nasty)
        yield SectionTable((nasty, nasty), [(nasty, nasty)], caption=nasty)
        marks = [Mark("words", 1, 1, text=nasty), Mark("point", 1, 1, text=nasty, series=9)]
        yield SectionFigure(nasty, 10, 10, marks)

    def columns(self, board: Mapping[str, Any], config: Any) -> Iterator[SectionColumn]:
        yield SectionColumn("<b>column</b>", {row["key"]: "<b>cell</b>" for row in board["rows"]}, "<i>says</i>")


def test_what_a_plugin_says_is_never_markup(browser: Browser, tmp_path: Path) -> None:  # noqa: F811
    shown = board(2)
    path = tmp_path / "report.html"
    path.write_text(render_board(shown, Beside(added=added_by([Hostile()], shown))), encoding="utf-8")
    assert "\u202e" not in path.read_text(encoding="utf-8")
    with browser.page(path.as_uri()) as page:
        counted = "[document.images.length, document.styleSheets.length, document.querySelectorAll('h1').length]"
        assert page.run(counted) == [0, 1, 1] and page.run("document.querySelectorAll('#board td b + b').length") == 0
        assert page.texts("td.added") == ["<b>cell</b>"] * 3
        assert page.complaints == [] and page.requests == [path.as_uri()]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"blocks": lambda self, board, config: ["<b>markup</b>"]}, "The page can draw every block"),
        ({"blocks": lambda self, board, config: [SectionTable(("a", "b"), [("x",)])]}, "a row of 1 cells under a head"),
        ({"blocks": lambda self, board, config: board["rows"].clear() or ()}, "leave the board as it is"),
        ({"blocks": lambda self, board, config: [SectionText(str(next(COUNT)))]}, "Equal boards"),
        (
            {"blocks": lambda self, board, config: [SectionFigure("f", 9, 9, [Mark("line", float("nan"), 0)])]},
            "stands at no finite place",
        ),
        (
            {"columns": lambda self, board, config: [SectionColumn("c", {"nobody": 1.0})]},
            "'nobody', which is the key of no row",
        ),
    ],
)
def test_a_broken_section_fails_and_leaves_the_page(overrides: dict[str, Any], words: str) -> None:
    broken = type("Broken", (Hostile,), {"name": "broken", **overrides})()
    with pytest.raises(AssertionError, match=words):
        check_section(broken)


def test_a_section_that_raises_is_named_and_the_rest_stands() -> None:
    def fail(self: Any, board: Any, config: Any) -> Any:
        raise KeyError("its own mistake")

    shown = example_board()
    (added,) = added_by([type("Broken", (Hostile,), {"name": "broken", "blocks": fail})()], shown)
    assert added.problem == "broken did not come about: KeyError: 'its own mistake'" and added.columns == ()
    page = render_board(shown, Beside(added=[added]))
    assert "broken did not come about: KeyError: &#39;its own mistake&#39;" in page and "0.700" in page
