"""The words of a report: numbers as text, the terminal table, and Markdown. Nothing here touches the disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.records import Row
from harness.core.text import ARROWS, DIGITS, MOST_DIGITS, number, task_label, visible

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from harness.report.model import Report, TaskReport

HOW_TO_READ = (
    ("mean", "Average over the n samples that have a score. ↑ higher is better, ↓ lower is better."),
    (
        "95 % interval",
        "Sampling noise of the mean: Wilson's score interval where every score is 0 or 1, Student's t otherwise (a "
        "bootstrap where a note says so). It says nothing of training noise or of another choice of prompts. Whether "
        "two intervals overlap is not a test: `harness compare` pairs two runs sample by sample.",
    ),
    ("chance", "Expected value of guessing. An interval that contains it shows no ability."),
    ("unscored", "Samples without a score. They are left out of the mean and never counted as 0."),
    (
        "truncated",
        "Samples whose prompt was cut to fit the context, or whose answer ended because its token budget was spent. "
        "They are scored as they stand.",
    ),
    (
        "minus base",
        "Mean difference from the base, over the samples that both scored, and only where both were asked the same. p "
        "is after Holm's correction over the table, and the interval goes with it: its level is 1 - 0.05/k, k being "
        "the tests left at its step. What is significant, but smaller than the metric's smallest difference worth "
        "naming, is no difference of size.",
    ),
    ("withheld", "Too many samples are unscored for the mean to be believed, so it is not shown."),
)


def digits_apart(pairs: Iterable[tuple[float | None, float | None]]) -> int:
    """Fewest decimals at which the two numbers of every pair are printed differently."""
    unequal = [pair for pair in pairs if pair[0] != pair[1]]
    enough = (
        digits
        for digits in range(DIGITS, MOST_DIGITS + 1)
        if all(number(one, digits=digits) != number(other, digits=digits) for one, other in unequal)
    )
    return next(enough, MOST_DIGITS)


def mean_text(row: Row, *, minus: str = "-", digits: int = DIGITS) -> str:
    """The mean of a row, or that it is withheld."""
    return "withheld" if row.withheld is not None else number(row.mean, minus=minus, digits=digits)


def interval_text(row: Row, *, minus: str = "-", digits: int = DIGITS) -> str:
    """The 95 % interval of a row."""
    if row.ci95 is None or row.withheld is not None:
        return "–"
    low, high = (number(end, minus=minus, digits=digits) for end in row.ci95)
    return f"[{low}, {high}]"


def metric_label(row: Row) -> str:
    """Metric with its direction."""
    return f"{visible(row.metric)} {ARROWS[row.higher_is_better]}".rstrip()


def shown_rows(report: Report, *, everything: bool = False) -> list[Row]:
    """The rows that tables show: those of primary metrics, unless there is none or all are asked for."""
    primary = [row for row in report.rows if row.primary]
    return primary if primary and not everything else list(report.rows)


FIGURES = ("mean", "95 % interval", "chance", "n", "unsc.", "trunc.")


def figures_table(title: Text, first: str, figures: Sequence[str]) -> Table:
    """An empty terminal table with a wide first column and right-aligned columns of figures."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption_justify="left",
    )
    table.add_column(first, overflow="fold")
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def numbers_table(report: Report, *, everything: bool = False) -> Table:
    """The numbers of one arm for the terminal; texts are neutralised and never read as markup. Fits in 80 columns."""
    from rich.text import Text

    engine = visible(str(report.engine.get("name", "")))
    title = Text.assemble((report.title, "bold"), (f"  {engine}", "dim"))
    table = figures_table(title, "task, metric", FIGURES)
    for row in shown_rows(report, everything=everything):
        table.add_row(
            Text.assemble(task_label(row.task, row.variant), "\n", (f"  {metric_label(row)}", "dim")),
            Text(mean_text(row), style="yellow" if row.withheld is not None else "bold"),
            Text(interval_text(row)),
            Text(number(row.chance), style="dim"),
            Text(f"{row.n:,}"),
            Text(f"{row.n_unscored:,}", style="yellow" if row.n_unscored else "dim"),
            Text(f"{row.n_truncated:,}", style="yellow" if row.n_truncated else "dim"),
        )
    if notes := remarks(report):
        table.caption = Text("\n".join(visible(note) for note in notes), justify="left")
    return table


