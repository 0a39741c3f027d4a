"""Text scorers: every expected value is decided by reading answer and target."""

from __future__ import annotations

from typing import Any

import pytest

from harness.contracts.scorer import ScoreJob, Scorer, ScorerContext
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.records import Answer, Output, Sample, Score
from harness.testing import check_scorer
from harness_plugins.scorers.text import ExactMatch, Includes, Regex


def score(scorer: Scorer, answer: Output | str, target: str | None, **options: Any) -> Score:
    output = answer if isinstance(answer, Output) else Output(text=answer)
    config = parse_options(scorer.Config, options, "test")
    session = scorer.open(config, ScorerContext())
    (one,) = session.score([Sample("s", (), target=target)], [Answer("s", (output,))], ScoreJob())
    assert set(one.values) == {metric.name for metric in scorer.metrics(config)}
    return one


@pytest.mark.parametrize(
    ("answer", "target", "options", "expected"),
    [
        ("Paris", "Paris", {}, 1.0),
        (" Paris\n", "Paris", {}, 1.0),
        (" Paris", "Paris", {"strip": False}, 0.0),
        ("paris", "Paris", {}, 0.0),
        ("paris", "Paris", {"ignore_case": True}, 1.0),
        ("STRASSE", "Straße", {"ignore_case": True}, 1.0),
        ("Paris.", "Paris", {}, 0.0),
        ("«Paris»!", "Paris", {"ignore_punctuation": True}, 1.0),
        ("(A)", "a", {"ignore_punctuation": True, "ignore_case": True}, 1.0),
        ("Paris, France", "Paris", {"ignore_punctuation": True}, 0.0),
        ("", "", {}, 1.0),
    ],
)
def test_exact_match(answer: str, target: str, options: dict[str, bool], expected: float) -> None:
    assert score(ExactMatch(), answer, target, **options).values == {"exact_match": expected}


@pytest.mark.parametrize(
    ("answer", "target", "options", "expected"),
    [
        ("It is Paris, surely", "Paris", {}, 1.0),
        ("It is paris", "Paris", {}, 0.0),
        ("It is paris", "Paris", {"ignore_case": True}, 1.0),
        ("", "Paris", {}, 0.0),
        ("Par-is", "Paris", {"ignore_punctuation": True}, 1.0),
    ],
)
def test_includes(answer: str, target: str, options: dict[str, bool], expected: float) -> None:
    assert score(Includes(), answer, target, **options).values == {"includes": expected}


@pytest.mark.parametrize(
    ("answer", "target", "options", "expected"),
    [
        ("The answer is (B).", "B", {"pattern": r"answer is \((.)\)"}, (1.0, 0.0, "B")),
        ("The answer is (C).", "B", {"pattern": r"answer is \((.)\)"}, (0.0, 0.0, "C")),
        ("I do not know", "B", {"pattern": r"answer is \((.)\)"}, (0.0, 1.0, None)),
        ("3 and then 4", "3", {"pattern": r"\d+"}, (1.0, 0.0, "3")),
        ("3 and then 4", "4", {"pattern": r"\d+", "take": "last"}, (1.0, 0.0, "4")),
        ("yes", "yes", {"pattern": r"yes(!)?"}, (0.0, 0.0, "")),
        ("\n\n first line \nsecond", "first line", {}, (1.0, 0.0, "first line ")),
        ("  \n ", "", {}, (0.0, 1.0, None)),
    ],
)
def test_regex(answer: str, target: str, options: dict[str, str], expected: tuple[float, float, str | None]) -> None:
    one = score(Regex(), answer, target, **options)
    assert one.values == {"regex": expected[0], "extraction_failed": expected[1]}
    assert one.detail.get("extracted") == expected[2]


@pytest.mark.parametrize("scorer", [ExactMatch(), Includes(), Regex()], ids=lambda scorer: scorer.name)
def test_no_answer_and_no_target_are_no_score(scorer: Scorer) -> None:
    failed = score(scorer, Output(error="time-out"), "x")
    assert set(failed.values.values()) == {None} and failed.reason == "time-out"
    untold = score(scorer, "x", None)
    assert set(untold.values.values()) == {None} and untold.reason == "the sample has no target"


def test_order_and_length_are_kept() -> None:
    samples = [Sample(str(i), (), target=t) for i, t in enumerate("aba")]
    answers = [Answer(str(i), (Output(text="a"),)) for i in range(3)]
    session = ExactMatch().open(ExactMatch.Config(), ScorerContext())
    scored = session.score(samples, answers, ScoreJob())
    assert [one.values["exact_match"] for one in scored] == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        session.score(samples, answers[:2], ScoreJob())


@pytest.mark.parametrize("scorer", [ExactMatch(), Includes(), Regex()], ids=lambda scorer: scorer.name)
def test_the_contract(scorer: Scorer) -> None:
    check_scorer(scorer)
    check_scorer(scorer, options={"ignore_case": True})


def test_sessions_keep_their_own_options() -> None:
    scorer = ExactMatch()
    strict, lax = (scorer.open(ExactMatch.Config(ignore_case=lax), ScorerContext()) for lax in (False, True))
    asked = [Sample("s", (), target="Paris")], [Answer("s", (Output(text="PARIS"),))], ScoreJob()
    found = [session.score(*asked)[0].values["exact_match"] for session in (strict, lax, strict)]
    assert found == [0.0, 1.0, 0.0]


def test_a_bad_pattern_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"test, pattern: not a regular expression \(.*unterminated.*found '\(a'"):
        parse_options(Regex.Config, {"pattern": "(a"}, "test")
