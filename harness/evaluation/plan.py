"""An evaluation as frozen steps with content ids. Reads files and loads nothing: no torch, no transformers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from harness.contracts.dataset import Dataset
from harness.contracts.engine import Engine
from harness.contracts.registry import Registered, Registry
from harness.contracts.scorer import Scorer
from harness.core.config import C, Config, parse_options
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo, digest_of
from harness.core.secrecy import refuse_within
from harness.core.specs import EvalSpec, PromptKind, ScorerRef, TaskSpec
from harness.data.hub import OtherRevisionError, read_all, resolve_revision
from harness.evaluation.arms import Candidate, find_arms
from harness.evaluation.control import Steering
from harness.evaluation.engines import choose_engine, conversations_only, needs_of, refuse_unspeakable
from harness.evaluation.judges import AskedOf, refuse_equal_judges, scorers_of
from harness.models.generation_config import generation_identity
from harness.models.inspect import inspect_model
from harness.models.locate import is_url
from harness.models.precision import asked_dtype, settle_dtype, with_dtype
from harness.steps.once import Once
from harness.steps.provenance import code_digest
from harness.steps.step import Step, make_step, without_paths
from harness.tasks.catalog import Catalog, Chosen, code_of
from harness.tasks.questions import dataset_of, resolve_variant

LM_EVAL_SCORER = "lm_eval"
LATER = {"leaf": None, "cluster": None, "subset": "first", "generation_prompt": True, "decoding_of": "task"}
"""Fields that a task got after its steps had ids, with what they stand for when absent: then they are no part of it."""


@dataclass(frozen=True)
class ScorerPlan:
    """One scorer with its options: opened once for all tasks and arms that it scores."""

    key: str
    """Digest of its name and all of its options, also of those that move no number."""
    plugin: Scorer
    config: Config


@dataclass(frozen=True)
class ScoresPlan:
    """One scorer over one task's answers."""

    step: Step
    ref: ScorerRef
    scorer: ScorerPlan
    asked: AskedOf | None = None
    """Of a task that names judges or wordings: which of them; None for a scorer that asks as it always does."""

    @property
    def id(self) -> str:
        """Id of the scores step."""
        return self.step.id


@dataclass(frozen=True)
class TaskPlan:
    """One task: its answers step and the scores steps on it."""

    chosen: Chosen
    variant: PromptKind
    template: str | None
    """Digest of the chat template that its prompts are written in; None: raw, or an endpoint's own."""
    answers: Step
    scores: tuple[ScoresPlan, ...]

    @property
    def answers_id(self) -> str:
        """Id of the answers step."""
        return self.answers.id

    @property
    def name(self) -> str:
        """The task's name, without variant."""
        return self.chosen.spec.name


@dataclass(frozen=True)
class ArmPlan:
    """One arm: the base, or the base under an adapter, and its tasks."""

    name: str
    """What folders and tables call it."""
    model: ModelInfo
    """With the chat template that its prompts are written in."""
    adapter: AdapterInfo | None
    label: str | None
    """The adapter's name, unique in its run: what the engine is asked for and rows carry."""
    template_of: str | None
    """Of the base, asked in a chat template that it does not have: label of an arm that brings it."""
    control: str | None
    """Of the conditioning that the arm was trained with; None: it has none."""
    folded: str | None
    """Why the engine cannot serve the adapter, which is then folded into a temporary checkpoint."""
    tasks: tuple[TaskPlan, ...]

    @cached_property
    def steering(self) -> Steering:
        """Its adapter and control, and what an engine is asked for."""
        return Steering(self.model, self.adapter, self.label, self.control)

    @cached_property
    def served(self) -> AdapterInfo | None:
        """What an engine has open for it beside the base."""
        return self.steering.served

    @property
    def said_control(self) -> str | None:
        """What rows and plans say of its control."""
        found = self.steering.conditioning
        if found is None or self.control is None:
            return None
        default = ", the default of its conditioning" if self.control == found.default else ""
        return f"under control {self.control}{default} ({self.steering.kind}, {found.position})"


