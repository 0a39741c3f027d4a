"""The words of a comparison: the terminal table, the changed samples, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.report_text import ARROWS, escape_markdown, figures_table, markdown_table, number
from harness.results import visible

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from harness.compare import ChangedSample, ComparisonReport, Difference

STYLES = {"better": "green", "worse": "bold red", "no difference shown": "dim", "not comparable": "yellow"}


def comparison_table(report: ComparisonReport, *, everything: bool = False) -> Table:
    """The table for the terminal: run B against run A. Fits in 80 columns."""
    from rich.text import Text

    title = Text.assemble("A ", (report.name_a, "bold"), "   B ", (report.name_b, "bold"))
    table = figures_table(title, "task, metric", ("A", "B", "B - A", "n"))
    table.add_column("verdict", overflow="fold")
    for one in report.shown(everything=everything):
        counts = f"+{one.n_better:,} -{one.n_worse:,}" if one.test != "none" else ""
        table.add_row(
            Text.assemble(one.label, "\n", (f"  {_metric(one)}", "dim")),
            Text(number(one.mean_a)),
            Text(number(one.mean_b)),
            Text.assemble(signed(one.difference), "\n", (_interval(one), "dim")),
            Text.assemble(f"{one.n:,}", "\n", (counts, "dim")),
            Text.assemble((one.verdict, STYLES[one.verdict]), "\n", (f"p {p_text(one.p_adjusted)}", "dim")),
        )
    lines = [visible(line) for line in remarks(report, everything=everything)]
    lines.append("Under n: samples that got better (+) and worse (-). p: after Holm.")
    table.caption = Text("\n".join(lines), justify="left")
    return table


def changed_text(changed: Sequence[ChangedSample], report: ComparisonReport) -> Group:
    """The changed samples for the terminal. Their texts are neutralised already and never read as markup."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[Text | Padding] = []
    for one in changed:
        style = {True: "red", False: "green", None: ""}[one.worse]
        head = Text.assemble((one.id, "bold"), f"  {_label(one)} {one.metric}  ")
        head.append(f"{number(one.value_a)} → {number(one.value_b)}", style=style)
        parts.append(head)
        for word, text in _texts(one, report):
            parts += [Padding(Text(word, style="dim"), (0, 0, 0, 2)), Padding(Text(text), (0, 0, 0, 4))]
        parts.append(Text(""))
    return Group(*parts)


def comparison_markdown(
    report: ComparisonReport, changed: Sequence[ChangedSample] = (), *, everything: bool = False
) -> str:
    """The comparison as Markdown; texts stand in fences that they cannot close."""
    lines = [f"# {escape_markdown(report.name_b)} against {escape_markdown(report.name_a)}", ""]
    lines += [
        f"A: {escape_markdown(report.name_a)}. B: {escape_markdown(report.name_b)}. Differences are B minus A.",
        "",
    ]
    header = ("task", "metric", "verdict", "A", "B", "B - A", "95 % interval", "n", "better", "worse", "p", "p (Holm)")
    rows = [
        (
            one.label,
            _metric(one),
            one.verdict,
            number(one.mean_a),
            number(one.mean_b),
            signed(one.difference),
            _interval(one) or "–",
            *(f"{count:,}" for count in (one.n, one.n_better, one.n_worse)),
            p_text(one.p_value),
            p_text(one.p_adjusted),
        )
        for one in report.shown(everything=everything)
    ]
    lines += markdown_table(header, rows, words=3)
    lines += ["", *[f"* {escape_markdown(line)}" for line in remarks(report, everything=everything)]]
    if changed:
        lines += ["", "## Samples that changed"]
    for one in changed:
        values = f"{number(one.value_a)} → {number(one.value_b)}"
        lines += ["", f"### {escape_markdown(f'{one.id} · {_label(one)} {one.metric} · {values}')}"]
        for word, text in _texts(one, report):
            lines += ["", f"{word}:", "", *_fence(text)]
    return "\n".join([*lines, ""])


def remarks(report: ComparisonReport, *, everything: bool = False) -> list[str]:
    """What a reader of the table must know, one line each."""
    lines = [f"{one.label} {one.metric}: {note}" for one in report.shown(everything=everything) for note in one.notes]
    lines += [f"only in A: {', '.join(report.only_a)}"] if report.only_a else []
    lines += [f"only in B: {', '.join(report.only_b)}"] if report.only_b else []
    lines += [f"not compared, a step failed: {', '.join(report.failed)}"] if report.failed else []
    lines += report.notes
    lines.append(
        f"Verdicts at Holm-adjusted p < {report.alpha:g}. 0/1 scores: exact McNemar test; others: paired bootstrap."
    )
    return lines


def p_text(value: float | None) -> str:
    """A p-value with three decimals."""
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with its sign."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 else text


def _metric(one: Difference) -> str:
    return f"{visible(one.metric)} {ARROWS[one.higher_is_better]}".rstrip()


def _interval(one: Difference) -> str:
    return "" if one.ci95 is None else f"[{signed(one.ci95[0])}, {signed(one.ci95[1])}]"


def _label(one: ChangedSample) -> str:
    return one.task if one.arm is None else f"{one.arm}, {one.task}"


def _texts(one: ChangedSample, report: ComparisonReport) -> list[tuple[str, str]]:
    # Of several arms the heading says which one it is.
    a, b = (f"A ({report.name_a})", f"B ({report.name_b})") if one.arm is None else ("A", "B")
    named = (("prompt", one.prompt), ("target", one.target), (a, one.answer_a), (b, one.answer_b))
    return [(word, text) for word, text in named if text is not None]


def _fence(text: str) -> list[str]:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]
