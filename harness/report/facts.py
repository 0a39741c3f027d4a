"""What a report says beside its numbers: how a task was asked, and what produced the numbers."""

from __future__ import annotations

from typing import Any

from harness.core.text import portable
from harness.report.model import TaskReport
from harness.report.read import RunResult, TaskResult


def task_report(task: TaskResult, several: bool) -> TaskReport:
    """What a report says about one task besides its numbers; ``several``: of several arms, so that it names its own."""
    info = portable(dict(task.info))
    asks, decoding = _asked(task)
    status = "failed" if task.failed() else "unfinished" if task.unfinished() else "done"
    rows = [row for step in task.scores if step.done for row in step.rows if row.leaf is None]
    scorers = [row.scorer for row in rows]
    metrics = {metric.name: metric for step in task.scores for metric in step.metrics}
    return TaskReport(
        task=task.name,
        variant=task.variant,
        arm=info.get("arm") if several else None,
        version=info.get("version"),
        source=info.get("source") or "",
        licence=info.get("licence") or "unknown",
        notes=tuple(
            dict.fromkeys(portable([*(info.get("notes") or ()), *(note for row in rows for note in row.notes)]))
        ),
        dropped=_dropped(task),
        limit=info.get("limit"),
        asks=asks,
        decoding=decoding,
        scorers=tuple(dict.fromkeys(scorers)),
        metrics=tuple(metrics.values()),
        steps=tuple(step.id for step in task.steps),
        status=status,
    )


def _dropped(task: TaskResult) -> dict[str, int]:
    counts = task.answers.record.counts if task.answers is not None and task.answers.record is not None else {}
    return {
        portable(key.removeprefix("dropped: ")): n for key, n in counts.items() if key.startswith("dropped: ") and n
    }


def _asked(task: TaskResult) -> tuple[Any, dict[str, Any] | None]:
    """Kind of request and decoding, as the first stored request shows them, else as the answers step says."""
    request = next((step.first_request() for step in task.scores), {})
    info = task.answers.info if task.answers is not None else {}
    described = task.answers.identity.get("task") if task.answers is not None else None
    kind = request.get("kind")
    if kind == "loglikelihood":
        return kind, None
    decoding = request.get("decoding")
    # What lm-eval decodes with stands in its own task file, not in ours.
    if decoding is None and not (isinstance(described, dict) and described.get("lm_eval") is not None):
        decoding = info.get("decoding")
    return ("generate" if decoding else kind), (dict(decoding) if decoding else None)


def provenance_of(run: RunResult) -> dict[str, Any]:
    """What produced the numbers. Where steps differ (a run continued after an upgrade) every value is kept."""
    versions: dict[str, list[str]] = {}
    facts: dict[str, list[Any]] = {}
    steps = []
    seen = set()
    for task in run.tasks:
        for step in task.steps:
            if step.id in seen:
                continue
            seen.add(step.id)
            source = portable(step.provenance)
            for name, version in {"harness": source.get("harness"), **source.get("libraries", {})}.items():
                if version is not None and version not in versions.setdefault(name, []):
                    versions[name].append(version)
            for name, fact in source.items():
                if name not in ("schema_version", "harness", "libraries") and fact not in facts.setdefault(name, []):
                    facts[name].append(fact)
            record = step.record
            steps.append(
                {
                    "id": step.id,
                    "kind": "answers" if step is task.answers else "scores",
                    "folder": step.folder.name if step.folder is not None else None,
                    "task": task.name,
                    "variant": task.variant,
                    **({"arm": task.info.get("arm")} if len(run.arms) > 1 else {}),
                    "status": record.status if record is not None else "unfinished",
                    "digest": record.digest if record is not None else None,
                    "counts": dict(record.counts) if record is not None else {},
                    "seconds": dict(record.seconds) if record is not None else {},
                }
            )
    return {"versions": versions, "facts": facts, "steps": steps}