@dataclass(frozen=True)
class EvalPlan:
    """Everything one evaluation will do."""

    spec: EvalSpec
    model: ModelInfo
    engine: Engine
    engine_options: Any
    engine_reason: str
    arms: tuple[ArmPlan, ...]
    dtype_note: str | None = None
    """Why the weights are in a type that a reader would not expect."""

    @property
    def arm(self) -> str:
        """Short name of what is evaluated."""
        if len(self.arms) == 1:
            return self.arms[0].name
        return f"{self.model.name}+{sum(arm.adapter is not None for arm in self.arms)}-adapters"

    @property
    def tasks(self) -> tuple[TaskPlan, ...]:
        """The tasks of all arms."""
        return tuple(task for arm in self.arms for task in arm.tasks)

    def to_json(self) -> dict[str, Any]:
        """plan.json: no absolute path, so that the run can be moved or published."""
        only = self.arms[0] if len(self.arms) == 1 else None
        spec = self.spec.model_dump(mode="json")
        spec["model"]["model"] = self.model.name if not is_url(self.model.ref) else self.model.ref
        spec["model"]["adapter"] = only.adapter.name if only is not None and only.adapter is not None else None
        spec["adapters"] = [arm.label for arm in self.arms if arm.label is not None] if only is None else []
        spec["task_folders"] = [folder.rstrip("/").rsplit("/", 1)[-1] for folder in spec["task_folders"]]
        keep = "name revision architecture max_length weights_digest tokenizer_digest template_digest"
        keep += " size_bytes dtype spec"
        model = only.model if only is not None else self.model
        return {
            "spec": without_paths(spec),
            "arm": self.arm,
            "model": model.model_dump(mode="json", include=set(keep.split())),
            "adapter": _adapter_json(only.adapter) if only is not None else None,
            "engine": {
                "name": self.engine.name,
                "reason": self.engine_reason,
                "options": without_paths(self.engine_options.model_dump(mode="json")),
            },
            "arms": [
                {
                    "name": arm.name,
                    "label": arm.label,
                    "adapter": _adapter_json(arm.adapter),
                    "template_digest": arm.model.template_digest,
                    "template_of": arm.template_of,
                    "folded": arm.folded,
                    **({"control": arm.control, "under": arm.said_control} if arm.control is not None else {}),
                }
                for arm in self.arms
            ],
            "tasks": [{"arm": arm.name, **_task_json(task)} for arm in self.arms for task in arm.tasks],
        }


def _adapter_json(adapter: AdapterInfo | None) -> dict[str, Any] | None:
    return adapter.model_dump(mode="json", include={"name", "digest", "rank"}) if adapter is not None else None


def _task_json(task: TaskPlan) -> dict[str, Any]:
    return {
        "task": task.name,
        "variant": task.variant,
        "template": task.template,
        "version": task.chosen.spec.version,
        "summary": task.chosen.spec.summary,
        "source": task.chosen.spec.source,
        "licence": task.chosen.spec.licence,
        "notes": list(task.chosen.spec.notes),
        "limit": task.chosen.limit,
        "answers": task.answers_id,
        "scores": [step.id for step in task.scores],
        **({"judged": judged} if (judged := _judged(task)) else {}),
    }


def _judged(task: TaskPlan) -> list[dict[str, Any]]:
    """Who is asked in which step: the first is the one that counts."""
    return [
        {"scores": one.id, "scorer": one.ref.name, "judge": one.asked.judge, "wording": one.asked.wording}
        for one in task.scores
        if one.asked is not None
    ]


def plan_eval(spec: EvalSpec, registry: Registry, catalog: Catalog) -> EvalPlan:
    """Resolve names, check everything that can be checked without loading, and give every step its id.

    A step's id holds what can move its numbers and nothing of the other arms: it is the same alone and in company.

    Raises:
        UserError: whatever the user must mend before anything runs.
    """
    model = inspect_model(spec.model, conditioned=True)
    return plan_arms(spec, model, partial(find_arms, spec), registry, catalog)


