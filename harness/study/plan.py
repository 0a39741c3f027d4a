"""A study as one graph of steps, known before any has run: no torch, and every base, data set and plugin read once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.alignment.plan import AlignPlan, plan_align
from harness.alignment.prepare import prepare_step, saves_work
from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner
from harness.contracts.merger import Merger
from harness.contracts.registry import Registry, load_plugins
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import EvalSpec, ModelSpec
from harness.core.trackers import check_trackers
from harness.evaluation.arms import Candidate
from harness.evaluation.plan import EvalPlan, plan_arms
from harness.models.chat_templates import with_template_of
from harness.models.inspect import check_template, inspect_adapter, inspect_model
from harness.steps.graph import Graph
from harness.steps.once import Once
from harness.steps.provenance import code_digest, digest_of_bytes
from harness.steps.step import Step, make_step
from harness.study.arms import ARM, Arm, arms_of
from harness.study.cells import Searched, cells_of, with_values
from harness.study.controls import asked_under, check_inputs, refuse_idle
from harness.study.said import said_at
from harness.study.spec import EvaluationBlock, Read, read_study
from harness.tasks.catalog import Catalog, load_catalog

STEP = "step:"
"""Before the key of a step, where an id has the digest of what that step makes."""


@dataclass(frozen=True)
class Promise:
    """What an arm is made of before its step has run: enough to plan what builds on it."""

    arm: Arm
    model: ModelInfo
    """The base, or a merged model."""
    adapter: AdapterInfo | None
    step: Step | None
    """That makes it; None for a base and for an adapter made elsewhere."""
    align: AlignPlan | None = None

    @property
    def candidate(self) -> Candidate:
        """The arm as an evaluation knows it."""
        label = None if self.arm.kind == "base" else self.arm.name
        model = self.model if self.adapter is None else with_template_of(self.model, self.adapter)
        return Candidate(model, self.adapter, label, self.arm.control)

    @property
    def template(self) -> str | None:
        """Chat template that it was trained with, or has."""
        return self.adapter.chat_template if self.adapter is not None else self.model.chat_template

    @property
    def loads(self) -> tuple[str, str]:
        """The base and the digest of the weights that an engine opens for it: arms that share both are asked together.

        Not the digest alone: a study may have one model twice, in two dtypes say.
        """
        return self.arm.base, self.model.weights_digest

    @property
    def opens(self) -> str:
        """What an alignment keeps open for the next: those with the same follow each other. Empty for other arms."""
        if self.align is None or self.arm.kind not in ("align", "search"):
            return ""
        quantises = type(self.align.adapter).quantization is not Adapter.quantization
        return f"{self.arm.base} {self.align.spec.adapter if quantises or self.align.spec.adapter == 'none' else ''}"


@dataclass(frozen=True)
class Preparation:
    """What several arms share, made once before they start: one step that all of them need."""

    step: Step
    arms: tuple[str, ...]
    """Names of the arms that are aligned with it."""


@dataclass
class StudyPlan:
    """Everything that a study will do."""

    read: Read
    registry: Registry
    promises: dict[str, Promise]
    """Arm -> what it is made of, each after those that it builds on."""
    evaluations: list[EvalPlan]
    """One for each model that an engine opens; ids are keys."""
    graph: Graph
    owners: dict[str, str] = field(default_factory=dict)
    """Key of an answers or scores step -> arm."""
    preparations: dict[str, Preparation] = field(default_factory=dict)
    """Key -> what is prepared for two arms and more."""
    searches: dict[str, Searched] = field(default_factory=dict)
    waiting: dict[str, Arm] = field(default_factory=dict)
    """Arms that are planned once a search has chosen."""

    @property
    def to_search(self) -> bool:
        """Whether there are searches that have not chosen and whose cells are known."""
        return any(one.values is None and one.cells for one in self.searches.values())

    def of_searches(self) -> StudyPlan:
        """The cells of searches that have not chosen, with what these are made from, and nothing else."""
        names = {cell for one in self.searches.values() if one.values is None for cell in one.cells}
        for name, promise in reversed(self.promises.items()):
            if name in names:
                names.update(promise.arm.parents)
        found = self.of_arms(names)
        steps = [*found.preparations, *(one.step.id for one in found.promises.values() if one.step is not None)]
        graph = Graph(self.graph.steps[key] for key in steps)
        return replace(found, evaluations=[], graph=graph, owners={}, waiting={})

    def of_arms(self, names: Collection[str]) -> StudyPlan:
        """The same with some of its arms, and what is prepared for them; its graph stays whole."""
        promises = {name: one for name, one in self.promises.items() if name in names}
        shared = {
            key: replace(one, arms=tuple(name for name in one.arms if name in names))
            for key, one in self.preparations.items()
            if any(name in names for name in one.arms)
        }
        return replace(self, promises=promises, preparations=shared)

    @cached_property
    def prepared_by(self) -> dict[str, Preparation]:
        """Arm -> what must be prepared before it is aligned; others prepare their own."""
        return {name: one for one in self.preparations.values() for name in one.arms}

    @property
    def arms(self) -> list[Arm]:
        """Every arm, those that are not planned yet too."""
        return [*(promise.arm for promise in self.promises.values()), *self.waiting.values()]

    def to_json(self) -> dict[str, Any]:
        """plan.json: every step with its key, and no absolute path."""
        return {
            "study": self.read.spec.study,
            "summary": self.read.spec.summary,
            "claims": [claim.model_dump(mode="json") for claim in self.read.spec.claims],
            "arms": [
                {
                    "name": arm.name,
                    "kind": arm.kind,
                    "base": arm.base,
                    "factors": dict(arm.factors),
                    "made_by": promise.step.id if promise.step is not None else None,
                    "from": list(arm.parents),
                }
                for arm, promise in ((one.arm, one) for one in self.promises.values())
                if not arm.cell
            ],
            "evaluations": [plan.to_json() for plan in self.evaluations],
            "steps": [
                {"key": step.id, "kind": step.kind, "arm": step.arm, "parents": list(step.parents)}
                for step in self.graph
            ],
            **({"searches": [one.to_json() for one in self.searches.values()]} if self.searches else {}),
        }


def plan_study(
    file: Path,
    *,
    registry: Registry | None = None,
    models: Mapping[str, str] | None = None,
    changes: tuple[str, ...] = (),
    revisions: Mapping[str, str] | None = None,
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
    text: str | None = None,
) -> StudyPlan:
    """Plan a study: what `harness study plan` does.

    Args:
        file: YAML.
        registry: from ``load_plugins``; by default all installed plugins and those that the study names.
        models: base name -> folder or hub id to take in place of the file's.
        changes: ``KEY=VALUE`` over keys of the file.
        revisions: hub id of a data set -> commit, over the file's.
        chosen: what the study's searches have chosen so far (:func:`harness.study.searched.read_choices`).
        text: what the file would hold, of a study that a command has written.

    Raises:
        UserError: with file, line and key, whatever must be mended before anything runs.
    """
    read = read_study(file, models=models, changes=changes, revisions=revisions, text=text)
    read.source["chosen"] = dict(chosen or {})
    registry = registry or load_plugins(read.spec.plugins)
    return Planner(read, registry).plan()


class Planner:
    """Plans the arms of one study, with promises of what is not there, or with what is."""

    def __init__(self, read: Read, registry: Registry) -> None:
        self.read, self.registry, self.once = read, registry, Once()
        evaluation = read.spec.evaluation
        self.catalog: Catalog | None = None
        """What can be asked; None: nothing is."""
        if evaluation is not None:
            trusted = evaluation.trust_task_code
            self.catalog = load_catalog(registry, evaluation.task_folders, trust_task_code=trusted)

    def plan(self) -> StudyPlan:
        """Every arm, every evaluation, one graph."""
        self._check_names()
        check_trackers(self.read.spec.trackers, self.read.where("trackers"))
        promises: dict[str, Promise] = {}
        searches: dict[str, Searched] = {}
        waiting: dict[str, Arm] = {}
        arms = arms_of(self.read)
        for arm in arms:
            with said_at(self.read, arm.place, arm.base):
                if not waiting.keys().isdisjoint(arm.parents):
                    waiting[arm.name] = arm
                    if arm.search is not None:
                        searches.setdefault(arm.search, Searched(arm.search)).arms.append(arm.name)
                    continue
                if arm.search is not None:
                    if arm.search not in searches:
                        searches[arm.search] = self._search(arm, arms, promises)
                    search = searches[arm.search]
                    search.arms.append(arm.name)
                    if search.values is None:
                        waiting[arm.name] = arm
                        continue
                    assert arm.align is not None
                    arm = replace(arm, align=with_values(arm.align, search.values))
                promises[arm.name] = promise = self.promise(arm, promises)
                for one in asked_under(promise, self.read):
                    if one.name in promises:
                        what = f"a second arm of the name {one.name!r}"
                        raise UserError(one.where, what, "Give the other a `name`.")
                    promises[arm.name] = replace(promise, arm=replace(arm, steered=True))
                    promises[one.name] = replace(promise, arm=one)
        if not waiting:
            refuse_idle(self.read, (one.arm for one in promises.values()))
        preparations = _preparations(promises)
        evaluations = self.evaluations(promises)
        graph = Graph(one.step for one in preparations.values())
        for step in (one.step for one in promises.values() if one.step is not None):
            graph.add(step)
        owned = _add_evaluations(graph, promises, evaluations)
        return StudyPlan(self.read, self.registry, promises, evaluations, graph, owned, preparations, searches, waiting)

    def _search(self, arm: Arm, arms: Sequence[Arm], promises: dict[str, Promise]) -> Searched:
        """Promise the cells of the search that decides an arm's recipe; what it has chosen, if it was among these."""
        assert arm.search is not None
        search, keys = Searched(arm.search), []
        for cell, values in cells_of(arm, arms, self.read, self.registry):
            promises[cell.name] = promise = self.promise(cell, promises)
            assert promise.step is not None and promise.align is not None
            if promise.align.recipe.eval_rows == 0:
                what = "0 held-out rows: there is nothing to choose by"
                raise UserError(self.read.where_set(arm.place, ["eval_rows"]), what, "Give some, or leave it out.")
            search.cells[cell.name] = values
            keys.append(promise.step.id)
        known = self.read.source["chosen"].get(arm.search)
        if known is not None and known["cells"] == keys and known["values"] in search.cells.values():
            search.values = dict(known["values"])
        return search

    def _check_names(self) -> None:
        """Methods and adapters of grids, before merges are found to have no inputs because of one misspelt."""
        for n, block in enumerate(self.read.spec.grid):
            with said_at(self.read, ("grid", n)):
                for name in block.method:
                    self.registry.registered(Aligner, name, "METHOD")
                for name in block.adapter:
                    self.registry.registered(Adapter, name, "--adapter")

    def base(self, arm: Arm) -> ModelInfo:
        """The base of an arm, under the name that the study gives it."""
        given = self.read.spec.bases[arm.base]
        info = self.once(inspect_model, ModelSpec(**given.model_dump(exclude={"template"})))
        return info.model_copy(update={"name": arm.base})

    def promise(self, arm: Arm, made: Mapping[str, Promise]) -> Promise:
        """What an arm will be made of; its digest is the key of the step that makes it."""
        base = self.base(arm)
        if arm.kind == "base":
            return Promise(arm, base, None, None)
        if arm.adapter is not None:
            mismatch = self.read.spec.bases[arm.base].allow_template_mismatch
            found = self.once(inspect_adapter, arm.adapter, base, allow_template_mismatch=mismatch, conditioned=True)
            found = found.model_copy(update={"name": arm.name})
            return Promise(arm, base, found, None)
        if arm.checkpoint is not None:
            whole = made[arm.parents[0]]
            assert whole.adapter is not None
            digest = f"{whole.adapter.digest}/step-{arm.checkpoint}"
            adapter = whole.adapter.model_copy(update={"name": arm.name, "digest": digest})
            return Promise(arm, base, adapter, whole.step, whole.align)
        if arm.align is not None:
            return self._aligned(arm, base, made)
        return self._merged(arm, base, made)

    def align(self, arm: Arm, made: Mapping[str, AdapterInfo]) -> AlignPlan:
        """The alignment that makes an arm; ``made`` has what it goes on from, by arm."""
        assert arm.align is not None
        return plan_align(
            arm.align, self.registry, made={f"{ARM}{name}": info for name, info in made.items()}, once=self.once
        )

    def _aligned(self, arm: Arm, base: ModelInfo, made: Mapping[str, Promise]) -> Promise:
        starts = {name: made[name].adapter for name in arm.parents}
        plan = self.align(arm, {name: info for name, info in starts.items() if info is not None})
        needs = tuple(step.id for name in arm.parents if (step := made[name].step) is not None)
        step = replace(plan.step, arm=arm.name, factors=dict(arm.factors), parents=needs)
        if plan.spec.adapter == "none":
            return Promise(arm, self._model(base, step, plan.template.source), None, step, plan)
        check_template(arm.name, plan.template.source, base, allowed=plan.spec.model.allow_template_mismatch)
        rank = getattr(plan.adapter_options, "rank", 0)
        grown = rank + (plan.start.rank if plan.start is not None else 0)
        config = {"peft_type": "LORA", "r": grown, "use_dora": getattr(plan.adapter_options, "dora", False)}
        return Promise(arm, base, self._adapter(arm, step, grown, plan.template.source, config), step, plan)

    def _adapter(self, arm: Arm, step: Step, rank: int, template: str | None, config: dict[str, Any]) -> AdapterInfo:
        return AdapterInfo(
            ref=arm.name,
            path="",
            name=arm.name,
            digest=f"{STEP}{step.id}",
            rank=rank,
            config=config,
            chat_template=template,
        )

    def _model(self, base: ModelInfo, step: Step, template: str | None) -> ModelInfo:
        digest = self.once(_template_digest, template) if template is not None else base.template_digest
        told = {"weights_digest": f"{STEP}{step.id}", "chat_template": template or base.chat_template}
        return base.model_copy(update={**told, "template_digest": digest})

    def _merged(self, arm: Arm, base: ModelInfo, made: Mapping[str, Promise]) -> Promise:
        """A merge before its inputs are there: their tensors are not known, but what decides them is."""
        assert arm.merge is not None
        entry = self.registry.registered(Merger, arm.merge.method, "method")
        config = self.once(parse_options, type(entry.plugin).Config, arm.merge.options, "set")
        inputs = [made[name] for name in arm.parents]
        controls = check_inputs(arm, inputs, self.read)
        identity = {
            "method": arm.merge.method,
            "options": config.model_dump(mode="json"),
            "base": self.once(base.identity),
            "inputs": [one.adapter.digest if one.adapter is not None else one.model.weights_digest for one in inputs],
            "weights": [one.weight for one in arm.merge.inputs],
            **({"controls": list(controls)} if any(controls) else {}),
            **arm.merge.model_dump(mode="json", include={"seed", "dtype", "form", "rank"}),
            "code": self.once(code_digest, entry),
        }
        needs = tuple(dict.fromkeys(one.step.id for one in inputs if one.step is not None))
        step = make_step("merge", identity, arm=arm.name, factors=arm.factors, parents=needs)
        template = next((found for one in inputs if (found := one.template) is not None), None)
        if arm.merge.form == "adapter":
            rank = arm.merge.rank or sum(one.adapter.rank for one in inputs if one.adapter is not None)
            adapter = self._adapter(arm, step, rank, template, {"peft_type": "LORA", "r": rank})
            return Promise(arm, base, adapter, step)
        return Promise(arm, self._model(base, step, template if base.chat_template is None else None), None, step)

    def evaluations(self, promises: Mapping[str, Promise]) -> list[EvalPlan]:
        """One evaluation for each model that an engine opens: a base with its adapters, or a merged model."""
        if (asked := self.read.spec.evaluation) is None or self.catalog is None:
            return []
        together: dict[tuple[str, str], list[Promise]] = {}
        for promise in promises.values():
            if not promise.arm.is_asked:
                continue
            together.setdefault(promise.loads, []).append(promise)
        return [self._evaluation(group, asked, self.catalog) for group in together.values()]

    def _evaluation(self, group: list[Promise], asked: EvaluationBlock, catalog: Catalog) -> EvalPlan:
        base = self.read.spec.bases[group[0].arm.base]
        spec = EvalSpec(
            model=ModelSpec(**base.model_dump(exclude={"template"})),
            data_revisions=self.read.spec.data_revisions,
            options=asked.set,
            # Which values arms are asked under, their names say.
            **asked.model_dump(exclude={"set", "control"}),
        )
        with said_at(self.read, ("evaluation",), group[0].arm.base):
            return plan_arms(
                spec, group[0].model, lambda _: [one.candidate for one in group], self.registry, catalog, self.once
            )


