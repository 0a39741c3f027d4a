"""Carries out `--parity`: some samples of every task through a second engine, beside what the first one answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from harness.contracts.registry import Registry
from harness.core.errors import CorruptionError, UserError
from harness.core.parity_record import Bound, ParityRecord, TaskParity
from harness.core.records import ModelInfo, Output, Request, digest_of
from harness.evaluation import ask
from harness.evaluation.engines import choose_engine, needs_of
from harness.evaluation.load import Loaded, groups_of
from harness.evaluation.parity import FULL, LOW, Tally, Turn, choose, probe_of, turn_of
from harness.evaluation.plan import EvalPlan
from harness.evaluation.resume import ANSWERS_FILE
from harness.evaluation.session import EvalSession, Unit
from harness.models.generation_config import end_tokens
from harness.models.precision import asked_dtype, settle_dtype, with_dtype
from harness.steps.files import read_json, write_json
from harness.steps.journal import Journal


@dataclass
class _Item:
    """One request, what both engines answered, and what is asked of them about it."""

    unit: Unit
    sample: str
    request: Request
    first: Output
    second: Output = field(default_factory=Output)
    probe: Request | None = None
    """The first engine's answer as a continuation to score."""
    probed: list[Output] = field(default_factory=list)
    """What either engine says of it."""
    turn: tuple[list[Output], list[Output]] | None = None
    """What the second engine says of either token where the answers part."""

    @property
    def generated(self) -> bool:
        """Whether both answers are a function of the prompt alone."""
        decoding = self.request.decoding
        return self.request.kind == "generate" and (decoding is None or decoding.greedy)


def second_plan(plan: EvalPlan, registry: Registry) -> EvalPlan | None:
    """The same evaluation on the second engine; None where no parity was asked for.

    Raises:
        UserError: the second engine is the first, or cannot do what the tasks need.
    """
    spec = plan.spec
    if spec.parity is None:
        return None
    where = f"--parity-engine {spec.parity_engine}"
    if spec.parity_engine == plan.engine.name:
        fix = "Name another engine, or choose the run's with --engine."
        raise UserError(where, "is the engine that the run uses already", fix)
    soft = any(arm.steering.kind == "embeddings" for arm in plan.arms)
    needs = needs_of([task.chosen for task in plan.tasks], embeddings=soft) | {"loglikelihood"}
    needs |= {"loglikelihood_embeds"} if soft else set()
    given = spec.options.get("parity_engine", {})
    if spec.parity_engine == "auto":
        raise UserError(where, "says no engine", "Name one: transformers, vllm.")
    try:
        engine, options, _ = choose_engine(spec.parity_engine, given, plan.model, needs, registry)
    except UserError as error:
        raise UserError(where, error.what, error.fix) from None
    # The run's own type, where its engine has named one.
    dtype = asked_dtype(settle_dtype(plan.model, engine.device(options))[0])
    arms = tuple(
        replace(
            arm,
            model=with_dtype(arm.model, dtype),
            folded=arm.steering.folded(engine, options),
        )
        for arm in plan.arms
    )
    return replace(plan, engine=engine, engine_options=options, arms=arms)