def plan_arms(
    spec: EvalSpec,
    model: ModelInfo,
    find: Callable[[ModelInfo], Sequence[Candidate]],
    registry: Registry,
    catalog: Catalog,
    once: Once | None = None,
) -> EvalPlan:
    """As :func:`plan_eval`, for a model and arms that are known, or promised: then ids are keys.

    Args:
        spec: what is asked; which model and adapters it names is passed over.
        model: the base, or a merged model.
        find: gives its arms, once it is known that all else is right.
        registry: of plugins.
        catalog: of tasks.
        once: shared by the plans of one study.

    Raises:
        UserError: whatever the user must mend before anything runs.
    """
    once = once or Once()
    refuse_within(spec.options, "--set ")
    talks = conversations_only(spec.engine, spec.options.get("engine", {}), model, registry)
    chosen = once(catalog.choose, spec.tasks, spec.suite, spec.limit, spec.options, conversations=talks)
    if talks:
        refuse_unspeakable(chosen)
    candidates = [one.conditioned() for one in find(model)]
    engine, options, reason = choose_engine(
        spec.engine,
        spec.options.get("engine", {}),
        model,
        needs_of(chosen, embeddings=any(map(_is_soft, candidates))),
        registry,
        adapters=any(one.adapter is not None for one in candidates),
    )
    settled, options = engine.settle(model, options)
    if settled is not model:  # a remote engine, which has learnt tokenizer and template elsewhere
        candidates = [replace(one, model=settled) for one in candidates]
    settled, note = settle_dtype(settled, engine.device(options))
    # From here on nobody needs to know that it was `auto`: asked for by name it is the same evaluation.
    dtype = asked_dtype(settled)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})
    candidates = [replace(one, model=with_dtype(one.model, dtype)) for one in candidates]
    planner = _Planner(spec, registry, engine, options, chosen, once)
    return EvalPlan(spec, settled, engine, options, reason, tuple(planner.arms(candidates)), note)


def _is_soft(one: Candidate) -> bool:
    """Whether virtual tokens stand for its control: those an engine has to put in."""
    return Steering(one.model, one.adapter, one.label, one.control).kind == "embeddings"


_Asked = tuple[Chosen, dict[str, Any], dict[str, Any]]
"""A task, what of it decides its questions, and what pins its data."""


