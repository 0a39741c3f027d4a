"""Scoring stored answers: one scorer after the other, each opened once, without the model that was asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

import harness
from harness import AdapterInfo, Answer, Metric, ModelInfo, Output, Request, Sample, Score, Session
from harness.contracts.engine import Availability, Capabilities, Engine
from harness.contracts.registry import Origin, Registered, Registry, load_plugins
from harness.contracts.scorer import Need, ScoreJob, Scorer, ScorerContext, ScorerSession
from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.testing import tiny_adapter
from harness_plugins.scorers.classifier import ClassifierSession
from harness_plugins.scorers.toxicity import ToxicityScorer
from tests.plugins.scorers.test_classifier import make_checkpoint


class Echo(Engine):
    """Says its prompt back; writes down when it is opened and closed."""

    name = "echo"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def availability(self) -> Availability:
        return Availability(True)

    def capabilities(self, model: ModelInfo, options: Any) -> Capabilities:
        return Capabilities(generate=True, max_adapters=10, max_adapter_rank=8)

    def identity(self, options: Any) -> dict[str, Any]:
        return {"name": self.name}

    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Any) -> Session:
        self.log.append("open echo")
        return Echoing(self.log)


class Echoing(Session):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        return [list(range(len(requests)))]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        return [Output(f"{request.prompt} {request.adapter}", (1, 2), "stop") for request in requests]

    def close(self) -> None:
        self.log.append("close echo")


class Logged(Scorer["Logged.Config"]):
    """Writes down when it is opened and closed, and what it scores; ``bad`` says what goes wrong when."""

    class Config(harness.Config):
        size: int = Field(1, description="nothing (no unit)")

    def __init__(self, name: str, log: list[str], need: Need | None = None) -> None:
        self.__dict__["name"] = name
        self.log, self.need, self.bad = log, need, dict[str, BaseException]()
        self.then: Callable[[ScoreJob], None] = lambda job: None

    def needs(self, config: Config) -> Need | None:
        return self.need

    def metrics(self, config: Config) -> tuple[Metric, ...]:
        return (Metric(name="length", higher_is_better=None, unit="characters"),)

    def open(self, config: Config, context: ScorerContext) -> ScorerSession:
        self.log.append(f"open {self.name} {config.size}")
        if "open" in self.bad:
            raise self.bad["open"]
        return Logging(self, config.size)


class Logging(ScorerSession):
    def __init__(self, scorer: Logged, size: int) -> None:
        self.scorer, self.size = scorer, size

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        self.scorer.log.append(f"score {job.task}")
        if job.task in self.scorer.bad:
            raise self.scorer.bad[job.task]
        self.scorer.then(job)
        return [Score({"length": float(len(answer.text))}) for answer in answers]

    def close(self) -> None:
        self.scorer.log.append(f"close {self.scorer.name} {self.size}")
        if "close" in self.scorer.bad:
            raise self.scorer.bad["close"]


class World:
    """A registry in which everything writes into one log, and a way to evaluate with it."""

    def __init__(self, tiny: Path, tasks: Path) -> None:
        self.log: list[str] = []
        self.said: list[str] = []
        self.tiny, self.tasks = tiny, tasks
        self.registry: Registry = load_plugins()
        self.heavy, self.light = Logged("heavy", self.log, "classifier"), Logged("light", self.log)
        origin = Origin("x", "x", "1", loose=Path(__file__))
        for one in (Echo(self.log), self.heavy, self.light):
            self.registry.entries[one.kind, one.name] = Registered(one.kind, one.name, one, origin)

    def task(self, name: str, scorers: str, prompt: str = "raw") -> None:
        text = (self.tasks / "sums.yaml").read_text(encoding="utf-8")
        text = text.replace("name: sums\n", f"name: {name}\n").replace("prompt: raw", f"prompt: {prompt}")
        text = text.partition("scorers:")[0] + f"scorers: {scorers}\n"
        (self.tasks / f"{name}.yaml").write_text(text, encoding="utf-8")

    def run(self, *tasks: str, **settings: Any) -> harness.Evaluation:
        self.log.clear()
        self.said.clear()
        reporter = Reporter()
        reporter.note = self.said.append  # type: ignore[method-assign]
        fields: dict[str, Any] = {"engine": "echo", "limit": 4, "task_folders": [self.tasks], "out": "out", **settings}
        return harness.evaluate(str(self.tiny), tasks=tasks, registry=self.registry, reporter=reporter, **fields)


@pytest.fixture
def world(tiny: Path, sums: Path) -> World:
    return World(tiny, sums)


# ------------------------------------------------------------------------------------------------------------- openings


def test_a_classifier_is_opened_once_for_all_arms_and_tasks_and_never_in_company(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three arms (the base and two adapters) x two tasks, two classifiers, and a scorer that needs nothing."""
    for seed in (1, 2):
        tiny_adapter(Path("adapters", f"a{seed}"), world.tiny, seed=seed)
    for seed in (1, 2):
        make_checkpoint(Path(f"judge{seed}"), seed=seed)
    used = [f"{{name: toxicity, options: {{model: judge{seed}}}}}" for seed in (1, 2)]
    for name in ("one", "two"):
        world.task(name, f"[{used[0]}, {used[1]}, {{name: light}}]")
    load, score, close = ToxicityScorer.load, ClassifierSession.score, ClassifierSession.close

    def loading(self: ToxicityScorer, config: Any) -> Any:
        world.log.append(f"open {config.model}")
        return load(self, config)

    def scoring(self: ClassifierSession, samples: Any, answers: Any, job: ScoreJob) -> list[Score]:
        world.log.append(f"score {job.task}")
        return score(self, samples, answers, job)

    def closing(self: ClassifierSession) -> None:
        world.log.append("close")
        close(self)

    monkeypatch.setattr(ToxicityScorer, "load", loading)
    monkeypatch.setattr(ClassifierSession, "score", scoring)
    monkeypatch.setattr(ClassifierSession, "close", closing)
    evaluation = world.run("one", "two", adapters=["adapters"])
    assert evaluation.failures == {}
    assert len(evaluation.rows) == 3 * 2 * (2 + 2 + 1)
    each = ["score one", "score two"] * 3
    assert world.log == [
        *("open echo", "close echo"),
        *("open light 1", *each, "close light 1"),
        *("open judge1", *each, "close"),
        *("open judge2", *each, "close"),
    ]


