"""The tables of arXiv 2406.04879 from a board: LoRA and QLoRA in pairs, merges beside their inputs, data by data.

Its published numbers stand beside ours where they are asked for (`--published paper`), arm by arm and task by task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.core.text import number
from harness.report.board.model import Board, BoardRow, Cell, Column
from harness.report.board.published import Matched
from harness.report.board.text import latex_table, shown_columns
from harness.report.text import escape_markdown, markdown_table

LAYOUTS = ("paper",)
NOTES = (
    "MMLU's 56,168 in the paper are requests, four for each of its 14,042 questions.",
    "The paper's Slerp-SFT and Slerp-DPO rows look exchanged.",
    "Red-Instruct appears in the paper's figures alone, so no number of its stands beside ours.",
    "Which of its choices are ours is said in the study's file: shots, decoding, merge weights, the mixtures' shares.",
)
_Row = tuple[str, ...]


def paper_tables(board: Board, published: Matched | None = None) -> dict[str, str]:
    """File name -> content: each table as LaTeX, and all of them in `tables/paper.md`."""
    columns = [column for column in shown_columns(board) if not column.differs]
    files: dict[str, str] = {}
    lines = [f"# {escape_markdown(board.title)}: the tables of arXiv 2406.04879", ""]
    for name, caption, make in _TABLES:
        heads, rows = make(board, columns, published)
        if not any(len(row) > 1 for row in rows):
            continue
        files[f"tables/paper-{name}.tex"] = latex_table(caption, heads, rows, words=2)
        body = [row if len(row) > 1 else (row[0], *[""] * (len(heads) - 1)) for row in rows]
        lines += [f"## {caption}", "", *markdown_table(heads, body, words=2), ""]
    told = "No published numbers were given (--published paper), so ours stand alone."
    if published is not None:
        told = f"Ours / published ({escape_markdown(published.published.source)})."
    lines += [told, "", *[f"* {note}" for note in NOTES], ""]
    files["tables/paper.md"] = "\n".join(lines)
    return files


def _mean(row: BoardRow | None, column: Column, published: Matched | None) -> str:
    """Mean and half width of its interval; after a stroke the published value of the same arm."""
    if row is None:
        return "–"
    cell = row.cells.get(column.key)
    theirs = published.value(row, column) if published is not None else None
    return _ours(cell) + (f" / {number(theirs)}" if theirs is not None else "")


def _ours(cell: Cell | None) -> str:
    if cell is None or cell.mean is None:
        return "–" if cell is None or cell.withheld is None else "withheld"
    return number(cell.mean) + (f" ±{number((cell.ci95[1] - cell.ci95[0]) / 2)}" if cell.ci95 is not None else "")


def _by_base(rows: Sequence[BoardRow]) -> Iterator[tuple[str, list[BoardRow]]]:
    bases: dict[str, list[BoardRow]] = {}
    for row in rows:
        bases.setdefault(row.base_name or row.name, []).append(row)
    yield from bases.items()


def _label(row: BoardRow) -> tuple[str, str]:
    return str(row.factors.get("method", row.kind)).upper(), str(row.factors.get("data", row.factors.get("inputs", "")))


def _adapters(board: Board, columns: Sequence[Column], published: Matched | None) -> tuple[list[str], list[_Row]]:
    """Arms that were trained with LoRA and with QLoRA, one line for both."""
    heads = ["Method", "Data", *[f"{column.task} {kind}" for column in columns for kind in ("LoRA", "QLoRA")]]
    rows: list[_Row] = []
    for base, some in _by_base([row for row in board.rows if row.kind == "align"]):
        pairs: dict[tuple[Any, ...], dict[str, BoardRow]] = {}
        for row in some:
            rest = tuple(sorted((k, str(v)) for k, v in row.factors.items() if k != "adapter"))
            pairs.setdefault(rest, {})[str(row.factors.get("adapter"))] = row
        both = [pair for pair in pairs.values() if {"lora", "qlora"} <= set(pair)]
        rows += [(base,)] if both else []
        for pair in both:
            cells = [_mean(pair[kind], column, published) for column in columns for kind in ("lora", "qlora")]
            rows.append((*_label(pair["lora"]), *cells))
    return heads, rows


def _merges(board: Board, columns: Sequence[Column], published: Matched | None) -> tuple[list[str], list[_Row]]:
    """Merges, each after the arms that it was made from."""
    named = {row.name: row for row in board.rows}
    rows: list[_Row] = []
    for base, some in _by_base([row for row in board.rows if row.kind == "merge"]):
        inputs = list(dict.fromkeys(name for row in some for name in row.parents if name in named))
        rows.append((base,))
        rows += [(*_label(named[name]), *[_mean(named[name], one, published) for one in columns]) for name in inputs]
        for row in some:
            # As the paper calls them: Slerp-SFT is a merge of SFT arms.
            made_from = dict.fromkeys(_label(named[name])[0] for name in row.parents if name in named)
            method, data = _label(row)
            rows.append(("-".join((method, *made_from)), data, *[_mean(row, one, published) for one in columns]))
    return ["Method", "Data or inputs", *[column.task for column in columns]], rows


def _data(part: str) -> Callable[[Board, Sequence[Column], Matched | None], tuple[list[str], list[_Row]]]:
    """Each base and the arms of one data set, in QLoRA where there are both."""

    def make(board: Board, columns: Sequence[Column], published: Matched | None) -> tuple[list[str], list[_Row]]:
        rows: list[_Row] = []
        trained = [row for row in board.rows if row.kind == "align" and row.factors.get("adapter") == "qlora"]
        chosen = [row for row in trained if str(row.factors.get("data", "")).startswith(part)]
        bases = {row.key: row for row in board.rows if row.kind == "base"}
        for base, some in _by_base(chosen):
            own = bases.get(some[0].base or "")
            rows.append((base,))
            told = [own] if own is not None else []
            rows += [(*_label(row), *[_mean(row, column, published) for column in columns]) for row in [*told, *some]]
        return ["Method", "Data", *[column.task for column in columns]], rows

    return make


_TABLES = (
    ("adapters", "LoRA and QLoRA on the same data", _adapters),
    ("merges", "Merges beside their inputs", _merges),
    ("hh-rlhf", "Alignment on HH-RLHF (QLoRA)", _data("hh-")),
    ("beavertails", "Alignment on BeaverTails (QLoRA)", _data("bt-")),
)