class _Planner:
    """Gives arms their steps; what all arms have in common is found out once."""

    def __init__(
        self,
        spec: EvalSpec,
        registry: Registry,
        engine: Engine,
        options: Any,
        chosen: Sequence[Chosen],
        once: Once,
    ) -> None:
        self._spec, self._registry, self._engine, self._options, self._once = spec, registry, engine, options, once
        self._settings: dict[tuple[str, bool], dict[str, Any]] = {}
        self._chosen = once(_pinned, chosen, spec.data_revisions, registry)
        self._shared = {
            "engine": engine.identity(options),
            "dtype": spec.model.dtype,
            "engine_code": once(code_digest, registry.registered(Engine, engine.name, "--engine")),
            "seed": spec.seed,
        }

    def arms(self, candidates: Sequence[Candidate]) -> Iterator[ArmPlan]:
        """Every arm; a base beside others is asked each task exactly as they are."""
        adapted = [one for one in candidates if one.adapter is not None]
        for one in candidates:
            if one.adapter is None and adapted:
                yield from self._base(one, adapted)
            else:
                yield self._arm(one, self._chosen)

    def _base(self, base: Candidate, adapted: Sequence[Candidate]) -> Iterator[ArmPlan]:
        """The base as it is alone, where an arm is asked raw, and once in every chat template that arms bring."""
        rows = {base.model.template_digest: base}
        tasks: dict[str | None, list[_Asked]] = {}
        for task in self._chosen:
            for one in adapted:
                model = one.model if self._variant(task[0], one.model) == "chat" else base.model
                digest = model.template_digest
                rows.setdefault(digest, replace(base, model=model, template_of=one.label))
                if task not in tasks.setdefault(digest, []):
                    tasks[digest].append(task)
        for digest, row in rows.items():
            if digest in tasks:
                yield self._arm(row, tasks[digest])

    def _arm(self, candidate: Candidate, tasks: Sequence[_Asked]) -> ArmPlan:
        model, adapter = candidate.model, candidate.adapter
        folded = Steering(model, adapter, candidate.label, candidate.control).folded(self._engine, self._options)
        base = {
            "model": model.identity(),
            "adapter": adapter.digest if adapter is not None else None,
            "control": candidate.control,
            **self._shared,
            # Folding rounds, so that it may move a number; an adapter that is served says nothing.
            **({"folded": True} if folded is not None else {}),
        }
        planned = [self._task(one, task, data, base, candidate) for one, task, data in tasks]
        return ArmPlan(
            name=candidate.name,
            model=model,
            adapter=adapter,
            label=candidate.label,
            template_of=candidate.template_of,
            control=candidate.control,
            folded=folded,
            # `sums` and `sums:raw` may be the same steps.
            tasks=tuple({task.answers_id: task for task in planned}.values()),
        )

    def _task(
        self, chosen: Chosen, task: dict[str, Any], data: dict[str, Any], base: dict[str, Any], candidate: Candidate
    ) -> TaskPlan:
        model, adapter = candidate.model, candidate.adapter
        variant = self._variant(chosen, model)
        identity = {**base, "task": task, "variant": variant, "limit": chosen.limit, "data": data}
        if not self._engine.remote and "generate" in needs_of([chosen]):
            identity |= self._decoded_as(model, sampling=chosen.spec.decoding_of == "model")
        factors = {"base": model.name, "adapter": candidate.label, "control": candidate.control}
        factors |= {"task": chosen.spec.name, "variant": variant}
        answers = make_step(
            "answers",
            identity,
            arm=candidate.name,
            factors=factors,
            made_from={"model": model.weights_digest} | ({"adapter": adapter.digest} if adapter is not None else {}),
        )
        refs = chosen.spec.scorers
        if chosen.spec.lm_eval is not None and not any(ref.name == LM_EVAL_SCORER for ref in refs):
            refs = (ScorerRef(name=LM_EVAL_SCORER, options={"flexible": chosen.spec.lm_eval.flexible}), *refs)
        scores = self._scores(chosen.spec, refs, answers)
        template = model.template_digest if variant == "chat" else None
        return TaskPlan(chosen, variant, template, answers, scores)

    def _decoded_as(self, model: ModelInfo, *, sampling: bool) -> dict[str, Any]:
        """What the model's own settings add to the id of generated answers; its file is read once for all tasks."""
        key = model.path, sampling
        if key not in self._settings:
            self._settings[key] = generation_identity(model, sampling=sampling)
        return self._settings[key]

    def _variant(self, chosen: Chosen, model: ModelInfo) -> PromptKind:
        chat_only = self._engine.capabilities(model, self._options).chat_only
        return resolve_variant(chosen, model, chat_only=chat_only)

    def _scores(self, spec: TaskSpec, refs: Sequence[ScorerRef], answers: Step) -> tuple[ScoresPlan, ...]:
        """A step for every scorer, and for every judge and wording that the task names."""
        found = []
        for ref, asked in scorers_of(spec, refs, partial(self._found, spec.name)):
            if asked is not None and asked.judge is None:
                scorer, _ = self._scorer(spec.name, ref)
                asked = replace(asked, judge=self._once(scorer.plugin.judge_name, scorer.config))
            found.append(self._score(spec.name, ref, answers, asked))
        panels: dict[str, list[tuple[str, AskedOf]]] = {}
        for one in found:
            if one.asked is not None:
                panels.setdefault(one.ref.name, []).append((one.id, one.asked))
        for panel in panels.values():
            refuse_equal_judges(spec, panel)
        return tuple(found)

    def _found(self, task: str, name: str) -> Scorer:
        return self._registry.find(Scorer, name, f"task {task}, scorer")

    def _score(self, task: str, ref: ScorerRef, answers: Step, asked: AskedOf | None) -> ScoresPlan:
        scorer, identity = self._scorer(task, ref)
        told = {} if asked is None else {"judge": asked.judge, "wording": asked.wording}
        step = make_step(
            "scores",
            {"answers": answers.id, **identity},
            arm=answers.arm,
            factors={**answers.factors, "scorer": ref.name, **told},
            parents=(answers.id,),
        )
        return ScoresPlan(step, ref, scorer, asked)

    def _scorer(self, task: str, ref: ScorerRef) -> tuple[ScorerPlan, dict[str, Any]]:
        """A scorer with its options, and its part of the step's id; found out once for all arms."""
        where = f"task {task}, scorer"
        entry = self._registry.registered(Scorer, ref.name, where)
        plugin = entry.plugin
        assert isinstance(plugin, Scorer)
        given = _with_cost(plugin.Config, ref.options, self._spec.max_judge_cost)
        config = self._once(parse_options, plugin.Config, given, f"{where} {ref.name}")
        try:
            return self._once(_scorer_of, entry, config)
        except UserError as error:
            raise UserError(error.where, error.what, error.fix.replace("TASK.", f"{task}.")) from None


