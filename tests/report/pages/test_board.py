"""The board's page in a browser, from file://, and what lies beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.report.board.build import board_of
from harness.report.board.gather import gather
from harness.report.board.model import Board
from harness.report.pages.board import Beside, render_board
from harness.report.pages.write import write_pages
from tests.browser import Browser, Page
from tests.report.pages.boards import CLAIM, board
from tests.report.pages.test_comparison import HOSTILE, right_in_a, write_run

NASTY = "x</script><img src=x onerror=\"document.title='pwned'\">\u202e{{ 7*7 }}"


def written(root: Path, shown: Board, beside: Beside | None = None) -> Path:
    """The page alone, without records."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "report.html").write_text(render_board(shown, beside or Beside(date="2026-01-02")), encoding="utf-8")
    return root / "report.html"


def arms(page: Page) -> list[str]:
    """Names of the rows that are shown, in order."""
    return page.texts("#board tbody tr .arm")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve arms on one base with three seeds, and a claim."""
    shown = board(12, seeds=3, claims=(CLAIM,))
    first = shown.rows[1]
    withheld = first.cells["mmlu@0"].model_copy(update={"withheld": "too many unscored", "mean": None, "ci95": None})
    rows = [
        first.model_copy(update={"cells": {**first.cells, "mmlu@0": withheld}}) if row is first else row
        for row in shown.rows
    ]
    return written(tmp_path_factory.mktemp("small"), shown.model_copy(update={"rows": tuple(rows)}))


def test_the_first_screen_says_what_was_found(browser: Browser, small: Path) -> None:
    with browser.page(small.as_uri()) as page:
        assert page.texts(".kicker") == ["Leaderboard · 2026-01-02"] and page.texts("h1") == ["a study"]
        assert page.texts(".finding") == ["One sentence of what was found."]
        assert page.run("document.getElementById('board').getBoundingClientRect().top < innerHeight / 2")
        assert len(arms(page)) == 13 and page.texts("#said") == ["13 arms"]
        # Of the fifth arm: 0.4 + 0.04 - 0.18 = 0.26, which is 0.14 below its base and lower is worse on MMLU alone.
        row = [one.split() for one in page.texts("#board tbody tr:nth-child(6) td")]
        assert row[0] == ["0.260", "0.240", "to", "0.280", "▼", "−0.140", "worse", "rank", "4"]
        assert row[2] == ["0.260", "0.240", "to", "0.280", "▲", "−0.140", "better", "rank", "4"]
        assert page.texts("#board tbody tr:nth-child(2) td:nth-child(2) b") == ["withheld"]
        assert page.texts(".claims .verdict") == ["supported"]
        assert page.complaints == [] and page.requests == [small.as_uri()]


def test_heads_sort_best_first_and_back_again(browser: Browser, small: Path) -> None:
    with browser.page(small.as_uri()) as page:
        stored = arms(page)
        page.click("#board thead th:nth-child(2) button")  # MMLU: higher is better
        falling = arms(page)
        assert page.run("document.querySelector('#board thead th:nth-child(2)').ariaSort") == "descending"
        assert falling[0] == "base0" and falling[1].endswith("-11") and falling[-1].endswith("-0")  # withheld: last
        page.click("#board thead th:nth-child(2) button")
        rising = arms(page)
        assert rising[:-1] == falling[:-1][::-1] and rising[-1] == falling[-1]
        page.click("#board thead th:nth-child(2) button")
        assert arms(page) == stored
        page.click("#board thead th:nth-child(5) button")  # attack success: lower is better
        assert page.run("document.querySelector('#board thead th:nth-child(5)').ariaSort") == "ascending"
        assert arms(page)[0].endswith("-0") and arms(page)[-1] == "base0"
        page.click("#board thead th:nth-child(1) button")
        assert arms(page) == sorted(
            stored, key=lambda name: (re.sub(r"\d+$", "", name), int(re.findall(r"\d+$", name)[0]))
        )


def test_filter_and_facets_leave_the_rows_that_match(browser: Browser, small: Path) -> None:
    with browser.page(small.as_uri()) as page:
        page.run("document.getElementById('find').focus()")
        page.write("DPO harmless")
        # k % 2 == 1 and k % 3 == 1: 1 and 7.
        assert arms(page) == ["dpo-harmless-base0-1", "dpo-harmless-base0-7"]
        assert page.texts("#said") == ["2 shown of 2 that match, 13 in all"]
        page.choose("#find", "")
        labels = page.texts(".controls label")
        assert [label.split()[0] for label in labels] == ["Filter", "method", "data", "adapter"]
        page.choose("select.facet", "sft")
        assert len(arms(page)) == 6 and all(name.startswith("sft") for name in arms(page))


def test_seeds_unfold_by_keyboard(browser: Browser, small: Path) -> None:
    with browser.page(small.as_uri()) as page:
        page.run("document.querySelector('button.fold').focus()")
        page.press("Enter")
        assert arms(page)[1:5] == ["sft-helpful-base0-0", *(f"sft-helpful-base0-0-s{k}" for k in range(3))]
        assert page.run("document.activeElement.getAttribute('aria-expanded')") == "true"
        # 0.4 + 0 - 0.18, and 0.03 to either side.
        assert page.texts("#board tr.seed td")[0].split() == ["0.220", "0.190", "to", "0.250"]
        page.press("Enter")
        assert len(arms(page)) == 13
        page.click("#unfold")
        assert len(arms(page)) == 13 + 12 * 3
        page.click("#unfold")
        assert len(arms(page)) == 13


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_sticks_out_and_heads_stay(browser: Browser, tmp_path: Path, width: int) -> None:
    path = written(tmp_path, board(60, seeds=2))
    with browser.page(path.as_uri(), width=width) as page:
        assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0
        page.run("document.querySelector('.board').scrollTo(300, 700)")
        box = page.place(".board")
        corner = page.place(".corner")
        assert corner[0] == pytest.approx(box[0], abs=3) and corner[1] == pytest.approx(box[1], abs=3)
        first = page.place("#board tbody tr:nth-child(20) th")[0]
        assert first == pytest.approx(box[0], abs=3)


def test_all_rows_are_printed_and_read_without_a_script(browser: Browser, tmp_path: Path) -> None:
    path = written(tmp_path, board(60))
    assert path.read_text().count('<th scope="row">') == 61
    with browser.page(path.as_uri()) as page:
        assert len(arms(page)) == 50
        page.run("dispatchEvent(new Event('beforeprint'))")
        assert len(arms(page)) == 61
        page.run("dispatchEvent(new Event('afterprint'))")
        assert len(arms(page)) == 50
        page.click("#all")
        assert len(arms(page)) == 61
        page.pdf(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_no_name_is_markup(browser: Browser, tmp_path: Path) -> None:
    shown = board(
        2, seeds=2, title=NASTY, finding=NASTY, notes=(NASTY,), claims=(CLAIM.model_copy(update={"summary": NASTY}),)
    )
    rows = []
    for row in shown.rows:
        seeds = tuple(seed.model_copy(update={"name": f"{NASTY} {seed.seed}"}) for seed in row.seeds)
        rows.append(
            row.model_copy(update={"name": NASTY + row.key, "seeds": seeds, "factors": {"method": NASTY + row.key}})
        )
    path = written(
        tmp_path, shown.model_copy(update={"rows": tuple(rows)}), Beside(tasks=((NASTY, ((NASTY, NASTY),)),))
    )
    assert "\u202e" not in path.read_text()
    with browser.page(path.as_uri()) as page:
        page.click("#unfold")
        assert page.run("[document.images.length, document.scripts.length]") == [0, 2]
        said = NASTY.replace("\u202e", "U+202E")
        assert page.run("document.title") == f"{said} · harness"
        shown_names = arms(page)
        assert len(shown_names) == 7 and all("<img src=x" in name and "49" not in name for name in shown_names)
        assert page.complaints == [] and page.requests == [path.as_uri()]


def test_the_policy_allows_exactly_the_pages_own_style_and_script(small: Path) -> None:
    text = small.read_text(encoding="utf-8")
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0].replace("&#39;", "'")
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    for directive, tag in (("style-src", "style"), ("script-src", "script")):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(body) == 1
        assert (
            parts.pop(directive) == f"'sha256-{base64.b64encode(hashlib.sha256(body[0].encode()).digest()).decode()}'"
        )
    assert parts == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'"}
    assert not re.search(r"<[^>]+\s(style|on\w+)=", text.partition("<body>")[2].partition("<script")[0])


def test_a_thousand_arms_fit_in_five_megabytes_and_fifty_rows_are_laid_out(browser: Browser, tmp_path: Path) -> None:
    path = written(tmp_path, board(1000, seeds=5, bases=4))
    assert path.stat().st_size < 5_000_000
    with browser.page(path.as_uri()) as page:
        page.click("#board thead th:nth-child(2) button")
        assert len(arms(page)) == 50
        assert page.texts("#said") == ["50 shown of 1,004 that match, 1,004 in all"]


# ------------------------------------------------------------------------------------------------------- from records


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    return write_run(root / "a", "first"), write_run(root / "b", "second")


def pages(roots: Sequence[Path], out: Path, **options: Any) -> Path:
    found = gather(list(roots))
    return write_pages(board_of(found), found, out, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pages_are_rebuilt_byte_for_byte_wherever_the_records_lie(runs: tuple[Path, Path], tmp_path: Path) -> None:
    pages(runs, tmp_path / "out")
    first = files(tmp_path / "out")
    assert {"report.html", "samples.html", "arms/first.html", "arms/second.html", "figures/bars.svg"} <= set(first)
    (tmp_path / "out" / "arms" / "mine.html").write_text("somebody's own")
    (tmp_path / "out" / "samples" / "mine.js").write_text("somebody's own")
    moved = tuple(Path(shutil.copytree(run, tmp_path / "elsewhere" / run.name)) for run in runs)
    pages(moved, tmp_path / "out")
    again = files(tmp_path / "out")
    assert again.pop("arms/mine.html") == again.pop("samples/mine.js") == b"somebody's own"
    assert again == first
    assert not any(str(run.parent).encode() in content for run in runs for content in first.values())


def test_pages_of_an_arm_that_is_no_more_go(runs: tuple[Path, Path], tmp_path: Path) -> None:
    pages(runs, tmp_path / "out")
    pages(runs[:1], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "arms").iterdir()) == ["first.html"]


def test_every_link_of_the_board_leads_somewhere(browser: Browser, runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = pages(runs, tmp_path / "out")
    with browser.page(path.as_uri()) as page:
        links = page.run("Array.from(document.links, one => one.getAttribute('href'))")
        assert links and all((path.parent / link).is_file() for link in links)
        assert page.complaints == []
    for arm in ("first", "second"):
        with browser.page((path.parent / "arms" / f"{arm}.html").as_uri()) as page:
            assert page.texts("h1") == [arm] and page.complaints == []
            assert page.texts("tbody tr:first-child td.mean")[0] == f"{mean_of(arm):.3f}"
            page.click(".lede a")
            page.until("document.getElementById('board')")


def mean_of(arm: str) -> float:
    """Of 130 sums, by the rule that they were written by."""
    if arm == "first":
        return sum(right_in_a(k) for k in range(130)) / 130
    return 25 / 129  # 0 to 4 and 110 to 129, without the 8th, which has no score


def test_a_sample_is_opened_from_the_board(browser: Browser, runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = pages(runs, tmp_path / "out")
    with browser.page(path.as_uri()) as page:
        page.click("a[href='samples.html']")
        page.until("document.querySelector('#samples .id')")
        page.click("details.sample summary")
        page.until("document.querySelector('.texts pre')")
        assert HOSTILE[:20] in page.texts(".texts pre")[0]
        assert page.complaints == []


def test_samples_are_left_out_where_that_is_asked_for(runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = pages(runs, tmp_path / "out")
    path = pages(runs, tmp_path / "out", samples=False)
    assert "The 266 samples are not written here: `harness report RUN --samples` does." in path.read_text()
    assert not list((tmp_path / "out" / "samples").iterdir()) and not (tmp_path / "out" / "samples.html").exists()


def test_a_run_without_a_score_has_a_page(browser: Browser, tmp_path: Path) -> None:
    from tests.run_folder import RunFolder

    folder = RunFolder(tmp_path / "run")
    folder.task("late", {"a": {"value": 1.0}}, [], state="running")
    with browser.page(pages((folder.write_plan(),), tmp_path / "out").as_uri()) as page:
        assert page.complaints == []
        assert any("late:raw: not finished" in text for text in page.texts(".remarks li"))


def test_nothing_heavy_is_imported(runs: tuple[Path, Path], tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom harness.report.board.write import write_board\n"
    code += f"write_board([Path(one) for one in {[str(run) for run in runs]!r}], Path({str(tmp_path / 'out')!r}))\n"
    code += "import json\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "vllm", "matplotlib"} & set(json.loads(done.stdout))
