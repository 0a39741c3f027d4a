"""The scorer kit passes a good scorer, and fails a broken one for each rule, with the rule's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from harness import Answer, Config, Metric, Sample, Score, Scorer, ScorerContext
from harness.testing import check_scorer, example_answers

METRIC = Metric(name="length", higher_is_better=None, unit="characters", low=0)


class Length(Scorer):
    name = "length"
    summary = "characters of the answer"

    class Config(Config):
        """No options."""

    def metrics(self, options: Any) -> tuple[Metric, ...]:
        return (METRIC,)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], context: ScorerContext) -> list[Score]:
        return [self.one(answer) for answer in answers]

    def one(self, answer: Answer) -> Score:
        return Score.absent((METRIC,), answer.error) if answer.error else Score({"length": float(len(answer.text))})


def broken(**overrides: Any) -> Scorer:
    scorer: Scorer = type("Broken", (Length,), overrides)()
    return scorer


def scores(change: Callable[[list[Score], Sequence[Answer]], Any]) -> Scorer:
    """A scorer whose list of scores is changed."""

    def score(self: Length, samples: Any, answers: Sequence[Answer], context: Any) -> Any:
        return change([self.one(answer) for answer in answers], answers)

    return broken(score=score)


def one(change: Callable[[Answer], Score]) -> Scorer:
    """A scorer whose scoring of one good answer is changed."""
    return broken(one=lambda self, answer: Length.one(self, answer) if answer.error else change(answer))


def test_a_good_scorer_passes() -> None:
    check_scorer(Length())
    samples, answers = example_answers()
    check_scorer(Length(), samples=samples[:2], answers=answers[:2])


def counting() -> Scorer:
    calls: list[int] = []

    def score(self: Length, samples: Any, answers: Sequence[Answer], context: Any) -> list[Score]:
        calls.append(1)
        return [Score({"length": float(len(calls))}) for _ in answers]

    return broken(score=score)


def ticking() -> Scorer:
    ticks = iter(range(99))
    return broken(identity=lambda self, options: {"at": next(ticks)})


def by_mean(found: list[Score], answers: Sequence[Answer]) -> list[Score]:
    """Normalised by the batch: changes with the company, but not with the order."""
    known = [value for score in found if (value := score.values["length"]) is not None]
    mean = sum(known) / max(1, len(known))
    return [s if s.values["length"] is None else Score({"length": (s.values["length"] or 0) / mean}) for s in found]


def by_position(found: list[Score], answers: Sequence[Answer]) -> list[Score]:
    return [s if s.values["length"] is None else Score({"length": float(i)}) for i, s in enumerate(found)]


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (scores(lambda found, answers: tuple(found)), "`score` returns a list with one Score per sample."),
        (scores(lambda found, answers: found[:-1]), "`score` returns a list with one Score per sample."),
        (scores(lambda found, answers: [s.values for s in found]), "`score` returns a list with one Score per sample."),
        (scores(lambda found, answers: found or [Score({"length": 1.0})]), "one Score per sample.\n  seen: 1 for 0"),
        (scores(by_mean), "A sample's score does not depend on the other samples."),
        (scores(by_position), "Scores follow their samples when the order changes."),
        (counting(), "Scores follow their samples when the order changes."),
        (
            one(lambda a: Score({"size": 1.0})),
            "exactly the metrics that `metrics` names.\n  seen: ['size'], not ['length']",
        ),
        (one(lambda a: Score({})), "exactly the metrics that `metrics` names."),
        (one(lambda a: Score({"length": -1.0})), "Values of 'length' (characters) lie in [0, inf].\n  seen: -1.0"),
        (
            broken(
                metrics=lambda self, options: (METRIC.model_copy(update={"unit": "proportion"}),),
            ),
            "Values of 'length' (proportion) lie in [0, 1].\n  seen: 5.0 of sample 0",
        ),
        (one(lambda a: Score({"length": float("nan")})), "A value is a finite number, or None."),
        (one(lambda a: Score({"length": "3"})), "A value is a finite number, or None."),  # type: ignore[dict-item]
        (one(lambda a: Score({"length": None})), "A value of None comes with a `reason`."),
        (one(lambda a: Score({"length": None}, "no idea")), "At least one of the kit's samples is scored"),
        (one(lambda a: Score({"length": 1.0}, detail={"why": {1, 2}})), "`Score.detail` holds plain JSON values."),
        (
            broken(one=lambda self, answer: Score({"length": 0.0 if answer.error else float(len(answer.text))})),
            "An answer with an error is Score.absent, never a number.\n  seen: {'length': 0.0}",
        ),
        (
            scores(
                lambda found, answers: (
                    [Score.absent((METRIC,), "one failed")] * len(found) if any(a.error for a in answers) else found
                )
            ),
            "A failed answer does not change the scores of others.",
        ),
        (broken(metrics=lambda self, options: ()), "`metrics` returns a tuple of one or more harness.Metric."),
        (broken(metrics=lambda self, options: (METRIC, METRIC)), "Names of metrics are distinct."),
        (
            broken(metrics=lambda self, options: (METRIC.model_copy(update={"high": -1.0}),)),
            "The range of 'length' is not empty.\n  seen: [0, -1]",
        ),
        (
            broken(metrics=lambda self, options: (METRIC.model_copy(update={"chance": -0.5}),)),
            "The chance level of 'length' lies in its range.",
        ),
        (broken(identity=lambda self, options: {"at": object()}), "`identity` returns plain JSON values."),
        (ticking(), "`identity` returns the same at every call."),
    ],
)
def test_a_broken_scorer_fails(scorer: Scorer, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_scorer(scorer)
    assert words in str(caught.value)


def test_a_model_may_differ_in_its_last_bits_if_the_author_says_so() -> None:
    def wobble(found: list[Score], answers: Sequence[Answer]) -> list[Score]:
        return [
            s if s.values["length"] is None else Score({"length": (s.values["length"] or 0) + 1e-6 * len(found)})
            for s in found
        ]

    with pytest.raises(AssertionError, match="does not depend on the other samples"):
        check_scorer(scores(wobble))
    check_scorer(scores(wobble), tolerance=1e-4)


def test_answers_must_belong_to_samples() -> None:
    samples, answers = example_answers()
    with pytest.raises(AssertionError, match="two or more samples, each with an answer"):
        check_scorer(Length(), samples=samples, answers=answers[:1])
