"""Which models a merge takes, whether they fit, and every tensor that it makes. Reads headers alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contracts.merger import Merger
from harness.contracts.registry import Registry
from harness.core.errors import UserError
from harness.core.records import digest_of
from harness.core.specs import MergeInput, MergeSpec
from harness.merging.compute import Maker
from harness.merging.inputs import OpenModels, open_models
from harness.merging.mergekit.recipe import configured_recipe
from harness.merging.names import Models
from harness.merging.sources import MergeModel
from harness.merging.tensor_plan import MergeRecipe, TensorRecipe, plain_recipe
from harness.merging.threads import Clock
from harness.steps.files import slug
from harness.steps.provenance import code_digest
from harness.steps.step import Step, make_step


@dataclass(frozen=True)
class MergePlan:
    """Everything one merge will do, and the id that names it."""

    spec: MergeSpec
    merger: Merger
    opened: OpenModels
    recipe: MergeRecipe
    device: str
    step: Step
    seconds: float
    """What planning took; digests of weights that were not known yet are most of it."""

    @property
    def id(self) -> str:
        """Id of the step."""
        return self.step.id


def parse_input(given: str | Path | tuple[str | Path, float] | MergeInput) -> MergeInput:
    """``ARM[@CONTROL][:weight]``, a pair, or the thing itself; a path that exists is cut nowhere."""
    if isinstance(given, MergeInput):
        return given
    if isinstance(given, tuple):
        return MergeInput(**_controlled(str(given[0])), weight=float(given[1]))
    text = str(given)
    ref, colon, weight = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return MergeInput(**_controlled(text))
    try:
        return MergeInput(**_controlled(ref), weight=float(weight))
    except ValueError:
        raise UserError("--inputs", f"{weight!r} in {text!r} is no weight", "Write ARM:0.5, or ARM alone.") from None


def _controlled(text: str) -> dict[str, Any]:
    """``ARM@CONTROL``, where ARM is a folder; an @ in a name of the hub is no control."""
    ref, sign, control = text.rpartition("@")
    if not sign or Path(text).expanduser().exists() or not Path(ref).expanduser().is_dir():
        return {"ref": text}
    return {"ref": ref, "control": control}


def plan_merge(spec: MergeSpec, registry: Registry, device: str = "auto") -> MergePlan:
    """Find the models, check that they fit, and list every tensor. Reads headers alone.

    Raises:
        UserError: whatever the user must mend before anything runs.
    """
    begun = time.perf_counter()
    entry = registry.registered(Merger, spec.method, "METHOD")
    merger = entry.plugin
    assert isinstance(merger, Merger)
    if spec.rank is not None and spec.form == "model":
        raise UserError("--rank", "is of an adapter, and a model is written", "Add --as adapter.")
    opened = open_models(spec)
    recipe = recipe_of(spec, merger, opened.names, opened.info.config, opened.base_names)
    device = _device(device)
    maker = Maker(opened, merger, spec.seed, device, Clock())
    for one in recipe.tensors:
        maker.check(one)
    identity = {
        "method": spec.method,
        "tensors": digest_of([_canonical(one) for one in recipe.tensors]),
        "base": opened.info.identity(),
        "base_adapter": opened.base.digest if opened.base is not None and opened.base.adapter is not None else None,
        "inputs": [_input_identity(model) for model in opened.inputs],
        "config_changes": {**opened.config_changes, **recipe.config_changes},
        "template": opened.template,
        "seed": spec.seed,
        "dtype": spec.dtype,
        "form": spec.form,
        "rank": spec.rank,
        "device": device.partition(":")[0],
        "code": code_digest(entry),
    }
    return MergePlan(spec, merger, opened, recipe, device, _step(spec, opened, identity), time.perf_counter() - begun)


def _input_identity(model: MergeModel) -> dict[str, Any]:
    control = {"control": model.controlled.control} if model.controlled is not None else {}
    return {"digest": model.digest, "on": model.info.weights_digest, **control}


def _step(spec: MergeSpec, opened: OpenModels, identity: dict[str, Any]) -> Step:
    names = [model.name for model in opened.inputs]
    return make_step(
        "merge",
        identity,
        arm=f"{spec.method}-{slug('+'.join(names))}",
        factors={"method": spec.method, "base": opened.info.name, "inputs": names, "seed": spec.seed},
        made_from={"base": opened.info.weights_digest, **opened.digests},
    )


def recipe_of(
    spec: MergeSpec,
    merger: Merger,
    names: Sequence[Sequence[str]],
    base_config: Mapping[str, Any],
    base_names: Sequence[str] | None = None,
) -> MergeRecipe:
    """Every tensor of the result, from the names of the inputs' tensors.

    Args:
        names: of each input as a whole model (for an adapter those of the checkpoint below it).
        base_config: config.json of the base, of the first input where there is none.
        base_names: the base's tensors; None: there is no base.

    Raises:
        UserError: weights, options, tensors or layers that do not fit together.
    """
    if merger.operates_on == "deltas" and base_names is None:
        what = f"{merger.name} merges differences from a base, and there is none"
        raise UserError("--base", what, "Give the model that the inputs were trained from.")
    tied = bool(base_config.get("tie_word_embeddings"))
    models = Models(spec, names, base_names, tied)
    if spec.config is None:
        return plain_recipe(spec, merger, models)
    return configured_recipe(spec.config, merger, models, base_config)


def _canonical(recipe: TensorRecipe) -> list[Any]:
    base = [recipe.base.model, recipe.base.tensor] if recipe.base is not None else None
    sources = [[source.model, source.tensor] for source in recipe.sources]
    return [recipe.name, sources, base, list(recipe.weights), recipe.options.model_dump(mode="json")]


def _device(asked: str) -> str:
    """The device; torch is only asked where the machine has an NVIDIA driver."""
    if asked == "cpu" or (asked == "auto" and not Path("/proc/driver/nvidia").exists()):
        return "cpu"
    import torch

    present = torch.cuda.is_available()
    if asked != "auto" and not present:
        raise UserError("--device", f"{asked}, and torch finds no CUDA device", "Give --device cpu or auto.")
    return asked if asked != "auto" else "cuda" if present else "cpu"
