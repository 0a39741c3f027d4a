"""Many adapters of one base on one engine: the same steps, numbers and bytes as each of them alone."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import (
    AdapterInfo,
    Event,
    Execution,
    Executor,
    ExecutorContext,
    InProcessPool,
    ModelInfo,
    Order,
    Output,
    Pool,
    Request,
    Session,
)
from harness.contracts.engine import Availability, Capabilities, Engine
from harness.contracts.registry import Origin, Registered, Registry, load_plugins
from harness.contracts.scorer import Scorer
from harness.core.errors import StepError, UserError
from harness.evaluation.arms import adapters_in, unique_names
from harness.report.build import write_reports
from harness.testing import tiny_adapter

NAMES = ("a", "b", "c")


@pytest.fixture
def adapters(alone: Path, tiny: Path) -> Path:
    """A folder of three adapters that answer differently."""
    for seed, name in enumerate(NAMES, start=1):
        tiny_adapter(alone / "adapters" / name, tiny, seed=seed)
    return alone / "adapters"


class Echo(Session):
    """Answers with prompt and adapter; `log` gets every batch."""

    def __init__(self, engine: EchoEngine, adapters: Sequence[AdapterInfo]) -> None:
        self.engine, self.names = engine, [adapter.name for adapter in adapters]
        engine.opened.append(self.names)

    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        return [list(range(start, min(start + 7, len(requests)))) for start in range(0, len(requests), 7)]

    def run(self, requests: Sequence[Request]) -> list[Output]:
        self.engine.batches.append([request.adapter for request in requests])
        outputs = []
        for request in requests:
            if request.adapter == self.engine.guilty:
                raise RuntimeError("this adapter is cursed")
            assert request.adapter is None or request.adapter in self.names
            outputs.append(Output(f"{request.prompt} by {request.adapter}", (1, 2), "stop"))
        return outputs


class EchoEngine(Engine):
    """An engine of the tests: ``most`` adapters at once, ranks up to ``rank``."""

    name = "echo"

    def __init__(self, most: int = 10, rank: int = 8) -> None:
        self.most, self.rank = most, rank
        self.opened: list[list[str]] = []
        self.models: list[ModelInfo] = []
        self.batches: list[list[str | None]] = []
        self.guilty: str | None = "nobody"

    def availability(self) -> Availability:
        return Availability(True)

    def capabilities(self, model: ModelInfo, options: Any) -> Capabilities:
        return Capabilities(generate=True, max_adapters=self.most, max_adapter_rank=self.rank)

    def identity(self, options: Any) -> dict[str, Any]:
        return {"name": self.name}

    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Any) -> Session:
        self.models.append(model)
        return Echo(self, adapters)


def with_echo(**settings: Any) -> tuple[Registry, EchoEngine]:
    registry, engine = load_plugins(), EchoEngine(**settings)
    registry.entries["engine", "echo"] = Registered(
        "engine", "echo", engine, Origin("x", "x", "1", loose=Path(__file__))
    )
    return registry, engine


def evaluate(tiny: Path, sums: Path, out: str, **settings: Any) -> Any:
    fields = {"engine": "echo", "limit": 5, "task_folders": [sums], "tasks": ["sums"], **settings}
    return harness.evaluate(str(tiny), out=Path(out), **fields)


def artifacts(root: Path, *, unpacked: bool = False) -> dict[str, bytes]:
    """Everything that steps made, by step folder and file; ``unpacked``: whatever batches it came in."""
    found = {str(path.relative_to(root / "steps")): path.read_bytes() for path in root.glob("steps/*/artifact/*")}
    return {name: gzip.decompress(data) if unpacked and name.endswith(".gz") else data for name, data in found.items()}


# ------------------------------------------------------------------------------------------------------ which arms


def test_a_folder_of_adapters_is_all_of_them_sorted(adapters: Path) -> None:
    (adapters / "notes").mkdir()
    assert [Path(ref).name for ref in adapters_in(str(adapters))] == list(NAMES)
    assert adapters_in(str(adapters / "b")) == [str(adapters / "b")]
    # What is no folder of adapters is left to the message that names what is missing.
    assert adapters_in(str(adapters / "notes")) == [str(adapters / "notes")]


def test_names_are_told_apart_by_their_parents(alone: Path) -> None:
    def info(ref: str) -> AdapterInfo:
        return AdapterInfo(ref=ref, path=ref, name=ref.rsplit("/", 1)[-1], digest=ref, rank=1)

    given = [info(ref) for ref in ("x/one/last", "y/one/last", "z/two/last", "z/other")]
    assert unique_names(given) == ["x-one-last", "y-one-last", "two-last", "other"]


def test_one_adapter_is_one_arm_and_several_bring_the_base(tiny: Path, sums: Path, adapters: Path) -> None:
    registry, engine = with_echo()
    one = evaluate(tiny, sums, "one", registry=registry, adapter=str(adapters / "a"))
    assert [arm.name for arm in one.plan.arms] == ["tiny+a"]
    both = evaluate(tiny, sums, "both", registry=registry, adapter=str(adapters / "a"), with_base=True)
    assert [arm.name for arm in both.plan.arms] == ["tiny", "tiny+a"]
    many = evaluate(tiny, sums, "many", registry=registry, adapters=[adapters])
    assert [arm.name for arm in many.plan.arms] == ["tiny", "tiny+a", "tiny+b", "tiny+c"]
    without = evaluate(tiny, sums, "without", registry=registry, adapters=[adapters], with_base=False)
    assert [arm.name for arm in without.plan.arms] == ["tiny+a", "tiny+b", "tiny+c"]
    # One engine, opened once, whatever the number of adapters.
    assert engine.opened == [["a"], ["a"], list(NAMES), list(NAMES)]


def test_the_same_adapter_twice_is_refused(tiny: Path, sums: Path, adapters: Path, alone: Path) -> None:
    shutil.copytree(adapters / "a", alone / "copy")
    with pytest.raises(UserError, match=r"is the same adapter as .*/a \(digest .*\)\n  Give each adapter once\."):
        evaluate(tiny, sums, "out", registry=with_echo()[0], adapters=[adapters, alone / "copy"])
    assert not Path("out").exists()


# ------------------------------------------------------------------------------------------------- asked at once


def test_requests_of_all_arms_share_batches(tiny: Path, sums: Path, adapters: Path) -> None:
    registry, engine = with_echo()
    evaluate(tiny, sums, "out", registry=registry, adapters=[adapters])
    assert [len(batch) for batch in engine.batches] == [7, 7, 6]
    assert engine.batches[0] == [None] * 5 + ["a"] * 2
    for name in NAMES:
        (journal,) = Path("out").glob(f"steps/answers-tiny+{name}-sums-*/artifact/answers.jsonl.gz")
        rows = harness.steps.journal.read_rows(journal)
        assert len(rows) == 5 and all(row["output"]["text"].endswith(f" by {name}") for row in rows)


def test_more_adapters_than_the_engine_holds_are_taken_in_groups(tiny: Path, sums: Path, adapters: Path) -> None:
    registry, engine = with_echo(most=2)
    evaluation = evaluate(tiny, sums, "out", registry=registry, adapters=[adapters])
    assert engine.opened == [["a", "b"], ["c"]]
    assert len(evaluation.rows) == 4 and evaluation.failures == {}


class Chosen(Executor):
    """Carries out here what ``pool`` makes of the orders."""

    name = "local"

    def __init__(self, pool: type[InProcessPool]) -> None:
        self._pool = pool

    def open(self, config: Any, context: ExecutorContext) -> Pool:
        return self._pool(context)


def with_executor(registry: Registry, pool: type[InProcessPool]) -> Registry:
    origin = Origin("x", "x", "1", loose=Path(__file__))
    registry.entries["executor", "local"] = Registered("executor", "local", Chosen(pool), origin)
    return registry


def test_orders_go_through_the_registered_executor(tiny: Path, sums: Path, adapters: Path) -> None:
    seen: list[Order] = []

    class Watching(InProcessPool):
        def submit(self, order: Order) -> None:
            seen.append(Order.model_validate_json(order.model_dump_json()))
            super().submit(order)

    registry = with_executor(with_echo(most=1)[0], Watching)
    evaluation = evaluate(tiny, sums, "out", registry=registry, adapters=[adapters])
    assert len(evaluation.rows) == 4
    # Base and a, then b, c, are served one adapter at a time; then one scorer over all of them.
    tasks = [arm.tasks[0] for arm in evaluation.plan.arms]
    answers = [task.answers_id for task in tasks]
    assert [(order.id, order.keys) for order in seen] == [
        ("answers-1", (answers[0], answers[1])),
        ("answers-2", (answers[2],)),
        ("answers-3", (answers[3],)),
        ("scores-1-exact_match", tuple(task.scores[0].id for task in tasks)),
    ]
    seen.clear()
    sure = Execution("local", in_process=True)
    evaluate(tiny, sums, "sure", registry=registry, adapters=[adapters], executor=sure)
    assert seen == []


def test_orders_in_any_order_give_the_same_rows(tiny: Path, sums: Path, adapters: Path) -> None:
    class Backwards(InProcessPool):
        def submit(self, order: Order) -> None:
            self._waiting.appendleft(order)

        def capacity(self) -> int:
            return 9

    # With room for nine, every arm is an order of its own.
    backwards = with_executor(with_echo(most=1)[0], Backwards)
    found = [
        evaluate(tiny, sums, out, registry=registry, adapters=[adapters])
        for out, registry in (("a", with_echo(most=1)[0]), ("b", backwards))
    ]
    assert [row.model_dump() for row in found[0].rows] == [row.model_dump() for row in found[1].rows]
    assert len(found[1].rows) == 4 and not found[1].failures
    one, two = (artifacts(evaluation.root, unpacked=True) for evaluation in found)
    assert one == two


class Dropping(InProcessPool):
    def submit(self, order: Order) -> None:
        if order.id != "answers-3":
            super().submit(order)


class Twice(InProcessPool):
    def events(self) -> Iterator[Event]:
        for event in super().events():
            yield event
            if event.order == "answers-2" and event.kind == "ended":
                yield event


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (Dropping, "executor Dropping: never ended answers-3\n  A fault of the executor: harness.testing.check_exec"),
        (Twice, "executor Twice: ended twice: answers-2, which is not under way"),
    ],
)
def test_an_executor_that_leaves_an_order_out_leaves_no_hole(
    tiny: Path, sums: Path, adapters: Path, pool: type[InProcessPool], said: str
) -> None:
    with pytest.raises(StepError) as caught:
        evaluate(tiny, sums, "out", registry=with_executor(with_echo(most=1)[0], pool), adapters=[adapters])
    assert said in str(caught.value)


def test_the_guilty_arm_alone_fails(tiny: Path, sums: Path, adapters: Path) -> None:
    registry, engine = with_echo()
    engine.guilty = "b"
    evaluation = evaluate(tiny, sums, "out", registry=registry, adapters=[adapters])
    assert [name.rpartition("-")[0] for name in evaluation.failures] == ["answers-tiny+b-sums"]
    assert "this adapter is cursed" in next(iter(evaluation.failures.values()))
    assert {row.adapter for row in evaluation.rows} == {None, "a", "c"}
    engine.guilty = "nobody"
    engine.batches.clear()
    again = evaluate(tiny, sums, "out", registry=registry, adapters=[adapters])
    assert again.failures == {} and len(again.rows) == 4
    assert engine.batches == [["b"] * 5]


def test_an_engine_that_does_not_open_is_not_tried_for_every_arm(
    tiny: Path, sums: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, engine = with_echo()
    tries = []

    def refuse(*_: Any) -> Session:
        tries.append(1)
        raise StepError("engine echo", "no voice")

    monkeypatch.setattr(engine, "open", refuse)
    with pytest.raises(StepError, match="engine echo: no voice"):
        evaluate(tiny, sums, "out", registry=registry, adapters=[adapters])
    assert len(tries) == 1
    failed = [json.loads(path.read_text())["status"] for path in Path("out").glob("steps/answers-*/status.json")]
    assert failed == ["failed"] * 4


def test_a_user_s_mistake_in_one_scorer_leaves_the_other_scores(
    tiny: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge whose money is spent, say: its step fails, what else was scored stays, and the next run goes on."""
    text = (sums / "sums.yaml").read_text()
    (sums / "sums.yaml").write_text(text + "- name: includes\n")
    registry, engine = with_echo()
    scorer = registry.registered(Scorer, "includes", "").plugin
    honest = type(scorer).score

    def refuse(*_: Any) -> Any:
        raise UserError("--max-judge-cost", "the limit is reached", "Give a higher one.")

    monkeypatch.setattr(type(scorer), "score", refuse)
    evaluation = evaluate(tiny, sums, "out", registry=registry)
    assert [row.scorer for row in evaluation.rows] == ["exact_match"]
    assert "the limit is reached" in next(iter(evaluation.failures.values()))
    monkeypatch.setattr(type(scorer), "score", honest)
    engine.batches.clear()
    again = evaluate(tiny, sums, "out", registry=registry)
    assert [row.scorer for row in again.rows] == ["exact_match", "includes"] and engine.batches == []


