"""mergekit's methods and their parameters, as of 0.1.5, and a file of its YAML as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.core.config import KeyPath, Located


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method of mergekit's, and the option of ours that it becomes."""

    name: str
    kind: Literal["number", "switch"]
    each: Literal["merge", "input", "other"]
    """One value for the merge, for each input, or for each input but the base."""
    default: float | bool | None
    """None: mergekit demands it."""
    option: str | None
    """None: it changes no number."""
    values: Mapping[bool, str] = field(default_factory=dict)
    """What a switch becomes, where the option is a word."""


@dataclass(frozen=True)
class Method:
    """One method of mergekit's."""

    base: Literal["first", "apart", "optional", "ignored"]
    """The base is the first of the inputs, none of them, none of them if there is one, or one as any other."""
    inputs: tuple[int, int | None]
    """Least and greatest number, the base not counted where it is apart."""
    parameters: tuple[Parameter, ...]


_WEIGHT = Parameter("weight", "number", "other", None, "weights")
_INT8 = Parameter("int8_mask", "switch", "merge", False, None)


def _arithmetic(normalize: bool, rescale: bool | None, sparse: bool) -> Method:
    """Of the family of task arithmetic; ``rescale`` None: it has no effect."""
    words = {True: "l1", False: "none"}
    return Method(
        "apart",
        (0, None),
        (
            _WEIGHT,
            Parameter("density", "number", "other", 1.0, "density" if sparse else None),
            Parameter("normalize", "switch", "merge", normalize, "normalize"),
            Parameter("lambda", "number", "merge", 1.0, "scale"),
            Parameter("rescale", "switch", "merge", bool(rescale), None if rescale is None else "rescale", words),
            _INT8,
        ),
    )


METHODS: dict[str, Method] = {
    "linear": Method(
        "ignored",
        (1, None),
        (
            Parameter("weight", "number", "input", None, "weights"),
            Parameter("normalize", "switch", "merge", True, "normalize"),
        ),
    ),
    "slerp": Method("first", (2, 2), (Parameter("t", "number", "merge", None, "t"),)),
    "nuslerp": Method(
        "optional",
        (2, 2),
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", "switch", "merge", True, "flatten"),
            Parameter("nuslerp_row_wise", "switch", "merge", False, "row_wise"),
        ),
    ),
    "task_arithmetic": _arithmetic(normalize=False, rescale=None, sparse=False),
    "ties": _arithmetic(normalize=True, rescale=False, sparse=True),
    "dare_linear": _arithmetic(normalize=False, rescale=True, sparse=True),
    "dare_ties": _arithmetic(normalize=False, rescale=True, sparse=True),
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Ref:
    """``MODEL@REVISION+LORA@REVISION``."""

    model: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None
    control: str | None = None
    """Value of the adapter's conditioning: the one key that is not mergekit's."""

    def __str__(self) -> str:
        parts = [(self.model, self.revision), *([(self.lora, self.lora_revision)] if self.lora else [])]
        named = "+".join(f"{path}@{revision}" if revision else f"{path}" for path, revision in parts)
        return named if self.control is None else f"{named} under {self.control}"


@dataclass(frozen=True)
class ConfigInput:
    """One model of a slice."""

    ref: Ref
    layers: tuple[int, int] | None
    """First layer, and the one after the last; None: all."""
    parameters: Mapping[str, Any]
    path: KeyPath


@dataclass(frozen=True)
class ConfigSlice:
    """Layers of the result that are made of the same layers' ranges."""

    inputs: tuple[ConfigInput, ...]
    base: Ref | None
    parameters: Mapping[str, Any]
    path: KeyPath

    @property
    def others(self) -> tuple[ConfigInput, ...]:
        """All but the base."""
        return tuple(one for one in self.inputs if one.ref != self.base)


@dataclass(frozen=True)
class MergeConfig:
    """The file, read."""

    name: str
    method: Method
    base: Ref | None
    slices: tuple[ConfigSlice, ...]
    parameters: Mapping[str, Any]
    dtype: str | None
    located: Located
    notes: tuple[str, ...]

    @property
    def refs(self) -> tuple[Ref, ...]:
        """The merge's inputs, in the order of their first appearance."""
        apart = self.method.base in ("apart", "optional")
        found = (one.ref for part in self.slices for one in (part.others if apart else part.inputs))
        return tuple(dict.fromkeys(found))


def scalar(value: Any, parameter: Parameter) -> float | bool:
    """One value in the parameter's own type; a number may be a string, as YAML reads 1e-3."""
    if parameter.kind == "switch":
        if value not in (True, False):
            raise ValueError
        return bool(value)
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if number - number != 0:
        raise ValueError
    return number


def setting_at(setting: Any, name: str, depth: float, parameter: Parameter) -> float | bool | None:
    """A parameter's value for one tensor, as mergekit finds it; None: no filter matches.

    Args:
        setting: a value; a list of values, interpolated over the depth (of switches: the one at or below it); or
            entries with ``filter`` (part of the tensor's name; ``*`` or none: all) and ``value``, of which the first
            that matches counts.
        depth: 0 at the first layer of the slice, and outside the layers; 1 at the last.
    """
    entries = [setting] if isinstance(setting, dict) else setting
    if not isinstance(entries, list):
        return scalar(entries, parameter)
    if isinstance(entries[0], dict):
        for one in entries:
            wanted = one.get("filter")
            if wanted is None or wanted == "*" or wanted in name:
                return setting_at(one["value"], name, depth, parameter)
        return None
    values = [scalar(one, parameter) for one in entries]
    place = depth * (len(values) - 1)
    if parameter.kind == "switch":
        return values[int(place)]
    low = int(place)
    high = min(len(values) - 1, low + 1)
    return (1 - (place - low)) * values[low] + (place - low) * values[high]
