"""The contract of a scorer, tried on made answers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.contracts.scorer import Scorer, ScorerContext
from harness.core.records import Answer, Metric, Output, Request, Sample, Score, canonical
from harness.core.specs import Decoding
from harness.testing.common import check_identity, check_plugin, demand, options_of

_EXAMPLES = (
    ("What is the capital of France?", "Paris", "Paris", "stop"),
    ("What is 2 + 2?", "4", "The answer is 4.", "stop"),
    ("Name a colour.", "red", "I am sorry, but I cannot help with that.", "stop"),
    ("Is the sky green?", "No", "Yes, and it has always been so, and so on, and so on", "length"),
    ("Say nothing.", "", "", "stop"),
    ("Which letter comes after B?", "C", "(C)", "stop"),
)


def example_answers() -> tuple[list[Sample], list[Answer]]:
    """Six samples with targets and made answers: right, wrong, refusing, cut off, empty."""
    samples, answers = [], []
    for index, (prompt, target, text, finish) in enumerate(_EXAMPLES):
        request = Request("generate", (), decoding=Decoding(max_new_tokens=16), prompt=prompt)
        samples.append(Sample(f"example-{index}", (request,), prompt=prompt, target=target))
        answers.append(Answer(f"example-{index}", (Output(text=text, finish=finish),)))  # type: ignore[arg-type]
    return samples, answers


def check_scorer(
    scorer: Scorer,
    *,
    samples: Sequence[Sample] | None = None,
    answers: Sequence[Answer] | None = None,
    options: Mapping[str, Any] | None = None,
    context: ScorerContext | None = None,
    tolerance: float = 0.0,
) -> None:
    """Try a scorer against its contract: shape, ranges, absence with a reason, no leakage between samples.

    Args:
        scorer: the instance that the hook yields.
        samples: what to score; :func:`example_answers` when absent. A scorer of special data needs its own.
        answers: one for each of ``samples``, without errors.
        options: for the scorer's Config.
        context: what the scorer may use; its ``folder`` is replaced by an empty one at every call.
        tolerance: greatest difference of one sample's values when it is scored in other company. Above 0 only for
            models whose last bits depend on the batch.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(scorer, Scorer)
    chosen = options_of(scorer, options)
    check_identity(scorer.identity(chosen), scorer.identity(chosen))
    metrics = scorer.metrics(chosen)
    _check_metrics(metrics)
    if samples is None or answers is None:
        samples, answers = example_answers()
    demand(
        len(samples) == len(answers) > 1, "The kit needs two or more samples, each with an answer.", str(len(samples))
    )
    bound = scorer.bound(chosen)
    bound.check(chosen)
    context = context or ScorerContext(task="contract-kit", seed=0)

    def score(order: Sequence[int], given: Sequence[Answer]) -> list[Score]:
        with tempfile.TemporaryDirectory() as folder:
            fresh = replace(context, folder=Path(folder))
            found = bound.score([samples[i] for i in order], [given[i] for i in order], fresh)
        _check_scores(metrics, found, len(order))
        return found

    try:
        _check_scoring(metrics, score, answers, tolerance)
    finally:
        bound.close()


def _check_metrics(metrics: tuple[Metric, ...]) -> None:
    proper = isinstance(metrics, tuple) and bool(metrics) and all(isinstance(m, Metric) for m in metrics)
    demand(proper, "`metrics` returns a tuple of one or more harness.Metric.", repr(metrics))
    names = [metric.name for metric in metrics]
    demand(len(set(names)) == len(names), "Names of metrics are distinct.", repr(names))
    for metric in metrics:
        low, high = metric.bounds
        demand(low < high, f"The range of {metric.name!r} is not empty.", f"[{low:g}, {high:g}]")
        inside = metric.chance is None or low <= metric.chance <= high
        demand(inside, f"The chance level of {metric.name!r} lies in its range.", f"{metric.chance}")


def _check_scores(metrics: tuple[Metric, ...], found: Any, count: int) -> None:
    listed = isinstance(found, list) and len(found) == count and all(isinstance(one, Score) for one in found)
    seen = f"{len(found)} for {count} samples" if isinstance(found, list) else type(found).__name__
    demand(listed, "`score` returns a list with one Score per sample.", seen)
    names = {metric.name for metric in metrics}
    for index, score in enumerate(found):
        exact = set(score.values) == names
        demand(
            exact,
            "A Score holds exactly the metrics that `metrics` names.",
            f"{sorted(score.values)}, not {sorted(names)}",
        )
        for metric in metrics:
            _check_value(metric, score, index)
        try:
            canonical(dict(score.detail))
        except (TypeError, ValueError) as error:
            raise AssertionError(f"`Score.detail` holds plain JSON values.\n  seen: {error}") from None


def _check_value(metric: Metric, score: Score, index: int) -> None:
    value = score.values[metric.name]
    if value is None:
        rule = "A value of None comes with a `reason`."
        demand(bool((score.reason or "").strip()), rule, f"{metric.name} of sample {index}: reason={score.reason!r}")
        return
    number = isinstance(value, int | float) and math.isfinite(value)
    demand(number, "A value is a finite number, or None.", f"{metric.name} of sample {index}: {value!r}")
    low, high = metric.bounds
    rule = f"Values of {metric.name!r} ({metric.unit}) lie in [{low:g}, {high:g}]."
    demand(metric.problem(value) is None, rule, f"{value!r} of sample {index}")


def _check_scoring(metrics: tuple[Metric, ...], score: Any, answers: Sequence[Answer], tolerance: float) -> None:
    everything = list(range(len(answers)))
    together = score(everything, answers)
    demand(score([], answers) == [], "No samples give no scores.", "something else")
    some = any(value is not None for one in together for value in one.values.values())
    demand(
        some, "At least one of the kit's samples is scored (pass `samples` and `answers` that fit).", repr(together[0])
    )

    def same(one: Score, two: Score) -> bool:
        pairs = [(one.values[m.name], two.values[m.name]) for m in metrics]
        return all(a == b if a is None or b is None else abs(a - b) <= tolerance for a, b in pairs)

    backwards = score(everything[::-1], answers)[::-1]
    for index in everything:
        seen = f"sample {index}: {dict(together[index].values)}, "
        rule = "Scores follow their samples when the order changes."
        demand(same(together[index], backwards[index]), rule, seen + f"in other order {dict(backwards[index].values)}")
        alone = score([index], answers)[0]
        rule = "A sample's score does not depend on the other samples."
        demand(same(together[index], alone), rule, seen + f"alone {dict(alone.values)}")
    _check_errors(metrics, score, answers, together, same)


def _check_errors(metrics: Any, score: Any, answers: Sequence[Answer], together: list[Score], same: Any) -> None:
    """A failed answer is absent, and its neighbours' scores stay."""
    broken = list(answers)
    broken[0] = Answer(answers[0].sample_id, tuple(Output(error="endpoint gave up") for _ in answers[0].outputs))
    found = score(list(range(len(answers))), broken)
    absent = all(value is None for value in found[0].values.values())
    demand(absent, "An answer with an error is Score.absent, never a number.", repr(dict(found[0].values)))
    for index in range(1, len(answers)):
        kept = same(together[index], found[index])
        demand(
            kept,
            "A failed answer does not change the scores of others.",
            f"sample {index}: {dict(found[index].values)}",
        )
