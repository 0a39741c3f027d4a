"""The words of a comparison: the terminal table, the changed samples, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.core.text import ARROWS, number, visible
from harness.report.external.unpaired import TEST as UNPAIRED
from harness.report.text import digits_apart, escape_markdown, figures_table, markdown_table
from harness.report.winrate_text import wins_markdown

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from harness.report.model import ChangedSample, ComparisonReport, Difference

STYLES = {
    "better": "green",
    "worse": "bold red",
    "no difference of size": "dim",
    "no difference shown": "dim",
    "not comparable": "yellow",
}
CLAIMS = ("better", "worse")
"""Verdicts that name a difference."""
MOST_LISTED = 12
"""Smallest detectable differences that a line names."""


def comparison_table(report: ComparisonReport, *, everything: bool = False) -> Table:
    """The table for the terminal: run B against run A. Fits in 80 columns."""
    from rich.text import Text

    title = Text.assemble("A ", (report.name_a, "bold"), "   B ", (report.name_b, "bold"))
    table = figures_table(title, "task, metric", ("A", "B", "B - A", "n"))
    table.add_column("verdict", overflow="fold", max_width=14)
    for one in report.shown(everything=everything):
        counts = f"+{one.n_better:,} -{one.n_worse:,}" if one.test not in ("none", UNPAIRED) else ""
        table.add_row(
            Text.assemble(one.label, "\n", (f"  {metric_text(one)}", "dim")),
            *map(Text, means_text(one)),
            Text.assemble(signed(one.difference), "\n", (ends_text(one.ci_adjusted), "dim")),
            Text.assemble(f"{one.n:,}", "\n", (counts, "dim")),
            Text.assemble((verdict_text(one), STYLES[one.verdict]), "\n", (f"p {p_text(one.p_adjusted)}", "dim")),
        )
    lines = [visible(line) for line in remarks(report, everything=everything)]
    lines.append("Under n: samples that got better (+) and worse (-). p and interval: after Holm.")
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
    words, counted = ("task", "metric", "verdict"), ("n", "better", "worse")
    figures = ("A", "B", "B - A", "95 % interval", "p", "interval (Holm)", "p (Holm)")
    rows = [
        (
            one.label,
            metric_text(one),
            verdict_text(one),
            *means_text(one),
            signed(one.difference),
            ends_text(one.ci95) or "–",
            p_text(one.p_value),
            ends_text(one.ci_adjusted) or "–",
            p_text(one.p_adjusted),
            *(f"{count:,}" for count in (one.n, one.n_better, one.n_worse)),
        )
        for one in report.shown(everything=everything)
    ]
    lines += markdown_table((*words, *figures, *counted), rows, words=len(words))
    lines += ["", *[f"* {escape_markdown(line)}" for line in remarks(report, everything=everything)]]
    lines += wins_markdown(report, everything=everything)
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
    seen = [one for one in report.shown(everything=everything) if one.detectable is not None]
    if seen:
        listed = "; ".join(f"{one.label} {visible(one.metric)} {number(one.detectable)}" for one in seen[:MOST_LISTED])
        more = f"; {len(seen) - MOST_LISTED:,} more" if len(seen) > MOST_LISTED else ""
        lines.append(f"Smallest difference that would have been shown (80 % power, after Holm): {listed}{more}")
    lines += report.notes
    lines.append(
        f"Verdicts at Holm-adjusted p < {report.alpha:g}. 0/1 scores: exact McNemar test; others: paired bootstrap. "
        f"The interval that goes with it: level 1 - {report.alpha:g}/k, k being the tests left at its step."
    )
    return lines


def verdict_text(one: Difference) -> str:
    """The verdict, marked where A and B were asked differently."""
    marked = one.prompts_differ is not None and one.verdict != "not comparable"
    return f"{one.verdict} (prompts differ)" if marked else one.verdict


def p_text(value: float | None) -> str:
    """A p-value with three decimals."""
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference with its sign."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 else text


def metric_text(one: Difference) -> str:
    """Metric with its direction."""
    return f"{visible(one.metric)} {ARROWS[one.higher_is_better]}".rstrip()


def means_text(one: Difference) -> tuple[str, str]:
    """Both means, with enough decimals to see a difference that is claimed."""
    claimed = [(one.mean_a, one.mean_b)] if one.verdict in CLAIMS else []
    digits = digits_apart(claimed)
    return number(one.mean_a, digits=digits), number(one.mean_b, digits=digits)


def ends_text(ends: tuple[float, float] | None) -> str:
    """The interval of a difference; empty where there is none."""
    return "" if ends is None else f"[{signed(ends[0])}, {signed(ends[1])}]"


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
