"""Which task and which metric of one run belong to which of another, and whether they measure the same thing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from harness.core.errors import UserError
from harness.core.records import Metric, Row, digest_of
from harness.core.text import clip, task_label, visible
from harness.report.external.open import open_any
from harness.report.read import RunResult, StepResult, TaskResult


@dataclass(frozen=True)
class Side:
    """One metric of one task of one run; ``row`` is its whole-task row."""

    task: TaskResult
    step: StepResult
    metric: Metric
    row: Row | None

    @property
    def values(self) -> dict[str, float | None]:
        """Sample id -> score; None where there is none."""
        return {name: row["values"].get(self.metric.name) for name, row in self.step.samples.items()}


def open_ended(root: Path) -> RunResult:
    """Open a run every step of which has ended (well or not).

    Raises:
        UserError: the folder is not a run, or the run has not ended.
    """
    run = open_any(root)
    check_ended(run)
    return run


def check_ended(run: RunResult) -> None:
    """Refuse a run with steps that have not ended.

    Raises:
        UserError: it has some.
    """
    waiting = [task_label(task.name, task.variant) for task in run.tasks if task.unfinished()]
    if waiting:
        shown = ", ".join(waiting[:4]) + (", ..." if len(waiting) > 4 else "")
        raise UserError(
            str(run.root),
            f"the run has not ended: {len(waiting)} of {len(run.tasks)} tasks are unfinished ({shown})",
            "Run its `harness eval` command again: it continues where it stopped. Then compare.",
        )


def base_of(run: RunResult) -> tuple[RunResult | None, list[RunResult]]:
    """The arm without an adapter, and the others."""
    base = next((arm for arm in run.arms if arm.label is None), None)
    return base, [arm for arm in run.arms if arm is not base]


def as_asked(base: RunResult, arm: RunResult) -> RunResult:
    """The base with the tasks that it was asked as the arm was; all of them, where it was asked in one way only."""
    if len(base.plan.get("arms") or ()) < 2:
        return base
    asked = {_asked(task) for task in arm.tasks}
    return replace(base, tasks=tuple(task for task in base.tasks if _asked(task) in asked))


def _asked(task: TaskResult) -> tuple[str, str, str | None]:
    return task.name, task.variant, task.template


def asked_differently(a: TaskResult, b: TaskResult) -> str | None:
    """How the prompts of two tasks differ; None where they do not, as far as it was recorded."""
    if a.variant != b.variant:
        return f"{a.variant} in A, {b.variant} in B"
    if a.template != b.template and a.template is not None and b.template is not None:
        return f"chat template {a.template[:12]} in A, {b.template[:12]} in B"
    return _facts_differ(a, b) or _questions_differ(a, b)


def _facts_differ(a: TaskResult, b: TaskResult) -> str | None:
    """What a log says of how it was asked, where both logs say it: few-shot examples, decoding, a solver."""
    left, right = a.info.get("asked") or {}, b.info.get("asked") or {}
    differing = [name for name in left if name in right and left[name] != right[name]]
    return "; ".join(f"{name} {_short(left[name])} in A, {_short(right[name])} in B" for name in differing) or None


def _questions_differ(a: TaskResult, b: TaskResult) -> str | None:
    """How many samples of one id are not one question, by the digests that logs give of data and prompt."""
    left, right = a.info.get("questions") or {}, b.info.get("questions") or {}
    shared = [name for name in left if name in right]
    differing = [name for name in shared if left[name] != right[name]]
    if not differing:
        return None
    shown = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
    return f"{len(differing):,} of {len(shared):,} samples of one id differ in data or prompt (id {shown})"


def _short(value: object) -> str:
    return visible(clip(str(value), 80))


def pair_arms(a: RunResult, b: RunResult) -> tuple[list[tuple[RunResult, RunResult]], tuple[str, ...], tuple[str, ...]]:
    """Arms of both runs that belong together, and the names of those that only one run has.

    A run with one arm goes with every arm of the other; otherwise arms of one name go together.
    """
    if len(a.arms) == 1 or len(b.arms) == 1:
        return [(left, right) for left in a.arms for right in b.arms], (), ()
    right = {arm.label: arm for arm in b.arms}
    pairs = [(arm, right[arm.label]) for arm in a.arms if arm.label in right]
    shared = {left.label for left, _ in pairs}
    if not pairs:
        raise UserError(
            f"{a.root} and {b.root}",
            "have no arm in common",
            f"Arms of the first: {_names(a)}; of the second: {_names(b)}. Evaluate the same adapters in both.",
        )
    alone = [tuple(visible(arm.arm) for arm in run.arms if arm.label not in shared) for run in (a, b)]
    return pairs, alone[0], alone[1]


def _names(run: RunResult) -> str:
    return ", ".join(visible(arm.label or "base") for arm in run.arms[:6]) + (", ..." if len(run.arms) > 6 else "")


def match_tasks(
    a: RunResult, b: RunResult
) -> tuple[list[tuple[TaskResult, TaskResult]], list[TaskResult], list[TaskResult]]:
    """Tasks of both runs: those asked alike first, then what is left of one variant, then what is left of one name."""
    left, right = list(a.tasks), list(b.tasks)
    pairs: list[tuple[TaskResult, TaskResult]] = []
    for parts in (3, 2, 1):
        for task in list(left):
            key = _asked(task)[:parts]
            mine, like = ([other for other in side if _asked(other)[:parts] == key] for side in (left, right))
            if len(mine) == 1 and len(like) == 1:
                pairs.append((task, like[0]))
                left.remove(task)
                right.remove(like[0])
    order = {id(task): index for index, task in enumerate(a.tasks)}
    return sorted(pairs, key=lambda pair: order[id(pair[0])]), left, right


def _sides(task: TaskResult) -> list[tuple[tuple[str, str, str], Side]]:
    """Each metric with its scorer's name, its own, and what of the scorer is in its id."""
    sides = []
    for step in task.scores:
        rows = {row.metric: row for row in step.rows if row.leaf is None}
        exactly = digest_of(step.identity.get("scorer"))
        for metric in step.metrics:
            side = Side(task, step, metric, rows.get(metric.name))
            sides.append(((str(step.info.get("scorer")), metric.name, exactly), side))
    return sides


