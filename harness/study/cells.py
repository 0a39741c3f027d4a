"""The cells of a search that a study asks for, and which of its arms wait for the choice.

The grid of a method is its own (``Recipe.search_grid``; arXiv 2406.04879, appendix B, for the bundled ones), with what
the study says laid over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner
from harness.contracts.registry import Registry
from harness.core.errors import UserError, unknown
from harness.core.records import digest_of
from harness.core.specs import AlignSpec
from harness.steps.files import slug
from harness.study.arms import Arm
from harness.study.spec import Read

OPTION = "--search"
Grid = Mapping[str, Sequence[Any]]


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
    block = read.spec.arms[int(arm.place[1])] if arm.place[0] == "arms" else read.spec.grid[int(arm.place[1])]
    asked = dict(block.search or {})
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
    # The cell that a single arm's search chooses is that arm, which is trained once with all that it keeps.
    kept = model.align.checkpoints if arm.place[0] == "arms" and seed == model.align.seed else ()
    spec = model.align.model_copy(update={"seed": seed, "checkpoints": kept})
    found = []
    for chosen in itertools.product(*full.values()):
        values = dict(zip(full, chosen, strict=True))
        factors = {**model.factors, "seed": seed, "cell": name_of(values)}
        name = _named(f"{arm.search}-{name_of(values)}", values)
        cell = replace(model, name=name, factors=factors, align=with_values(spec, values), cell=True)
        found.append((cell, values))
    return found


def with_values(spec: AlignSpec, values: Mapping[str, Any]) -> AlignSpec:
    """An alignment with the values of a cell among its options."""
    options = {key: dict(v) if isinstance(v, dict) else v for key, v in spec.options.items()}
    for key, value in values.items():
        group, _, last = key.rpartition(".")
        (options.setdefault(group, {}) if group else options)[last] = value
    return spec.model_copy(update={"options": options})


def name_of(values: Mapping[str, Any]) -> str:
    """A name for a cell, which no two of a grid share."""
    name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
    # A slug cuts long names off: two cells must not share one.
    return slug(name) if slug(name) == name else f"{slug(name)[:50]}-{digest_of(dict(values))[:8]}"


def full_grid(spec: AlignSpec, registry: Registry, grid: Grid) -> dict[str, list[Any]]:
    """The method's own grid, as far as the adapter knows its keys and nothing fixes them, with the user's laid over.

    Raises:
        UserError: an unknown key, one that is fixed too, or nothing to vary.
    """
    aligner = registry.find(Aligner, spec.method, "METHOD")
    adapter = registry.find(Adapter, spec.adapter, "--adapter")
    recipe_keys, adapter_keys = set(aligner.Config.model_fields), set(adapter.Config.model_fields)
    fixed = {*spec.options, *(f"adapter.{key}" for key in spec.options.get("adapter", {}))}

    def known(key: str) -> bool:
        return key in recipe_keys or (key.removeprefix("adapter.") in adapter_keys and key.startswith("adapter."))

    given: dict[str, list[Any]] = {}
    for key, values in grid.items():
        whole = key if key in recipe_keys or key.startswith("adapter.") else f"adapter.{key}"
        if not known(whole):
            names = [*sorted(recipe_keys), *sorted(f"adapter.{name}" for name in adapter_keys)]
            raise unknown(f"{OPTION} {key}", "key", key, names, "harness align --help")
        if whole in fixed:
            raise UserError(f"{OPTION} {key}", "--set fixes the same key", "Give it in one of the two.")
        given[whole] = list(values)
    own = {key: list(v) for key, v in aligner.Config.search_grid.items() if known(key) and key not in fixed}
    full = {**own, **given}
    if not full:
        raise UserError(
            OPTION,
            f"{spec.method} with adapter {spec.adapter} has no grid of its own",
            f"Say what to vary: {OPTION} learning_rate=1e-5,5e-5.",
        )
    return full


def _named(name: str, values: Mapping[str, Any]) -> str:
    # A slug cuts long names off: two cells must not share one.
    return name if slug(name) == name else f"{slug(name)[:50]}-{digest_of([name, dict(values)])[:8]}"


def _values(given: Any, where: str) -> list[Any]:
    values = list(given) if isinstance(given, list | tuple) else [given]
    if isinstance(given, Mapping) or not values or len(set(map(repr, values))) < len(values):
        raise UserError(where, f"{given!r} is no list of different values", "Write for example [1e-5, 5e-5].")
    return values
