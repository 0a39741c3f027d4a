"""Carries out one order of an evaluation: answers of some units, scores of some steps, or the parity of two engines.

Where the run itself is, with the objects that are open there; elsewhere the same is planned again from the spec, and
refused if that gives other steps. Everything is left on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from harness.contracts.executor import Needs, Order, WorkerContext
from harness.contracts.registry import Registry, load_plugins
from harness.core.errors import HarnessError, UserError
from harness.core.machine import torch_device
from harness.core.records import digest_of
from harness.core.specs import EvalSpec
from harness.evaluation.answers import Answering
from harness.evaluation.ask import Answered
from harness.evaluation.load import Group, group_of, groups_of, remove_scratch
from harness.evaluation.parity_run import Parity, second_plan
from harness.evaluation.plan import EvalPlan, ScorerPlan, plan_eval
from harness.evaluation.scores import Scoring, score_all
from harness.evaluation.session import EvalSession, Unit
from harness.steps.execute import Job, refuse_unplanned
from harness.steps.folder import StepFolder
from harness.steps.orders import failure_of
from harness.steps.step import Step
from harness.steps.store import RunStore
from harness.tasks.catalog import load_catalog

Part = Literal["answers", "scores", "parity"]
PARITY = "parity"


class EvalWorker:
    """Carries out the orders of one run in one process, with what is open there."""

    def __init__(
        self,
        session: EvalSession,
        broken: Mapping[str, Exception] | None = None,
        answered: dict[str, Answered] | None = None,
    ) -> None:
        """Prepare.

        Args:
            session: of the run.
            broken: why some units' tasks cannot be opened; found out for every order where it is not given.
            answered: answers of before that are at hand, by the id of their step.
        """
        self.session, self._broken = session, broken
        self._answered: dict[str, Answered] = answered if answered is not None else {}

    def carry_out(self, order: Order, context: WorkerContext) -> None:
        """Carry out an order; what fails of it is in the session's runner, and on disk."""
        session = self.session
        part: Part = order.spec["part"]
        session.scratch = session.store.scratch / order.id
        try:
            if part == "answers":
                self._answer(group_of(units_of(session, order.keys)))
            elif part == "scores":
                score_all([(Scoring(session, self._answered), units_of(session, order.keys))], order.keys)
            else:
                self._measure()
        finally:
            remove_scratch(session.scratch)

    def _answer(self, group: Group) -> None:
        broken = self._broken
        if broken is None:
            found = {unit.id: self.session.unopenable(unit) for unit in group.units}
            broken = {key: error for key, error in found.items() if error is not None}
        answering = Answering(self.session, group, broken)
        answering.carry_out()
        self._answered.update(answering.answered)

    def _measure(self) -> None:
        """What fails here takes no score with it."""
        session = self.session
        second = second_plan(session.plan, session.registry)
        assert second is not None
        try:
            Parity(session, second).carry_out()
        except HarnessError as error:
            session.runner.failures[PARITY] = str(error)
            session.reporter.note(f"failed: parity: {error}")


def units_of(session: EvalSession, keys: Sequence[str]) -> list[Unit]:
    """The units that some steps belong to, each with those of its scores steps that are asked for."""
    asked = set(keys)
    found = []
    for unit in session.units:
        scores = tuple(step for step in unit.task.scores if step.id in asked)
        if unit.id in asked or scores:
            found.append(unit if unit.id in asked else replace(unit, task=replace(unit.task, scores=scores)))
    return found


# ------------------------------------------------------------------------------------------------------------- orders


