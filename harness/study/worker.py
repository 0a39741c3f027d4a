"""Carries out one order of a study: makes one arm, asks one model's arms, or scores with one scorer.

Where it is carried out the study is planned again from its file, and refused if that gives other steps. What an order
builds on is found by its records; everything is left on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.alignment.bases import Bases
from harness.contracts.executor import Needs, Order, WorkerContext
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.core.machine import torch_device
from harness.core.records import digest_of
from harness.evaluation.plan import ScorerPlan
from harness.steps.execute import Job, refuse_unplanned
from harness.steps.folder import StepFolder
from harness.steps.step import Step
from harness.steps.store import RunStore
from harness.study.folder import read_index
from harness.study.plan import Promise, StudyPlan, plan_study
from harness.study.run import StudyRun
from harness.study.turns import in_turn, merged_models

_OPEN: dict[str, StudyPlan] = {}
"""What this process has planned last: the orders of one study share it."""
_BASES = Bases(keep=True)
"""The base that the next alignment of this process may find open."""


def jobs_of(plan: StudyPlan, root: Path, at_once: int = 1) -> Iterator[Job]:
    """What is to be carried out, and after what: arms, then what each opened model is asked, then scorer by scorer.

    Merged models come last, one by one: each is made, answered for and let go before the next but ``at_once - 1``.
    """
    common = {
        "worker": "harness.study.worker",
        "run": str(root.absolute()),
        "plugins": plan.registry.loose_files,
        "folder": str(Path.cwd()),
        "spec": plan.read.source,
    }
    cuda = torch_device() == "cuda"
    makes: dict[str, str] = {}
    last = {step.id for name in merged_models(plan) if (step := plan.promises[name].step) is not None}
    merges: list[Job] = []
    for job in _makes(plan, makes, common, cuda):
        if last.isdisjoint(job.order.keys):
            yield job
        else:
            merges.append(job)
    answered: dict[str, str] = {}
    # Evaluation of a merged model -> the order that makes it.
    of_merged: dict[str, Job] = {}
    for job in _answers(plan, makes, answered, common):
        builds = {parent for key in job.order.keys for parent in plan.graph.steps[key].parents}
        made = next((key for key in builds if key in last), None)
        if made is None:
            yield job
        else:
            of_merged[makes[made]] = job
    lanes: list[frozenset[str]] = [frozenset()] * at_once
    for number, job in enumerate(merges):
        waits = frozenset() if "merge" in plan.read.spec.keep else lanes[number % at_once]
        yield Job(job.order, job.after | waits)
        asked = of_merged.get(job.order.id)
        if asked is not None:
            yield asked
        lanes[number % at_once] = frozenset({(asked or job).order.id})
    yield from _scores(plan, answered, common, cuda)


def _makes(plan: StudyPlan, makes: dict[str, str], common: dict[str, Any], cuda: bool) -> Iterator[Job]:
    """Orders that make arms, each noted in ``makes`` by the key of its step."""
    imports = _imports(cuda)
    for step, promise in _made(plan):
        order = f"{step.kind}-{step.arm}" + (f"-{step.id[:8]}" if step.kind == "prepare" else "")
        opens = step.kind == "align" or ("reference" in step.whole and step.whole["reference"] is not None)
        processes = promise.align.spec.processes if step.kind == "align" and promise.align is not None else 1
        devices = processes if cuda and opens else 0
        needs = Needs(devices=devices, memory=promise.model.size_bytes if opens or step.kind == "merge" else 0)
        after = frozenset(makes[parent] for parent in step.parents)
        makes[step.id] = order
        keeps = {"opens": promise.opens, "imports": imports} if opens else {}
        yield Job(Order(id=order, keys=(step.id,), needs=needs, **keeps, **common), after)


def _answers(plan: StudyPlan, makes: dict[str, str], answered: dict[str, str], common: dict[str, Any]) -> Iterator[Job]:
    """Orders that ask one model and all its adapters, each noted in ``answered`` by the keys of its steps."""
    for number, evaluation in enumerate(plan.evaluations, start=1):
        keys = tuple(dict.fromkeys(task.answers.id for task in evaluation.tasks))
        order = f"answers-{number}-{evaluation.model.name}"
        after = frozenset(makes[parent] for key in keys for parent in plan.graph.steps[key].parents)
        devices = evaluation.engine.devices(evaluation.engine_options)
        needs = Needs(devices=devices, memory=evaluation.model.size_bytes)
        answered |= dict.fromkeys(keys, order)
        yield Job(Order(id=order, keys=keys, needs=needs, **common), after)


def _imports(cuda: bool) -> tuple[str, ...]:
    """Modules that training needs and a process can be forked after.

    Where there are CUDA and bitsandbytes, importing peft touches the GPU; then what takes longest of its imports.
    """
    if cuda and find_spec("bitsandbytes") is not None:
        return ("torch", "datasets", "transformers.models.auto.modeling_auto", "sklearn.metrics")
    return ("torch", "datasets", "transformers", "peft", "trl", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer")


def _made(plan: StudyPlan) -> Iterator[tuple[Step, Promise]]:
    """Steps that make arms, and what is prepared for them before the first that needs it; each with its arm."""
    done: set[str] = set()
    for promise in in_turn(plan):
        shared = plan.prepared_by.get(promise.arm.name)
        for step in (shared.step if shared is not None else None, promise.step):
            if step is not None and step.id not in done:
                done.add(step.id)
                yield step, promise


def _scores(plan: StudyPlan, answered: dict[str, str], common: dict[str, Any], cuda: bool) -> Iterator[Job]:
    found: dict[str, tuple[ScorerPlan, dict[str, str]]] = {}
    for evaluation in plan.evaluations:
        for task in evaluation.tasks:
            for scores in task.scores:
                found.setdefault(scores.scorer.key, (scores.scorer, {}))[1][scores.id] = answered[task.answers.id]
    before_it: dict[str, str] = {}
    for number, (scorer, keys) in enumerate(found.values(), start=1):
        opens = scorer.plugin.needs(scorer.config) in ("classifier", "engine")
        order = Order(
            id=f"scores-{number}-{scorer.plugin.name}",
            keys=tuple(keys),
            needs=Needs(devices=int(opens and cuda)),
            **common,
        )
        # Scorers of one plugin may share a judge's journal, which two processes must not write.
        last = before_it.get(scorer.plugin.name)
        before_it[scorer.plugin.name] = order.id
        yield Job(order, frozenset(keys.values()).union({last} if last is not None else ()))


def unfinished(plan: StudyPlan, root: Path, order: Order) -> Iterator[tuple[Step, StepFolder]]:
    """The steps of an order that began and have not ended: its worker crashed."""
    ids = read_index(root)
    for key in order.keys:
        planned = plan.graph.steps[key]
        if key not in ids:
            continue
        for path in (root / "steps").glob(f"{planned.kind}-*-{ids[key][:12]}"):
            folder = StepFolder(path, ids[key], planned.kind, path / "artifact")
            if folder.status() is None:
                yield Step(planned.kind, ids[key], planned.arm, planned.identity, planned.factors), folder


def carry_out(order: Order, context: WorkerContext) -> dict[str, Any]:
    """Carry out an order in a worker's process; returns what failed, and which arms were left out.

    Raises:
        UserError: other steps are planned here than were asked for, or none can be.
    """
    try:
        plan = _planned(order)
    except UserError as error:
        what = f"cannot be planned where it is carried out: {error.where}: {error.what}"
        raise UserError(f"executor, order {order.id}", what, error.fix) from None
    refuse_unplanned(order, plan.graph.steps)
    run = StudyRun(
        plan,
        RunStore(Path(order.run)),
        context.reporter,
        observers=context.observers,
        retry_failed=bool(order.spec.get("retry_failed")),
        only=order.keys,
        bases=_BASES,
    )
    done = run.carry_out()
    return {"failures": done.failures, "left_out": run.left_out}


def _planned(order: Order) -> StudyPlan:
    key = digest_of([order.run, order.plugins, order.spec])
    if key not in _OPEN:
        _OPEN.clear()
        registry = load_plugins([Path(file) for file in order.plugins])
        _OPEN[key] = plan_study(
            Path(order.spec["file"]),
            registry=registry,
            models=order.spec["models"],
            changes=tuple(order.spec["changes"]),
            revisions=order.spec["revisions"],
            chosen=order.spec["chosen"],
            text=order.spec.get("text"),
        )
    return _OPEN[key]
