"""A merge as a list of tensors to make: which tensors of which models, with which weights and options. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """One tensor of one model."""

    model: int
    """Index into the merge's inputs; -1 is the base."""
    tensor: str


@dataclass(frozen=True)
class TensorRecipe:
    """How one tensor of the result comes about; every value filled in for this very tensor."""

    name: str
    """Its name in the result."""
    sources: tuple[Source, ...]
    """What is merged, in the order of the models."""
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