def _preparations(promises: dict[str, Promise]) -> dict[str, Preparation]:
    """What two alignments and more share, by key; the steps of those then wait for it. Their ids do not change."""
    shared: dict[str, tuple[Step, dict[str, list[str]]]] = {}
    for name, promise in promises.items():
        if promise.arm.kind in ("align", "search") and promise.align is not None and saves_work(promise.align):
            assert promise.step is not None
            step = prepare_step(promise.align.of_arm(name, promise.step.factors))
            # Rows alone do not hang on what the arms go on from.
            step = replace(step, parents=promise.step.parents if "from" in step.made_from else ())
            shared.setdefault(step.id, (step, {}))[1].setdefault(promise.step.id, []).append(name)
    found = {}
    for key, (step, aligns) in shared.items():
        if len(aligns) < 2:
            continue
        names = [name for some in aligns.values() for name in some]
        found[key] = Preparation(step, tuple(names))
        for name, promise in promises.items():
            if promise.step is not None and promise.step.id in aligns:
                needs = (key, *promise.step.parents)
                promises[name] = replace(promise, step=replace(promise.step, parents=needs))
    return found


def _add_evaluations(graph: Graph, promises: Mapping[str, Promise], evaluations: Sequence[EvalPlan]) -> dict[str, str]:
    """Add what is asked and scored after what makes the arms; returns key of a step -> arm."""
    makers = {one.candidate.name: one.step.id for one in promises.values() if one.step is not None}
    owners = {one.candidate.name: one.arm.name for one in promises.values()}
    owned: dict[str, str] = {}
    for plan in evaluations:
        for row in plan.arms:
            needs = (makers[row.name],) if row.name in makers else ()
            for task in row.tasks:
                graph.add(replace(task.answers, parents=needs))
                owned[task.answers.id] = owners.get(row.name, row.model.name)
                for scores in task.scores:
                    graph.add(scores.step)
                    owned[scores.id] = owned[task.answers.id]
    return owned


def _template_digest(template: str) -> str:
    return digest_of_bytes(template.encode())
