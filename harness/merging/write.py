"""Safetensors shards that are laid out beforehand and filled in any order, and the small files of a model folder.

Every size is known before anything is merged, so each tensor has its place: what is written does not depend on who
writes first. Written by ``pwrite``: threads share the files without a lock.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.models.chat_templates import read_chat_template
from harness.models.inspect import TOKENIZER_FILES
from harness.models.tensors import STORED_NAMES, TORCH_NAMES
from harness.steps.files import refusal, write_bytes

if TYPE_CHECKING:
    import torch

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in one file, unless asked otherwise: what transformers has long cut at."""
_PIECE = 1 << 26
_UNSYNCED = 1 << 27
"""Bytes written after which the disk is asked to take them, while the next tensors are made."""
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}
_SPARE = 64 << 20
"""Left free on the disk besides what the model takes."""


@dataclass(frozen=True)
class TensorShape:
    """One tensor to be written."""

    name: str
    dtype: str
    """In safetensors' words."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The tensor's size in bytes."""
        size = _BYTES.get(self.dtype, 1)
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Slot:
    """The place of one tensor."""

    plan: TensorShape
    file: str
    start: int


class Shards:
    """The weight files of one folder, open for writing.

    Args:
        folder: exists and is ours.
        plans: the tensors in their order.
        shard_size: most bytes of tensors in a file; a tensor that is larger gets a file of its own.
        stem: ``model``, or ``adapter_model``.
    """

    def __init__(self, folder: Path, plans: Sequence[TensorShape], shard_size: int, stem: str = "model") -> None:
        self.folder = folder
        groups: list[list[TensorShape]] = [[]]
        filled = 0
        for plan in plans:
            if groups[-1] and filled + plan.size > shard_size:
                groups.append([])
                filled = 0
            groups[-1].append(plan)
            filled += plan.size
        count = len(groups)
        self.files = [
            f"{stem}.safetensors" if count == 1 else f"{stem}-{n + 1:05d}-of-{count:05d}.safetensors"
            for n in range(count)
        ]
        self.slots: dict[str, Slot] = {}
        self.total = sum(plan.size for plan in plans)
        self._left = {file: len(group) for file, group in zip(self.files, groups, strict=True)}
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._written = 0
        self._wake = threading.Event()
        self._ending = False
        self._lost: OSError | None = None
        self._flusher = threading.Thread(target=self._flush, name="flush", daemon=True)
        try:
            for file, group in zip(self.files, groups, strict=True):
                self._begin(file, group)
        except BaseException:
            self.close()
            raise
        self._flusher.start()

    def _flush(self) -> None:
        """Push what was written to the disk in the background; the last sync of a file, which counts, is its own."""
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._ending:
                return
            for descriptor in list(self._open.values()):
                try:
                    os.fdatasync(descriptor)
                except OSError as error:
                    # The system tells of a lost write once: the sync at the file's end would find nothing wrong.
                    self._lost = self._lost or error

    def _begin(self, file: str, group: Sequence[TensorShape]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for plan in group:
            header[plan.name] = {"dtype": plan.dtype, "shape": plan.shape, "data_offsets": [end, end + plan.size]}
            end += plan.size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # Padded, so that every tensor lies at a multiple of 8 bytes where its neighbours let it.
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        for plan in group:
            self.slots[plan.name] = Slot(plan, file, begin + header[plan.name]["data_offsets"][0])
        path = self.folder / file
        try:
            self._open[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._write(file, struct.pack("<Q", len(text)) + text, 0)
            os.ftruncate(self._open[file], begin + end)
        except OSError as error:
            raise _disk_error(path, error) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, in its place, and (the last of a file) make that file durable.

        Args:
            name: one of the plan's.
            tensor: of the planned type and shape, on the CPU.
        """
        import torch

        slot = self.slots[name]
        dtype = STORED_NAMES[str(tensor.dtype).removeprefix("torch.")]
        if (dtype, tuple(tensor.shape)) != (slot.plan.dtype, slot.plan.shape):
            raise ValueError(f"{name}: {dtype} {tuple(tensor.shape)} was not planned: {slot.plan}")
        flat: Any = tensor.contiguous().flatten().view(torch.uint8).numpy() if tensor.numel() else b""
        try:
            self._write(slot.file, memoryview(flat), slot.start)
            with self._lock:
                self._left[slot.file] -= 1
                last = self._left[slot.file] == 0
                self._written += slot.plan.size
                if self._written > _UNSYNCED:
                    self._written = 0
                    self._wake.set()
            if last:
                os.fsync(self._open[slot.file])
        except OSError as error:
            raise _disk_error(self.folder / slot.file, error) from error

    def _write(self, file: str, data: memoryview | bytes, start: int) -> None:
        view = memoryview(data)
        while view:
            # A write may be cut short (at 2 GiB always).
            done = os.pwrite(self._open[file], view[:_PIECE], start)
            view, start = view[done:], start + done

    def finish(self) -> dict[str, int]:
        """Write the index where there are several files, and return the sizes of all.

        Raises:
            RuntimeError: a tensor was not written.
        """
        if any(self._left.values()):
            raise RuntimeError(f"tensors are missing: {self._left}")
        self.close()
        if self._lost is not None:
            raise _disk_error(self.folder / self.files[0], self._lost) from self._lost
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {name: slot.file for name, slot in sorted(self.slots.items())},
            }
            stem = self.files[0].split("-0")[0]
            write_bytes(
                self.folder / f"{stem}.safetensors.index.json",
                (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode(),
            )
        return {file: (self.folder / file).stat().st_size for file in self.files}

    def close(self) -> None:
        """Close the files, whatever state they are in."""
        self._ending = True
        self._wake.set()
        if self._flusher.is_alive():
            self._flusher.join()
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def check_disk(folder: Path, needed: int, where: str) -> None:
    """Refuse to begin where the disk has no room for what will be written.

    Raises:
        UserError: with what is needed and what is free.
    """
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE:
        raise UserError(
            where,
            f"the result takes {_gigabytes(needed)}, and {_gigabytes(free)} are free on that disk",
            "Free some space, or give a folder on another disk.",
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"


def write_small_files(
    out: Path, base: ModelInfo, *, changes: Mapping[str, Any], dtype: str, template: str | None
) -> None:
    """Config, generation config, tokenizer and chat template of a merged model.

    Args:
        out: its folder.
        base: the model that everything but the weights is taken from.
        changes: keys of config.json that differ.
        dtype: type of the weights in torch's words, or ``auto``: the base's.
        template: chat template that the inputs brought, where the base has none of its own.
    """
    config = dict(base.config)
    for key, value in changes.items():
        # Of models that read more than text, the language model's part counts.
        inner = config.get("text_config")
        if isinstance(inner, Mapping) and key in inner:
            config["text_config"] = {**inner, key: value}
        else:
            config[key] = value
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    # The auto map names code beside the model, which comes along.
    write_bytes(out / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    source = Path(base.path)
    extra = ["generation_config.json", "preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES]
    files = [source / name for name in extra]
    if base.remote_code and base.spec.get("trust_remote_code"):
        files += sorted(source.glob("*.py"))
    for file in files:
        if file.is_file():
            write_bytes(out / file.name, file.read_bytes())
    if template is not None and template != read_chat_template(out):
        write_bytes(out / "chat_template.jinja", template.encode())


def target_dtype(stored: str, asked: str) -> str:
    """The type that a float tensor is written in, in safetensors' words.

    Args:
        stored: as the base has it.
        asked: torch's name, or ``auto``.
    """
    return stored if asked == "auto" or TORCH_NAMES[stored] == asked else STORED_NAMES[asked]


def _disk_error(path: Path, error: OSError) -> Exception:
    refused = refusal(error)
    if refused is None:
        return error
    what, fix = refused
    return UserError(str(path), what, f"Nothing of the unfinished model is kept. {fix}")
