"""`harness compare --html`: every sample of two runs side by side, in a browser, from file://."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.report.compare import compare_runs
from harness.report.pages import side_files
from harness.report.pages.comparison import write_comparison
from harness.report.read import open_run
from tests.browser import Browser, Page
from tests.run_folder import ACC, TOX, RunFolder

HOSTILE = "</script></pre><img src=x onerror=\"document.title='pwned'\">\u202e {{ 7*7 }} \x00\x00 <b>bold</b>"
SUMS = 130
"""Samples of the first task: three pages of 50."""


def row(metric: str = "acc", **fields: Any) -> dict[str, Any]:
    return {"metric": metric, "n": 4, "mean": 0.5, "stderr": 0.28, "ci95": (0.15, 0.85), **fields}


def write_run(root: Path, model: str) -> Path:
    """Of 130 sums, A has every one right but the first 10; B has every one wrong but the last 20 (and 5 of those 10).

    The 8th answer of B has no score, the 4th of both is truncated, and so is the 5th prompt of B.
    """
    folder = RunFolder(root, model=model)
    right = right_in_a if model == "first" else right_in_b
    sums = {
        f"sum/{k:03}": {
            "value": None if k == 7 and model == "second" else float(right(k)),
            "leaf": f"leaf{k % 2}",
            "prompt": f"prompt of {k} {HOSTILE}",
            "target": str(k),
            "answer": f"{model} says {k} {HOSTILE}",
            "hit_limit": k == 3,
            "cut": k == 4 and model == "second",
            "reason": "the judge was silent" if k == 7 and model == "second" else None,
        }
        for k in range(SUMS)
    }
    known = [one["value"] for one in sums.values() if one["value"] is not None]
    counted = {"n": len(known), "n_unscored": SUMS - len(known), "mean": sum(known) / len(known)}
    folder.task("sums", sums, [row(**counted)], metrics=(ACC,))
    story = {
        f"s{k}": {"value": k + (model == "second") * 0.5, "choices": [(" A", -1.5), (" B", -0.25)]} for k in range(3)
    }
    mean = 1.0 + (model == "second") * 0.5
    folder.task("story", story, [row("toxicity", unit="logit", n=3, mean=mean)], metrics=(TOX,), scorer="toxicity")
    return folder.write_plan()


def right_in_a(k: int) -> bool:
    return k >= 10


def right_in_b(k: int) -> bool:
    return k >= 110 or k < 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    return write_run(root / "a", "first"), write_run(root / "b", "second")


@pytest.fixture
def folder(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page in a folder of its own, its texts in many small parts."""
    monkeypatch.setattr(side_files, "CHUNK_BYTES", 2_000)
    write(runs, tmp_path / "out")
    return tmp_path / "out"


def write(runs: tuple[Path, Path], out: Path) -> None:
    a, b = runs
    write_comparison(compare_runs(a, b), open_run(a), open_run(b), out)


def opened(browser: Browser, folder: Path, where: str = "", **options: Any) -> Any:
    return browser.page((folder / "compare.html").as_uri() + where, **options)


def listed(page: Page) -> list[str]:
    page.until("document.getElementById('said').textContent")
    return page.texts("#samples .id")


def counts(page: Page) -> dict[str, int]:
    listed(page)
    return {word: int(number) for word, number in (text.split() for text in page.texts("#kinds button:not([hidden])"))}


def test_nothing_is_asked_for_but_the_pages_own_files(browser: Browser, folder: Path) -> None:
    with opened(browser, folder) as page:
        assert len(listed(page)) == 50
        page.click("details.sample summary")
        page.until("document.querySelector('.texts pre')")
        page.click("#reveal")
        page.until("document.querySelectorAll('.sides').length === 50")
        assert page.complaints == []
        assert all(url.startswith(folder.as_uri() + "/") for url in page.requests)
        assert len(page.requests) > 10  # the page, scores, and parts of the texts