# ---------------------------------------------------------------------------------------- alone and in company


def test_steps_are_the_same_alone_and_in_company(tiny: Path, sums: Path, adapters: Path) -> None:
    registry, _ = with_echo()
    many = evaluate(tiny, sums, "many", registry=registry, adapters=[adapters])
    together = artifacts(many.root, unpacked=True)
    for name in NAMES:
        one = evaluate(tiny, sums, f"alone-{name}", registry=registry, adapter=str(adapters / name))
        for file, content in artifacts(one.root, unpacked=True).items():
            assert together.pop(file) == content
    base = evaluate(tiny, sums, "alone", registry=registry)
    assert artifacts(base.root, unpacked=True) == together


def test_a_run_grows_by_arms_and_asks_only_the_new_ones(tiny: Path, sums: Path, adapters: Path) -> None:
    registry, engine = with_echo()
    evaluate(tiny, sums, "out", registry=registry, adapter=str(adapters / "b"))
    engine.batches.clear()
    evaluate(tiny, sums, "out", registry=registry, adapters=[adapters])
    assert {name for batch in engine.batches for name in batch} == {None, "a", "c"}
    plan = json.loads(Path("out/plan.json").read_text())
    assert [arm["name"] for arm in plan["arms"]] == ["tiny", "tiny+a", "tiny+b", "tiny+c"]
    with pytest.raises(UserError) as caught:
        evaluate(tiny, sums, "out", registry=registry, adapters=[adapters / "a", adapters / "b"])
    assert "holds arms that are not asked for now: tiny+c" in str(caught.value)


