"""From scores to rows: what a scorer returned, held to its contract and summarised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.contracts.scorer import ScorerSession
from harness.core.errors import StepError
from harness.core.records import Answer, Metric, Row, Sample, Score, digest_of
from harness.core.specs import PromptKind
from harness.core.stats import summarise

CORPUS_DRAWS = 1000
"""Bootstrap draws for the interval of a corpus metric (perplexity, F1, ...)."""
REASON_LENGTH = 160
"""Most of a reason that is shown beside a withheld mean (characters)."""

_FAULT = "This is a fault of the scorer: `harness.testing.check_scorer` finds such."


@dataclass
class Scored:
    """One scorer's result on one task."""

    metrics: tuple[Metric, ...]
    scores: list[Score]


def check_scores(scorer: str, metrics: Sequence[Metric], scores: Sequence[Score], samples: Sequence[Sample]) -> None:
    """Hold a scorer to its contract: one score per sample, the declared metrics, their ranges, a reason for absence.

    Raises:
        StepError: naming the scorer, and what is wrong.
    """
    if len(scores) != len(samples):
        raise StepError(scorer, f"returned {len(scores)} scores for {len(samples)} samples", _FAULT)
    names = {metric.name for metric in metrics}
    for sample, score in zip(samples, scores, strict=True):
        if set(score.values) != names:
            raise StepError(scorer, f"returned metrics {sorted(score.values)}, declared {sorted(names)}", _FAULT)
        if None in score.values.values() and not score.reason:
            raise StepError(scorer, "left a sample without a score and without a reason", _FAULT)
        for metric in metrics:
            value = score.values[metric.name]
            if value is not None and (problem := metric.problem(value)):
                raise StepError(scorer, f"{metric.name} of sample {sample.id}: {problem}", _FAULT)


