"""Runs and arms side by side: paired differences, corrected for how many there are, and the samples that changed.

Run A is the reference and run B what is judged: a difference is B minus A. Within one run the base is the reference of
every other arm. Nothing is generated or scored here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.core.records import Row
from harness.core.stats import Interval, compare_paired, holm, holm_levels
from harness.core.text import clip, task_label, visible
from harness.report.engines import check_engines
from harness.report.external.open import check_sources, source
from harness.report.external.unpaired import TEST as UNPAIRED, unpaired
from harness.report.model import ChangedSample, ComparisonReport, Difference
from harness.report.pairing import (
    Side,
    as_asked,
    asked_differently,
    base_of,
    match_metrics,
    match_tasks,
    obstacle,
    open_ended,
    pair_arms,
)
from harness.report.power import smallest_detectable
from harness.report.read import RunResult, Texts
from harness.report.winrate import win_rates

_AtLevel = Callable[[float], tuple[Interval | None, float | None]]
"""The interval at a level, and the smallest difference that a test at it would have shown."""
TEXT_LIMIT = 2_000
"""Longest prompt or answer that a changed sample shows (characters)."""


def compare_runs(
    run_a: Path,
    run_b: Path | None = None,
    *,
    seed: int = 0,
    alpha: float = 0.05,
    allow_engine_mismatch: bool = False,
    allow_prompt_mismatch: bool = False,
) -> ComparisonReport:
    """Compare run B with run A, or every arm of run A with its base, paired by sample id.

    Arms are paired by name; a run with one arm is the reference of every arm of the other. Holm's correction is taken
    over all primary metrics of the table (the others among themselves), so what is shown does not depend on what else
    is shown. Verdicts follow the metric's direction at adjusted p < ``alpha``; below its resolution a difference has no
    size. What was asked differently (raw and chat, or two templates) is compared only with ``allow_prompt_mismatch``.

    Raises:
        UserError: a folder is not a run, a run has not ended, there is nothing to compare, or the runs come from
            engines that no parity record brings together.
    """
    if not 0 < alpha < 1:
        raise UserError("alpha", f"is the level of a test, and {alpha:g} is none", "Give a number between 0 and 1.")
    a = open_ended(run_a)
    if run_b is None:
        report = compare_arms(a, seed=seed, alpha=alpha, allow_prompt_mismatch=allow_prompt_mismatch)
        paired, lost = _within(a), {}
        notes: tuple[str, ...] = ()
    else:
        b = open_ended(run_b)
        check_sources(a, b)
        paired, only_a, only_b = pair_arms(a, b)
        notes = (*check_engines(a, b, allowed=allow_engine_mismatch), *_notes(a, b))
        report = _compared(paired, (a.name, b.name), seed, alpha, allow_prompt_mismatch)
        lost = {"only_a": report.only_a + only_a, "only_b": report.only_b + only_b}
    sides = [(arm, *both) for arm, pair in zip(_arms(paired), paired, strict=True) for both in _matched(*pair)]
    wins = win_rates(sides, seed=seed, allow_prompt_mismatch=allow_prompt_mismatch)
    return report.model_copy(update={**lost, "win_rates": wins, "notes": (*notes, *report.notes)})


def compare_arms(
    run: RunResult, *, seed: int = 0, alpha: float = 0.05, allow_prompt_mismatch: bool = False
) -> ComparisonReport:
    """Compare every arm of a run with its base, as the base was asked the same.

    Raises:
        UserError: the run has no base, or nothing besides it.
    """
    base, others = base_of(run)
    if base is None or not others:
        what = "has no arm without an adapter" if base is None else "has one arm"
        fix = "Give a second run, or evaluate the base too: harness eval --with-base --adapter A --adapter B."
        raise UserError(str(run.root), f"{what}, so there is nothing to compare within it", fix)
    name = others[0].name if len(others) == 1 else f"{len(others)} arms"
    return _compared(_within(run), (base.name, name), seed, alpha, allow_prompt_mismatch)


def _within(run: RunResult) -> list[tuple[RunResult, RunResult]]:
    """The base of a run with each of its arms; none where it has no base."""
    base, others = base_of(run)
    return [] if base is None else [(as_asked(base, arm), arm) for arm in others]


def _matched(a: RunResult, b: RunResult) -> list[tuple[Side, Side]]:
    """The metrics of two arms that both have, of tasks that both have ended well."""
    ended = [pair for pair in match_tasks(a, b)[0] if not any(task.failed() for task in pair)]
    return [sides for pair in ended for sides in match_metrics(*pair)]


def _compared(
    paired: Sequence[tuple[RunResult, RunResult]],
    names: tuple[str, str],
    seed: int,
    alpha: float,
    allow_prompt_mismatch: bool,
) -> ComparisonReport:
    found: list[tuple[Difference, _AtLevel]] = []
    failed: list[str] = []
    only: tuple[list[str], list[str]] = ([], [])
    notes: list[str] = []
    for arm, (a, b) in zip(_arms(paired), paired, strict=True):
        pairs, *alone = match_tasks(a, b)
        before = "" if arm is None else f"{visible(arm)}, "
        for left, right in pairs:
            if left.failed() or right.failed():
                failed.append(before + task_label(left.name, left.variant))
                continue
            matched = match_metrics(left, right)
            if not matched:
                notes.append(f"{before}{task_label(left.name, left.variant)}: A and B have no metric in common")
            for sides in matched:
                one, at = _difference(*sides, seed=seed, allow_prompt_mismatch=allow_prompt_mismatch)
                found.append((one.model_copy(update={"arm": arm}), at))
        for names_of, tasks in zip(only, alone, strict=True):
            names_of += [before + task_label(task.name, task.variant) for task in tasks]
    judged = [one for one, _ in found]
    for primary in (True, False):
        family = [index for index, (one, _) in enumerate(found) if one.primary is primary]
        p_values = [found[index][0].p_value for index in family]
        for index, p, level in zip(family, holm(p_values), holm_levels(p_values, alpha=alpha), strict=True):
            judged[index] = _judged(*found[index], p, level, alpha)
    return ComparisonReport(
        name_a=names[0],
        name_b=names[1],
        alpha=alpha,
        seed=seed,
        differences=tuple(judged),
        only_a=tuple(only[0]),
        only_b=tuple(only[1]),
        failed=tuple(failed),
        notes=tuple(notes),
    )


def _arms(paired: Sequence[tuple[RunResult, RunResult]]) -> list[str | None]:
    """What tells the pairs apart: the arm of the side that has several; None for a single pair."""
    several = 1 if len({id(one) for _, one in paired}) > 1 else 0
    return [(pair[several].label or "base") if len(paired) > 1 else None for pair in paired]


def changed_samples(
    run_a: Path,
    run_b: Path | None = None,
    *,
    limit: int = 10,
    tasks: Sequence[str] = (),
    everything: bool = False,
    allow_prompt_mismatch: bool = False,
) -> list[ChangedSample]:
    """The samples whose score changed most, at most ``limit`` per task and metric, those that got worse first.

    Args:
        run_a, run_b: folders of two runs; the first alone: its base and its other arms.
        limit: most samples per arm, task and metric.
        tasks: only these tasks, by name without variant; all when empty.
        everything: also the metrics that are not primary.
        allow_prompt_mismatch: also where both were asked differently.

    Raises:
        UserError: a folder is not a run, or a run has not ended.
    """
    a = open_ended(run_a)
    paired = _within(a) if run_b is None else pair_arms(a, open_ended(run_b))[0]
    found: list[ChangedSample] = []
    for arm, one in zip(_arms(paired), paired, strict=True):
        for left, right in _matched(*one):
            wanted = left.metric.primary or right.metric.primary or everything
            if not wanted or (tasks and left.task.name not in tasks):
                continue
            if obstacle(left, right, allow_prompt_mismatch=allow_prompt_mismatch) is None:
                found += _changes(arm, left, right, limit)
    return found


def _difference(a: Side, b: Side, *, seed: int, allow_prompt_mismatch: bool) -> tuple[Difference, _AtLevel]:
    """The difference as it stands, and its interval and smallest detectable difference by level."""
    values_a, values_b = a.values, b.values
    alone = [f"run {name}: {side.task.info['means_only']}" for name, side in (("A", a), ("B", b)) if _means_only(side)]
    if alone:  # what the other has by sample is of no use
        values_a = values_b = {}
    shared = values_a.keys() & values_b.keys()
    unscored = sum(values_a[key] is None or values_b[key] is None for key in shared)
    base: dict[str, Any] = {
        "task": b.row.task if b.row is not None else b.task.name,
        "variant_a": a.task.variant,
        "variant_b": b.task.variant,
        "metric": a.metric.name,
        "unit": a.metric.unit,
        "higher_is_better": a.metric.higher_is_better,
        "primary": a.metric.primary or b.metric.primary,
        "resolution": max((one.resolution for one in (a.metric, b.metric) if one.resolution is not None), default=None),
        "prompts_differ": asked_differently(a.task, b.task),
        "n": len(shared) - unscored,
        "n_only_a": len(values_a) - len(shared),
        "n_only_b": len(values_b) - len(shared),
        "n_unscored": unscored,
    }
    notes = []
    if base["prompts_differ"] and allow_prompt_mismatch:
        notes.append(f"prompts differ: {base['prompts_differ']} (--allow-prompt-mismatch)")
    if base["n_only_a"] or base["n_only_b"]:
        limits = [side.task.info.get("limit") for side in (a, b)]
        said = f" (limits {limits[0] or 'none'} and {limits[1] or 'none'})" if limits[0] != limits[1] else ""
        notes.append(f"left out: {base['n_only_a']:,} samples only in A, {base['n_only_b']:,} only in B{said}")
    if unscored:
        notes.append(f"left out: {unscored:,} samples unscored in A or B")
    reason = obstacle(a, b, allow_prompt_mismatch=allow_prompt_mismatch)
    if reason is None and alone and a.row is not None and b.row is not None:
        return _unpaired(a.row, b.row, base, (f"unpaired, as if the samples were others: {'; '.join(alone)}", *notes))
    if reason is None and not base["n"]:
        reason = "no sample is scored in both runs"
    if reason is not None:
        return Difference(**base, verdict="not comparable", notes=(reason, *notes)), _nothing
    # B first, so that differences and intervals are B minus A.
    clusters, strata = a.step.hanging
    result = compare_paired(values_b, values_a, seed=seed, clusters=clusters, strata=strata)
    up, down = result.wins, result.losses
    better, worse = (down, up) if a.metric.higher_is_better is False else (up, down)
    one = Difference(
        **base,
        mean_a=result.mean_b,
        mean_b=result.mean_a,
        difference=result.difference,
        ci95=_ends(result.interval),
        p_value=result.p_value,
        test=result.test,
        n_better=better,
        n_worse=worse,
        n_same=result.ties,
        verdict="no difference shown",
        notes=tuple(notes),
    )
    pairs = [(x, y) for key in shared if (x := values_a[key]) is not None and (y := values_b[key]) is not None]
    differences = [y - x for x, y in pairs]
    exact = result.test == "mcnemar_exact"
    return one, lambda level: (result.at(level), smallest_detectable(differences, exact=exact, level=level))


def _nothing(level: float) -> tuple[None, None]:
    return None, None


def _means_only(side: Side) -> bool:
    return "means_only" in side.task.info


def _unpaired(a: Row, b: Row, base: dict[str, Any], notes: tuple[str, ...]) -> tuple[Difference, _AtLevel]:
    """The difference of two means whose samples are not both at hand."""
    base |= {"n": min(a.n, b.n), "mean_a": a.mean, "mean_b": b.mean}
    found = unpaired(a, b)
    if isinstance(found, str):
        return Difference(**base, verdict="not comparable", notes=(found, *notes)), _nothing
    difference, p_value, at = found
    numbers = {"difference": difference, "p_value": p_value, "ci95": _ends(at(0.95)), "test": UNPAIRED}
    return Difference(**base, **numbers, verdict="no difference shown", notes=notes), lambda level: (at(level), None)


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def _judged(one: Difference, at: _AtLevel, p_adjusted: float | None, level: float | None, alpha: float) -> Difference:
    """The same difference with its corrected p-value, the interval beside it, and its verdict."""
    verdict, notes = one.verdict, one.notes
    if verdict != "not comparable":
        if p_adjusted is None:
            verdict, notes = "not comparable", ("one pair of samples shows nothing", *notes)
        elif p_adjusted < alpha and abs(one.difference or 0.0) < (one.resolution or 0.0):
            verdict = "no difference of size"
            notes = (f"significant, but below {one.resolution:g}, the smallest difference worth naming", *notes)
        elif p_adjusted < alpha and one.higher_is_better is None:
            verdict, notes = "not comparable", ("they differ, but this metric has no better direction", *notes)
        elif p_adjusted < alpha and one.difference:
            verdict = "better" if (one.difference > 0) is one.higher_is_better else "worse"
    interval, detectable = (None, None) if level is None else at(level)
    held = {"ci_adjusted": _ends(interval), "level_adjusted": level, "detectable": detectable}
    return one.model_copy(update={"verdict": verdict, "p_adjusted": p_adjusted, "notes": notes, **held})


def _notes(a: RunResult, b: RunResult) -> tuple[str, ...]:
    """What else differs between the runs and could explain a difference."""
    notes = []
    for word, keys in (
        ("dtype", ("spec", "model", "dtype")),
        ("seed", ("spec", "seed")),
        ("model_args", ("spec", "model", "args")),
    ):
        values = [_at(run.plan, keys) for run in (a, b)]
        if values[0] != values[1]:
            notes.append(f"{word} differs: {visible(str(values[0]))} in A, {visible(str(values[1]))} in B")
    for name, run in (("A", a), ("B", b)):
        left = run.plan.get("left_out", {}) if source(run) is not None else {}
        notes += [f"{name}: {visible(file)}: {why}" for file, why in left.items()]
    return tuple(notes)


def _at(data: Any, keys: Iterable[str]) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _changes(arm: str | None, a: Side, b: Side, limit: int) -> list[ChangedSample]:
    values_b = b.values
    changed: list[tuple[float, str, float, float]] = []
    for name, before in a.values.items():
        after = values_b.get(name)
        if before is not None and after is not None and before != after:
            changed.append((after - before, name, before, after))

    def worse(change: float) -> bool | None:
        return None if a.metric.higher_is_better is None else (change < 0) is a.metric.higher_is_better

    chosen = sorted(changed, key=lambda one: (-abs(one[0]), not worse(one[0]), one[1]))[:limit]
    names = {name for _, name, _, _ in chosen}
    texts_a, texts_b = (a.step.texts(names), b.step.texts(names)) if names else ({}, {})
    return [
        ChangedSample(
            arm=None if arm is None else visible(arm),
            task=task_label(a.task.name, a.task.variant),
            metric=visible(a.metric.name),
            id=visible(name),
            leaf=_safe(a.step.samples[name].get("leaf")),
            value_a=before,
            value_b=after,
            worse=worse(change),
            prompt=_safe(texts_a[name].prompt, tail=0.7) if name in texts_a else None,
            target=_safe(texts_a[name].target) if name in texts_a else None,
            answer_a=_answer(texts_a.get(name)),
            answer_b=_answer(texts_b.get(name)),
        )
        for change, name, before, after in chosen
    ]


def _answer(texts: Texts | None) -> str | None:
    return None if texts is None else _safe(texts.answer())


def _safe(text: str | None, *, tail: float = 0.0) -> str | None:
    return None if text is None else visible(clip(text, TEXT_LIMIT, tail=tail), lines=True)