class Parity:
    """Measures one run against a second engine, and writes ``parity.json``."""

    def __init__(self, run: EvalSession, second: EvalPlan) -> None:
        self._run, self._second = run, second
        self._units = run.units
        assert run.plan.spec.parity is not None
        self._count = run.plan.spec.parity
        plans = (run.plan, second)
        self._ends: dict[str, list[int]] = {}
        self._identities = tuple(plan.engine.identity(plan.engine_options) for plan in plans)

    def carry_out(self) -> None:
        """Ask the second engine, and the first about its own answers; nothing where that was done before."""
        run, key = self._run, self._key()
        if self._recorded() == key:
            run.reporter.note("parity was measured before")
            return
        items = [item for unit in self._units for item in self._items(unit)]
        lacking = self._lacking()
        if "loglikelihood" not in lacking:
            for item in items:
                # Virtual tokens stand in its prompt, and the first engine may only generate under them.
                if item.request.control_at is None or "loglikelihood_embeds" not in lacking:
                    item.probe = probe_of(item.request, item.first)
            self._ask_first([item for item in items if item.probe is not None])
        self._ask_second(items)
        bound = _bound(run.plan.model)
        by_unit: dict[str, list[_Item]] = {}
        for item in items:
            by_unit.setdefault(item.unit.id, []).append(item)
        record = ParityRecord(
            key=key,
            samples=self._count,
            engines=(run.plan.engine.name, self._second.engine.name),
            identities=(self._identities[0], self._identities[1]),
            bound=bound,
            tasks=tuple(_tally(unit, own, bound) for unit in self._units if (own := by_unit.get(unit.id))),
        )
        write_json(run.store.parity_file, record.model_dump(mode="json"))
        run.reporter.note(record.summary())

    def _key(self) -> str:
        return digest_of([[unit.id for unit in self._units], self._count, list(self._identities)])

    def _recorded(self) -> str | None:
        try:
            return str(read_json(self._run.store.parity_file)["key"])
        except (CorruptionError, FileNotFoundError, KeyError, TypeError):
            return None

    def _lacking(self) -> dict[str, str]:
        plan = self._run.plan
        return plan.engine.capabilities(plan.model, plan.engine_options).lacks(
            ["loglikelihood", "loglikelihood_embeds"]
        )

    def _items(self, unit: Unit) -> list[_Item]:
        """The chosen samples of one unit with the answers that are stored; none where it failed."""
        folder = self._run.folder(unit)
        status = folder.status()
        if status is None or status.status != "done":
            return []
        opened = self._run.opened(unit)
        answered = ask.load_answers(opened.samples, Journal(folder.artifact / ANSWERS_FILE))
        self._run.forget(unit)
        if answered is None:
            return []
        outputs = {answer.sample_id: answer.outputs for answer in answered.answers}
        return [
            _Item(unit, sample.id, request, outputs[sample.id][index])
            for sample in choose(opened.samples, self._count)
            for index, request in enumerate(sample.requests)
        ]

    def _groups(self, plan: EvalPlan, items: Sequence[_Item]) -> Iterator[tuple[Loaded, list[_Item]]]:
        """What one engine serves at once, opened on demand and closed after it."""
        asked = {item.unit.id for item in items}
        for group in groups_of(plan, [unit for unit in self._units if unit.id in asked]):
            loaded = Loaded(self._run, plan, group)
            names = {arm.name for arm in group.arms}
            try:
                yield loaded, [item for item in items if item.unit.arm.name in names]
            finally:
                loaded.close()

    def _ask_first(self, items: Sequence[_Item]) -> None:
        """What the run's own engine says of its generated answers."""
        for loaded, own in self._groups(self._run.plan, items):
            for item, output in zip(own, _ask(loaded, [(item, item.probe) for item in own]), strict=True):
                item.probed.append(output)

    def _ask_second(self, items: Sequence[_Item]) -> None:
        """The same questions, the same answers, and what weighs the turns where answers part."""
        for loaded, own in self._groups(self._second, items):
            for item, output in zip(own, _ask(loaded, [(item, item.request) for item in own]), strict=True):
                item.second = output
            probed = [item for item in own if item.probed]
            for item, output in zip(probed, _ask(loaded, [(item, item.probe) for item in probed]), strict=True):
                item.probed.append(output)
            parted = [(item, turn) for item in own if item.generated and (turn := self._turn(item)) is not None]
            asked = [(item, request) for item, turn in parted for request in (*turn.first, *turn.second)]
            outputs = iter(_ask(loaded, asked))
            for item, turn in parted:
                item.turn = [next(outputs) for _ in turn.first], [next(outputs) for _ in turn.second]

    def _turn(self, item: _Item) -> Turn | None:
        model = item.unit.arm.model
        if model.path not in self._ends:
            self._ends[model.path] = end_tokens(model)
        return turn_of(item.request, item.first, item.second, self._ends[model.path])


def _ask(loaded: Loaded, asked: Sequence[tuple[_Item, Request | None]]) -> list[Output]:
    requests = [loaded.sender(item.unit.arm)(request) for item, request in asked if request is not None]
    return ask.ask(loaded.session(), requests) if requests else []


def _tally(unit: Unit, items: Sequence[_Item], bound: Bound) -> TaskParity:
    samples = len({item.sample for item in items})
    tally = Tally(unit.arm.name, unit.task.name, unit.task.variant, samples, bound)
    for item in items:
        if item.request.kind == "loglikelihood":
            tally.logprobs(item.first, item.second, len(item.request.continuation_ids))
            continue
        if item.generated:
            tally.answers(item.first, item.second)
        if item.turn is not None:
            tally.turn(*item.turn)
        if item.probe is not None and item.probed:
            tally.logprobs(item.probed[0], item.probed[1], len(item.probe.continuation_ids))
    return tally.result()


def _bound(model: ModelInfo) -> Bound:
    asked = asked_dtype(model)
    return FULL if (model.dtype if asked == "auto" else asked) == "float32" else LOW