def remarks(report: Report) -> list[str]:
    """What a reader of the numbers must know: means that are withheld, steps that failed, what steps noted."""
    withheld = [row for row in report.rows if row.withheld is not None]
    return [f"{task_label(row.task, row.variant)} {row.metric}: {row.withheld}" for row in withheld] + list(
        report.notes
    )


def escape_markdown(text: str) -> str:
    """One line of text that Markdown shows as it is; control characters are made visible."""
    escaped = re.sub(r"([\\`*\[\]<>|~#!&])", r"\\\1", visible(text))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", escaped)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int) -> list[str]:
    """Lines of a table whose first ``words`` columns are text (left) and whose others are numbers (right)."""
    marks = [":--" if column < words else "--:" for column in range(len(header))]
    body = [[escape_markdown(cell) for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in ([*header], marks, *body)]


def markdown(report: Report, leaderboard: Sequence[str] = ()) -> str:
    """The report as Markdown, without any text of a model or a data set; ``leaderboard``: the table of several arms."""
    engine = escape_markdown(str(report.engine.get("name", "unknown")))
    lines = [f"# {escape_markdown(report.title)}", "", f"Engine: {engine}. harness {report.harness}.", ""]
    header = ("task", "metric", "mean", "95 % interval", "standard error", "chance", "n", "unscored", "truncated")
    lines += leaderboard or markdown_table(header, [_cells(row) for row in report.rows], words=2)
    lines += ["", *[f"* {escape_markdown(note)}" for note in remarks(report)]]
    lines += ["", "## How to read it", "", *[f"* **{word}**: {text}" for word, text in HOW_TO_READ]]
    for task in report.tasks:
        arm = f"{task.arm}, " if task.arm is not None else ""
        lines += ["", f"## {escape_markdown(arm + task_label(task.task, task.variant))}", ""]
        lines += [f"* {word}: {escape_markdown(text)}" for word, text in task_facts(task)]
        leaves = [row for row in report.leaves if row.step in task.steps]
        if leaves:
            cells = [(visible(row.leaf or ""), *_cells(row)[1:]) for row in leaves]
            lines += ["", *markdown_table(("leaf task", *header[1:]), cells, words=2)]
    lines += ["", "## Pedigree", "", *[f"* {word}: {escape_markdown(text)}" for word, text in pedigree(report)], ""]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    counts = (f"{row.n:,}", f"{row.n_unscored:,}", f"{row.n_truncated:,}")
    error = "–" if row.withheld is not None else number(row.stderr)
    label = task_label(row.task, row.variant)
    return (label, metric_label(row), mean_text(row), interval_text(row), error, number(row.chance), *counts)


def task_facts(task: TaskReport) -> list[tuple[str, str]]:
    """What is to be said about a task, as pairs of word and text."""
    decoding = "not recorded"
    if task.asks == "loglikelihood":
        decoding = "nothing is generated: log-likelihoods of given continuations"
    elif task.decoding is not None:
        decoding = ", ".join(f"{key} {value}" for key, value in task.decoding.items() if value not in (None, [], ()))
    facts = [
        ("prompt", task.variant),
        ("decoding", decoding),
        ("scorer", ", ".join(task.scorers) or "–"),
        ("samples", "all" if task.limit is None else f"the first {task.limit:,} of each leaf task (limit)"),
        ("source", task.source or "not stated"),
        ("licence", task.licence),
        ("version", str(task.version)),
        ("steps", ", ".join(step[:12] for step in task.steps)),
    ]
    facts += [("left out", f"{count:,} rows: {reason}") for reason, count in task.dropped.items()]
    facts += [("status", task.status)] if task.status != "done" else []
    return facts + [("note", note) for note in task.notes]


def pedigree(report: Report) -> list[tuple[str, str]]:
    """Where the numbers come from, as pairs of word and text."""
    facts = [(f"model {key}", _plain(value)) for key, value in report.model.items() if value is not None]
    facts += [(f"adapter {key}", _plain(value)) for key, value in (report.adapter or {}).items() if value is not None]
    facts += [(f"engine {key}", _plain(value)) for key, value in report.engine.items() if value not in (None, {})]
    facts.append(("seed", str(report.spec.get("seed", "not recorded"))))
    facts += [(name, " and ".join(found)) for name, found in report.provenance.get("versions", {}).items()]
    for name, found in report.provenance.get("facts", {}).items():
        facts.append((name, " and ".join(_plain(value) for value in found)))
    return facts


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=True, sort_keys=True)
