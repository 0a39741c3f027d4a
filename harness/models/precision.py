"""Which type a model's weights are loaded in, settled while planning: it enters ids, rows and pedigrees."""

from __future__ import annotations

from harness.core.machine import GIB, memory_bytes
from harness.core.records import ModelInfo
from harness.models.inspect import weight_files
from harness.models.tensors import FLOATS, TORCH_NAMES, read_header

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SHARE = 0.8
"""Most of the machine's memory that fp32 weights may take: of all of it, as what is free now is not so later."""


def settle_dtype(model: ModelInfo, device: str | None) -> tuple[ModelInfo, str | None]:
    """The model with the type that ``auto`` means on a kind of device, and what a reader must know of it.

    On a CPU that is fp32: most compute bf16 tens of times slower, and byte-identity is promised for fp32. Where that
    does not fit the memory, and on an accelerator, it is what is stored. Where no device is known, and for a quantised
    checkpoint, ``auto`` stays what the engine makes of it.
    """
    if asked_dtype(model) != "auto" or device is None or "quantization_config" in model.config:
        return model, None
    stored = _stored(model)
    dtype, note = _on_cpu(model, stored) if device == "cpu" else (stored or "auto", None)
    return with_dtype(model, dtype), note


def _on_cpu(model: ModelInfo, stored: str | None) -> tuple[str, str | None]:
    """fp32, or two bytes a weight where fp32 does not fit, and then a note that says so."""
    need = model.size_bytes * BYTES["float32"] / BYTES.get(stored or "float32", 4)
    total, _ = memory_bytes()
    if not total or need <= SHARE * total:
        return "float32", None
    dtype = stored if stored is not None and BYTES[stored] == 2 else "bfloat16"
    sizes = f"{need / GIB:.1f} GiB of weights, {total / GIB:.1f} GiB of memory"
    return dtype, f"{model.name} is loaded in {dtype}: float32 does not fit this machine ({sizes})"


def asked_dtype(model: ModelInfo) -> str:
    """The type that the user named, or ``auto``; once settled, the type itself."""
    return str(model.spec.get("dtype") or "auto")


def with_dtype(model: ModelInfo, dtype: str) -> ModelInfo:
    """The same model, to be loaded in a type."""
    return model.model_copy(update={"spec": {**model.spec, "dtype": dtype}})


def _stored(model: ModelInfo) -> str | None:
    """The type of a checkpoint's weights, as its config says, else as its first float tensor is; None: another one."""
    if model.dtype is not None or model.pickled or not model.path:
        return model.dtype if model.dtype in BYTES else None
    for file in weight_files(model):
        found = [entry.dtype for entry in read_header(file).values() if entry.dtype in FLOATS]
        if found:
            return TORCH_NAMES[found[0]] if TORCH_NAMES[found[0]] in BYTES else None
    return None
