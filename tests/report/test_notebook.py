"""What a notebook shows of a board and of an evaluation: names and numbers, whatever the names hold."""

from __future__ import annotations

import html.parser
import subprocess
import sys

from harness.core.records import Row
from harness.report.board.model import BaseDifference, Board, BoardRow, Cell, Column
from harness.report.notebook import MOST_ROWS, rows_html, table_html

HOSTILE = '<img src=x onerror="alert(1)">\u202e</td><script>alert(2)</script>'


class Tags(html.parser.HTMLParser):
    """What tags and attributes there are, and the words between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs} | {(tag, "")}

    def handle_data(self, data: str) -> None:
        self.words += data


PLAIN = {"div", "table", "caption", "b", "thead", "tbody", "tr", "th", "td", "p", "span"}


def check(text: str) -> Tags:
    tags = Tags(text)
    assert {tag for tag, _ in tags.found} <= PLAIN
    assert {name for _, name in tags.found} <= {"", "style", "class"}
    assert "url(" not in text and "\u202e" not in text
    return tags


def test_a_board_with_hostile_names() -> None:
    common = {"variant": "raw", "scorer": HOSTILE, "unit": "proportion", "higher_is_better": False}
    columns = (
        Column(key="a", label=HOSTILE, task=HOSTILE, metric=HOSTILE, primary=True, **common),
        Column(key="b", label="quiet", task="quiet", metric="hidden", primary=False, **common),
    )
    difference = BaseDifference(base="base", n=60, difference=-0.1, verdict="better")
    cell = Cell(mean=-0.25, ci95=(-0.5, 0.125), n=1234, difference=difference)
    withheld = Cell(mean=0.5, n=3, withheld=HOSTILE)
    rows = (
        BoardRow(key="base", name=HOSTILE, kind="base", cells={"a": cell, "b": cell}, notes=(HOSTILE,)),
        BoardRow(key="arm", name="arm", kind="align", cells={"a": withheld}),
    )
    board = Board(harness="0", title=HOSTILE, finding=HOSTILE, columns=columns, rows=rows)
    tags = check(board._repr_html_())
    assert "−0.250 [−0.500 to 0.125], n 1,234, better" in tags.words
    # What is withheld has no number, and what is no primary metric no column.
    assert "withheld (n 3)" in tags.words and "0.500," not in tags.words and "quiet" not in tags.words
    assert "↓" in tags.words


def test_rows_of_an_evaluation() -> None:
    row = Row(
        model=HOSTILE, adapter="a", task="quiz", scorer="match", metric="acc", unit="proportion", n=40, n_unscored=2,
        mean=0.75, ci95=(0.6, 0.85), higher_is_better=True, notes=("a prompt that should stay hidden",),
    )  # fmt: skip
    text = rows_html("mine", [row, row.model_copy(update={"withheld": "too many", "control": "good"})])
    tags = check(text)
    assert "0.750" in tags.words and "0.600 to 0.850" in tags.words and "hidden" not in tags.words
    assert tags.words.count("withheld") == 1 and "+ a + good" in tags.words
    assert "2 further rows are not shown." in table_html("t", ["n"], [[str(n)] for n in range(MOST_ROWS + 2)])


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from harness.report.board.model import Board; Board(harness='0', title='t')._repr_html_();"
        "print(sorted({'torch', 'transformers', 'datasets', 'vllm', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