def test_other_options_are_another_opening(world: World) -> None:
    world.task("one", "[{name: heavy}, {name: heavy, options: {size: 2}}]")
    world.task("two", "[{name: heavy, options: {size: 1}}]")
    assert len(world.run("one", "two").rows) == 3
    assert world.log[2:] == [
        *("open heavy 1", "score one", "score two", "close heavy 1"),
        *("open heavy 2", "score one", "close heavy 2"),
    ]


def test_what_is_scored_already_opens_nothing(world: World) -> None:
    world.task("one", "[{name: heavy}]")
    world.run("one")
    world.run("one")
    assert world.log == [] and world.said[-1] == "everything was done before"
    world.task("one", "[{name: heavy}, {name: light}]")
    world.run("one")
    assert world.log == ["open light 1", "score one", "close light 1"]


def test_an_opening_that_fails_fails_the_steps_of_its_scorer_alone(world: World) -> None:
    """It is tried once, not once for each step; and again by the next run."""
    for name in ("one", "two"):
        world.task(name, "[{name: heavy}, {name: light}]")
    world.heavy.bad["open"] = UserError("scorer heavy, model", "its weights lack a head", "Give another.")
    evaluation = world.run("one", "two")
    assert [(row.task, row.scorer) for row in evaluation.rows] == [("one", "light"), ("two", "light")]
    message = "scorer heavy, model: its weights lack a head\n  Give another."
    assert list(evaluation.failures.values()) == [message] * 2
    assert world.log.count("open heavy 1") == 1
    failed = [json.loads(path.read_text()) for path in Path("out").glob("steps/scores-*-heavy-*/status.json")]
    assert [(one["status"], one["error"]) for one in failed] == [("failed", message)] * 2
    world.heavy.bad.clear()
    assert len(world.run("one", "two").rows) == 4
    assert world.log == ["open heavy 1", "score one", "score two", "close heavy 1"]


def test_a_task_that_cannot_be_scored_takes_no_other_with_it(world: World) -> None:
    for name in ("one", "two"):
        world.task(name, "[{name: heavy}, {name: light}]")
    world.heavy.bad["one"] = RuntimeError("out of memory")
    evaluation = world.run("one", "two")
    assert [(row.task, row.scorer) for row in evaluation.rows] == [("one", "light"), ("two", "heavy"), ("two", "light")]
    (message,) = evaluation.failures.values()
    assert "RuntimeError: out of memory" in message
    assert world.log[-4:] == ["open heavy 1", "score one", "score two", "close heavy 1"]