def test_an_arm_that_goes_by_another_name_in_company_keeps_its_steps(tiny: Path, sums: Path, alone: Path) -> None:
    for seed, parent in enumerate(("x", "y"), start=1):
        tiny_adapter(alone / parent / "last", tiny, seed=seed)
    registry, engine = with_echo()
    evaluate(tiny, sums, "out", registry=registry, adapter=str(alone / "x" / "last"))
    engine.batches.clear()
    both = evaluate(tiny, sums, "out", registry=registry, adapters=[alone / "x" / "last", alone / "y" / "last"])
    assert [arm.name for arm in both.plan.arms] == ["tiny", "tiny+x-last", "tiny+y-last"]
    assert {name for batch in engine.batches for name in batch} == {None, "y-last"}
    assert len(list(Path("out/steps").glob("answers-*"))) == 3


def test_everything_equals_each_alone_byte_for_byte_in_fp32(tiny: Path, sums: Path, adapters: Path) -> None:
    """Generation and log-likelihood of the transformers engine; batches never mix adapters."""
    settings = {"engine": "transformers", "limit": 6, "options": {"engine": {"batch_size": 4}}}
    many = evaluate(tiny, sums, "many", adapters=[adapters], **settings)
    together = artifacts(many.root)
    texts = set()
    for name in (None, *NAMES):
        adapter = {} if name is None else {"adapter": str(adapters / name)}
        one = evaluate(tiny, sums, f"alone-{name}", **adapter, **settings)
        found = artifacts(one.root)
        assert found and all(together.pop(file) == content for file, content in found.items())
        texts.add(found[next(file for file in found if file.endswith("answers.jsonl.gz"))])
    assert together == {}
    assert len(texts) == 4, "the adapters must answer differently, or nothing was tested"


