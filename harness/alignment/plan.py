"""One alignment, resolved and checked, with the id that names it. Loads nothing: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness.alignment.checks import (
    check_checkpoints,
    check_data_options,
    check_is_folder,
    check_method,
    check_processes,
    find_start,
    has_reference,
    recipe_of,
    rows_of,
    take_group,
    template_of,
)
from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner, Stage
from harness.contracts.dataset import Dataset, RowSchema, TrainingRow
from harness.contracts.recipe import Recipe
from harness.contracts.registry import Registered, Registry
from harness.core.config import parse_options
from harness.core.machine import torch_device
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import AlignSpec
from harness.data.expression import at_revisions, parse_expression, portable
from harness.data.hub import COMMIT
from harness.data.selection import identity_of
from harness.models.chat_templates import ChatTemplate
from harness.models.inspect import inspect_model
from harness.steps.files import slug
from harness.steps.once import Once
from harness.steps.provenance import code_digest
from harness.steps.step import Step, make_step


@dataclass(frozen=True)
class StagePlan:
    """One stage of an alignment, resolved."""

    stage: Stage
    recipe: Recipe
    """With the stage's own settings laid over."""
    schema: RowSchema | type[TrainingRow]
    data: dict[str, Any]
    """What pins its rows."""
    step: Step
    """Of the last stage: the alignment's own."""


@dataclass(frozen=True)
class AlignPlan:
    """Everything one alignment will do, and the id that names it."""

    spec: AlignSpec
    model: ModelInfo
    start: AdapterInfo | None
    aligner: Aligner
    recipe: Recipe
    adapter: Adapter
    adapter_options: Any
    template: ChatTemplate
    data_options: dict[str, Any]
    stages: tuple[StagePlan, ...]
    """In order. Each step's id holds that of the step before it, so that all are known before anything has run."""
    dataset: str
    """The expression as records have it: files by name alone."""

    @property
    def step(self) -> Step:
        """The step of the whole alignment, which is that of its last stage."""
        return self.stages[-1].step

    def of_arm(self, name: str, factors: Mapping[str, Any]) -> AlignPlan:
        """The same alignment under the name that a study gives its arm; ids do not change."""
        last = self.stages[-1]
        step = replace(last.step, arm=name, factors=dict(factors))
        return replace(self, stages=(*self.stages[:-1], replace(last, step=step)))

    @property
    def id(self) -> str:
        """Id of the step."""
        return self.step.id

    @property
    def arm(self) -> str:
        """Short name of the arm; commits are shortened in it."""
        return self.step.arm


def needs_reference(plan: AlignPlan, stage: StagePlan) -> bool:
    """Whether the rows of a stage carry log-probabilities under the policy that it begins with."""
    return has_reference(plan.aligner, stage.stage)