def match_metrics(a: TaskResult, b: TaskResult) -> list[tuple[Side, Side]]:
    """The metrics that both tasks have from a scorer of the same name, in the order of ``a``.

    One scorer may ask several judges: those that are the same go together, and others only where there is no choice.
    """
    left, right = _sides(a), _sides(b)
    found: dict[int, tuple[Side, Side]] = {}
    for parts in (3, 2):
        for place, (key, side) in enumerate(left):
            mine = [one for one, _ in left if one[:parts] == key[:parts]]
            like = [other for one, other in right if one[:parts] == key[:parts]]
            if place not in found and len(mine) == 1 and len(like) == 1:
                found[place] = side, like[0]
    return [found[place] for place in sorted(found)]


def obstacle(a: Side, b: Side, *, allow_prompt_mismatch: bool = False) -> str | None:
    """Why two numbers of one name do not measure the same thing."""
    differently = asked_differently(a.task, b.task)
    if differently is not None and not allow_prompt_mismatch:
        return f"not comparable: {differently}"
    versions = a.task.info.get("version"), b.task.info.get("version")
    if versions[0] != versions[1]:
        return f"task versions {versions[0]} and {versions[1]} differ in prompts or data"
    scorers = [side.step.identity.get("scorer") for side in (a, b)]
    if scorers[0] != scorers[1]:
        return "the scorers differ in options or model"
    if (a.metric.unit, a.metric.higher_is_better) != (b.metric.unit, b.metric.higher_is_better):
        return "unit or direction differ"
    if "corpus" in (a.metric.aggregate, b.metric.aggregate):
        return "a corpus metric is no mean over samples, so there is nothing to pair"
    for name, side in (("A", a), ("B", b)):
        if side.row is not None and side.row.withheld is not None:
            return f"withheld in run {name}: {side.row.withheld}"
    return None