def test_filters_count_what_the_records_hold(browser: Browser, folder: Path) -> None:
    scored = [k for k in range(SUMS) if k != 7]
    worse = [k for k in scored if right_in_a(k) and not right_in_b(k)]
    better = [k for k in scored if right_in_b(k) and not right_in_a(k)]
    assert (len(worse), len(better)) == (100, 5)  # 10 to 109; 0 to 4
    with opened(browser, folder) as page:
        # Truncated: the answer to 3 in both runs, the prompt of 4 in the second. Unscored: 7 in the second.
        assert counts(page) == {
            "All": 130, "Changed": 105, "Worse": 100, "Better": 5, "Truncated": 2, "Unscored": 1,
        }  # fmt: skip
        page.click("#kinds button[value=worse]")
        shown = listed(page)
        page.click("button.after")
        assert [*shown, *listed(page)] == [f"sum/{k:03}" for k in worse]
        assert page.texts("#samples .word") == ["worse"] * 50
        page.click("#kinds button[value=truncated]")
        assert sorted(listed(page)) == ["sum/003", "sum/004"]
        page.click("#kinds button[value=unscored]")
        assert listed(page) == ["sum/007"] and page.texts("#samples .score") == ["0.000 → – unscored"]
        page.click("details.sample summary")
        page.until("document.querySelector('.texts pre')")
        assert "the judge was silent" in page.texts(".texts .note")
        page.click("#kinds button[value=all]")
        page.click("#find")
        page.write("leaf1")
        assert counts(page)["All"] == 65


def test_all_samples_are_reached_and_each_shows_its_own_texts(browser: Browser, folder: Path) -> None:
    with opened(browser, folder, "#order=stored") as page:
        seen = listed(page)
        for _ in range(2):
            page.click("button.after")
            seen += listed(page)
        assert seen == [f"sum/{k:03}" for k in range(SUMS)]
        assert page.run("document.querySelector('button.after').disabled")
        page.click("#reveal")
        page.until("document.querySelectorAll('.sides').length === 30")
        shown = page.run(
            "Array.from(document.querySelectorAll('.sample'), one => [one.querySelector('.id').textContent,"
            " ...Array.from(one.querySelectorAll('pre'), pre => pre.textContent)])"
        )
        text = HOSTILE.replace("\u202e", "U+202E").replace("\x00\x00", "U+0000 ×2")
        assert shown == [
            [f"sum/{k:03}", f"prompt of {k} {text}", str(k), f"first says {k} {text}", f"second says {k} {text}"]
            for k in range(100, SUMS)
        ]


def test_texts_are_hidden_until_asked_for_and_are_never_markup(browser: Browser, folder: Path) -> None:
    page_text = (folder / "compare.html").read_text()
    assert "prompt of" not in page_text and "says" not in page_text
    with opened(browser, folder) as page:
        listed(page)
        assert page.run("document.querySelectorAll('details.sample[open], .texts').length") == 0
        page.click("#reveal")
        page.until("document.querySelectorAll('.sides').length === 50")
        assert page.run("[document.images.length, document.title, document.querySelectorAll('pre b').length]") == [
            0, "second against first · harness", 0,
        ]  # fmt: skip
        assert page.run("document.querySelectorAll('pre .cp').length") == 2 * 3 * 50
        page.click("#reveal")
        assert page.run("document.querySelectorAll('details.sample[open]').length") == 0


def test_everything_is_done_by_keyboard(browser: Browser, folder: Path) -> None:
    with opened(browser, folder) as page:
        first = listed(page)[0]
        page.run("document.getElementById('find').focus()")
        for _ in range(20):
            page.press("Tab")
            if page.run("document.activeElement.tagName") == "SUMMARY":
                break
        assert page.run("document.activeElement.querySelector('.id').textContent") == first
        page.press("Enter")
        page.until("document.querySelector('.texts pre')")
        page.press("Tab")  # into the prompt, which scrolls by keys
        assert page.run("document.activeElement.getAttribute('aria-label')") == "Prompt"
        page.run("document.querySelector('#kinds button[value=better]').focus()")
        page.press("Space")
        assert len(listed(page)) == 5
        assert page.texts("#said") == ["1 to 5 of 5 samples, 130 in all"]


