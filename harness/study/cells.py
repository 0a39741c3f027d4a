"""The cells of a search that a study asks for, and which of its arms wait for the choice."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.contracts.registry import Registry
from harness.core.errors import UserError
from harness.core.records import digest_of
from harness.steps.files import slug
from harness.study.arms import Arm
from harness.study.search import full_grid, name_of, with_values
from harness.study.spec import Read


@dataclass
class Searched:
    """A search of a recipe, as far as it is planned."""

    name: str
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arm of a cell -> its values; empty where its cells wait for another search themselves."""
    arms: list[str] = field(default_factory=list)
    """Arms whose recipe it decides."""
    values: dict[str, Any] | None = None
    """What was chosen, once it has been."""

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {"name": self.name, "cells": self.cells, "arms": self.arms, "chosen": self.values}


def cells_of(arm: Arm, arms: Sequence[Arm], read: Read, registry: Registry) -> list[tuple[Arm, dict[str, Any]]]:
    """The cells of the search that decides an arm's recipe, each with its values.

    Args:
        arm: one whose recipe is searched.
        arms: all of the study.
        read: the study.
        registry: of plugins.

    Raises:
        UserError: a key that is unknown or fixed, no value, a seed that is none, or of no arm to go on from.
    """
    assert arm.search is not None and arm.align is not None
    place = (*arm.place, "search")
    asked = dict(read.spec.grid[int(arm.place[1])].search or {})
    seed = asked.pop("seed", None)
    alike = [one for one in arms if one.search == arm.search]
    if seed is None:
        model = alike[0]
        seed = model.factors["seed"]
    elif not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(read.where(*place, "seed"), f"{seed!r} is no seed", "Give one whole number, 0 say.")
    else:
        model = next((one for one in alike if one.factors["seed"] == seed), alike[0])
        if model.parents and model.factors["seed"] != seed and len({one.parents for one in alike}) > 1:
            what = f"there is no arm of seed {seed} to go on from"
            raise UserError(read.where(*place, "seed"), what, "Take one of the block's seeds.")
    grid = {key: _values(values, read.where(*place, key)) for key, values in asked.items()}
    assert model.align is not None
    full = full_grid(model.align, registry, grid)
    spec = model.align.model_copy(update={"seed": seed, "checkpoints": ()})
    found = []
    for chosen in itertools.product(*full.values()):
        values = dict(zip(full, chosen, strict=True))
        factors = {**model.factors, "seed": seed, "cell": name_of(values)}
        name = _named(f"{arm.search}-{name_of(values)}", values)
        cell = replace(model, name=name, factors=factors, align=with_values(spec, values), cell=True)
        found.append((cell, values))
    return found


def _named(name: str, values: Mapping[str, Any]) -> str:
    # A slug cuts long names off: two cells must not share one.
    return name if slug(name) == name else f"{slug(name)[:50]}-{digest_of([name, dict(values)])[:8]}"


def _values(given: Any, where: str) -> list[Any]:
    values = list(given) if isinstance(given, list | tuple) else [given]
    if isinstance(given, Mapping) or not values or len(set(map(repr, values))) < len(values):
        raise UserError(where, f"{given!r} is no list of different values", "Write for example [1e-5, 5e-5].")
    return values
