"""The words of win rates: the terminal table, Markdown, and the cells of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.core.text import number, visible
from harness.report.text import escape_markdown, figures_table, markdown_table

if TYPE_CHECKING:
    from rich.table import Table

    from harness.report.model import AtEqualLength, ComparisonReport, WinRate

HEADER = ("B wins", "won, tied, lost", "characters A, B", "lengths within 10 %", "at equal length")
HOW_TO_READ = (
    "B wins: share of prompts for which the reward of B's answer is the better one, a tie being half; 95 % intervals, "
    "not corrected for how many there are. Within 10 %: of the pairs whose lengths differ by no more. At equal length: "
    "by a logistic regression on the difference of length, with a bootstrap interval."
)


def wins_table(report: ComparisonReport, *, everything: bool = False) -> Table | None:
    """The win rates for the terminal, which fit in 80 columns; None where there are none."""
    from rich.text import Text

    shown = report.shown_wins(everything=everything)
    if not shown:
        return None
    table = figures_table(Text("win rates of B over A", style="bold"), "task, metric", ("B wins", "n", "chars"))
    for name in ("within 10 %", "equal length"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in shown:
        table.add_row(
            Text.assemble(one.label, "\n", (f"  {visible(one.metric)}", "dim")),
            Text.assemble((number(one.share), "bold"), "\n", (_ends(one.ci95), "dim")),
            Text.assemble(f"{one.n:,}", "\n", (f"+{one.wins:,} -{one.losses:,}", "dim")),
            Text(f"A {_length(one.length_a)}\nB {_length(one.length_b)}"),
            *(Text.assemble(*_at(at, one)) for at in (one.matched, one.fitted)),
        )
    lines = [visible(line) for line in wins_remarks(shown)]
    table.caption = Text("\n".join(lines), justify="left")
    return table


def wins_cells(one: WinRate) -> tuple[str, ...]:
    """One per column of :data:`HEADER`."""
    counts = f"{one.wins:,}, {one.ties:,}, {one.losses:,}"
    lengths = f"{_length(one.length_a)}, {_length(one.length_b)}"
    rates = (
        f"{number(at.share)} {_ends(at.ci95)}".rstrip() if at.share is not None else "withheld" for at in _both(one)
    )
    matched, fitted = rates
    return f"{number(one.share)} {_ends(one.ci95)}".rstrip(), counts, lengths, f"{matched}, n {one.matched.n:,}", fitted


def wins_markdown(report: ComparisonReport, *, everything: bool = False) -> list[str]:
    """The win rates as lines of Markdown; none where there are none."""
    shown = report.shown_wins(everything=everything)
    if not shown:
        return []
    rows = [(one.label, visible(one.metric), *wins_cells(one)) for one in shown]
    notes = [f"* {escape_markdown(line)}" for line in wins_remarks(shown)]
    return ["", "## Win rates", "", *markdown_table(("task", "metric", *HEADER), rows, words=2), "", *notes]


def wins_remarks(shown: Sequence[WinRate]) -> list[str]:
    """What a reader of win rates must know, one line each."""
    lines = []
    for one in shown:
        before = f"{one.label} {one.metric}"
        if one.n_unscored:
            lines.append(f"{before}: left out: {one.n_unscored:,} prompts unscored in A or B")
        if one.n_truncated_a or one.n_truncated_b:
            cut = f"{one.n_truncated_a:,} answers of A and {one.n_truncated_b:,} of B spent their token budget"
            lines.append(f"{before}: {cut}: their length is that of what was scored")
        why = [at.withheld for at in _both(one)]
        if why[0] is not None and why[0] == why[1]:
            lines.append(f"{before}: win rates at equal length are withheld: {why[0]}")
            continue
        for word, reason in zip(("within 10 % of length", "at equal length"), why, strict=True):
            lines += [f"{before}: {word} withheld: {reason}"] if reason is not None else []
    return [*lines, HOW_TO_READ]


def _both(one: WinRate) -> tuple[AtEqualLength, AtEqualLength]:
    return one.matched, one.fitted


def _share(share: float | None, ends: tuple[float, float] | None) -> str:
    return "withheld" if share is None else f"{number(share)} {_ends(ends)}".rstrip()


def _at(at: AtEqualLength, one: WinRate) -> tuple[str | tuple[str, str], ...]:
    count = f"n {at.n:,}" if at is one.matched else ""
    if at.share is None:
        return ("withheld", "yellow"), "\n", (count, "dim")
    return f"{number(at.share)}{', ' if count else ''}{count}", "\n", (_ends(at.ci95), "dim")


def _length(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"


def _ends(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"[{number(ends[0])}, {number(ends[1])}]"
