"""axe-core finds nothing serious on any page. It comes by npm and is no part of this repository:

npm install --prefix DIR axe-core; HARNESS_AXE=DIR/node_modules/axe-core/axe.min.js make test
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness.report.board.build import board_of
from harness.report.board.gather import gather
from harness.report.compare import compare_runs
from harness.report.figures.of_board import figures_of
from harness.report.pages.board import Beside, render_board
from harness.report.pages.comparison import write_comparison
from harness.report.pages.write import write_pages
from harness.report.read import open_run
from tests.browser import Browser, Page
from tests.report.pages.boards import CLAIM, board
from tests.report.pages.test_comparison import listed, write_run


@pytest.fixture(scope="module")
def axe() -> str:
    path = os.environ.get("HARNESS_AXE")
    if not path:
        pytest.skip("HARNESS_AXE does not name axe-core's axe.min.js (npm install axe-core): accessibility not checked")
    return Path(path).read_text(encoding="utf-8")


def findings(page: Page, axe: str) -> list[str]:
    """What axe finds serious or critical: rule, and the first element that breaks it."""
    page.run(f"{axe}; true")
    result: dict[str, Any] = page.run(
        "axe.run().then(found => ({checked: found.passes.length, broken: found.violations.map("
        "one => [one.impact, one.id, one.nodes.length, one.nodes[0].html])}))"
    )
    assert result["checked"] > 10
    return [f"{rule}: {count} x {html[:200]}" for impact, rule, count, html in result["broken"] if impact in SERIOUS]


SERIOUS = ("serious", "critical")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_comparison(browser: Browser, axe: str, tmp_path: Path, scheme: str) -> None:
    a, b = write_run(tmp_path / "a", "first"), write_run(tmp_path / "b", "second")
    path = write_comparison(compare_runs(a, b), open_run(a), open_run(b), tmp_path / "out")
    with browser.page(path.as_uri(), media={"prefers-color-scheme": scheme}) as page:
        listed(page)
        page.click("details.sample summary")
        page.until("document.querySelector('.texts pre')")
        assert findings(page, axe) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_board(browser: Browser, axe: str, tmp_path: Path, scheme: str, width: int) -> None:
    shown = board(60, seeds=2, bases=2, claims=(CLAIM,), notes=("a note",))
    figures = [(figure.said, figure.canvas.inline()) for figure in figures_of(shown, {"0-1": 1.0, "0-2": 2.0})]
    beside = Beside(
        date="2026-01-02",
        links={row.key: "arms/x.html" for row in shown.rows},
        samples="samples.html",
        figures=figures[:2],
        more_figures=figures[2:],
        tasks=(("mmlu@0:raw", (("prompt", "raw"),)),),
        pedigree=(("torch", "2"),),
    )
    (tmp_path / "report.html").write_text(render_board(shown, beside), encoding="utf-8")
    with browser.page((tmp_path / "report.html").as_uri(), width=width, media={"prefers-color-scheme": scheme}) as page:
        page.click("#board thead th:nth-child(2) button")
        page.click("button.fold")
        page.run("for (const one of document.querySelectorAll('details')) one.open = true")
        assert findings(page, axe) == []


def test_arm_and_samples(browser: Browser, axe: str, tmp_path: Path) -> None:
    found = gather([write_run(tmp_path / "a", "first"), write_run(tmp_path / "b", "second")])
    path = write_pages(board_of(found), found, tmp_path / "out")
    with browser.page((path.parent / "arms" / "first.html").as_uri()) as page:
        assert findings(page, axe) == []
    with browser.page((path.parent / "samples.html").as_uri()) as page:
        listed(page)
        page.click("#reveal")
        page.until("document.querySelectorAll('.sides').length === 50")
        assert findings(page, axe) == []
