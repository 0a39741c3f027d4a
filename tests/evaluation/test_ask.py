"""Answers go to the journal before they count; what is there is not asked again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.contracts.engine import Session
from harness.core.errors import StepError
from harness.core.records import Output, Request, Sample
from harness.evaluation.ask import Answered, Part, answer, ask, load_answers
from harness.steps.journal import Journal, read_members


class Counting(Session):
    """Answers with the prompt in capitals; ``fails`` are prompts whose call fails; ``dies`` ends it at a batch."""

    def __init__(self, size: int = 2, fails: Sequence[str] = (), dies: int | None = None) -> None:
        self.size, self.fails, self.dies = size, fails, dies
        self.asked: list[list[str]] = []

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        # Last first: the plan's order is the engine's business.
        order = list(range(len(requests)))[::-1]
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        if len(self.asked) == self.dies:
            raise KeyboardInterrupt
        self.asked.append([request.prompt for request in requests])
        return [
            Output(error="down")
            if request.prompt in self.fails
            else Output(f"{request.prompt.upper()}{len(self.asked)}")
            for request in requests
        ]


def samples(names: str = "abcdef") -> list[Sample]:
    return [Sample(name, (Request("generate", (), prompt=name),)) for name in names]


def texts(answered: Answered) -> list[str]:
    return [one.text for one in answered.answers]


def run(tmp_path: Path, session: Session, asked: list[Sample] | None = None, *, batchwise: bool = True) -> Answered:
    part = Part(asked or samples(), Journal(tmp_path / "answers.jsonl.gz"))
    (answered,) = answer([part], lambda: session, batchwise=batchwise)
    return answered


def test_answers_come_in_the_samples_order(tmp_path: Path) -> None:
    session = Counting()
    answered = run(tmp_path, session)
    assert session.asked == [["f", "e"], ["d", "c"], ["b", "a"]]
    assert texts(answered) == ["A3", "B3", "C2", "D2", "E1", "F1"]
    assert (answered.computed, answered.reused, answered.errors) == (6, 0, 0)


@pytest.mark.parametrize(
    ("logprob", "error"),
    [
        (float("nan"), "the engine gave nan as a log-probability"),
        (float("-inf"), "the engine gave -inf as a log-probability"),
        (0.5, "the engine gave 0.5 as a log-probability"),
        (0.001, None),
        (-3.0, None),
    ],
)
def test_a_log_probability_that_is_none_is_that_answers_error(
    tmp_path: Path, logprob: float, error: str | None
) -> None:
    class Odd(Counting):
        def run(self, requests: Sequence[Request]) -> list[Output]:
            return [Output(logprob=logprob if request.prompt == "b" else -1.0) for request in requests]

    answered = run(tmp_path, Odd())
    assert [one.error for one in answered.answers] == [None, error, None, None, None, None]
    assert answered.answers[1].outputs[0].logprob == (logprob if error is None else None)
    assert ask(Odd(), samples("b")[0].requests)[0].error == error


def test_what_is_stored_is_not_asked_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(dies=2))
    session = Counting()
    answered = run(tmp_path, session)
    assert session.asked == [["b", "a"]]
    assert (answered.computed, answered.reused) == (2, 4)

    def nothing_to_load() -> Session:
        raise AssertionError("the model was opened")

    (again,) = answer([Part(samples(), Journal(tmp_path / "answers.jsonl.gz"))], nothing_to_load)
    assert again.digest == answered.digest
    assert again.reused == 6


class Told:
    """Keeps what a display is told."""

    def __init__(self) -> None:
        self.now: list[int] = []
        self.before: list[int] = []

    def __call__(self, items: int) -> None:
        self.now.append(items)

    def stored(self, items: int) -> None:
        self.before.append(items)


def test_progress_tells_what_was_stored_from_what_is_answered_now(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counting(dies=2))
    told = Told()
    answer([Part(samples(), Journal(tmp_path / "answers.jsonl.gz"))], Counting, told)
    assert (told.before, told.now) == ([4], [2])


def test_progress_moves_within_a_long_batch(tmp_path: Path) -> None:
    class Telling(Counting):
        def run(self, requests: Sequence[Request]) -> list[Output]:
            # One more than there are, as after a batch that ran out of memory and was begun anew.
            for _ in range(len(requests) + 1):
                self.tell(1)
            return super().run(requests)

    told = Told()
    session = Telling(size=6)
    answer([Part(samples(), Journal(tmp_path / "answers.jsonl.gz"))], lambda: session, told)
    assert len(session.asked) == 1 and told.now == [1] * 6


def test_a_batch_is_in_the_journal_before_the_next_one_runs(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl.gz"
    seen = []

    class Looking(Counting):
        def run(self, requests: Sequence[Request]) -> list[Output]:
            seen.append(len(read_members(file)[0]))
            return super().run(requests)

    run(tmp_path, Looking())
    assert seen == [0, 1, 2]


def test_an_interrupted_batch_is_done_whole_and_stored_answers_stay(tmp_path: Path) -> None:
    run(tmp_path, Counting(size=2, fails=["c"]))
    session = Counting(size=2)
    answered = run(tmp_path, session)
    assert session.asked == [["d", "c"]]
    # d keeps its first answer ("2": the second batch), byte for byte; c has its new one.
    assert texts(answered) == ["A3", "B3", "C1", "D2", "E1", "F1"]
    loaded = load_answers(samples(), Journal(tmp_path / "answers.jsonl.gz"))
    assert loaded is not None
    assert loaded.digest == answered.digest


def test_an_endpoint_is_asked_for_what_is_missing_alone(tmp_path: Path) -> None:
    first = run(tmp_path, Counting(size=3, fails=["b", "e"]), batchwise=False)
    assert first.errors == 2
    assert first.answers[1].error == "down"
    session = Counting(size=3)
    answered = run(tmp_path, session, batchwise=False)
    assert session.asked == [["e"], ["b"]]
    assert (answered.computed, answered.reused, answered.errors) == (2, 4, 0)


def test_answers_to_other_questions_are_not_taken(tmp_path: Path) -> None:
    run(tmp_path, Counting())
    asked = samples()
    asked[0] = Sample("a", (Request("generate", (), prompt="another question"),))
    assert load_answers(asked, Journal(tmp_path / "answers.jsonl.gz")) is None
    session = Counting(size=1)
    answered = run(tmp_path, session, asked)
    assert session.asked == [["another question"]]
    assert texts(answered)[0] == "ANOTHER QUESTION1"


def test_engines_are_held_to_their_contract(tmp_path: Path) -> None:
    class Forgetful(Counting):
        def batches(self, requests: Sequence[Request]) -> list[list[int]]:
            return super().batches(requests)[:-1]

    with pytest.raises(StepError, match="batch plan does not hold every request exactly once"):
        run(tmp_path, Forgetful())

    class Silent(Counting):
        def run(self, requests: Sequence[Request]) -> list[Output]:
            return super().run(requests)[:-1]

    with pytest.raises(StepError, match="returned 1 outputs for 2 requests"):
        run(tmp_path, Silent())
    with pytest.raises(StepError, match="two samples of the task have the same id"):
        run(tmp_path, Counting(), samples("aa"))
