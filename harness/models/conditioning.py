"""``conditioning.json`` in the folder of an adapter or a model: read, checked and written. Torch-free until asked.

Every file that it names begins with ``conditioning``, lies in the folder, and is part of the digest of what it steers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.aligner import ArtifactFiles
from harness.core.conditioning import Conditioning, Position, conditioning_of
from harness.core.errors import CorruptionError, UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.models.adapter_keys import EMBEDDINGS, Base, check_keys
from harness.models.artifact import CONDITIONING, adapter_digest, largest_rank
from harness.models.files import read_adapter_config, read_object
from harness.models.lineage import CONFIG, WEIGHTS, refuse_unless_plain
from harness.models.tensors import FLOATS, Entry, mapped, not_finite, read_header
from harness.steps.files import read_json, stays_inside, write_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FILE = f"{CONDITIONING}.json"
SOFT = f"{CONDITIONING}/embeddings.safetensors"
"""In a folder: vLLM takes every safetensors file that lies beside config.json for weights of the model."""
_FIX = "Restore the adapter as its method exported it."


@dataclass(frozen=True)
class AdapterControl:
    """A LoRA adapter that stands for a value, in peft's format, before it is written."""

    config: Mapping[str, Any]
    """adapter_config.json"""
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: Any, name: str) -> AdapterControl:
        """An adapter of a PeftModel, by peft's name for it."""
        from peft import get_peft_model_state_dict

        config = json.loads(json.dumps(model.peft_config[name].to_dict(), default=_plain))
        config["target_modules"] = _plain(config["target_modules"]) if config["target_modules"] else []
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        return cls({**config, "inference_mode": True, "base_model_name_or_path": None}, tensors)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list) else str(getattr(value, "value", value))


def write_conditioning(
    files: ArtifactFiles,
    values: Mapping[str, str | Tensor | AdapterControl],
    *,
    default: str,
    position: Position = "after_bos",
    preferences: Mapping[str, Sequence[str]] | None = None,
) -> Conditioning:
    """Write what conditions an adapter's prompts beside it; for a method's ``export``.

    Args:
        files: of the folder.
        values: name of a value (``PREFERENCE=VALUE`` with several preferences) -> a text, virtual tokens of shape
            (tokens, hidden size), or a LoRA adapter.
        default: the control that is applied where none is asked for.
        position: where text and virtual tokens stood in training.
        preferences: preference -> its values, where several were trained.

    Raises:
        UserError: names or values that do not make a conditioning.
    """
    described: dict[str, dict[str, str]] = {}
    soft: dict[str, Tensor] = {}
    adapters: dict[str, AdapterControl] = {}
    for name, value in values.items():
        if isinstance(value, str):
            described[name] = {"text": value}
        elif isinstance(value, AdapterControl):
            described[name] = {"adapter": f"{CONDITIONING}/{name}"}
            adapters[name] = value
        else:
            described[name] = {"embeddings": SOFT}
            soft[name] = value
    found: dict[str, Any] = {"values": described, "default": default, "position": position}
    if preferences:
        found["preferences"] = {kind: list(names) for kind, names in preferences.items()}
    checked = conditioning_of(found, "conditioning")
    for name, adapter in adapters.items():
        folder = f"{CONDITIONING}/{name}"
        files.write_tensors(f"{folder}/{WEIGHTS}", adapter.tensors)
        files.write(f"{folder}/{CONFIG}", (json.dumps(adapter.config, indent=2, sort_keys=True) + "\n").encode())
    if soft:
        files.write_tensors(SOFT, soft)
    files.write_json(FILE, found)
    return checked


# ------------------------------------------------------------------------------------------------------------ reading


