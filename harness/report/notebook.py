"""A table for a notebook: plain HTML that runs nothing and loads nothing, and whatever is in it is escaped.

It holds names and numbers alone. Prompts and answers, red-team text among them, are never in it.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.core.records import Row
from harness.core.text import ARROWS, MINUS, number, task_label
from harness.report.pages.page import line_html

MOST_ROWS = 200
"""Above this the rest is counted: a notebook keeps what it has shown."""
_CELL = 'style="text-align:left;padding:2px 10px;vertical-align:top"'


def table_html(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """One table with its caption and notes.

    Args:
        caption: one line.
        heads: of the columns.
        rows: texts, as many as heads.
        notes: lines below it.
    """
    lines = ["<div><table>", f'<caption style="text-align:left"><b>{line_html(caption)}</b></caption>']
    lines.append("<thead><tr>" + "".join(f"<th {_CELL}>{line_html(head)}</th>" for head in heads) + "</tr></thead>")
    lines.append("<tbody>")
    for row in rows[:MOST_ROWS]:
        lines.append("<tr>" + "".join(f"<td {_CELL}>{line_html(cell)}</td>" for cell in row) + "</tr>")
    lines.append("</tbody></table>")
    more = [f"{len(rows) - MOST_ROWS:,} further rows are not shown."] if len(rows) > MOST_ROWS else []
    lines += [f"<p>{line_html(note)}</p>" for note in (*more, *notes)]
    return "\n".join([*lines, "</div>"])


def ends_text(ends: tuple[float, float] | None) -> str:
    """An interval in words."""
    return "" if ends is None else " to ".join(number(end, minus=MINUS) for end in ends)


def rows_html(caption: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The rows of an evaluation: one line for each number."""
    heads = ("model", "task", "metric", "mean", "95 % interval", "n", "unscored")
    shown = [
        (
            " + ".join(one for one in (row.model, row.adapter, row.control) if one is not None),
            task_label(row.task, row.variant),
            f"{row.metric} {ARROWS[row.higher_is_better]}".rstrip(),
            "withheld" if row.withheld is not None else number(row.mean, minus=MINUS),
            ends_text(row.ci95) if row.withheld is None else "",
            f"{row.n:,}",
            f"{row.n_unscored:,}",
        )
        for row in rows
    ]
    return table_html(caption, heads, shown, notes)
