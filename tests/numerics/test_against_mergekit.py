"""Merges after mergekit's YAML against what mergekit itself made of the same files (`mergekit_0.1.5/README.md`)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness import Merger, load_plugins
from harness.merging.mergekit.config import read_merge_config
from harness.merging.names import Source
from harness.merging.plan import recipe_of
from harness.merging.tensor_plan import MergeRecipe, TensorRecipe

PEER = Path(__file__).parent / "mergekit_0.1.5"
DATA = json.loads((PEER / "merges.json").read_text(encoding="utf-8"))
ROUNDINGS = 8 * 2.0**-23
"""Both sum a handful of products in float32, in other orders."""


@pytest.fixture(scope="module")
def peer() -> dict[str, dict[str, Any]]:
    """``input.NAME`` and ``output.NAME`` -> tensors by name."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for key, flat in load_file(PEER / "tensors.safetensors").items():
        shapes = DATA["layers"]["shapes"][str(DATA["layers"]["of"][key])]
        parts = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
        found[key] = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return found


def recipe_and_merger(name: str, peer: Mapping[str, Any], folder: Path) -> tuple[MergeRecipe, Merger, list[str]]:
    """The recipe of one configuration, its merger, and the inputs' names."""
    file = folder / "merge.yaml"
    file.write_text(yaml.safe_dump(DATA["configs"][name], sort_keys=False), encoding="utf-8")
    spec = read_merge_config(file)
    merger = load_plugins().find(Merger, spec.method, "test")
    inputs = [one.ref for one in spec.inputs]
    names = [sorted(peer[f"input.{ref}"]) for ref in inputs]
    base = sorted(peer[f"input.{spec.base.model}"]) if spec.base is not None else None
    base_name = spec.base.model if spec.base is not None else ""
    return recipe_of(spec, merger, names, DATA["config"], base), merger, [*inputs, base_name]


def merged(recipe: TensorRecipe, merger: Merger, models: list[str], peer: Mapping[str, Any]) -> Any:
    """One tensor, as the harness makes it."""
    import torch

    def read(source: Source) -> Any:
        return peer[f"input.{models[source.model]}"][source.tensor]

    base = read(recipe.base) if recipe.base is not None else None
    if not recipe.sources:
        return base
    tensors = [read(source) for source in recipe.sources]
    deltas = merger.operates_on == "deltas"
    found = merger.merge(
        [tensor - base for tensor in tensors] if deltas else tensors,
        base=base,
        weights=recipe.weights,
        config=recipe.options,
        generator=lambda index: torch.Generator().manual_seed(index),
    ).tensor
    return base + found if deltas else found


@pytest.mark.parametrize("name", sorted(DATA["configs"]))
def test_every_tensor_is_mergekits(name: str, peer: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    recipe, merger, models = recipe_and_merger(name, peer, tmp_path)
    theirs = peer[f"output.{name}"]
    assert sorted(one.name for one in recipe.tensors) == sorted(theirs)
    assert recipe.config_changes == (
        {}
        if DATA["layers"]["of"][f"output.{name}"] == 3
        else {"num_hidden_layers": DATA["layers"]["of"][f"output.{name}"]}
    )
    for one in recipe.tensors:
        ours, expected = merged(one, merger, models, peer), theirs[one.name]
        far = float((ours - expected).abs().max()) / float(expected.abs().max())
        assert far <= ROUNDINGS, (one.name, far)


def test_the_fixture_tells_the_methods_apart(peer: dict[str, dict[str, Any]]) -> None:
    """Results that hardly differ would compare equal whatever we do."""
    results = {name: peer[f"output.{name}"]["model.layers.1.mlp.up_proj.weight"] for name in DATA["configs"]}
    for one in results:
        for other in results:
            if one < other:
                far = float((results[one] - results[other]).abs().max()) / float(results[one].abs().max())
                assert far > 100 * ROUNDINGS, (one, other)
