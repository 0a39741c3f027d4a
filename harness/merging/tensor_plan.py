"""A merge as a list of tensors to make: which tensors of which models, with which weights and options. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.contracts.merger import Merger
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.specs import MergeSpec
from harness.merging.names import Models, Source


@dataclass(frozen=True)
class TensorRecipe:
    """How one tensor of the result comes about; every value filled in for this very tensor."""

    name: str
    """Its name in the result."""
    sources: tuple[Source, ...]
    """What is merged, in the order of the models; empty: the base's tensor as it is."""
    base: Source | None
    """The base's tensor; None where there is no base."""
    weights: tuple[float, ...]
    options: Any
    """The merger's Config."""


@dataclass(frozen=True)
class MergeRecipe:
    """Everything one merge will do, before anything is read."""

    method: str
    tensors: tuple[TensorRecipe, ...]
    """In the order in which they are written."""
    config_changes: dict[str, Any]
    """What differs in the result's config.json from the base's (the number of layers, where slices change it)."""
    notes: tuple[str, ...] = ()


def plain_recipe(spec: MergeSpec, merger: Merger, models: Models) -> MergeRecipe:
    """Every tensor of the result, with the weights and options that the command line gives for all of them.

    Raises:
        UserError: too few or too many models, weights for some of them alone, options that the merger refuses.
    """
    count = len(spec.inputs)
    least, most = merger.models
    if count < least or (most is not None and count > most):
        number = str(least) if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError("--inputs", f"{merger.name} merges {number} models, found {count}", "Give as many inputs.")
    given = [one.weight for one in spec.inputs]
    if any(weight is None for weight in given) and any(weight is not None for weight in given):
        without = [one.ref for one in spec.inputs if one.weight is None]
        fix = "Write INPUT:WEIGHT for all of them, or for none."
        raise UserError("--inputs", f"no weight for {', '.join(without)}, but for others", fix)
    config = parse_options(merger.Config, spec.options, "--set")
    weights, config = settled(merger, None if None in given else given, count, config, "--inputs", "--set")  # type: ignore[arg-type]
    models.refuse_extra()
    reference = models.of(-1 if models.base_names is not None else 0)
    base = models.base_names is not None
    tensors = tuple(
        TensorRecipe(
            name,
            tuple(models.source(index, name, name) for index in range(count)),
            Source(-1, name) if base else None,
            weights,
            config,
        )
        for name in reference
    )
    return MergeRecipe(merger.name, tensors, {}, models.notes)


def settled(
    merger: Merger, weights: Sequence[float] | None, count: int, config: Any, of_weights: str, of_options: str
) -> tuple[tuple[float, ...], Any]:
    """The weights and options as the merger wants them; its errors get the place where the user wrote them."""
    for weight in weights or ():
        if weight - weight != 0:
            raise UserError(of_weights, f"a weight is {weight}", "Give finite weights.")
    for field in merger.per_model:
        value = getattr(config, field)
        if isinstance(value, tuple) and len(value) != count:
            fix = "Give one value, or one for each model in their order."
            raise UserError(f"{of_options} {field}", f"{len(value)} values for {count} models", fix)
    try:
        return merger.settle(weights, count, config)
    except UserError as error:
        where = of_weights if error.where == "weights" else f"{of_options} {error.where}"
        raise UserError(where, error.what, error.fix) from None