def read_conditioning(folder: Path, where: str, model: ModelInfo, base: Base | None) -> Conditioning | None:
    """The conditioning in the folder of an adapter, or of a whole model, checked; None: there is none.

    Args:
        folder: of the adapter or the model.
        where: option and name, for messages.
        model: that it conditions.
        base: the modules of that model; None where its files do not tell.

    Raises:
        UserError: a file that is missing, lies elsewhere or is of another base, numbers that are not finite.
    """
    file = folder / FILE
    if not file.is_file():
        strange = sorted(path.name for path in folder.glob(f"{CONDITIONING}*"))
        if strange:
            raise UserError(where, f"holds {strange[0]}, and no {FILE} that says what it is", _FIX)
        return None
    place = f"{where}, {FILE}"
    _inside(folder, FILE, place)
    found = read_object(file, where)
    try:
        read_json(file)  # the checksum, where it has one
    except CorruptionError:
        raise UserError(place, "is not what was written: its checksum is another", _FIX) from None
    conditioning = conditioning_of(found, place)
    width = _width(model, base)
    for name, value in conditioning.values.items():
        here = f"{place}, values.{name}"
        if value.embeddings is not None:
            _check_embeddings(_inside(folder, value.embeddings, here), value.tensor or name, width, here)
        if value.adapter is not None:
            _check_adapter(folder, value.adapter, base, here)
    for control in conditioning.controls:
        if conditioning.kind(control) == "embeddings":
            count = sum(_soft_entry(folder, conditioning, name).shape[0] for name in conditioning.parts(control))
            refuse_too_long(count, model.max_length, f"{place}, {control}")
    return conditioning


def refuse_too_long(count: int, context: int, where: str) -> None:
    """Refuse a control that leaves no room for a prompt and an answer.

    Raises:
        UserError: naming both lengths.
    """
    if count + 2 > context:
        what = f"takes {count} tokens, and the model's context is {context}"
        raise UserError(where, what, "Take a value with fewer tokens, or a base with a longer context.")


def _inside(folder: Path, name: str, where: str) -> Path:
    """A file or folder that a conditioning names, in its own folder; snapshots of the hub are links to blobs."""
    if not stays_inside(name) or "\\" in name or not name.startswith(CONDITIONING):
        what = f"{name!r} is outside of its folder, or is not called {CONDITIONING}..."
        raise UserError(where, what, "Name a file beside it; what conditions is part of the digest by its name.")
    path, home = folder / name, folder.resolve()
    homes = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    if not path.exists():
        raise UserError(where, f"{name} is missing", _FIX)
    if not any(path.resolve().is_relative_to(one) for one in homes):
        raise UserError(where, f"{name} is a link that leads out of its folder", "Copy what it leads to.")
    return path


def _width(model: ModelInfo, base: Base | None) -> int | None:
    """Length of a token's vector; None where neither files nor config.json tell."""
    if base is not None:
        for name, shape in base.weights.items():
            if name.rpartition(".")[2] in EMBEDDINGS and "pos" not in name and "wpe" not in name and len(shape) == 2:
                return shape[1]
    config = model.config.get("text_config") or model.config
    return next((config[key] for key in ("hidden_size", "n_embd", "d_model") if isinstance(config.get(key), int)), None)


def _check_embeddings(file: Path, tensor: str, width: int | None, where: str) -> None:
    entry = read_header(file, where).get(tensor)
    if entry is None:
        raise UserError(where, f"{file.name} has no tensor {tensor!r}", _FIX)
    if entry.dtype not in FLOATS or len(entry.shape) != 2 or 0 in entry.shape:
        what = f"tensor {tensor!r} is {entry.dtype} of shape {list(entry.shape)}"
        raise UserError(where, what, "Virtual tokens are floats of shape [tokens, hidden size].")
    if width is not None and entry.shape[1] != width:
        what = f"its virtual tokens have {entry.shape[1]} numbers each, and those of the base {width}"
        raise UserError(where, what, "Give the base that it was trained on as --model.")
    _check_finite(entry, where)


def _check_adapter(folder: Path, name: str, base: Base | None, where: str) -> None:
    home = _inside(folder, name, where)
    if not home.is_dir():
        raise UserError(where, f"{name} is no folder", "Name the folder of a peft adapter.")
    for part in (CONFIG, WEIGHTS):
        _inside(folder, f"{name}/{part}", where)
    config, header = read_adapter_config(home / CONFIG, where), read_header(home / WEIGHTS, where)
    check_keys(where, config, header, base)
    refuse_unless_plain(config, where)
    for entry in header.values():
        _check_finite(entry, where)