def test_an_interruption_closes_what_is_open(world: World) -> None:
    world.task("one", "[{name: heavy}]")
    world.heavy.bad["one"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.run("one")
    assert world.log[-2:] == ["score one", "close heavy 1"]


def test_a_scorer_that_does_not_close_costs_no_score(world: World) -> None:
    world.task("one", "[{name: heavy}, {name: light}]")
    world.heavy.bad["close"] = world.light.bad["close"] = RuntimeError("stuck")
    assert len(world.run("one").rows) == 2
    assert "warning: scorer light did not close: stuck" in world.said


# ---------------------------------------------------------------------------------- without the model that was asked


def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on none can be opened, by whatever name."""
    from transformers import AutoTokenizer

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a tokenizer is opened")

    for place in ("harness.models.inspect.open_tokenizer", "harness.evaluation.session.open_tokenizer"):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)


def numbers(evaluation: harness.Evaluation) -> list[dict[str, Any]]:
    return [row.model_dump() for row in evaluation.rows]


@pytest.mark.parametrize("arms", [1, 3])
def test_another_scorer_needs_neither_model_nor_tokenizer(
    world: World, monkeypatch: pytest.MonkeyPatch, arms: int
) -> None:
    """Raw and in the chat template, alone and under adapters: the rows of a run that had both from the start."""
    for seed in (1, 2):
        tiny_adapter(Path("adapters", f"a{seed}"), world.tiny, seed=seed)
    settings = {"adapters": ["adapters"]} if arms > 1 else {}
    for name, prompt in (("one", "raw"), ("two", "chat")):
        world.task(name, "[{name: exact_match}, {name: includes}, {name: light}]", prompt)
    expected = numbers(world.run("one", "two", out="whole", **settings))
    assert len(expected) == arms * 2 * 3
    for name, prompt in (("one", "raw"), ("two", "chat")):
        world.task(name, "[{name: exact_match}]", prompt)
    world.run("one", "two", **settings)
    for name, prompt in (("one", "raw"), ("two", "chat")):
        world.task(name, "[{name: exact_match}, {name: includes}, {name: light}]", prompt)
    no_tokenizer(monkeypatch)
    assert numbers(world.run("one", "two", **settings)) == expected
    assert world.log == ["open light 1", *["score one", "score two"] * arms, "close light 1"]
    assert not any("preparing" in line for line in world.said)


def test_questions_that_cannot_be_read_back_are_written_again_and_the_answers_kept(world: World) -> None:
    """A file of an earlier version, or of other questions, is no damage that a checksum shows."""
    from harness.steps.journal import read_rows, write_rows

    world.task("one", "[{name: exact_match}]")
    world.run("one")
    (requests,) = Path("out", "requests").iterdir()
    stored = read_rows(requests)
    old = [{key: value for key, value in row.items() if key != "chance"} for row in stored]
    for number, (rows, said) in enumerate(
        [(old, "is of another version (KeyError: 'chance')"), (stored[1:], "holds other questions than those that")]
    ):
        write_rows(requests, rows)
        world.task("one", f"[{{name: exact_match}}, {{name: light, options: {{size: {number}}}}}]")
        assert len(world.run("one").rows) == 2
        assert any(line.startswith(f"requests/{requests.name}: {said}") for line in world.said), world.said
        assert read_rows(requests) == stored
        assert "open echo" not in world.log


def test_questions_that_are_lost_while_it_runs_fail_the_steps_that_need_them(world: World) -> None:
    world.task("one", "[{name: light}, {name: heavy}]")

    def lose(job: ScoreJob) -> None:
        shutil.rmtree(Path("out", "requests"))

    world.light.then = lose
    evaluation = world.run("one")
    assert [row.scorer for row in evaluation.rows] == ["light"]
    (message,) = evaluation.failures.values()
    assert message.startswith("requests/") and "is missing or damaged; run the command of its answers again" in message
    world.light.then = lambda job: None
    assert [row.scorer for row in world.run("one").rows] == ["light", "heavy"]
    assert "open echo" not in world.log