def sample_rows(samples: Sequence[Sample], answers: Sequence[Answer], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """What ``samples.jsonl.gz`` of a scores step keeps."""
    return [
        {
            "id": sample.id,
            "leaf": sample.leaf,
            "values": dict(score.values),
            "reason": score.reason,
            "cut": sample.cut,
            "hit_limit": answer.hit_limit,
            "detail": dict(score.detail),
            **({"cluster": sample.cluster} if sample.cluster is not None else {}),
        }
        for sample, answer, score in zip(samples, answers, scores, strict=True)
    ]


@dataclass(frozen=True)
class RowContext:
    """What the rows of one scores step have in common."""

    model: str
    adapter: str | None
    task: str
    variant: PromptKind
    scorer: str
    step: str
    dtype: str | None = None
    template: str | None = None
    notes: tuple[str, ...] = ()


def build_rows(
    context: RowContext, session: ScorerSession, scored: Scored, samples: Sequence[Sample], answers: Sequence[Answer]
) -> list[Row]:
    """One row per metric for the whole task, then one per metric and leaf task; ``session`` made the scores.

    The whole-task mean is the micro average: every sample counts once, so leaf tasks weigh by their size.
    """
    everything = list(range(len(samples)))
    leaves: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.leaf is not None:
            leaves.setdefault(sample.leaf, []).append(index)
    groups: list[tuple[str | None, list[int]]] = [(None, everything), *sorted(leaves.items())]
    return [
        _row(context, session, metric, leaf, [(samples[i], answers[i], scored.scores[i]) for i in indices])
        for leaf, indices in groups
        for metric in scored.metrics
    ]


def _row(
    context: RowContext,
    session: ScorerSession,
    metric: Metric,
    leaf: str | None,
    triples: Sequence[tuple[Sample, Answer, Score]],
) -> Row:
    values = [score.values[metric.name] for _, _, score in triples]
    unscored = sum(value is None for value in values)
    share = unscored / len(values)
    withheld = session.withheld(metric, [score for _, _, score in triples])
    if withheld is None and share > metric.threshold:
        withheld = f"{unscored} of {len(values)} samples are unscored, above the threshold of {metric.threshold:.0%}"
        withheld += f" (most often: {_commonest_reason(metric, triples)})"
    mean = stderr = None
    interval: tuple[float, float] | None = None
    notes = list(context.notes)
    if withheld is None and metric.aggregate == "corpus":
        mean, stderr, interval = _corpus(context.scorer, session, metric, [score for _, _, score in triples])
        notes.append(f"{metric.name} is a corpus metric: interval by bootstrap over samples, {CORPUS_DRAWS} draws")
    elif withheld is None:
        mean, stderr, interval = _mean(metric, values, _clusters([sample for sample, _, _ in triples]))
    chance = _chance(metric, [sample for sample, _, _ in triples])
    return Row(
        model=context.model,
        adapter=context.adapter,
        task=context.task,
        variant=context.variant,
        dtype=context.dtype,
        template=context.template,
        leaf=leaf,
        scorer=context.scorer,
        metric=metric.name,
        unit=metric.unit,
        n=len(values) - unscored,
        n_unscored=unscored,
        n_truncated=sum(sample.cut or answer.hit_limit for sample, answer, _ in triples),
        mean=mean,
        stderr=stderr,
        ci95=interval,
        higher_is_better=metric.higher_is_better,
        chance=chance,
        primary=metric.primary,
        withheld=withheld,
        step=context.step,
        notes=tuple(notes),
    )


def _commonest_reason(metric: Metric, triples: Sequence[tuple[Sample, Answer, Score]]) -> str:
    """Why samples have no score; of equally common reasons the first. A server's words are cut short."""
    reasons = Counter(score.reason or "no reason given" for _, _, score in triples if score.values[metric.name] is None)
    reason = " ".join(reasons.most_common(1)[0][0].split())
    return reason if len(reason) <= REASON_LENGTH else f"{reason[:REASON_LENGTH]}..."


def _clusters(samples: Sequence[Sample]) -> list[tuple[str, str]] | None:
    """What each sample hangs together with, itself alone where nothing is said; None: no sample says anything."""
    if all(sample.cluster is None for sample in samples):
        return None
    return [("sample", one.id) if one.cluster is None else ("cluster", one.cluster) for one in samples]


def _mean(
    metric: Metric, values: Sequence[float | None], clusters: Sequence[Hashable] | None
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Mean, standard error and interval; a share that is told in percent has the interval of a share."""
    whole = {"proportion": 1.0, "percent": 100.0}.get(metric.unit, 0.0)
    if whole and all(value in (0.0, whole, None) for value in values):
        summary = summarise(
            [None if value is None else value / whole for value in values], kind="proportion", clusters=clusters
        )
    else:
        summary, whole = summarise(values, clusters=clusters), 1.0
    if summary.mean is None:
        return None, None, None
    span = summary.interval
    stderr = None if summary.stderr is None else summary.stderr * whole
    return summary.mean * whole, stderr, None if span is None else (span.low * whole, span.high * whole)


def _chance(metric: Metric, samples: Sequence[Sample]) -> float | None:
    """The metric's own, else the mean of what the samples' questions allow: only for shares of right answers."""
    if metric.chance is not None or metric.unit != "proportion" or not metric.higher_is_better:
        return metric.chance
    chances = [sample.chance for sample in samples if sample.chance is not None]
    return sum(chances) / len(chances) if chances and len(chances) == len(samples) else None


def _corpus(
    scorer: str, session: ScorerSession, metric: Metric, scores: Sequence[Score]
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """A corpus metric, and its percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13)."""
    import numpy as np

    present = [score for score in scores if score.values[metric.name] is not None]
    if not present:
        return None, None, None
    whole = session.aggregate(metric, present)
    if whole is not None and (problem := metric.problem(whole, whole=True)):
        raise StepError(scorer, f"{metric.name} of {len(present)} samples: {problem}", _FAULT)
    generator = np.random.default_rng(int(digest_of([metric.name, len(present)])[:8], 16))
    draws = []
    for _ in range(CORPUS_DRAWS if len(present) > 1 else 0):
        value = session.aggregate(metric, [present[i] for i in generator.integers(0, len(present), len(present))])
        if value is not None:
            draws.append(value)
    if len(draws) < 2:
        return whole, None, None
    low, high = np.quantile(draws, [0.025, 0.975])
    return whole, float(np.std(draws, ddof=1)), (float(low), float(high))