def _check_finite(entry: Entry, where: str) -> None:
    """By numpy: torch takes seconds to import, and the numbers are few."""
    import numpy as np

    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if entry.dtype not in kinds:
        return
    with entry.file.open("rb") as stream:
        stream.seek(entry.start)
        numbers = np.frombuffer(stream.read(entry.size), kinds[entry.dtype])
    # In bfloat16 all bits of the exponent are set in what is not finite.
    good = (numbers & 0x7F80) != 0x7F80 if entry.dtype == "BF16" else np.isfinite(numbers)
    if not good.all():
        raise UserError(where, f"tensor {entry.name!r} holds numbers that are not finite", _FIX)


# ------------------------------------------------------------------------------------------------ what stands for one


def _soft_entry(folder: Path, conditioning: Conditioning, name: str) -> Entry:
    value = conditioning.values[name]
    assert value.embeddings is not None
    return read_header(folder / value.embeddings)[value.tensor or name]


def copy_conditioning(info: AdapterInfo, out: Path) -> Conditioning:
    """Copy what conditions an adapter into the folder of a model that it is folded into; returns it as it lies there.

    Files go into a folder there: see :data:`SOFT`.
    """
    found = info.conditioning
    assert found is not None
    values = {}
    for name, value in found.values.items():
        if value.embeddings is not None:
            lying = f"{CONDITIONING}/{value.embeddings.replace('/', '-')}"
            write_bytes(out / lying, (Path(info.path) / value.embeddings).read_bytes())
            value = value.model_copy(update={"embeddings": lying})
        values[name] = value
    return found.model_copy(update={"values": values})


def virtual_tokens(info: AdapterInfo | ModelInfo, control: str) -> int:
    """How many vectors stand for a control; 0 where text or adapters do."""
    found = info.conditioning
    if found is None or found.kind(control) != "embeddings":
        return 0
    return sum(_soft_entry(Path(info.path), found, name).shape[0] for name in found.parts(control))


def soft_prompt(info: AdapterInfo | ModelInfo, control: str) -> Tensor:
    """The vectors that stand for a control of an adapter or a whole model: (tokens, hidden size), float32.

    Raises:
        UserError: it has no conditioning, or no such value, or no vectors stand for it.
    """
    import torch

    found = info.conditioning
    if found is None or control not in found.controls or found.kind(control) != "embeddings":
        raise UserError("Request.control", f"no virtual tokens of {info.name} stand for {control!r}", _FIX)
    entries = [_soft_entry(Path(info.path), found, name) for name in found.parts(control)]
    # A copy: what was mapped goes with the file.
    vectors = torch.cat([mapped(entry).to(torch.float32) for entry in entries])
    if problem := not_finite(vectors):
        raise UserError("Request.control", f"the virtual tokens of {control!r} hold {problem}", _FIX)
    return vectors


def control_texts(conditioning: Conditioning, control: str) -> str:
    """The text that stands for a control: those of several preferences one after the other."""
    return "".join(value.text or "" for value in conditioning.parts(control).values())


def control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a written control, by itself and without BOS: what training has to put in as well."""
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def control_adapters(info: AdapterInfo | ModelInfo, control: str) -> list[AdapterInfo]:
    """The adapters that stand for a control, in order; none where text or virtual tokens do."""
    found = info.conditioning
    if found is None or found.kind(control) != "adapter":
        return []
    adapters = []
    for name, value in found.parts(control).items():
        assert value.adapter is not None
        path = Path(info.path) / value.adapter
        config = read_adapter_config(path / CONFIG, "conditioning")
        told = {"ref": f"{info.ref}@{name}", "path": str(path), "name": f"{info.name}@{name}"}
        adapters.append(AdapterInfo(**told, digest=adapter_digest(path), rank=largest_rank(config), config=config))
    return adapters