def plan_align(
    spec: AlignSpec, registry: Registry, *, made: Mapping[str, AdapterInfo] | None = None, once: Once | None = None
) -> AlignPlan:
    """Resolve names and options, check what can be checked without loading, and give the arm its id.

    Args:
        spec: what is asked.
        registry: of plugins.
        made: adapters that other steps make, or will make, by what ``spec.start`` calls them. Of one that is not there
            yet the digest is the key of its step, and so is the id that comes of it.
        once: shared by the plans of one study.

    Raises:
        UserError: whatever the user must mend before anything runs.
    """
    once = once or Once()
    asked = _asked(spec, registry)
    aligner, adapter, adapter_options, data_given = asked.aligner, asked.adapter, asked.adapter_options, asked.data
    stages = check_method(aligner, asked.recipe)
    recipes = [recipe_of(asked.recipe, stage) for stage in stages]
    # From here on the expression names the commits, and so do the arm, its rows and every record.
    spec = spec.model_copy(update={"dataset": once(at_revisions, spec.dataset, registry, spec.data_revisions)})
    parts = once(parse_expression, spec.dataset, registry)
    check_data_options(data_given, [part.name for part in parts])
    check_is_folder(spec)
    model = once(inspect_model, spec.model)
    if spec.model.dtype == "auto":
        # On a CPU fp32 is exact and repeatable; on CUDA bf16 is what the recipe's memory is counted in.
        dtype = "bfloat16" if once(torch_device) == "cuda" else "float32"
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})
    start = find_start(spec, model, adapter_options, made or {})
    check_checkpoints(spec.checkpoints, recipes[-1].steps)
    template = once(template_of, spec.template, model, start)
    data_entries = [registry.registered(Dataset, part.name, "--dataset") for part in parts]
    identity = {
        "method": spec.method,
        "adapter": {"name": spec.adapter, **adapter_options.model_dump(mode="json")},
        "model": {k: v for k, v in once(model.identity).items() if k != "template"},
        "dtype": spec.model.dtype,
        "template": template.digest,
        "from": start.digest if start is not None else None,
        "checkpoints": sorted(spec.checkpoints),
        "seed": spec.seed,
        "code": [once(code_digest, entry) for entry in (*asked.entries, *data_entries)],
    }
    if spec.processes > 1:
        for own in recipes:
            check_processes(spec.processes, own.batch_size)
        # Sums are taken in another order, and every process draws its own dropout.
        identity["processes"] = spec.processes
    chain: list[StagePlan] = []
    for stage, own in zip(stages, recipes, strict=True):
        schema, order = rows_of(aligner, stage), (spec.data_seed, spec.samples, own.eval_rows)
        rows = once(identity_of, parts, schema, registry, data_given, order)
        whole = {**identity, "recipe": own.model_dump(mode="json"), "data": rows, **_place(stages, stage, chain)}
        step = _step(spec, model, start, whole, stage.name if stage is not stages[-1] else None)
        chain.append(StagePlan(stage, own, schema, rows, step))
    return AlignPlan(
        spec,
        model,
        start,
        aligner,
        asked.recipe,
        adapter,
        adapter_options,
        template,
        data_given,
        tuple(chain),
        portable(spec.dataset),
    )


@dataclass(frozen=True)
class _Asked:
    """The plugins that a spec names, with their options parsed."""

    aligner: Aligner
    recipe: Recipe
    adapter: Adapter
    adapter_options: Any
    data: dict[str, Any]
    """Options of data sets, by their names."""
    entries: tuple[Registered, Registered]


def _asked(spec: AlignSpec, registry: Registry) -> _Asked:
    given = dict(spec.options)
    adapter_given, data_given = take_group(given, "adapter"), take_group(given, "dataset")
    aligner_entry = registry.registered(Aligner, spec.method, "METHOD")
    aligner = aligner_entry.plugin
    assert isinstance(aligner, Aligner)
    recipe = parse_options(aligner.Config, given, "--set")
    adapter_entry = registry.registered(Adapter, spec.adapter, "--adapter")
    adapter = adapter_entry.plugin
    assert isinstance(adapter, Adapter)
    defaults = {k: v for k, v in recipe.adapter_defaults.items() if k in adapter.Config.model_fields}
    adapter_options = parse_options(adapter.Config, {**defaults, **adapter_given}, "--set adapter")
    adapter.check(adapter_options)
    return _Asked(aligner, recipe, adapter, adapter_options, data_given, (aligner_entry, adapter_entry))


def _place(stages: tuple[Stage, ...], stage: Stage, before: list[StagePlan]) -> dict[str, Any]:
    """What the id of a stage holds of where it stands; of the only one nothing."""
    place = {} if len(stages) == 1 else {"stage": stage.name, "earlier": before[-1].step.id if before else None}
    return place if stage is stages[-1] else {**place, "checkpoints": []}


def _step(
    spec: AlignSpec, model: ModelInfo, start: AdapterInfo | None, identity: dict[str, Any], stage: str | None
) -> Step:
    """The step of a stage; ``stage`` is its name, and None for the last."""
    dataset = portable(spec.dataset)
    data = slug(COMMIT.sub(lambda found: found[0][:12], dataset).replace("&", " and "))
    factors = {
        "method": spec.method,
        "data": dataset,
        "base": model.name,
        "adapter": spec.adapter,
        "seed": spec.seed,
        "samples": spec.samples,
        **({"stage": stage} if stage is not None else {}),
    }
    return make_step(
        "align",
        identity,
        arm=f"{spec.method}-{data}-{model.name}-{spec.adapter}-s{spec.seed}",
        factors=factors,
        made_from={"base": model.weights_digest, **({"from": start.digest} if start is not None else {})},
    )
