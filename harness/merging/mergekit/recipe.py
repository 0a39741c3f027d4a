"""A merge after mergekit's YAML as a list of tensors to make, each with the values mergekit would find. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.contracts.merger import Merger
from harness.core.config import Located, parse_options
from harness.core.errors import UserError
from harness.merging.mergekit.config import parse_merge_config
from harness.merging.mergekit.methods import ConfigInput, ConfigSlice, MergeConfig, Parameter, setting_at
from harness.merging.names import Models, Source
from harness.merging.tensor_plan import MergeRecipe, TensorRecipe, settled

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""Names of the number of layers in config.json."""
PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Keys of config.json with one entry for each layer."""
_LAYER = re.compile(r"(?P<prefix>(?:[^.]*[^.\d][^.]*\.)*)(?P<index>\d+)\.(?P<rest>.+)")
_FIRST = re.compile(r"embed(?!_out)|wte|wpe")


def configured_recipe(
    config: Mapping[str, Any], merger: Merger, models: Models, base_config: Mapping[str, Any]
) -> MergeRecipe:
    """Every tensor of the result, with the weights, options and layers that mergekit's YAML gives for it.

    Raises:
        UserError: naming the place in the YAML where layers, filters or values do not fit.
    """
    located = Located(config, "merge config", {})
    return _Configured(parse_merge_config(located), merger, models).recipe(base_config)


@dataclass(frozen=True)
class _Place:
    """Where in the result a tensor belongs: before the layers, in one, after them."""

    part: ConfigSlice
    depth: float
    """mergekit's t: how far through its slice a layer is, 0 to 1."""
    layer: int | None = None
    """Index in the result."""
    offset: int = 0
    """Index within the slice."""


