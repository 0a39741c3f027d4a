"""One alignment, resolved and checked, with the id that names it. Loads nothing: no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.alignment.checks import (
    check_checkpoints,
    check_data_options,
    check_is_folder,
    check_method,
    check_processes,
    find_start,
    take_group,
    template_of,
)
from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner
from harness.contracts.dataset import Dataset
from harness.contracts.recipe import Recipe
from harness.contracts.registry import Registry
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
    data: dict[str, Any]
    data_options: dict[str, Any]
    step: Step
    dataset: str
    """The expression as records have it: files by name alone."""

    @property
    def id(self) -> str:
        """Id of the step."""
        return self.step.id

    @property
    def arm(self) -> str:
        """Short name of the arm; commits are shortened in it."""
        return self.step.arm


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
    check_method(aligner, recipe)
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
    check_checkpoints(spec.checkpoints, recipe.steps)
    template = once(template_of, spec.template, model, start)
    data_entries = [registry.registered(Dataset, part.name, "--dataset") for part in parts]
    order = (spec.data_seed, spec.samples, recipe.eval_rows)
    data = once(identity_of, parts, aligner.consumes, registry, data_given, order)
    identity = {
        "method": spec.method,
        "recipe": recipe.model_dump(mode="json"),
        "adapter": {"name": spec.adapter, **adapter_options.model_dump(mode="json")},
        "model": {k: v for k, v in once(model.identity).items() if k != "template"},
        "dtype": spec.model.dtype,
        "template": template.digest,
        "from": start.digest if start is not None else None,
        "data": data,
        "checkpoints": sorted(spec.checkpoints),
        "seed": spec.seed,
        "code": [once(code_digest, entry) for entry in (aligner_entry, adapter_entry, *data_entries)],
    }
    if spec.processes > 1:
        check_processes(spec.processes, recipe.batch_size)
        # Sums are taken in another order, and every process draws its own dropout.
        identity["processes"] = spec.processes
    return AlignPlan(
        spec,
        model,
        start,
        aligner,
        recipe,
        adapter,
        adapter_options,
        template,
        data,
        data_given,
        _step(spec, model, start, identity, portable(spec.dataset)),
        portable(spec.dataset),
    )


def _step(spec: AlignSpec, model: ModelInfo, start: AdapterInfo | None, identity: dict[str, Any], dataset: str) -> Step:
    data = slug(COMMIT.sub(lambda found: found[0][:12], dataset).replace("&", " and "))
    factors = {
        "method": spec.method,
        "data": dataset,
        "base": model.name,
        "adapter": spec.adapter,
        "seed": spec.seed,
        "samples": spec.samples,
    }
    return make_step(
        "align",
        identity,
        arm=f"{spec.method}-{data}-{model.name}-{spec.adapter}-s{spec.seed}",
        factors=factors,
        made_from={"base": model.weights_digest, **({"from": start.digest} if start is not None else {})},
    )
