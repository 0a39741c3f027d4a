"""Inputs of a merge under a control: adapters that stand for one are summed in; all else has to be the same in all."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.conditioning import Conditioning, refuse_control
from harness.core.errors import UserError
from harness.core.records import AdapterInfo
from harness.models.conditioning import control_adapters, control_texts, soft_prompt, write_conditioning
from harness.models.files import read_adapter_config
from harness.models.lineage import CONFIG, concatenate
from harness.steps.files import write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Controlled:
    """An adapter under one control of its conditioning."""

    adapter: AdapterInfo
    control: str
    """What was asked for, or the default."""
    summed: AdapterInfo
    """The adapter with those that stand for the control."""
    scratch: tempfile.TemporaryDirectory[str] | None = None
    """Where the sum lies; it goes with this object."""

    @property
    def conditioning(self) -> Conditioning:
        """That the adapter was trained with."""
        assert self.adapter.conditioning is not None
        return self.adapter.conditioning

    @property
    def note(self) -> str:
        """What a record says of it."""
        default = ", the default of its conditioning" if self.control == self.conditioning.default else ""
        how = {
            "adapter": "the adapter that stands for it is summed in",
            "text": "its text stands beside the result",
            "embeddings": "its virtual tokens stand beside the result",
        }[self.conditioning.kind(self.control)]
        return f"{self.adapter.name} is taken under control {self.control}{default}: {how}"

    @property
    def beside(self) -> str | Tensor | None:
        """Text or virtual tokens that prompts of the result need; None: weights alone do."""
        kind = self.conditioning.kind(self.control)
        if kind == "adapter":
            return None
        if kind == "text":
            return control_texts(self.conditioning, self.control)
        return soft_prompt(self.adapter, self.control)


def under_control(adapter: AdapterInfo, asked: str | None, where: str) -> Controlled | None:
    """An adapter under what is asked for, or its default; None: it has no conditioning.

    Raises:
        UserError: a value that was not trained, or adapters that cannot be summed exactly.
    """
    found = adapter.conditioning
    what = f"{adapter.name} has no conditioning.json"
    refuse_control([asked] if asked is not None else [], found, what, f"{where}, control")
    if found is None:
        return None
    control = found.resolve(asked, f"{where}, control")
    more = control_adapters(adapter, control)
    if not more:
        return Controlled(adapter, control, adapter)
    scratch = tempfile.TemporaryDirectory(prefix="harness-control-")
    path = Path(adapter.path)
    for number, part in enumerate(more):
        out = Path(scratch.name) / str(number)
        out.mkdir()
        concatenate(path, Path(part.path), out)
        path = out
    config = read_adapter_config(path / CONFIG, where)
    told = {"path": str(path), "config": config, "rank": config["r"], "conditioning": None}
    return Controlled(adapter, control, adapter.model_copy(update=told), scratch)


@dataclass(frozen=True)
class Carried:
    """What prompts of a result need, as all of its inputs did."""

    name: str
    value: str | Tensor
    conditioning: Conditioning

    def write(self, folder: Path) -> None:
        """Write it beside the result: a conditioning of one value."""
        position = self.conditioning.position
        write_conditioning(_Files(folder), {self.name: self.value}, default=self.name, position=position)


def carried_by(inputs: Sequence[tuple[str, Controlled | None]]) -> Carried | None:
    """What stands beside the inputs of a merge and is the same in all; None: nothing does.

    Args:
        inputs: label and control of each.

    Raises:
        UserError: it differs, so that no prompt would be right for the result.
    """
    values = [(label, one, one.beside if one is not None else None) for label, one in inputs]
    first = next(((label, one, value) for label, one, value in values if one is not None and value is not None), None)
    if first is None:
        return None
    known, one, value = first
    assert one is not None and value is not None
    for label, other, its in values:
        if other is None or its is None or not _same(value, its):
            what = f"has {_said(other)}, and {known} has {_said(one)}"
        elif other.conditioning.position != one.conditioning.position:
            what = f"has its control {other.conditioning.position}, and {known} {one.conditioning.position}"
        else:
            continue
        fix = "Merge adapters under the same control, or evaluate each by itself: only equal ones can be carried over."
        raise UserError(f"{label}, control", what, fix)
    names = {other.control for _, other, _ in values if other is not None}
    plain = len(names) == 1 and re.fullmatch(r"[\w.+-]+", one.control) is not None
    return Carried(one.control if plain else "merged", value, one.conditioning)


def _said(one: Controlled | None) -> str:
    if one is None:
        return "no conditioning"
    words = {"text": "the text", "embeddings": "the virtual tokens", "adapter": "the adapter"}
    return f"{words[one.conditioning.kind(one.control)]} of {one.control}"


def _same(one: str | Tensor, other: str | Tensor) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and one == other
    return one.shape == other.shape and bool((one == other).all())


@dataclass(frozen=True)
class _Files:
    """A :class:`harness.ArtifactFiles` of a result's folder, which the harness itself writes."""

    folder: Path

    def write(self, name: str, data: bytes) -> None:
        write_bytes(self.folder / name, data)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.folder / name, dict(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        write_bytes(self.folder / name, save({key: one.contiguous() for key, one in tensors.items()}))
