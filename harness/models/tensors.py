"""Tensors of a model folder, read one at a time: a window of the file is mapped and goes with the last use of it.

``safetensors.safe_open`` keeps the whole file mapped, and every page that was touched counts as memory of the process
until it is closed; here nothing stays that no tensor needs. torch is imported when the first tensor is read.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserError, nearest
from harness.models.files import AGAIN, MOST_BYTES, open_file

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' word for a type -> torch's."""
BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Of one number."""
STORED_NAMES = {name: stored for stored, name in TORCH_NAMES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""What can be merged; anything else is copied."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    name: str
    dtype: str
    """In safetensors' words: BF16, F32, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Its first byte, counted from the start of the file."""
    size: int
    """In bytes."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count


def read_header(file: Path, where: str = "") -> dict[str, Entry]:
    """The tensors of one safetensors file, which lie one behind the other and fill it.

    Raises:
        UserError: it is none, is cut off, or its header says what cannot be.
    """
    with open_file(file, where) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
        if length > size - 8:
            raise _torn(file, where, "its header is cut off")
        if length > MOST_BYTES:
            raise _torn(file, where, f"its header has more than {MOST_BYTES} bytes")
        text = stream.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise TypeError
        header.pop("__metadata__", None)
        found = {name: _entry(name, tensor, file, 8 + length) for name, tensor in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f", {error}" if isinstance(error, _MisfitError) else ""
        raise _torn(file, where, f"its header is not JSON that lists tensors{what}") from None
    end = 8 + length
    for entry in sorted(found.values(), key=lambda one: (one.start, one.size)):
        if entry.start != end:
            raise _torn(file, where, f"its header has tensors that overlap or leave a gap ({entry.name[:80]!r})")
        end += entry.size
    if end != size:
        raise _torn(file, where, f"it should hold {end} bytes and holds {size}")
    return found


class _MisfitError(ValueError):
    """What a header says of one tensor cannot be."""


def _entry(name: str, tensor: Any, file: Path, offset: int) -> Entry:
    dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    whole = isinstance(shape, list) and all(type(one) is int and one >= 0 for one in [*shape, begin, end])
    if not isinstance(dtype, str) or not whole or end < begin:
        raise _MisfitError(f"and not {name[:80]!r} as it stands")
    entry = Entry(name, dtype, tuple(shape), file, offset + begin, end - begin)
    bytes_each = BYTES.get(dtype)
    if bytes_each is not None and entry.elements * bytes_each != entry.size:
        raise _MisfitError(f"and not {name[:80]!r} of shape {shape} in {entry.size} bytes")
    return entry


def _torn(file: Path, where: str, problem: str) -> UserError:
    return UserError(f"{where} {file}".strip(), f"not a whole safetensors file: {problem}", AGAIN)


def mapped(entry: Entry) -> torch.Tensor:
    """The tensor in its stored type, on a window of the file.

    The window is private: nothing that is done to the tensor reaches the file.
    """
    import torch

    dtype = getattr(torch, TORCH_NAMES[entry.dtype])
    if entry.size == 0:
        return torch.empty(entry.shape, dtype=dtype)
    first = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as stream:
        window = mmap.mmap(stream.fileno(), entry.start - first + entry.size, access=mmap.ACCESS_COPY, offset=first)
    if entry.start % dtype.itemsize:
        flat = torch.frombuffer(bytearray(window[entry.start - first :]), dtype=dtype)
    else:
        flat = torch.frombuffer(window, dtype=dtype, count=entry.elements, offset=entry.start - first)
    return flat.view(entry.shape)


class TensorFolder:
    """The tensors of a checkpoint or an adapter by name.

    Args:
        files: safetensors files, or pickled ones where the user trusts them.
        label: what to call the model in messages.
        aliases: further names of tensors (tied weights that are stored once).
    """

    def __init__(self, files: Iterable[Path], label: str, aliases: Mapping[str, str] | None = None) -> None:
        self.label = label
        self.aliases = dict(aliases or {})
        self.entries: dict[str, Entry] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        for file in files:
            if file.suffix == ".safetensors":
                self.entries.update(read_header(file))
            else:
                self._take_pickled(file)

    def _take_pickled(self, file: Path) -> None:
        """Unpickled tensors stay on the mapped file; only plain tensors are let through."""
        import pickle

        import torch

        try:
            state: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self.label}, {file.name}",
                f"cannot be read tensor by tensor: {line}",
                "Load the model in transformers and save it again with save_pretrained: that writes safetensors.",
            ) from None
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                stored = STORED_NAMES.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))
                size = tensor.numel() * tensor.element_size()
                self.entries[name] = Entry(name, stored, tuple(tensor.shape), file, 0, size)
                self._pickled[name] = tensor

    @property
    def names(self) -> list[str]:
        """Stored tensors, sorted; aliases are not among them."""
        return sorted(self.entries)

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.entries

    def entry(self, name: str) -> Entry:
        """What is known of a tensor without reading it.

        Raises:
            UserError: there is no such tensor.
        """
        found = self.entries.get(self.aliases.get(name, name))
        if found is None:
            close = nearest(name, self.entries, limit=1)
            raise UserError(
                self.label,
                f"has no tensor {name}",
                f"The nearest that it has: {close[0]}." if close else f"It has {len(self.entries)} tensors.",
            )
        return found

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored type; not to be written to."""
        entry = self.entry(name)
        kept = self._pickled.get(entry.name)
        if kept is not None:
            return kept.contiguous()
        if entry.dtype not in TORCH_NAMES:
            raise UserError(
                f"{self.label}, {entry.name}",
                f"is stored as {entry.dtype}, which cannot be read here",
                f"Save the model again in one of: {', '.join(FLOATS)}.",
            )
        return mapped(entry)


def not_finite(tensor: torch.Tensor) -> str:
    """What is wrong with a tensor's numbers: "NaN", "infinity", or nothing."""
    import torch

    if tensor.numel() == 0 or not tensor.is_floating_point():
        return ""
    # One pass without a temporary; isfinite().all() makes one of a byte per number and takes twenty times as long.
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.to(torch.float32))
    if torch.isnan(low) or torch.isnan(high):
        return "NaN"
    return "infinity" if torch.isinf(low) or torch.isinf(high) else ""
