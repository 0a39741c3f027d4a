"""Several arms in one table: per task and metric every arm, and what it is worth against the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.records import Row
from harness.core.text import number, task_label, visible
from harness.report.compare_text import CLAIMS, STYLES, p_text, signed, verdict_text
from harness.report.text import (
    digits_apart,
    figures_table,
    interval_text,
    markdown_table,
    mean_text,
    metric_label,
    numbers_table,
    remarks,
    shown_rows,
)

if TYPE_CHECKING:
    from rich.table import Table

    from harness.report.model import Difference, Report

BASE = "base"
Key = tuple[str | None, str, str, str]


def row_key(row: Row) -> Key:
    """What tells a whole-task row from all others of a report."""
    return row.adapter, row.task, row.variant, row.metric


def differences_by_row(report: Report) -> dict[Key, Difference]:
    """The difference from the base that belongs to each row."""
    only = [arm.get("label") for arm in report.arms if arm.get("label") is not None]
    return {
        # With one arm beside the base, its differences name no arm.
        (one.arm if one.arm is not None else only[0], one.task, one.variant_b, one.metric): one
        for one in report.differences
        if one.arm is not None or len(only) == 1
    }


def arm_text(row: Row, report: Report) -> str:
    """The arm of a row: its adapter, or the base, and whose chat template it was asked in where it has none."""
    if row.adapter is not None:
        return visible(row.adapter)
    lent = {arm["template_digest"]: arm["template_of"] for arm in report.arms if arm.get("template_of")}
    return BASE if row.template not in lent else visible(f"{BASE} (template of {lent[row.template]})")


def digits_by_row(rows: Sequence[Row], against: Mapping[Key, Difference]) -> dict[tuple[str, str], int]:
    """Decimals of means, by step and metric: enough to see every difference from the base that is claimed."""
    found: dict[tuple[str, str], int] = {}
    for section in _sections(rows):
        bases = [row for row in section if row.adapter is None]
        claimed = [row for row in section if (one := against.get(row_key(row))) is not None and one.verdict in CLAIMS]
        pairs = [(row.mean, base.mean) for row in claimed for base in bases if base.template == row.template]
        found.update(dict.fromkeys(((row.step, row.metric) for row in section), digits_apart(pairs)))
    return found


def terminal_table(report: Report, *, everything: bool = False) -> Table:
    """The table for the terminal: numbers of one arm, or all arms by task and metric. Fits in 80 columns."""
    if not report.arms:
        return numbers_table(report, everything=everything)
    from rich.text import Text

    engine = visible(str(report.engine.get("name", "")))
    table = figures_table(
        Text.assemble((report.title, "bold"), (f"  {engine}", "dim")), "task, metric, arm", ("mean", "n")
    )
    table.add_column("- base", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    against = differences_by_row(report)
    chosen = shown_rows(report, everything=everything)
    decimals = digits_by_row(chosen, against)
    for rows in _sections(chosen):
        first = rows[0]
        table.add_row(Text.assemble((visible(first.task), "bold"), "\n", (metric_label(first), "dim")))
        for row in rows:
            digits = decimals[row.step, row.metric]
            one = against.get(row_key(row))
            counts = "".join(
                f" {n:,} {word}" for n, word in ((row.n_unscored, "unsc."), (row.n_truncated, "trunc.")) if n
            )
            table.add_row(
                Text.assemble(f"  {arm_text(row, report)} ", (row.variant, "dim"), (counts, "yellow")),
                Text.assemble(
                    (mean_text(row, digits=digits), "bold"), "\n", (interval_text(row, digits=digits), "dim")
                ),
                Text(f"{row.n:,}"),
                Text("" if one is None else f"{signed(one.difference)}\n{_interval(one)}"),
                Text("")
                if one is None
                else Text.assemble(
                    (verdict_text(one), STYLES[one.verdict]), "\n", (f"p {p_text(one.p_adjusted)}", "dim")
                ),
            )
    lines = [visible(note) for note in remarks(report)]
    if report.differences:
        lines.append("- base: paired by sample. p, and the interval that goes with it: after Holm over the table.")
    table.caption = Text("\n".join(lines), justify="left")
    return table


def markdown_lines(report: Report) -> list[str]:
    """The same as a Markdown table."""
    words = ("task", "metric", "arm", "verdict")
    header = (
        *words,
        "mean",
        "95 % interval",
        "n",
        "unscored",
        "truncated",
        "minus base",
        "interval (Holm)",
        "p (Holm)",
    )
    against = differences_by_row(report)
    decimals = digits_by_row(report.rows, against)
    cells = []
    for rows in _sections(list(report.rows)):
        for row in rows:
            one, digits = against.get(row_key(row)), decimals[row.step, row.metric]
            cells.append(
                (
                    task_label(row.task, row.variant),
                    metric_label(row),
                    arm_text(row, report),
                    "–" if one is None else verdict_text(one),
                    mean_text(row, digits=digits),
                    interval_text(row, digits=digits),
                    *(f"{count:,}" for count in (row.n, row.n_unscored, row.n_truncated)),
                    "–" if one is None else signed(one.difference),
                    "–" if one is None else _interval(one),
                    "–" if one is None else p_text(one.p_adjusted),
                )
            )
    return markdown_table(header, cells, words=len(words))


def _sections(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by task and metric, in the order in which these first appear; variants may differ from arm to arm."""
    sections: dict[Any, list[Row]] = {}
    for row in rows:
        sections.setdefault((row.task, row.scorer, row.metric), []).append(row)
    return list(sections.values())


def _interval(one: Difference) -> str:
    return "–" if one.ci_adjusted is None else f"[{number(one.ci_adjusted[0])}, {number(one.ci_adjusted[1])}]"