def test_a_difference_leads_to_its_samples_and_an_address_to_its_view(browser: Browser, folder: Path) -> None:
    with opened(browser, folder) as page:
        listed(page)
        assert page.texts("#differences ~ .scroll .verdict") == ["worse", "no difference shown"]
        page.run("document.querySelectorAll('tbody a')[1].click()")
        page.until("document.getElementById('task').value === 'story:raw'")
        assert listed(page) == ["s0", "s1", "s2"] and page.texts("#samples .word") == ["better"] * 3
        page.click("#swap")
        page.until("document.querySelector('#samples .word').textContent.trim() === 'worse'")
        page.click("details.sample summary")
        page.until("document.querySelector('.choices')")
        # Of log p = -1.5 and -0.25 the second is the most likely.
        assert page.texts(".choices li.best .num") == ["−0.250"] * 2
        address = page.run("location.href")
    with browser.page(address) as page:
        assert listed(page) == ["s0", "s1", "s2"] and page.texts("#samples .word") == ["worse"] * 3
        assert page.complaints == []


def test_a_page_without_its_files_says_so(browser: Browser, folder: Path) -> None:
    shutil.rmtree(folder / "samples")
    with opened(browser, folder) as page:
        page.until("document.getElementById('said').textContent")
        assert "is not beside this page. Move or publish the whole folder." in page.texts("#said")[0]


def test_on_a_phone_nothing_sticks_out(browser: Browser, folder: Path) -> None:
    with opened(browser, folder, width=390) as page:
        listed(page)
        page.click("details.sample summary")
        page.until("document.querySelector('.texts pre')")
        assert page.run("document.documentElement.scrollWidth - innerWidth") <= 0


def test_the_same_records_give_the_same_bytes_and_old_files_go(runs: tuple[Path, Path], tmp_path: Path) -> None:
    write(runs, tmp_path / "one")
    (tmp_path / "two" / "samples").mkdir(parents=True)
    (tmp_path / "two" / "samples" / "00000000000000000000.js").write_text("")
    write(runs, tmp_path / "two")
    one, two = (
        {str(file.relative_to(root)): file.read_bytes() for root in [tmp_path / name] for file in root.rglob("*.*")}
        for name in ("one", "two")
    )
    assert one == two and len(one) > 3


def test_questions_that_both_runs_share_are_written_once(runs: tuple[Path, Path], tmp_path: Path) -> None:
    write(runs, tmp_path)
    whole = "".join(file.read_text() for file in (tmp_path / "samples").iterdir())
    assert whole.count("prompt of 17 ") == 1 and whole.count("first says 17 ") == 1
    data = (tmp_path / "compare.html").read_text().partition('id="data">')[2].partition("</script>")[0]
    arms = json.loads(data)["arms"]
    assert arms[0]["tasks"][0]["prompts"] == arms[1]["tasks"][0]["prompts"]


def test_runs_without_texts_keep_their_scores(browser: Browser, runs: tuple[Path, Path], tmp_path: Path) -> None:
    bare = tuple(Path(shutil.copytree(run, tmp_path / run.name)) for run in runs)
    for run in bare:
        shutil.rmtree(run / "requests")
    write((bare[0], bare[1]), tmp_path / "out")
    with opened(browser, tmp_path / "out") as page:
        assert counts(page)["Changed"] == 105
        page.click("details.sample summary")
        page.until("document.querySelectorAll('.texts .side').length === 2")
        assert page.texts(".texts .side .note") == ["The texts of this arm are not in its run's folder."] * 2


def test_the_command_writes_the_page_where_it_says(cli: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    ran = cli("compare", *runs, "--show", "0", "--html")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "compare-a-b/compare.html")
    assert Path("compare-a-b/compare.html").is_file()
    ran = cli("compare", *runs, "--html", "--json", "--out", tmp_path / "there")
    assert json.loads(ran.out)["name_a"] == "first" and ran.err.strip() == str(tmp_path / "there" / "compare.html")
    ran = cli("compare", *runs, "--out", "x")
    assert (ran.code, ran.err) == (
        2, "error: --out: x is the folder of a page, and none was asked for\n  Give --html, too.\n"
    )  # fmt: skip