# --------------------------------------------------------------------------------------------------------- folding


def test_an_adapter_that_the_engine_cannot_serve_is_folded(tiny: Path, sums: Path, adapters: Path, alone: Path) -> None:
    tiny_adapter(alone / "adapters" / "wide", tiny, seed=9, rank=16)
    registry, engine = with_echo()
    notes: list[str] = []

    class Listening(harness.core.progress.Reporter):
        def note(self, text: str) -> None:
            notes.append(text)

    many = evaluate(tiny, sums, "out", registry=registry, adapters=[adapters], reporter=Listening())
    assert engine.opened == [list(NAMES), []]
    served, folded = engine.models
    assert served.path == str(tiny) and folded.path.startswith("out/.folded/") and folded.name == "tiny"
    assert not Path("out/.folded").exists()
    why = "rank 16, and this engine serves ranks up to 8"
    assert f"folding wide into a temporary checkpoint: {why}" in notes
    row = next(row for row in many.rows if row.adapter == "wide")
    assert f"wide was folded into the base, as the engine cannot serve it: {why}" in row.notes
    (provenance,) = Path("out").glob("steps/answers-tiny+wide-*/provenance.json")
    assert json.loads(provenance.read_text())["folded"] == why
    assert any(f"tiny+wide: folded into the base: {why}" in note for note in write_reports(Path("out")).notes)
    one = evaluate(tiny, sums, "one", registry=registry, adapter=str(alone / "adapters" / "wide"))
    wide = next(arm for arm in many.plan.arms if arm.label == "wide")
    assert one.plan.tasks[0].answers_id == wide.tasks[0].answers_id