def jobs_of(session: EvalSession, pending: Sequence[Unit], unanswered: Sequence[Unit], workers: int) -> Iterator[Job]:
    """What is to be carried out: answers by what one open engine serves; scores, one order per scorer; parity, last."""
    spec = session.plan.spec.model_dump(mode="json")
    common = {
        "worker": "harness.evaluation.worker",
        "run": str(session.store.root.absolute()),
        "plugins": session.registry.loose_files,
        "folder": str(Path.cwd()),
    }
    engine, options = session.plan.engine, session.plan.engine_options
    devices = engine.devices(options)
    # On an accelerator weights take little of the machine's own memory.
    needs = Needs(devices=devices, memory=0 if devices or engine.remote else session.plan.model.size_bytes)
    answered_by: dict[str, str] = {}
    for number, group in enumerate(groups_of(session.plan, unanswered, workers), start=1):
        keys = tuple(unit.id for unit in group.units)
        order = Order(id=f"answers-{number}", keys=keys, spec={"eval": spec, "part": "answers"}, needs=needs, **common)
        answered_by.update(dict.fromkeys(keys, order.id))
        yield Job(order)
    # What one scorer has open, or is told by a judge, serves all its tasks: they stay together.
    scorers: dict[str, tuple[ScorerPlan, list[tuple[Unit, str]]]] = {}
    for unit in pending:
        for plan in unit.task.scores:
            scorers.setdefault(plan.scorer.key, (plan.scorer, []))[1].append((unit, plan.id))
    scored: list[str] = []
    before_it: dict[str, str] = {}
    for number, (scorer, steps) in enumerate(sorted(scorers.values(), key=lambda one: _opens(one[0])), start=1):
        order = Order(
            id=f"scores-{number}-{scorer.plugin.name}",
            keys=tuple(step for _, step in steps),
            spec={"eval": spec, "part": "scores"},
            needs=Needs(devices=int(_opens(scorer) and torch_device() == "cuda")),
            **common,
        )
        scored.append(order.id)
        # Scorers of one plugin may share a judge's journal, which two processes must not write.
        last = before_it.get(scorer.plugin.name)
        before_it[scorer.plugin.name] = order.id
        after = {answered_by[unit.id] for unit, _ in steps if unit.id in answered_by}
        yield Job(order, frozenset(after | ({last} if last is not None else set())))
    if session.plan.spec.parity is not None:
        before = frozenset(answered_by.values()).union(scored)
        yield Job(Order(id=PARITY, spec={"eval": spec, "part": PARITY}, needs=needs, **common), before)


def _opens(scorer: ScorerPlan) -> bool:
    """Whether it opens a model: those that do come after those that do not."""
    return scorer.plugin.needs(scorer.config) in ("classifier", "engine")


def unfinished(session: EvalSession, order: Order, finished: set[str]) -> Iterator[tuple[Step, StepFolder]]:
    """The steps of an order that have not ended, as far as they could: without answers there is nothing to score."""
    for unit in units_of(session, order.keys):
        if order.spec["part"] == "answers":
            steps = [(unit.task.answers, session.folder(unit))]
        else:
            answered = session.folder(unit).status()
            done = answered is not None and answered.status == "done"
            steps = [(step.step, session.scores_folder(unit, step)) for step in unit.task.scores] if done else []
        for step, folder in steps:
            status = folder.status()
            if status is None or (status.status == "failed" and step.id not in finished):
                yield step, folder


# ---------------------------------------------------------------------------------------- in a process of another sort

_OPEN: dict[str, EvalWorker] = {}
"""What this process has planned last: the orders of one run share plan, questions and tokenizers."""


def carry_out(order: Order, context: WorkerContext) -> dict[str, Any]:
    """Carry out an order in a worker's process; returns the failures of its steps, and the time that it took.

    Raises:
        UserError: other steps are planned here than were asked for, or none can be.
    """
    try:
        worker = _planned(order, context)
    except UserError as error:
        # Where the run is, it could be planned.
        where = f"executor, order {order.id}"
        what = f"cannot be planned where it is carried out: {error.where}: {error.what}"
        raise UserError(where, what, f"{error.fix} Or --in-process.") from None
    session = worker.session
    refuse_unplanned(order, _ids(session.plan))
    session.report_to(context.reporter, context.observers)
    before = dict(session.seconds)
    worker.carry_out(order, context)
    last = session.runner.last_error
    return {
        "failures": dict(session.runner.failures),
        "error": failure_of(last).model_dump(mode="json") if last is not None else None,
        "seconds": {name: value - before[name] for name, value in session.seconds.items()},
    }


def _planned(order: Order, context: WorkerContext) -> EvalWorker:
    key = digest_of([order.run, order.plugins, order.spec["eval"]])
    if key not in _OPEN:
        _OPEN.clear()
        registry = load_plugins([Path(file) for file in order.plugins])
        plan = _plan(EvalSpec.model_validate(order.spec["eval"]), registry)
        session = EvalSession(plan, registry, RunStore(Path(order.run)), context.reporter, context.observers)
        _OPEN[key] = EvalWorker(session)
    return _OPEN[key]


def _plan(spec: EvalSpec, registry: Registry) -> EvalPlan:
    return plan_eval(spec, registry, load_catalog(registry, spec.task_folders, trust_task_code=spec.trust_task_code))


def _ids(plan: EvalPlan) -> Iterator[str]:
    for task in plan.tasks:
        yield task.answers_id
        yield from (step.id for step in task.scores)
