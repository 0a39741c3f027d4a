"""The scorer kit passes a good scorer, and fails a broken one for each rule, with the rule's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from harness import Answer, AnswerScorer, Config, Metric, Sample, Score, ScoreJob, Scorer, ScorerContext, ScorerSession
from harness.testing import check_scorer, example_answers

METRIC = Metric(name="length", higher_is_better=None, unit="characters", low=0)


class Length(Scorer):
    name = "length"
    summary = "characters of the answer"

    class Config(Config):
        """No options."""

    def metrics(self, config: Any) -> tuple[Metric, ...]:
        return (METRIC,)

    def open(self, config: Any, context: ScorerContext) -> ScorerSession:
        return Ruler(self)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        return [self.one(answer) for answer in answers]

    def one(self, answer: Answer) -> Score:
        return Score.absent((METRIC,), answer.error) if answer.error else Score({"length": float(len(answer.text))})


class Ruler(ScorerSession):
    """Hands everything to the plugin, which the tests break."""

    def __init__(self, scorer: Length) -> None:
        self.scorer = scorer

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        return self.scorer.score(samples, answers, job)


class Brief(AnswerScorer):
    name = "brief"
    summary = "characters of the answer, in the short form"

    def metrics(self, config: Any) -> tuple[Metric, ...]:
        return (METRIC,)

    def score(self, sample: Sample, answer: Answer, config: Any) -> Score:
        return Score({"length": float(len(answer.text))})


def broken(**overrides: Any) -> Scorer:
    scorer: Scorer = type("Broken", (Length,), overrides)()
    return scorer


def scores(change: Callable[[list[Score], Sequence[Answer]], Any]) -> Scorer:
    """A scorer whose list of scores is changed."""

    def score(self: Length, samples: Any, answers: Sequence[Answer], job: Any) -> Any:
        return change([self.one(answer) for answer in answers], answers)

    return broken(score=score)


def one(change: Callable[[Answer], Score]) -> Scorer:
    """A scorer whose scoring of one good answer is changed."""
    return broken(one=lambda self, answer: Length.one(self, answer) if answer.error else change(answer))


def test_a_good_scorer_passes() -> None:
    check_scorer(Length())
    check_scorer(Brief())
    samples, answers = example_answers()
    check_scorer(Length(), samples=samples[:2], answers=answers[:2])


def counting() -> Scorer:
    calls: list[int] = []

    def score(self: Length, samples: Any, answers: Sequence[Answer], job: Any) -> list[Score]:
        calls.append(1)
        return [Score({"length": float(len(calls))}) for _ in answers]

    return broken(score=score)


class Session(Ruler):
    """A session that is broken itself."""

    def __init__(self, scorer: Length, more: float = 0.0, **overrides: Any) -> None:
        super().__init__(scorer)
        self.more, self.overrides, self.closed = more, overrides, 0

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        known = [value for score in super().score(samples, answers, job) if (value := score.values["length"])]
        scores = [
            s if s.values["length"] is None else Score({"length": s.values["length"] + self.more})
            for s in super().score(samples, answers, job)
        ]
        if self.overrides.get("adds_up") and any(answer.error for answer in answers):
            self.more += len(known)
        return scores

    def notes(self) -> Any:
        return self.overrides.get("notes", ())

    def label(self) -> Any:
        return self.overrides.get("label")

    def close(self) -> None:
        self.closed += 1
        if self.closed > 1 and self.overrides.get("once"):
            raise RuntimeError("it is closed already")


def session(**overrides: Any) -> Scorer:
    """A scorer whose session is broken."""
    return broken(open=lambda self, config, context: Session(self, **overrides))


def one_more_each_time() -> Scorer:
    opened = iter(range(9))
    return broken(open=lambda self, config, context: Session(self, float(next(opened))))


def keeping() -> Scorer:
    def open_(self: Length, config: Any, context: Any) -> ScorerSession:
        self.__dict__["model"] = object()
        return Ruler(self)

    return broken(open=open_)


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
        (broken(open=lambda self, config, context: self), "`open` returns a harness.ScorerSession."),
        (broken(needs=lambda self, config: "gpu"), "`needs` returns one of None, 'classifier', 'engine', 'endpoint'."),
        (session(adds_up=True), "A session gives the same scores whatever it scored before."),
        (one_more_each_time(), "Another session gives the same scores."),
        (keeping(), "What is open belongs to the session: the plugin stays as it was.\n  seen: model"),
        (session(notes="a judge"), "`notes` returns a tuple of sentences."),
        (session(label=" "), "`label` returns a short name, or None."),
        (broken(identity=lambda self, options: {"at": object()}), "`identity` returns plain JSON values."),
        (ticking(), "`identity` returns the same at every call."),
    ],
)
def test_a_broken_scorer_fails(scorer: Scorer, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_scorer(scorer)
    assert words in str(caught.value)


def test_a_session_can_be_closed_twice() -> None:
    with pytest.raises(RuntimeError, match="it is closed already"):
        check_scorer(session(once=True))


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
