"""What every reader of foreign logs makes: the same runs, tasks and rows that a run folder of our own is read into.

Their means are printed as they stand in the log, once they have been held against its samples: a log whose samples
give another mean than it says is refused, or, where the mean is no average over samples, shown but not paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.core.records import Metric, Row, StepRecord, digest_of
from harness.core.stats import is_binary, summarise
from harness.report.read import RunResult, StepResult, TaskResult, Texts

CLOSE = 1e-9
"""How far a mean may lie from that of its samples, by the order in which it was summed (relative, from 1 on)."""


@dataclass(frozen=True)
class Content:
    """What a log says of one task."""

    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    samples: Mapping[str, dict[str, Any]]
    texts: Callable[[Collection[str]], dict[str, Texts]]
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class LogStep(StepResult):
    """The scores of one task of a foreign log, in the shape of a scores step."""

    content: Content

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the log says of the program that wrote it."""
        return dict(self.content.provenance)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row per metric for the whole task, then one per leaf."""
        return self.content.rows

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """What its numbers mean."""
        return self.content.metrics

    @cached_property
    def samples(self) -> dict[str, dict[str, Any]]:
        """Sample id -> values; empty where the log holds means alone."""
        return dict(self.content.samples)

    def read_samples(self) -> dict[str, dict[str, Any]]:
        """The same: a log is read as one."""
        return self.samples

    def first_request(self) -> Mapping[str, Any]:
        """The first request, where the log holds samples."""
        name = next(iter(self.content.samples), None)
        found = self.texts([name]).get(name) if name is not None else None
        return next(iter(found.requests), {}) if found is not None else {}

    def asked(self, ids: Collection[str] | None = None) -> dict[str, Texts]:
        """Nothing: a log has its questions beside what was answered, and `texts` gives both."""
        return {}

    def texts(self, ids: Collection[str], asked: Mapping[str, Texts] | None = None) -> dict[str, Texts]:
        """What was asked and answered for some samples."""
        return self.content.texts(ids)


@dataclass(frozen=True)
class Reported:
    """A number as the log gives it, over the samples of ``leaf`` (None: of the whole task)."""

    metric: str
    mean: float | None
    stderr: float | None = None
    leaf: str | None = None
    n: int | None = None
    """Samples, where the log holds none of them."""
    aggregation: str | None = None
    """Its name in the log; None: it says nothing."""
    higher_is_better: bool | None = None
    unit: str = "score"
    primary: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Logged:
    """One task of a foreign log, as its reader found it."""

    where: Path
    program: str
    model: str
    name: str
    reported: Sequence[Reported]
    samples: Mapping[str, dict[str, Any]]
    """Sample id -> leaf, values by metric (None: none, with a reason); empty where the log holds means alone."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """`variant, version, limit, template, source, asked, questions`, as far as they are known."""
    scorer: Any = None
    """What its scores are made by: two logs that differ in it do not measure the same."""
    adapter: str | None = None
    dtype: str | None = None
    texts: Callable[[Collection[str]], dict[str, Texts]] = lambda ids: {}
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def task_of(log: Logged) -> TaskResult:
    """One task in the model that reports and comparisons are made from.

    Raises:
        UserError: the log's mean of a metric is not that of its samples, though it says that it is.
    """
    step = digest_of([log.program, log.model, log.adapter, log.name, str(log.where.name), [*map(repr, log.reported)]])
    whole = {one.metric: _row(log, step, one) for one in log.reported if one.leaf is None}
    leaves = [_row(log, step, one) for one in log.reported if one.leaf is not None]
    metrics = tuple(
        Metric(
            name=one.metric,
            higher_is_better=one.higher_is_better,
            unit=one.unit,
            primary=one.primary,
            aggregate=whole[one.metric][1],
        )
        for one in log.reported
        if one.leaf is None
    )
    content = Content(
        metrics,
        (*(row for row, _ in whole.values()), *(row for row, _ in leaves)),
        log.samples,
        log.texts,
        log.provenance,
    )
    info = {"id": step, "scorer": log.program, "identity": {"scorer": log.scorer}}
    record = StepRecord(id=step, kind="scores", status="done", artifact="scores", notes=log.notes)
    means_only = {} if log.samples else {"means_only": f"{log.where.name} comes without samples"}
    return TaskResult(
        {"task": log.name, **log.info, **means_only},
        None,
        (LogStep(log.where.parent, step, None, info, record, content),),
    )


def run_of_log(root: Path, plan: Mapping[str, Any], tasks: Sequence[TaskResult]) -> RunResult:
    """The run of a log; ``plan`` names the program that wrote it (`source`) and its model."""
    return RunResult(root, {"tasks": [dict(task.info) for task in tasks], **plan}, tuple(tasks))


def _row(log: Logged, step: str, one: Reported) -> tuple[Row, Any]:
    """The row of one reported number, and whether it is a mean over samples."""
    base: dict[str, Any] = {
        "model": log.model,
        "adapter": log.adapter,
        "task": log.name,
        "variant": log.info.get("variant", "raw"),
        "template": log.info.get("template"),
        "dtype": log.dtype,
        "leaf": one.leaf,
        "scorer": log.program,
        "metric": one.metric,
        "unit": one.unit,
        "higher_is_better": one.higher_is_better,
        "primary": one.primary,
        "step": step,
    }
    mine = [row for row in log.samples.values() if one.leaf is None or row.get("leaf") == one.leaf]
    mine = [row for row in mine if one.metric in row["values"]]
    if not mine and log.samples:
        note = "a number of the whole: no sample has it, so that it is shown as it stands, and not paired"
        return Row(**base, mean=one.mean, stderr=one.stderr, n=one.n or 0, notes=(note, *one.notes)), "corpus"
    if not mine:
        note = "from the log's own mean and standard error, without its samples"
        known = {"mean": one.mean, "stderr": one.stderr, "n": one.n or 0, "notes": (note, *one.notes)}
        return Row(**base, **known, withheld=None if one.mean is not None else "the log gives no mean"), "mean"
    values = [row["values"][one.metric] for row in mine]
    summary = summarise(values, kind="proportion" if is_binary(values) else "mean")
    base |= {
        "n": summary.n,
        "n_unscored": summary.n_unscored,
        "n_truncated": sum(bool(row.get("cut") or row.get("hit_limit")) for row in mine),
    }
    if one.mean is None or not math.isfinite(one.mean):
        said = "none" if one.mean is None else repr(one.mean)
        why = f"{log.program}'s own mean is {said}; {summary.n_unscored:,} of {len(mine):,} samples have no number"
        return Row(**base, withheld=why, notes=one.notes), "mean"
    if summary.mean is not None and abs(summary.mean - one.mean) <= CLOSE * max(1.0, abs(one.mean)):
        interval = None if summary.interval is None else (summary.interval.low, summary.interval.high)
        share = summary.n_unscored / len(mine)
        limit = Metric.model_fields["threshold"].default
        withheld = f"{summary.n_unscored:,} of {len(mine):,} samples are unscored" if share > limit else None
        numbers = {"mean": one.mean, "stderr": summary.stderr, "ci95": interval, "withheld": withheld}
        return Row(**base, **numbers, notes=one.notes), "mean"
    if one.aggregation == "mean":
        where = f"{log.where}, {log.name}{'' if one.leaf is None else f' ({one.leaf})'}"
        raise UserError(
            where,
            f"gives {one.mean!r} as the mean of {one.metric}, and its {summary.n:,} samples give {summary.mean!r}",
            "They are not of one evaluation, or one was changed; evaluate again, or give the result file alone in "
            "another folder to see its means.",
        )
    how = f"as {one.aggregation!r}" if one.aggregation else "in a way that the log does not name"
    if not summary.n:  # a sample's part of it is no number of its own, which is not to be without a score
        base |= {"n": len(mine), "n_unscored": 0}
    note = f"aggregated by {log.program} {how}, which is no mean over samples: shown as it stands, not paired"
    return Row(**base, mean=one.mean, stderr=one.stderr, notes=(note, *one.notes)), "corpus"