class _Configured:
    """One merge after mergekit's YAML."""

    def __init__(self, config: MergeConfig, merger: Merger, models: Models) -> None:
        self.config, self.merger, self.models = config, merger, models
        self.index = {ref: position for position, ref in enumerate(config.refs)}
        self.ranged = any(one.layers is not None for part in config.slices for one in part.inputs)
        self._made: dict[Any, tuple[tuple[float, ...], Any]] = {}

    def recipe(self, base_config: Mapping[str, Any]) -> MergeRecipe:
        """All tensors, and the number of layers if it changes."""
        if not self.ranged:
            self.models.refuse_extra()
        tensors = tuple(self._tensor(name, place) for name, place in self._places())
        notes = [*self.config.notes, *self.models.notes]
        if "rescale" in type(self.merger).Config.model_fields:
            kinds = sorted({one.options.rescale for one in tensors if one.sources})
            notes.append(f"rescale: {', '.join(kinds)}, as mergekit since 0.1 (`rescale: true` is l1)")
        changes = self._changes(base_config) if self.ranged else {}
        return MergeRecipe(self.merger.name, tensors, changes, tuple(notes))

    def _places(self) -> Iterator[tuple[str, _Place]]:
        """The result's tensors: before the layers, layer by layer, after them."""
        first, last = self.config.slices[0], self.config.slices[-1]
        if not self.ranged:
            names = self.models.of(-1 if self.models.base_names is not None else 0)
            depth: dict[str, int] = {}
            for name in names:
                found = _LAYER.fullmatch(name)
                if found:
                    depth[found["prefix"]] = max(depth.get(found["prefix"], 0), int(found["index"]))
            for name in names:
                found = _LAYER.fullmatch(name)
                yield name, _Place(first, _depth(int(found["index"]), depth[found["prefix"]] + 1) if found else 0.0)
            return
        prefix = self._prefix()
        outside = [name for name in self._names(first) if not _in_layers(name, prefix)]
        yield from ((name, _Place(first, 0.0)) for name in outside if _FIRST.search(name))
        layer = 0
        for part in self.config.slices:
            start, stop = part.inputs[0].layers or (0, 0)
            rests = self._layer_names(part, prefix)
            for offset in range(stop - start):
                for rest in rests[offset]:
                    yield f"{prefix}{layer}.{rest}", _Place(part, _depth(offset, stop - start), layer, offset)
                layer += 1
        outside = [name for name in self._names(last) if not _in_layers(name, prefix)]
        yield from ((name, _Place(last, 0.0)) for name in outside if not _FIRST.search(name))

    def _names(self, part: ConfigSlice) -> list[str]:
        """Names of the first source of a slice, the measure of the others."""
        return self.models.of(self.index.get(part.inputs[0].ref, -1))

    def _prefix(self) -> str:
        """What stands before the number of a layer."""
        found = {m["prefix"] for part in self.config.slices for n in self._names(part) if (m := _LAYER.fullmatch(n))}
        if len(found) != 1:
            shown = ", ".join(f"{one}N" for one in sorted(found)) or "none"
            what = f"slices need one stack of layers, found {shown}"
            raise UserError("merge config, slices", what, "Use `models` instead.")
        return found.pop()

    def _layer_names(self, part: ConfigSlice, prefix: str) -> list[list[str]]:
        """Per layer of the slice the names within it; every source must have those layers."""
        for one in part.inputs:
            names = self.models.of(self.index.get(one.ref, -1))
            have = 1 + max((int(m["index"]) for n in names if (m := _LAYER.fullmatch(n))), default=-1)
            if one.layers is not None and one.layers[1] > have:
                where = self.config.located.where((*one.path, "layer_range"))
                what = f"layers up to {one.layers[1]}, but {one.ref} has {have}"
                raise UserError(where, what, f"Give a range within [0, {have}].")
        start, stop = part.inputs[0].layers or (0, 0)
        rests: list[list[str]] = [[] for _ in range(stop - start)]
        for name in self._names(part):
            found = _LAYER.fullmatch(name)
            if found and start <= int(found["index"]) < stop:
                rests[int(found["index"]) - start].append(found["rest"])
        return rests

    def _source(self, one: ConfigInput, name: str, place: _Place, model: int) -> Source:
        tensor = name
        if place.layer is not None and one.layers is not None:
            found = _LAYER.fullmatch(name)
            assert found is not None
            tensor = f"{found['prefix']}{one.layers[0] + place.offset}.{found['rest']}"
        return self.models.source(model, tensor, name)

    def _tensor(self, name: str, place: _Place) -> TensorRecipe:
        """One tensor: mergekit looks for a value in the model's parameters, then the slice's, then the top ones."""
        part, method = place.part, self.config.method
        base_input = next((one for one in part.inputs if one.ref == part.base), None)
        inputs = part.others if method.base in ("apart", "optional") else part.inputs
        if method.base == "first" and base_input is not None:
            inputs = (base_input, *part.others)
        sources = tuple(self._source(one, name, place, self.index[one.ref]) for one in inputs)
        base = None
        if self.models.base_names is not None and method.base == "ignored" and not self.ranged:
            base = self.models.source(-1, name, name)
        elif base_input is not None and method.base != "ignored":
            same = part.base == self.config.base
            base = self._source(base_input, name, place, -1 if same else self.index[base_input.ref])
        if not sources:
            return TensorRecipe(name, (), base, (), self.merger.Config())
        weights, options = self._values(name, place, inputs, sources)
        return TensorRecipe(name, sources, base, weights, options)

    def _values(
        self, name: str, place: _Place, inputs: Sequence[ConfigInput], sources: Sequence[Source]
    ) -> tuple[tuple[float, ...], Any]:
        weights: list[float] | None = None
        options: dict[str, Any] = {}
        above = (place.part.parameters, self.config.parameters)
        for parameter in self.config.method.parameters:
            if parameter.option is None:
                continue
            if parameter.each == "merge":
                value = self._setting(parameter, above, name, place, "")
                options[parameter.option] = parameter.values.get(bool(value), value) if parameter.values else value
                continue
            values = [
                float(self._setting(parameter, (one.parameters, *above), source.tensor, place, f" for {one.ref}"))
                for one, source in zip(inputs, sources, strict=True)
            ]
            if parameter.option == "weights":
                weights = values
            else:
                options[parameter.option] = values[0] if len(set(values)) == 1 else tuple(values)
        key = (tuple(weights) if weights is not None else None, tuple(options.items()), len(inputs))
        if key not in self._made:
            where = f"merge config, parameters of {name}"
            config = parse_options(type(self.merger).Config, options, where)
            self._made[key] = settled(self.merger, weights, len(inputs), config, f"{where}, weight", where + ",")
        return self._made[key]

    def _setting(
        self, parameter: Parameter, levels: Sequence[Mapping[str, Any]], name: str, place: _Place, of: str
    ) -> float | bool:
        for level in levels:
            if parameter.name in level:
                value = setting_at(level[parameter.name], name, place.depth, parameter)
                if value is not None:
                    return value
        if parameter.default is None:
            where = f"merge config, parameters of {name}"
            fix = f"End the list of {parameter.name!r} with an entry without a filter."
            raise UserError(where, f"no filter of {parameter.name!r}{of} matches", fix)
        return parameter.default

    def _changes(self, base_config: Mapping[str, Any]) -> dict[str, Any]:
        """The number of layers, and lists with an entry for each layer."""
        origin = [
            (one.layers or (0, 0))[0] + offset
            for part in self.config.slices
            for one in part.inputs[:1]
            for offset in range((one.layers or (0, 0))[1] - (one.layers or (0, 0))[0])
        ]
        key = next((key for key in LAYER_KEYS if key in base_config), LAYER_KEYS[0])
        changes: dict[str, Any] = {} if base_config.get(key) == len(origin) else {key: len(origin)}
        for listed in PER_LAYER_KEYS:
            old = base_config.get(listed)
            if isinstance(old, list) and max(origin) < len(old) and old != [old[index] for index in origin]:
                changes[listed] = [old[index] for index in origin]
        return changes


def _depth(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def _in_layers(name: str, prefix: str) -> bool:
    found = _LAYER.fullmatch(name)
    return found is not None and found["prefix"] == prefix
