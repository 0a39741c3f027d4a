"""The contract of a scorer, tried on made answers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.contracts.scorer import ScoreJob, Scorer, ScorerContext, ScorerSession
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
    """Try a scorer against its contract: shape, ranges, absence with a reason, no leakage between samples and sessions.

    Args:
        scorer: the instance that the hook yields.
        samples: what to score; :func:`example_answers` when absent. A scorer of special data needs its own.
        answers: one for each of ``samples``, without errors.
        options: for the scorer's Config.
        context: what the scorer may use; its ``shared`` is replaced by an empty folder at every opening.
        tolerance: greatest difference of one sample's values when it is scored in other company. Above 0 only for
            models whose last bits depend on the batch.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(scorer, Scorer)
    config = options_of(scorer, options)
    check_identity(scorer.identity(config), scorer.identity(config))
    metrics = scorer.metrics(config)
    _check_metrics(metrics)
    needs = scorer.needs(config)
    known = (None, "classifier", "engine", "endpoint")
    demand(needs in known, f"`needs` returns one of {', '.join(map(repr, known))}.", repr(needs))
    if samples is None or answers is None:
        samples, answers = example_answers()
    demand(
        len(samples) == len(answers) > 1, "The kit needs two or more samples, each with an answer.", str(len(samples))
    )
    scorer.check(config)
    kept = dict(vars(scorer))
    bench = _Bench(scorer, config, metrics, samples, context or ScorerContext(), tolerance)
    with bench.opened() as session:
        first = _check_scoring(bench, session, answers)
        _check_words(session)
    with bench.opened() as session:
        again = bench.score(session, answers)
        bench.same(first, again, "Another session gives the same scores.")
    session.close()  # which it allows twice
    changed = sorted(name for name in kept.keys() | vars(scorer).keys() if kept.get(name) is not vars(scorer).get(name))
    demand(not changed, "What is open belongs to the session: the plugin stays as it was.", ", ".join(changed))


@dataclass
class _Bench:
    """A scorer on trial."""

    scorer: Scorer
    config: Any
    metrics: tuple[Metric, ...]
    samples: Sequence[Sample]
    context: ScorerContext
    tolerance: float

    @contextmanager
    def opened(self) -> Iterator[ScorerSession]:
        """A session that knows of no earlier one."""
        with tempfile.TemporaryDirectory() as shared:
            session = self.scorer.open(self.config, replace(self.context, shared=Path(shared)))
            demand(isinstance(session, ScorerSession), "`open` returns a harness.ScorerSession.", repr(session))
            try:
                yield session
            finally:
                session.close()

    def score(
        self, session: ScorerSession, answers: Sequence[Answer], order: Sequence[int] | None = None
    ) -> list[Score]:
        """Scores of these samples in this order, held to their shape."""
        order = range(len(answers)) if order is None else order
        with tempfile.TemporaryDirectory() as folder:
            job = ScoreJob("contract-kit", Path(folder))
            found = session.score([self.samples[i] for i in order], [answers[i] for i in order], job)
        _check_scores(self.metrics, found, len(order))
        return found

    def same(self, one: Sequence[Score], two: Sequence[Score], rule: str, indices: Sequence[int] | None = None) -> None:
        """Hold two lists of scores to each other; ``indices`` are those of the samples, for the message."""
        for index, a, b in zip(indices or range(len(one)), one, two, strict=True):
            pairs = [(a.values[metric.name], b.values[metric.name]) for metric in self.metrics]
            close = all(x == y if x is None or y is None else abs(x - y) <= self.tolerance for x, y in pairs)
            demand(close, rule, f"sample {index}: {dict(a.values)}, then {dict(b.values)}")


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


def _check_scoring(bench: _Bench, session: ScorerSession, answers: Sequence[Answer]) -> list[Score]:
    everything = range(len(answers))
    together = bench.score(session, answers)
    demand(bench.score(session, answers, []) == [], "No samples give no scores.", "something else")
    some = any(value is not None for one in together for value in one.values.values())
    demand(
        some, "At least one of the kit's samples is scored (pass `samples` and `answers` that fit).", repr(together[0])
    )
    backwards = bench.score(session, answers, everything[::-1])[::-1]
    bench.same(together, backwards, "Scores follow their samples when the order changes.")
    for index in everything:
        alone = bench.score(session, answers, [index])
        rule = "A sample's score does not depend on the other samples."
        bench.same([together[index]], alone, rule, [index])
    _check_errors(bench, session, answers, together)
    bench.same(together, bench.score(session, answers), "A session gives the same scores whatever it scored before.")
    return together


def _check_errors(bench: _Bench, session: ScorerSession, answers: Sequence[Answer], together: list[Score]) -> None:
    """A failed answer is absent, and its neighbours' scores stay."""
    broken = list(answers)
    broken[0] = Answer(answers[0].sample_id, tuple(Output(error="endpoint gave up") for _ in answers[0].outputs))
    found = bench.score(session, broken)
    absent = all(value is None for value in found[0].values.values())
    demand(absent, "An answer with an error is Score.absent, never a number.", repr(dict(found[0].values)))
    rule = "A failed answer does not change the scores of others."
    bench.same(together[1:], found[1:], rule, range(1, len(answers)))


def _check_words(session: ScorerSession) -> None:
    notes, label = session.notes(), session.label()
    words = isinstance(notes, tuple) and all(isinstance(note, str) and note.strip() for note in notes)
    demand(words, "`notes` returns a tuple of sentences.", repr(notes))
    demand(label is None or bool(str(label).strip()), "`label` returns a short name, or None.", repr(label))