def _scorer_of(entry: Registered, config: Config) -> tuple[ScorerPlan, dict[str, Any]]:
    plugin = entry.plugin
    assert isinstance(plugin, Scorer)
    plugin.check(config)
    key = digest_of([entry.name, config.model_dump(mode="json")])
    return ScorerPlan(key, plugin, config), {"scorer": plugin.identity(config), "scorer_code": code_digest(entry)}


def _pinned(chosen: Sequence[Chosen], revisions: Mapping[str, str], registry: Registry) -> list[_Asked]:
    """Tasks with what of them decides their questions, and what pins their data."""
    tasks = [_at_revision(one, revisions, registry) for one in chosen]
    data = read_all(partial(_data_identity, one, registry) for one in tasks)
    return [(one, _portable_task(one), found) for one, found in zip(tasks, data, strict=True)]


def _with_cost(config: type[Config], given: dict[str, Any], most: float | None) -> dict[str, Any]:
    """A scorer's options with the greatest cost of its judge: as `max_cost`, or that of a group, where it has one."""
    if most is None:
        return given
    if "max_cost" in config.model_fields:
        return {**given, "max_cost": most}
    found = dict(given)
    for key, field in config.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Config) and "max_cost" in inner.model_fields:
            group = given.get(key) or {}
            found[key] = {**group, "max_cost": most} if isinstance(group, dict) else group
    return found


def _portable_task(chosen: Chosen) -> dict[str, Any]:
    """What of a task decides its questions; where its files lie does not (``data`` has their digests)."""
    left_out = {
        "scorers",
        "judges",
        "wordings",
        "summary",
        "notes",
        "licence",
        "size",
        "leaves",
        "source",
        "generative",
    }
    task: dict[str, Any] = chosen.spec.model_dump(mode="json", exclude=left_out)
    if chosen.limit is None:
        task["subset"] = LATER["subset"]  # all is all, however some would have been drawn
    if task["lm_eval"] is not None and task["lm_eval"]["include"] is not None:
        task["lm_eval"]["include"] = "its folder"
    if task["lm_eval"] is not None:
        # What it comes to is in the identity of the data.
        del task["lm_eval"]["revision"]
    if task["dataset"] is not None:
        task["dataset"]["options"] = without_paths(task["dataset"]["options"])
    return {key: value for key, value in task.items() if key not in LATER or value != LATER[key]}


def _data_identity(chosen: Chosen, registry: Registry) -> dict[str, Any]:
    """What pins the questions: the data's revision and, for lm-eval, the code that writes them."""
    if chosen.spec.lm_eval is None:
        plugin, job = dataset_of(chosen.spec, registry, chosen)
        where = f"task {chosen.spec.name}, dataset"
        try:
            pinned = plugin.identity(job)
        except OtherRevisionError as error:
            raise error.of_task(chosen.spec.name) from None
        return {**pinned, "code": code_digest(registry.registered(Dataset, plugin.name, where))}
    ref = chosen.spec.lm_eval
    identity: dict[str, Any] = {"lm_eval": importlib.metadata.version("lm_eval"), "files": code_of(chosen.entry)}
    if ref.data is not None:
        identity["data"] = ref.data
        identity["revision"] = resolve_revision(ref.data, ref.revision) or ref.revision
    return identity


def _at_revision(chosen: Chosen, revisions: Mapping[str, str], registry: Registry) -> Chosen:
    """The task with its data at the commit that the user wants of that data set, unless it names one itself."""
    spec = chosen.spec
    if spec.lm_eval is not None:
        commit = revisions.get(spec.lm_eval.data or "")
        if commit is None or spec.lm_eval.revision is not None:
            return chosen
        return replace(chosen, spec=_with(spec, lm_eval=_with(spec.lm_eval, revision=commit)))
    assert spec.dataset is not None
    plugin = registry.find(Dataset, spec.dataset.name, f"task {spec.name}, dataset")
    commit = revisions.get(plugin.source or str(spec.dataset.options.get("path")))
    if commit is None or spec.dataset.revision is not None:
        return chosen
    return replace(chosen, spec=_with(spec, dataset=_with(spec.dataset, revision=commit)))


def _with(config: C, **fields: Any) -> C:
    return config.model_copy(update=fields)
