"""Two engines on the same questions: what is measured, what the bound says, and who may stand beside whom."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import AdapterInfo, ModelInfo, Output, Request, Session
from harness.contracts.engine import Availability, Capabilities, Engine
from harness.contracts.registry import Origin, Registered, Registry, load_plugins
from harness.core.errors import CorruptionError, UserError
from harness.core.parity_record import ParityRecord, TaskParity
from harness.core.records import Sample
from harness.evaluation.parity import FULL, LOW, Tally, choose, probe_of, shared_tokens, turn_of
from harness.report.build import load_report, write_reports
from harness.report.compare import compare_runs
from harness.report.read import open_run

# ---------------------------------------------------------------------------------------------------------- figures


def generated(*ids: int, finish: Any = "stop") -> Output:
    return Output(" ".join(map(str, ids)), ids, finish)


def ask(*ids: int) -> Request:
    return Request("generate", ids, decoding=harness.Decoding(max_new_tokens=8))


def test_tokens_are_counted_up_to_the_first_difference() -> None:
    assert [shared_tokens(*pair) for pair in (((), ()), ((1, 2), (1, 2)), ((1, 2, 3), (1, 5, 3)), ((1,), (1, 2)))] == [
        0,
        2,
        1,
        1,
    ]
    tally = Tally("arm", "task", "raw", 3, LOW)
    tally.answers(generated(1, 2, 3, 4), generated(1, 2, 3, 4))
    tally.answers(generated(1, 2, 3, 4), generated(1, 9, 3, 4))
    tally.answers(generated(7, 8), generated(7, 8, 9, 9))
    one = tally.result()
    # 4 of 4, 1 of 4, and 2 of the longer one's 4.
    assert one.tokens_equal == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert one.texts_equal == pytest.approx(1 / 3)
    assert (one.answers, one.parted) == (3, 2)


def test_log_probabilities_are_compared_per_token_and_as_a_whole() -> None:
    tally = Tally("arm", "task", "raw", 3, LOW)
    tally.logprobs(Output(logprob=-4.0), Output(logprob=-4.4), 4)
    tally.logprobs(Output(logprob=-1.0), Output(logprob=-0.8), 1)
    tally.logprobs(Output(error="no"), Output(logprob=-0.8), 1)
    one = tally.result()
    # 0.4 over 4 tokens is 0.1 each; 0.2 over one is 0.2.
    assert one.logprob_mean == pytest.approx(0.15)
    assert (one.logprob_largest, one.logprob_largest_sum) == (pytest.approx(0.2), pytest.approx(0.4))
    assert (one.scored, one.errors) == (2, 1)


def test_a_turn_between_tokens_that_are_nearly_as_likely_is_excused() -> None:
    """The bound of a log-probability is 0.25, so two of them may change places when they are 0.5 apart."""
    for gap, parted in ((0.5, 0), (0.51, 1)):
        tally = Tally("arm", "task", "raw", 1, LOW)
        tally.answers(generated(1, 2), generated(1, 3))
        tally.turn([Output(logprob=-1.0 - gap)], [Output(logprob=-1.0)])
        assert tally.result().parted == parted


def test_a_turn_asks_about_the_tokens_where_answers_part() -> None:
    turn = turn_of(ask(5, 6), generated(1, 2, 3), generated(1, 4), ends=(0,))
    assert turn is not None
    assert [(one.prompt_ids, one.continuation_ids) for one in (*turn.first, *turn.second)] == [
        ((5, 6, 1), (2,)),
        ((5, 6, 1), (4,)),
    ]
    # The first went on where the second ended: any token that ends an answer counts for the second.
    turn = turn_of(ask(5, 6), generated(1, 2, 3), generated(1), ends=(0, 9))
    assert turn is not None and [one.continuation_ids for one in turn.second] == [(0,), (9,)]
    assert turn_of(ask(5, 6), generated(1, 2), generated(1, 2), ends=(0,)) is None
    # One spent its token budget: no token stands against the other's.
    assert turn_of(ask(5, 6), generated(1, 2), generated(1, finish="length"), ends=(0,)) is None


def test_a_generated_answer_is_scored_as_a_continuation() -> None:
    probe = probe_of(ask(5, 6), generated(1, 2))
    assert probe is not None and (probe.prompt_ids, probe.continuation_ids) == ((5, 6), (1, 2))
    assert probe_of(ask(5, 6), generated()) is None
    assert probe_of(Request("loglikelihood", (1,), (2,)), Output(logprob=-1.0)) is None
    assert probe_of(ask(), generated(1)) is None, "an endpoint that was sent text"


def test_the_bounds() -> None:
    """LOW follows from bf16: 8 significant bits, so logits of 16 to 32 are 2**(4 - 7) = 0.125 apart."""
    assert LOW.largest == 2 * 2 ** (math.floor(math.log2(16)) - 7)
    good = TaskParity(
        arm="a",
        task="t",
        variant="raw",
        samples=20,
        answers=20,
        parted=1,
        scored=9,
        logprob_mean=0.05,
        logprob_largest=0.25,
    )
    assert good.problems(LOW) == []
    assert good.model_copy(update={"parted": 2}).problems(LOW) == [
        "2 of 20 answers part where one token was clearly likelier"
    ]
    assert good.problems(FULL) == [
        "largest log-probability difference 0.25 nats per token > 0.001",
        "mean log-probability difference 0.05 nats per token > 0.0001",
    ]
    nothing = TaskParity(arm="a", task="t", variant="raw", samples=2, errors=4)
    assert nothing.problems(LOW) == ["nothing could be compared"]


def test_samples_are_chosen_by_their_ids_alone() -> None:
    samples = [Sample(f"s{i}", ()) for i in range(50)]
    chosen = choose(samples, 5)
    assert len(chosen) == 5 and {one.id for one in choose(samples[::-1], 5)} == {one.id for one in chosen}
    assert [one.id for one in chosen] != [f"s{i}" for i in range(5)]
    assert choose(samples[:3], 5) == samples[:3]


# ----------------------------------------------------------------------------------------------------- two engines


class Fixed(Session):
    """Answers the sums; log-probabilities are -2 for every token, and ``shift`` more for the whole."""

    def __init__(self, engine: FixedEngine) -> None:
        self.engine = engine
        engine.opened += 1

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        return [list(range(len(requests)))] if requests else []

    def run(self, requests: Sequence[Request]) -> list[Output]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Output:
        if request.kind == "generate":
            return Output("1 2", (11, 12 if self.engine.turns else 13), "stop")
        return Output(logprob=-2.0 * len(request.continuation_ids) + self.engine.shift)


class FixedEngine(Engine):
    name = "one"

    def __init__(self, name: str, shift: float = 0.0, turns: bool = False) -> None:
        self.__dict__.update(name=name)
        self.shift, self.turns, self.opened = shift, turns, 0

    def availability(self) -> Availability:
        return Availability(True)

    def capabilities(self, model: ModelInfo, options: Any) -> Capabilities:
        return Capabilities(generate=True, loglikelihood=True, max_adapters=4, max_adapter_rank=8)

    def identity(self, options: Any) -> dict[str, Any]:
        return {"name": self.name}

    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Any) -> Session:
        return Fixed(self)


def engines(**second: Any) -> tuple[Registry, FixedEngine, FixedEngine]:
    registry = load_plugins()
    pair = FixedEngine("one"), FixedEngine("two", **second)
    for engine in pair:
        registry.entries["engine", engine.name] = Registered(
            "engine", engine.name, engine, Origin("x", "x", "1", loose=Path(__file__))
        )
    return registry, *pair


def evaluate(model: Any, sums: Path, out: str, registry: Registry, **settings: Any) -> Any:
    fields = {
        "engine": "one",
        "limit": 6,
        "task_folders": [sums],
        "tasks": ["sums"],
        "parity_engine": "two",
        **settings,
    }
    model = model if isinstance(model, harness.core.specs.ModelSpec) else str(model)
    return harness.evaluate(model, out=Path(out), registry=registry, **fields)


def record(root: str) -> ParityRecord:
    found = harness.report.engines.stored_parity(open_run(Path(root)))
    assert found is not None
    return found


def test_a_record_is_made_once_and_stands_in_the_report(tiny: Path, sums: Path) -> None:
    registry, first, second = engines(shift=0.0001)
    evaluate(tiny, sums, "out", registry, parity=4)
    assert (first.opened, second.opened) == (2, 1)
    made = record("out")
    (task,) = made.tasks
    assert (task.samples, task.answers, task.scored, task.texts_equal) == (4, 4, 4, 1.0)
    # Two tokens each, and the whole is 0.0001 more.
    assert task.logprob_largest == pytest.approx(0.00005) and task.logprob_largest_sum == pytest.approx(0.0001)
    assert made.agrees and made.engines == ("one", "two") and made.bound == FULL
    write_reports(Path("out"))
    report = load_report(Path("out"))
    assert report.parity is not None and report.parity["tasks"][0]["logprob_largest_sum"] == pytest.approx(0.0001)
    assert any(note.startswith("parity: engines one and two on 4 samples per task") for note in report.notes)
    evaluate(tiny, sums, "out", registry, parity=4)
    assert (first.opened, second.opened) == (2, 1), "nothing was asked again"
    evaluate(tiny, sums, "out", registry, parity=5)
    assert (first.opened, second.opened) == (3, 2)
    assert record("out").samples == 5


def test_engines_that_turn_where_one_token_was_clearly_likelier_disagree(tiny: Path, sums: Path) -> None:
    registry, _, _ = engines(turns=True)
    evaluate(tiny, sums, "out", registry, parity=4)
    (task,) = record("out").tasks
    # Both tokens are as likely to the second engine: every turn is excused.
    assert (task.tokens_equal, task.parted) == (0.5, 0)
    assert record("out").agrees


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_far_engines_may_be_apart_depends_on_the_dtype(tiny: Path, sums: Path, dtype: str) -> None:
    registry, _, _ = engines(shift=0.08)
    model = harness.core.specs.ModelSpec(model=str(tiny), dtype=dtype)  # type: ignore[arg-type]
    evaluate(model, sums, "out", registry, parity=4)
    # 0.08 over two tokens is 0.04 each: within 0.05 in bf16, far beyond 0.0001 in fp32.
    assert record("out").agrees is (dtype == "bfloat16")
    if dtype == "float32":
        assert "they DISAGREE beyond the bound" in record("out").summary()


def test_runs_of_different_engines_need_a_record(tiny: Path, sums: Path) -> None:
    registry, _, _ = engines(shift=0.0001)
    evaluate(tiny, sums, "a", registry)
    evaluate(tiny, sums, "b", registry, engine="two")
    a, b = Path("a"), Path("b")
    with pytest.raises(UserError) as caught:
        compare_runs(a, b)
    assert str(caught.value) == (
        "a and b: come from different engines (one, two), and no parity record shows that they agree\n"
        "  Run one of them again with --parity 16 --parity-engine two (or one), or pass --allow-engine-mismatch."
    )
    (note,) = compare_runs(a, b, allow_engine_mismatch=True).notes
    assert note.startswith("engine differs: one in A, two in B, and no parity record shows that they agree")
    evaluate(tiny, sums, "a", registry, parity=4)
    (note,) = compare_runs(a, b).notes
    assert note.startswith("engine differs: one in A, two in B; parity: engines one and two on 4 samples per task")
    (note,) = compare_runs(b, a).notes
    assert note.startswith("engine differs: two in A, one in B; parity:")


def test_a_record_of_disagreement_is_no_leave(tiny: Path, sums: Path) -> None:
    registry, _, _ = engines(shift=1.0)
    evaluate(tiny, sums, "a", registry, parity=4)
    evaluate(tiny, sums, "b", registry, engine="two")
    with pytest.raises(
        UserError, match=r"tiny, sums:raw: largest log-probability difference 0\.5 nats per token > 0\.001"
    ):
        compare_runs(Path("a"), Path("b"))


def test_mistakes_are_named(tiny: Path, sums: Path) -> None:
    registry, _, _ = engines()
    with pytest.raises(UserError) as caught:
        evaluate(tiny, sums, "out", registry, parity=4, parity_engine="one")
    assert str(caught.value) == (
        "--parity-engine one: is the engine that the run uses already\n"
        "  Name another engine, or choose the run's with --engine."
    )
    assert not Path("out").exists()
    with pytest.raises(UserError, match="--parity-engine twoo: unknown engine 'twoo'\n  Did you mean 'two'"):
        evaluate(tiny, sums, "out", registry, parity=4, parity_engine="twoo")
    evaluate(tiny, sums, "out", registry, parity=4)
    Path("out/parity.json").write_text(json.dumps({"key": 1}))
    with pytest.raises(CorruptionError, match="not a parity record"):
        write_reports(Path("out"))


def test_a_second_engine_that_fails_takes_no_score_with_it(
    tiny: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, _, second = engines()

    def refuse(*_: Any) -> Session:
        raise harness.StepError("engine two", "out of memory")

    monkeypatch.setattr(second, "open", refuse, raising=False)
    evaluation = evaluate(tiny, sums, "out", registry, parity=4)
    assert evaluation.failures == {"parity": "engine two: out of memory"}
    assert len(evaluation.rows) == 1 and not Path("out/parity.json").exists()