def test_a_folded_arm_has_other_answers_than_a_served_one(tiny: Path, sums: Path, adapters: Path) -> None:
    ids = [
        evaluate(tiny, sums, f"out-{rank}", registry=with_echo(rank=rank)[0], adapter=str(adapters / "a"))
        .plan.tasks[0]
        .answers_id
        for rank in (8, 1)
    ]
    assert ids[0] != ids[1]


def test_folding_gives_what_serving_gives_to_fp32_rounding(tiny: Path, sums: Path, adapters: Path) -> None:
    """One adapter through transformers, live and folded: log-likelihoods differ by rounding, answers not at all."""
    from harness_plugins.engines.transformers.engine import TransformersEngine

    class Folds(TransformersEngine):
        name = "folds"

        def adapter_problem(self, model: ModelInfo, adapter: AdapterInfo, options: Any) -> str | None:
            return "it would rather not"

    registry = load_plugins()
    registry.entries["engine", "folds"] = Registered(
        "engine", "folds", Folds(), Origin("x", "x", "1", loose=Path(__file__))
    )
    texts = []
    for engine in ("transformers", "folds"):
        evaluation = evaluate(tiny, sums, engine, registry=registry, engine=engine, adapter=str(adapters / "a"))
        (journal,) = evaluation.root.glob("steps/answers-*/artifact/answers.jsonl.gz")
        texts.append([row["output"] for row in harness.steps.journal.read_rows(journal)])
    assert texts[0] == texts[1]
