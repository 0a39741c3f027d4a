"""mergekit's YAML, read into a merge; what is not supported is refused by name.

The meaning of every key is that of mergekit 0.1.5: which parameters a method has, at which levels they may stand, who
counts as an input. Paths stay as they are written: relative ones start from the working directory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.core.config import KeyPath, Located, load_yaml, parse_options
from harness.core.errors import UserError, nearest
from harness.core.specs import MergeInput, MergeSpec
from harness.merging.mergekit.methods import (
    DTYPES,
    METHODS,
    ConfigInput,
    ConfigSlice,
    MergeConfig,
    Parameter,
    Ref,
    scalar,
)

TOP = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
)
REFUSED = {
    "modules": "Write `models` or `slices`: merging several modules apart is not supported.",
    "chat_template": "Delete it: the base's template is kept.",
    "residual_weight": "Delete it: mergekit reads it nowhere.",
}


def read_merge_config(path: Path, *, seed: int = 0) -> MergeSpec:
    """The merge that a YAML file of mergekit's describes.

    Raises:
        UserError: with file, line and key, for whatever the file says that is not supported or makes no sense.
    """
    located = load_yaml(path)
    return merge_spec(parse_merge_config(located), located.data, seed=seed)


def merge_spec(config: MergeConfig, data: Mapping[str, Any], *, seed: int = 0) -> MergeSpec:
    """The merge of a file that is read already."""
    base = config.base
    if base is not None and base.lora_revision is not None:
        where = config.located.where(("base_model",))
        raise UserError(where, f"a revision of the adapter under the base: {base}", "Give the adapter as a folder.")
    fields = {
        "method": config.name,
        "base": None if base is None else {"model": base.model, "revision": base.revision, "adapter": base.lora},
        "inputs": tuple(_input(ref, base, config.located) for ref in config.refs),
        "config": dict(data),
        "seed": seed,
        "dtype": config.dtype or "auto",
    }
    return parse_options(MergeSpec, fields, "harness merge")


def _input(ref: Ref, base: Ref | None, located: Located) -> MergeInput:
    if ref.lora is None:
        return MergeInput(ref=ref.model, base=None, revision=ref.revision, control=ref.control)
    if base is not None and base.lora is None and (base.model, base.revision) == (ref.model, ref.revision):
        return MergeInput(ref=ref.lora, base=None, revision=ref.lora_revision, control=ref.control)
    if ref.revision is not None:
        raise UserError(
            located.where(()), f"a revision of the model under an adapter: {ref}", "Give that model as a folder."
        )
    return MergeInput(ref=ref.lora, base=ref.model, revision=ref.lora_revision, control=ref.control)


# ---------------------------------------------------------------------------------------------------------- reading


def parse_merge_config(located: Located) -> MergeConfig:
    """The data of a file of mergekit's, checked.

    Raises:
        UserError: with the key, and the line where it is known.
    """
    top = _mapping(located, (), TOP)
    name = top.get("merge_method")
    if name not in METHODS:
        known = ", ".join(METHODS)
        close = nearest(str(name), METHODS)
        fix = f"Did you mean {close[0]!r}? " if close else ""
        what = "required key 'merge_method' is missing" if name is None else f"merge method {name!r} is not supported"
        raise UserError(located.where(("merge_method",)), what, f"{fix}Supported of mergekit's: {known}.")
    method = METHODS[name]
    base = _ref(located, ("base_model",)) if top.get("base_model") is not None else None
    if base is None and method.base in ("first", "apart") and not top.get("slices"):
        raise UserError(located.where(()), f"{name} needs a `base_model`", "Name the model under all others.")
    _check_tokenizer(located, base)
    notes: list[str] = []
    parameters = _parameters(located, ("parameters",), name, notes)
    slices = _slices(located, name, base, notes)
    bases = {part.base for part in slices}
    if method.base != "ignored" and base is None and len(bases) == 1:
        base = next(iter(bases))
    config = MergeConfig(name, method, base, slices, parameters, _dtype(located, notes), located, tuple(notes))
    for part in slices:
        _check_slice(config, part)
    if not config.refs:
        raise UserError(located.where(()), "there is no model besides the base", "Name the models to merge.")
    return config


def _value(located: Located, path: KeyPath) -> Any:
    value = located.data
    for part in path:
        value = value[part]
    return value


def _mapping(located: Located, path: KeyPath, allowed: Sequence[str]) -> Mapping[str, Any]:
    value = _value(located, path)
    if not isinstance(value, dict):
        raise UserError(
            located.where(path), f"expected a mapping, found {value!r}", f"Allowed keys: {', '.join(allowed)}."
        )
    for key in value:
        if key in allowed:
            continue
        close = nearest(str(key), allowed)
        fix = f"Did you mean {close[0]!r}? " if close else ""
        fix = REFUSED.get(str(key), f"{fix}Supported here: {', '.join(allowed)}.")
        raise UserError(located.where((*path, key)), f"key {key!r} is not supported", fix)
    return value


def _ref(located: Located, path: KeyPath) -> Ref:
    """A model as mergekit writes it: a string, or a mapping with `model` and `lora`, each with `path`, `revision`."""
    value = _value(located, path)
    where = located.where(path)
    if isinstance(value, dict):
        _mapping(located, path, ("model", "lora"))
        parts = [value[key] for key in ("model", "lora") if value.get(key) is not None]
        if "model" not in value:
            raise UserError(where, "required key 'model' is missing", "Allowed keys: model, lora.")
    else:
        parts = value.split("+") if isinstance(value, str) else []
    found: list[str | None] = []
    for part in parts:
        pair = [part.get("path"), part.get("revision")] if isinstance(part, dict) else str(part).split("@")
        known = not isinstance(part, dict) or set(part) <= {"path", "revision"}
        if not known or len(pair) > 2 or not isinstance(pair[0], str) or not pair[0].strip():
            parts = []
            break
        found += [pair[0], pair[1] if len(pair) == 2 else None]
    if not 1 <= len(parts) <= 2:
        raise UserError(where, f"no model: {value!r}", "Write MODEL, MODEL@REVISION or MODEL+ADAPTER.")
    model, revision, lora, lora_revision = [*found, None, None][:4]
    return Ref(str(model), revision, lora, lora_revision)


def _check_tokenizer(located: Located, base: Ref | None) -> None:
    """Only the base's tokenizer: `base`, or the base's own name."""
    path: KeyPath = ("tokenizer_source",)
    source = located.data.get("tokenizer_source")
    if located.data.get("tokenizer") is not None:
        path = ("tokenizer", "source")
        source = _mapping(located, ("tokenizer",), ("source",)).get("source", "union")
    if source is None or (base is not None and source in ("base", str(base))):
        return
    fix = "Write `tokenizer_source: base` and a `base_model`, or leave it out; all models must have one vocabulary."
    raise UserError(located.where(path), f"tokenizer source {source!r} is not supported", fix)


def _dtype(located: Located, notes: list[str]) -> str | None:
    names = {}
    for key in ("dtype", "out_dtype"):
        value = located.data.get(key)
        if value is None:
            continue
        names[key] = str(value).removeprefix("torch.")
        if names[key] not in DTYPES:
            raise UserError(located.where((key,)), f"dtype {value!r} is not supported", f"One of: {', '.join(DTYPES)}.")
    if names.get("dtype", "float32") != "float32":
        notes.append(f"computed in float32 and rounded once; mergekit rounds the inputs to {names['dtype']} first")
    return names.get("out_dtype", names.get("dtype"))


def _slices(located: Located, name: str, base: Ref | None, notes: list[str]) -> tuple[ConfigSlice, ...]:
    given = [key for key in ("models", "slices") if located.data.get(key)]
    if len(given) != 1:
        what = "neither `models` nor `slices` is given" if not given else "both `models` and `slices` are given"
        raise UserError(located.where(()), what, "Give one of the two.")
    key = given[0]
    if not isinstance(located.data[key], list):
        raise UserError(located.where((key,)), f"expected a list, found {located.data[key]!r}", "Write a list.")
    if key == "models":
        inputs = [_one(located, ("models", i), name, base, notes, ranged=False) for i in range(len(located.data[key]))]
        if base is not None and all(one.ref != base for one in inputs):
            inputs.append(ConfigInput(base, None, {}, ("base_model",)))
        return (ConfigSlice(tuple(inputs), base, {}, ("models",)),)
    found = []
    for index in range(len(located.data[key])):
        path: KeyPath = ("slices", index)
        part = _mapping(located, path, ("sources", "base_model", "parameters"))
        if not isinstance(part.get("sources"), list) or not part["sources"]:
            raise UserError(located.where((*path, "sources")), "expected a list of models", "Give `sources`.")
        own = _ref(located, (*path, "base_model")) if part.get("base_model") is not None else base
        inputs = [
            _one(located, (*path, "sources", i), name, own, notes, ranged=True) for i in range(len(part["sources"]))
        ]
        found.append(ConfigSlice(tuple(inputs), own, _parameters(located, (*path, "parameters"), name, notes), path))
    return tuple(found)


def _one(
    located: Located, path: KeyPath, name: str, base: Ref | None, notes: list[str], *, ranged: bool
) -> ConfigInput:
    keys = ("model", "layer_range", "parameters", "control") if ranged else ("model", "parameters", "control")
    entry = _mapping(located, path, keys)
    if entry.get("model") is None:
        raise UserError(located.where(path), "required key 'model' is missing", f"Allowed keys: {', '.join(keys)}.")
    ref = _ref(located, (*path, "model"))
    control = entry.get("control")
    if control is not None and not isinstance(control, str):
        what = f"{control!r} is no value of a conditioning"
        raise UserError(located.where((*path, "control")), what, "Name one value, in quotes if need be.")
    ref = replace(ref, control=control)
    layers = None
    if ranged:
        layers = entry.get("layer_range")
        ends = layers if isinstance(layers, list) and all(type(end) is int for end in layers) else []
        if len(ends) != 2 or not 0 <= ends[0] < ends[1]:
            fix = "Write [first, after the last], counted from 0, such as [0, 32]."
            raise UserError(located.where((*path, "layer_range")), f"no range of layers: {layers!r}", fix)
    parameters = _parameters(located, (*path, "parameters"), name, notes, of_input=True)
    return ConfigInput(ref, tuple(layers) if layers else None, parameters, path)


# ------------------------------------------------------------------------------------------------------- parameters


def _parameters(
    located: Located, path: KeyPath, name: str, notes: list[str], *, of_input: bool = False
) -> Mapping[str, Any]:
    """The parameters of one level, as mergekit has them, each checked."""
    holder = _value(located, path[:-1])
    if holder.get("parameters") is None:
        return {}
    known = {one.name: one for one in METHODS[name].parameters}
    values = _mapping(located, path, tuple(known))
    for key, value in values.items():
        parameter = known[key]
        where = (*path, key)
        if of_input and parameter.each == "merge":
            fix = f"Write it under the top-level `parameters`: mergekit reads {key!r} only there and in a slice."
            raise UserError(located.where(where), f"{key!r} belongs to the merge, not to one model", fix)
        check_setting(located, where, value, parameter)
        if parameter.option is None:
            note = f"{key} has no effect on the result of {name}"
            notes += [] if note in notes else [note]
    return values


def check_setting(located: Located, path: KeyPath, value: Any, parameter: Parameter) -> None:
    """A value, a gradient over layers, or a list of values with filters."""
    where = located.where(path)
    wanted = "a number" if parameter.kind == "number" else "true or false"
    fix = f"{parameter.name} is {wanted}, a list of such over the layers, or entries with `filter` and `value`."
    entries = [value] if isinstance(value, dict) else value
    if isinstance(entries, list) and entries and all(isinstance(one, dict) for one in entries):
        for index, one in enumerate(entries):
            inside = path if isinstance(value, dict) else (*path, index)
            _mapping(located, inside, ("filter", "value"))
            if not isinstance(one.get("filter", ""), str | None) or isinstance(one.get("value"), dict):
                raise UserError(located.where(inside), f"not a filter with its value: {one!r}", fix)
            if any(isinstance(inner, dict) for inner in _listed(one.get("value"))):
                raise UserError(located.where(inside), f"a filter within a filter: {one!r}", fix)
            check_setting(located, (*inside, "value"), one.get("value"), parameter)
        return
    for one in _listed(value):
        try:
            scalar(one, parameter)
        except (TypeError, ValueError):
            raise UserError(where, f"not {wanted}: {one!r}", fix) from None
    if value == []:
        raise UserError(where, "an empty list", fix)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_slice(config: MergeConfig, part: ConfigSlice) -> None:
    """What mergekit checks of the models of a slice."""
    located, method = config.located, config.method
    refs = [one.ref for one in part.inputs]
    twice = [one for index, one in enumerate(part.inputs) if one.ref in refs[:index]]
    if twice:
        raise UserError(located.where(twice[0].path), f"{twice[0].ref} is given twice", "Name each model once.")
    lengths = {one.layers[1] - one.layers[0] for one in part.inputs if one.layers is not None}
    if len(lengths) > 1:
        what = f"ranges of {' and '.join(map(str, sorted(lengths)))} layers"
        raise UserError(located.where(part.path), what, "All sources of a slice have the same number of layers.")
    if method.base != "ignored":
        if part.base is None and method.base != "optional":
            raise UserError(located.where(part.path), f"{config.name} needs a `base_model`", "Name one of the sources.")
        if part.base is not None and part.base not in refs:
            fix = "Add it with its layer_range: mergekit takes the base of a slice from its sources."
            raise UserError(located.where(part.path), f"the base model {part.base} is none of the sources", fix)
        if method.base != "first" and part.base != config.base:
            fix = "Give one `base_model`, at the top."
            raise UserError(located.where(part.path), f"{config.name} with a base of its own for a slice", fix)
    counted = part.inputs if method.base in ("first", "ignored") else part.others
    least, most = method.inputs
    if len(counted) < least or (most is not None and len(counted) > most):
        besides = "" if method.base in ("first", "ignored") else " besides the base"
        number = str(least) if least == most else f"{least} or more"
        what = f"{config.name} merges {number} models{besides}, found {len(counted)}"
        raise UserError(located.where(part.path), what, f"Found: {', '.join(map(str, refs))}.")
    _check_given(config, part, counted)


def _check_given(config: MergeConfig, part: ConfigSlice, counted: Sequence[ConfigInput]) -> None:
    """Parameters without a default stand somewhere."""
    for parameter in config.method.parameters:
        if parameter.default is not None:
            continue
        above = parameter.name in part.parameters or parameter.name in config.parameters
        for one in counted:
            if not above and (parameter.each == "merge" or parameter.name not in one.parameters):
                of = "" if parameter.each == "merge" else f" for {one.ref}"
                fix = f"Give {parameter.name!r} there or under the top-level `parameters`; mergekit demands it too."
                raise UserError(config.located.where(one.path), f"{config.name} without {parameter.name!r}{of}", fix)
