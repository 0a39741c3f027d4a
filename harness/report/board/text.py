"""A board as Markdown, CSV, LaTeX and in the terminal. What it shows of foreign texts is neutralised."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from harness.core.text import ARROWS, number, visible
from harness.report.board.model import Board, BoardRow, Cell, Column, JudgePanel
from harness.report.compare_text import STYLES, p_text, signed
from harness.report.text import escape_markdown, figures_table, markdown_table

if TYPE_CHECKING:
    from rich.table import Table

HOW_TO_READ = "docs/reading-the-numbers.md says how to read this."


def shown_columns(board: Board) -> list[Column]:
    """The columns of primary metrics; all where there is none."""
    primary = [column for column in board.columns if column.primary]
    return primary or list(board.columns)


def board_markdown(board: Board) -> str:
    """The board, its claims and its differences as Markdown."""
    lines = [f"# {escape_markdown(board.title)}", "", escape_markdown(board.finding), ""]
    lines += [f"{HOW_TO_READ} harness {board.harness}.", ""]
    columns = shown_columns(board)
    heads = ["arm", "seeds", *[_head(column) for column in columns]]
    rows = [
        (row.name, str(len(row.seeds)), *[_cell_text(row.cells.get(column.key)) for column in columns])
        for row in board.rows
    ]
    lines += markdown_table([escape_markdown(head) for head in heads], rows, words=1)
    lines += ["", "Mean, 95 % interval, rank in brackets. ▲ better, ▼ worse than the base after Holm's correction.", ""]
    if board.claims:
        lines += ["## Claims", "", *_claims(board), ""]
    lines += _judges(board, columns)
    for column in columns:
        lines += _column_lines(board, column)
    notes = [*board.notes, *(f"{row.name}: {note}" for row in board.rows for note in row.notes)]
    if notes:
        lines += ["## Notes", "", *[f"* {escape_markdown(note)}" for note in dict.fromkeys(notes)], ""]
    return "\n".join(lines)


def _head(column: Column) -> str:
    more = f" ({column.differs[0]})" if column.differs else ""
    return f"{column.label} {column.metric} {ARROWS[column.higher_is_better]}".rstrip() + more


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if cell.withheld is not None:
        return "withheld"
    verdict = cell.difference.verdict if cell.difference is not None else ""
    sign = {"better": " ▲", "worse": " ▼"}.get(verdict, "")
    rank = f" ({cell.rank})" if cell.rank is not None else ""
    more = "".join(f" {one}" for one in (part_text(cell), spread_text(cell)) if one)
    return f"{number(cell.mean)} {_ends(cell.ci95)}{more}{rank}{sign}"


def part_text(cell: Cell) -> str:
    """What a mean is of, where a seeded subset was asked; empty for all else."""
    part = cell.part
    if part is None or cell.withheld is not None:
        return ""
    if part.whole:
        return f"whole set, {part.n_whole:,}"
    return f"subset mean, {part.n:,}" if part.plain is None else f"estimated, {part.n:,} of {part.n_whole:,}"


def spread_text(cell: Cell) -> str:
    """What other judges and wordings make of a number; empty where nobody else was to be asked."""
    if cell.spread is not None:
        return f"judges {number(cell.spread.low)} to {number(cell.spread.high)}"
    return "judges: not all known" if cell.spread_note is not None else ""


def _judges(board: Board, columns: Sequence[Column]) -> list[str]:
    """Every row under every judge and wording, and how far these agree; of the columns that are shown."""
    keys = {column.key for column in columns}
    lines: list[str] = []
    for panel in board.judges:
        if keys.isdisjoint({panel.column, *(one.column for one in panel.askers)}):
            continue
        lines += [f"## Judges of {escape_markdown(panel.task)}, {escape_markdown(panel.metric)}", ""]
        rows = [
            (row.name, *cells, spread_of(row, panel)) for row in board.rows if any(cells := panel_cells(row, panel))
        ]
        lines += markdown_table(["arm", *(one.name for one in panel.askers), "spread"], rows, words=1)
        lines += ["", f"The first judge's numbers stand on the board. {SPREAD}", ""]
        agreement = [
            (one.a, one.b, number(one.tau), str(one.n_rows), number(one.kappa), f"{one.n_answers:,}")
            for one in panel.agreement
        ]
        heads = ["judge", "other judge", "Kendall's tau of the arms", "arms", "Cohen's kappa", "answers"]
        lines += [*markdown_table(heads, agreement, words=2), ""]
        told = [*panel.remarks, *(f"no spread for {one}" for one in panel.missing)]
        lines += [*[f"* {escape_markdown(one)}" for one in told], *([""] if told else [])]
    return lines


SPREAD = "Spread: the smallest and the largest mean over judges and wordings; it is no interval."


def panel_cells(row: BoardRow, panel: JudgePanel) -> list[str]:
    """The means of a row under every judge and wording; empty texts where there is none."""
    cells = [row.cells.get(one.column) if one.column is not None else None for one in panel.askers]
    return ["" if cell is None else "withheld" if cell.withheld is not None else number(cell.mean) for cell in cells]


def spread_of(row: BoardRow, panel: JudgePanel) -> str:
    """The spread of a row over a panel, and where its verdict hangs on the judge."""
    cell = row.cells.get(panel.column) if panel.column is not None else None
    if cell is None or cell.spread is None:
        return "not all known"
    verdicts = ", ".join(f"{verdict} under {name}" for name, verdict in cell.spread.verdicts.items())
    return f"{number(cell.spread.low)} to {number(cell.spread.high)}" + (f"; {verdicts}" if verdicts else "")


def _ends(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"


def _claims(board: Board) -> list[str]:
    head = ("claim", "says", "status", "effect", "95 % interval", "p", "p (Holm)", "detectable", "why")
    rows = [
        (
            one.name,
            one.summary or f"{' + '.join(one.rows_a)} {one.direction} than {' + '.join(one.rows_b)}",
            one.status,
            signed(one.effect),
            _ends(one.ci95),
            p_text(one.p_value),
            p_text(one.p_adjusted),
            number(one.detectable),
            one.why,
        )
        for one in board.claims
    ]
    tested = sum(one.p_value is not None for one in board.claims)
    return [
        *markdown_table(head, rows, words=3),
        "",
        f"p: two-sided; Holm over the {tested} claims that could be tested. Detectable: the smallest effect that would "
        f"have been found with {100 * board.power:.0f} % power at that correction.",
    ]


def _column_lines(board: Board, column: Column) -> list[str]:
    lines = [f"## {escape_markdown(_head(column))}", ""]
    facts = [f"{column.n_samples:,} samples, scorer {column.scorer}, version {column.version}"]
    if column.n_clusters != column.n_samples:
        facts.append(f"{column.n_clusters:,} clusters: samples that hang together count as one")
    facts += [f"{column.n_strata:,} strata (leaf tasks)"] if column.n_strata > 1 else []
    facts += [f"family of Holm's correction: {column.family}"] if column.family else []
    facts += [f"rank: {column.rank_note}"] if column.rank_note else []
    facts += [f"differs: {one}" for one in column.differs]
    lines += [*[f"* {escape_markdown(fact)}" for fact in facts], ""]
    head = ["arm", "verdict", "note", "seeds", "n", "unscored", "truncated", "mean", "95 % interval", "minus base"]
    head += ["95 % interval of it", "p", "p (Holm)", "detectable", "detectable (Holm)"]
    lines += markdown_table(head, [_row_cells(row, row.cells[column.key]) for row in _having(board, column)], words=3)
    return [*lines, ""]


def _having(board: Board, column: Column) -> list[BoardRow]:
    return [row for row in board.rows if column.key in row.cells]


def _row_cells(row: BoardRow, cell: Cell) -> tuple[str, ...]:
    one = cell.difference
    notes = [cell.note, cell.withheld, one.note if one is not None else None, cell.spread_note]
    notes += [part_text(cell), cell.part.note if cell.part is not None else None]
    told = "; ".join(dict.fromkeys(note for note in notes if note))
    counts = (str(cell.n_seeds), f"{cell.n:,}", f"{cell.n_unscored:,}", f"{cell.n_truncated:,}")
    mean = "withheld" if cell.withheld is not None else number(cell.mean)
    if one is None:
        return (row.name, "–", told, *counts, mean, _ends(cell.ci95), *["–"] * 6)
    tests = (p_text(one.p_value), p_text(one.p_adjusted), number(one.detectable), number(one.detectable_adjusted))
    apart = (signed(one.difference), _ends(one.ci95))
    return (row.name, one.verdict, told, *counts, mean, _ends(cell.ci95), *apart, *tests)


CSV_FIELDS = (
    *("arm", "kind", "base", "task", "variant", "metric", "unit", "column", "primary", "seeds", "n", "n_unscored"),
    *("n_truncated", "mean", "stderr", "low", "high", "rank", "verdict", "difference", "difference_low"),
    *("difference_high", "p_value", "p_adjusted", "adjusted_low", "adjusted_high", "test", "detectable"),
    *("detectable_adjusted", "withheld", "note", "judges_low", "judges_high", "judges"),
    *("n_subset", "n_whole", "subset_mean"),
)


def board_csv(board: Board) -> str:
    """One line for each row and column, at full precision, with a column for each factor."""
    factors = sorted({name for row in board.rows for name in row.factors})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*CSV_FIELDS, *(f"factor_{name}" for name in factors)])
    for row in board.rows:
        for column in board.columns:
            if (cell := row.cells.get(column.key)) is not None:
                told = [row.factors.get(name) for name in factors]
                writer.writerow([_plain(value) for value in (*_csv_cells(row, column, cell), *told)])
    return stream.getvalue()


def _csv_cells(row: BoardRow, column: Column, cell: Cell) -> Iterable[object]:
    one = cell.difference
    low, high = cell.ci95 or (None, None)
    yield from (row.name, row.kind, row.base_name, column.task, column.variant, column.metric, column.unit, column.key)
    yield from (column.primary, cell.n_seeds, cell.n, cell.n_unscored, cell.n_truncated, cell.mean, cell.stderr)
    yield from (low, high, cell.rank)
    if one is None:
        yield from [None] * 11
    else:
        yield from (one.verdict, one.difference, *(one.ci95 or (None, None)), one.p_value, one.p_adjusted)
        yield from (*(one.ci_adjusted or (None, None)), one.test, one.detectable, one.detectable_adjusted)
    notes = (cell.note, one.note if one is not None else None, cell.spread_note)
    yield from (cell.withheld, "; ".join(note for note in notes if note))
    spread = cell.spread
    yield from (None, None, None) if spread is None else (spread.low, spread.high, spread.n)
    part = cell.part
    yield from (None, None, None) if part is None else (part.n, part.n_whole, part.plain)


def _plain(value: object) -> object:
    """No spreadsheet takes a text of ours for a formula."""
    text = "" if value is None else repr(value) if isinstance(value, float) else visible(str(value))
    return f"'{text}" if isinstance(value, str) and text[:1] in ("=", "+", "-", "@") else text


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is; what it cannot set (outside Latin-1) becomes its code point."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$"}
    named |= {one: f"\\{one}" for one in "&%$#_{}"} | {"<": "$<$", ">": "$>$", "|": r"\textbar{}", "±": r"$\pm$"}
    named |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$", "·": r"$\cdot$"}
    named |= {"▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$"}
    safe = re.sub(r"[\\~^–−&%$#_{}<>|±↑↓×·▲▼]", lambda found: named[found[0]], visible(text))
    return re.sub(r"[^\x20-\x7e\xa1-\xff]", lambda found: f"U+{ord(found[0]):04X}", safe)


def latex_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """One LaTeX table (booktabs); a row of one cell is a rule with a heading."""
    marks = "l" * words + "r" * (len(heads) - words)
    lines = [r"% needs \usepackage{booktabs,amssymb}", r"\begin{table}", r"\centering"]
    lines += [rf"\caption{{{escape_latex(caption)}}}"]
    lines += [rf"\begin{{tabular}}{{{marks}}}", r"\toprule", " & ".join(map(escape_latex, heads)) + r" \\", r"\midrule"]
    for row in rows:
        if len(row) == 1:
            lines.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{\emph{{{escape_latex(row[0])}}}}} \\")
        else:
            lines.append(" & ".join(map(escape_latex, row)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def board_latex(board: Board) -> str:
    """The first table of the board for LaTeX."""
    columns = shown_columns(board)
    heads = ["Arm", "Seeds", *[_head(column) for column in columns]]
    rows = [
        (row.name, str(len(row.seeds)), *[_cell_text(row.cells.get(column.key)) for column in columns])
        for row in board.rows
    ]
    caption = f"{board.title}: mean and 95 % interval; the rank in brackets; better and worse than the base after Holm."
    return latex_table(caption, heads, rows)


def _mean_lines(cell: Cell) -> str:
    return "\n".join(part for part in (number(cell.mean), _ends(cell.ci95), part_text(cell), spread_text(cell)) if part)


def board_table(board: Board) -> Table:
    """The board for the terminal: one section for each column, one line for each arm."""
    from rich.text import Text

    table = figures_table(Text(board.title, style="bold"), "column, arm", ("mean", "n", "rank", "- base"))
    table.add_column("verdict", overflow="fold")
    for column in shown_columns(board):
        table.add_row(Text(_head(column), style="bold"))
        for row in _having(board, column):
            cell = row.cells[column.key]
            one = cell.difference
            few = f"{cell.n_seeds} seed{'' if cell.n_seeds == 1 else 's'}"
            table.add_row(
                Text.assemble(f"  {row.name} ", (few, "dim")),
                Text("withheld" if cell.withheld is not None else _mean_lines(cell)),
                Text(f"{cell.n:,}"),
                Text("" if cell.rank is None else str(cell.rank)),
                Text("" if one is None else f"{signed(one.difference)}\n{_ends(one.ci_adjusted)}"),
                Text("")
                if one is None
                else Text.assemble((one.verdict, STYLES[one.verdict]), "\n", (f"p {p_text(one.p_adjusted)}", "dim")),
            )
    lines = [board.finding, *(f"claim {one.name}: {one.status} ({one.why})" for one in board.claims), *board.notes]
    table.caption = Text("\n".join(lines), justify="left")
    return table
