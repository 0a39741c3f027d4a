"""report.html: one page that opens offline and that no answer of a model can break out of.

Everything is rendered here, on the server's side as it were: the page's script sorts tables and opens samples, and no
text of a model or a data set ever passes through it. A Content-Security-Policy allows this one script and style sheet,
by digest, and nothing else, so that markup which slipped through could still neither run nor fetch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from harness.core.records import Metric, Row
from harness.core.text import (
    ARROWS,
    DIGITS,
    HIDDEN_IN_LINE,
    HIDDEN_IN_TEXT,
    MINUS,
    clip,
    code_point,
    number,
    portable,
    task_label,
)
from harness.report.compare_text import p_text, signed, verdict_text
from harness.report.leaderboard import arm_text, differences_by_row, digits_by_row, row_key
from harness.report.read import RunResult, StepResult, TaskResult, Texts
from harness.report.text import HOW_TO_READ, interval_text, mean_text, pedigree, remarks, shown_rows, task_facts

if TYPE_CHECKING:
    from harness.report.model import Difference, Report, TaskReport

ASSETS = Path(__file__).with_name("assets")
SAMPLES_PER_TASK = 50
"""Samples that a page shows of each task; arms share them."""
FEWEST_SAMPLES = 4
TEXT_BYTES = 3_000_000
"""Room for the texts of all samples of a page, so that it opens quickly (bytes of HTML)."""
MIN_BYTES, MAX_BYTES = 800, 12_000
"""Least and most room for the texts of one sample (bytes of HTML)."""
MAX_CHOICES = 12
PLOT_WIDTH, PLOT_MARGIN = 150.0, 5.0


def render(report: Report, run: RunResult) -> str:
    """The page. The same records give the same bytes."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["line"] = line_html
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    rows = shown_rows(report)
    per_task = max(FEWEST_SAMPLES, SAMPLES_PER_TASK // len(run.arms))
    total = sum(min(per_task, _sample_count(task)) for task in run.tasks)
    room = max(MIN_BYTES, min(MAX_BYTES, TEXT_BYTES // max(1, total)))
    tasks = [
        _task_view(report, said, task, f"task-{index}", (per_task, room))
        for index, (said, task) in enumerate(zip(report.tasks, run.tasks, strict=True))
    ]
    anchors = {step: view["anchor"] for said, view in zip(report.tasks, tasks, strict=True) for step in said.steps}
    return environment.get_template("report.html.j2").render(
        report=report,
        summary=_summary(report),
        has_chance=any(row.chance is not None for row in rows),
        policy=f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        rows=[{**view, "anchor": anchors.get(view["step"])} for view in _row_views(rows, report)],
        several=bool(report.arms),
        remarks=remarks(report),
        tasks=tasks,
        how_to_read=HOW_TO_READ,
        pedigree=pedigree(report),
        steps=report.provenance.get("steps", []),
        per_task=per_task,
    )


def _summary(report: Report) -> list[str]:
    """What a reader wants to know first, in a few words each."""
    loaded = report.rows[0].dtype if report.rows else None
    words = [report.model.get("architecture"), loaded or report.model.get("dtype")]
    size = report.model.get("size_bytes")
    if size:
        words.append(f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB")
    engine = report.engine.get("name")
    words.append(f"engine {engine}" if engine else None)
    limit = report.spec.get("limit")
    words.append(f"limit {limit:,} per leaf task" if limit else None)
    return [str(word) for word in words if word]


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# -------------------------------------------------------------------------------------------------------------- texts


def _marked(text: str, *, lines: bool) -> Markup:
    """Escape a text; hidden characters become visible code points that stand out from the text itself."""
    pattern = HIDDEN_IN_TEXT if lines else HIDDEN_IN_LINE
    parts: list[str] = []
    start = 0
    for match in pattern.finditer(text):
        parts += [escape(text[start : match.start()]), f'<span class="cp">{code_point(match)}</span>']
        start = match.end()
    parts.append(escape(text[start:]))
    return Markup("".join(parts))


def line_html(value: Any) -> Markup:
    """A text of one line (a name, a note)."""
    return _marked(str(value), lines=False)


def block_html(text: str, room: int, *, tail: float = 0.0) -> Markup:
    """A text of many lines in at most about ``room`` bytes of HTML; ``tail`` is the share kept of its end."""
    limit, text = room, text.replace("\r\n", "\n")
    while True:
        html = _marked(clip(text, limit, tail=tail), lines=True)
        # Escaping can multiply the size of a text by 30, and hostile texts are made of what it multiplies.
        if len(html.encode()) <= room + 60 or limit <= 40:
            return html
        limit = limit * 2 // 3


# --------------------------------------------------------------------------------------------------------------- rows


def _domain(rows: Iterable[Row], metric: Metric | None) -> tuple[float, float] | None:
    """Ends of the axis: the metric's own range, or what the rows span and 0, as a span alone has no scale."""
    if metric is not None and metric.low is not None and metric.high is not None:
        return metric.low, metric.high
    values = [value for row in rows for value in (*(row.ci95 or ()), row.mean, row.chance) if value is not None]
    if not values:
        return None
    low, high = min(0.0, *values), max(0.0, *values)
    pad = 0.08 * (high - low) or max(abs(high) * 0.1, 0.5)
    return low - pad, high + pad


def plot(row: Row, domain: tuple[float, float] | None) -> Markup:
    """Mean, interval and chance level on one axis, as SVG (its attributes are data; a style sheet would not be)."""
    if domain is None or row.mean is None or row.withheld is not None or not math.isfinite(row.mean):
        return Markup("")
    low, high = domain

    def at(value: float) -> str:
        share = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5
        return f"{PLOT_MARGIN + share * (PLOT_WIDTH - 2 * PLOT_MARGIN):.1f}"

    label = f"mean {number(row.mean)}"
    marks = [f'<path class="axis" d="M{at(low)} 9H{at(high)}"/>']
    if row.chance is not None:
        label += f", chance {number(row.chance)}"
        marks.append(f'<path class="chance" d="M{at(row.chance)} 1V17"/>')
    if row.ci95 is not None:
        label += f", 95 % interval {number(row.ci95[0])} to {number(row.ci95[1])}"
        left, right = at(row.ci95[0]), at(row.ci95[1])
        marks.append(f'<path class="ci" d="M{left} 9H{right}M{left} 5.5V12.5M{right} 5.5V12.5"/>')
    marks.append(f'<circle class="mean" cx="{at(row.mean)}" cy="9" r="3.5"/>')
    label += f"; axis from {number(low)} to {number(high)}"
    return Markup(
        f'<svg class="plot" viewBox="0 0 {PLOT_WIDTH:g} 18" width="{PLOT_WIDTH:g}" height="18" role="img" '
        f'aria-label="{label}"><title>{label}</title>{"".join(marks)}</svg>'
    )


def _row_views(rows: Sequence[Row], report: Report) -> list[dict[str, Any]]:
    metrics = {(step, metric.name): metric for task in report.tasks for step in task.steps for metric in task.metrics}
    against = differences_by_row(report)
    decimals = digits_by_row(report.rows, against)
    views = []
    for row in rows:
        metric = metrics.get((row.step, row.metric))
        digits = decimals.get((row.step, row.metric), DIGITS)
        difference = against.get(row_key(row))
        alike = [other for other in rows if other.unit == row.unit and other.metric == row.metric]
        views.append(
            {
                "task": row.task,
                "variant": row.variant,
                "label": task_label(row.task, row.variant),
                "arm": arm_text(row, report),
                "step": row.step,
                "difference": "" if difference is None else _difference_text(difference),
                "difference_value": "" if difference is None else repr(difference.difference),
                "verdict": "" if difference is None else verdict_text(difference),
                "p": "" if difference is None else p_text(difference.p_adjusted),
                "leaf": row.leaf,
                "metric": row.metric,
                "unit": row.unit,
                "scorer": row.scorer,
                "arrow": ARROWS[row.higher_is_better],
                "direction": {True: "higher is better", False: "lower is better", None: ""}[row.higher_is_better],
                "mean": mean_text(row, minus=MINUS, digits=digits),
                "mean_value": "" if row.mean is None or row.withheld is not None else repr(row.mean),
                "interval": interval_text(row, minus=MINUS, digits=digits),
                "width": "" if row.ci95 is None or row.withheld is not None else repr(row.ci95[1] - row.ci95[0]),
                "plot": plot(row, _domain(alike, metric)),
                "chance": number(row.chance, minus=MINUS),
                "chance_value": "" if row.chance is None else repr(row.chance),
                "n": row.n,
                "n_unscored": row.n_unscored,
                "n_truncated": row.n_truncated,
                "notes": row.notes,
            }
        )
    return views


def _difference_text(one: Difference) -> str:
    return one.verdict if one.difference is None else signed(one.difference).replace("-", MINUS)


def _task_view(
    report: Report, said: TaskReport, task: TaskResult, anchor: str, space: tuple[int, int]
) -> dict[str, Any]:
    """``space``: samples to show, and room for the texts of each (bytes)."""

    def mine(rows: Iterable[Row]) -> list[Row]:
        return [row for row in rows if row.step in said.steps]

    leaves = mine(report.leaves)
    samples = _sample_views(task, *space)
    return {
        "task": said.task,
        "variant": said.variant,
        "arm": said.arm,
        "label": task_label(said.task, said.variant),
        "anchor": anchor,
        "facts": task_facts(said),
        "rows": _row_views(mine(report.rows), report),
        "leaves": _row_views(leaves, report),
        "leaf_count": len({row.leaf for row in leaves}),
        "samples": samples,
        "sample_count": _sample_count(task),
        "folders": [step.folder.name for step in task.scores if step.done and step.folder is not None],
        "has_texts": any(view["texts"] for view in samples),
    }


# ------------------------------------------------------------------------------------------------------------ samples


def _scored(task: TaskResult) -> list[StepResult]:
    return [step for step in task.scores if step.done]


def _sample_count(task: TaskResult) -> int:
    steps = _scored(task)
    return len(steps[0].samples) if steps else 0


def choose_samples(
    samples: Mapping[str, Mapping[str, Any]],
    metric: str,
    *,
    higher_is_better: bool | None,
    limit: int = SAMPLES_PER_TASK,
) -> list[tuple[str, str]]:
    """(id, why it is shown) of at most ``limit`` samples: worst, best, unscored, and a spread over the others.

    Nothing is worst that no sample beats, nor best that beats none: of a perfect run there is only a spread.
    Ties are broken by the digest of the id: neither by chance nor by the order of the data set, whose first leaf would
    otherwise be all that is seen of a 0/1 metric.
    """
    ids = sorted(samples, key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest())
    values = {name: samples[name]["values"].get(metric) for name in ids}
    unscored = [name for name in ids if values[name] is None]
    rising = sorted((name for name in ids if values[name] is not None), key=lambda name: values[name])
    # Both sorts are stable, so that among equals the order of the digests holds from either end.
    falling = sorted((name for name in ids if values[name] is not None), key=lambda name: -values[name])
    first, second = (falling, rising) if higher_is_better is False else (rising, falling)
    if len(ids) <= limit:
        return [*((name, "") for name in first), *((name, "unscored") for name in unscored)]
    words = ("lowest", "highest") if higher_is_better is None else ("worst", "best")
    part = max(1, limit * 3 // 10)
    ends = [values[side[0]] if side else None for side in (first, second)]
    chosen = {name: words[0] for name in first[:part] if values[name] != ends[1]}
    chosen.update((name, words[1]) for name in second[:part] if name not in chosen and values[name] != ends[0])
    chosen.update(dict.fromkeys(unscored[: limit // 5], "unscored"))
    rest = [name for name in ids if name not in chosen]
    chosen.update(dict.fromkeys(rest[: limit - len(chosen)], "spread"))
    return list(chosen.items())


def _sample_views(task: TaskResult, count: int, room: int) -> list[dict[str, Any]]:
    steps = _scored(task)
    if not steps or not steps[0].metrics:
        return []
    first = steps[0]
    metric = next((metric for metric in first.metrics if metric.primary), first.metrics[0])
    chosen = choose_samples(first.samples, metric.name, higher_is_better=metric.higher_is_better, limit=count)
    texts = first.texts({name for name, _ in chosen})
    views = []
    for name, why in chosen:
        row = first.samples[name]
        values = {key: value for step in steps for key, value in step.samples.get(name, {}).get("values", {}).items()}
        reasons = [step.samples.get(name, {}).get("reason") for step in steps]
        views.append(
            {
                "id": name,
                "why": why,
                "leaf": row.get("leaf"),
                "metric": metric.name,
                "score": number(row["values"].get(metric.name), minus=MINUS),
                "unscored": row["values"].get(metric.name) is None,
                "flags": [
                    word for word, key in (("prompt cut", "cut"), ("token budget spent", "hit_limit")) if row.get(key)
                ],
                "values": [(key, number(value, minus=MINUS)) for key, value in values.items()],
                "reasons": [clip(str(portable(reason)), 300) for reason in reasons if reason],
                "texts": _text_views(texts.get(name), row.get("detail") or {}, room),
            }
        )
    return views


def _text_views(texts: Texts | None, detail: Mapping[str, Any], room: int) -> dict[str, Any] | None:
    """The texts of one sample, within ``room``: what is not needed by one part is left to the next."""
    if texts is None:
        return None
    left = room

    def take(text: str, share: float, *, tail: float = 0.0) -> Markup:
        nonlocal left
        html = block_html(text, max(100, int(left * share)), tail=tail)
        left = max(0, left - len(html.encode()))
        return html

    target = None if texts.target is None else take(texts.target, 0.2)
    choices = [
        (take(text, 0.1), "–" if logprob is None else number(logprob, minus=MINUS), best)
        for text, logprob, best in texts.choices[:MAX_CHOICES]
    ]
    generated = None if texts.generated is None else take(texts.generated, 0.5)
    errors = [take(output.error, 0.2) for output in texts.outputs if output.error is not None][:3]
    kept = _without_empty(detail)
    return {
        "target": target,
        "choices": choices,
        "more_choices": max(0, len(texts.choices) - MAX_CHOICES),
        "generated": generated,
        "errors": errors,
        "detail": take(json.dumps(kept, ensure_ascii=False, sort_keys=True, indent=1), 0.3) if kept else None,
        # The question of a few-shot prompt stands at its end.
        "prompt": take(texts.prompt, 1.0, tail=0.7),
    }


def _without_empty(detail: Mapping[str, Any]) -> dict[str, Any]:
    empty: Collection[Any] = (None, "", [], {})
    return {key: value for key, value in detail.items() if value not in empty}
