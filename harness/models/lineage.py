"""Where an adapter comes from, and how an adapter trained on top of another becomes one file.

A LoRA layer adds s B A to a frozen weight, with A of shape (r, in), B of shape (out, r) and s = alpha / r (or alpha /
sqrt(r) for rslora). Two of them add s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]: one layer of rank r1 + r2 and scale
1, exactly. peft's own weighted merge of A and B apart would add the cross terms.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.models.files import LineageFile, read_checked
from harness.steps.files import write_bytes

if TYPE_CHECKING:
    import torch

_NOT_PLAIN = ("modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
LINEAGE = "lineage.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def scale_of(config: dict[str, Any], module: str) -> float:
    """The factor s of one module, patterns and rslora considered (peft's own rule)."""
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Keys are regular expressions for the end of a module's name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _is_partial(config: dict[str, Any]) -> bool:
    """Whether an adapter may lie on some only of the modules that share a last name."""
    targets = config.get("target_modules")
    some = config.get("layers_to_transform") is not None or bool(config.get("exclude_modules"))
    return some or isinstance(targets, str) or any("." in target for target in targets or ())


def ancestry(start: AdapterInfo | None) -> list[dict[str, str]]:
    """Name and digest of every adapter that one continues from, the oldest first."""
    if start is None:
        return []
    file = Path(start.path) / LINEAGE
    before = read_checked(file, LineageFile).get("adapters", []) if file.is_file() else []
    return [*before, {"name": start.name, "digest": start.digest}]


def base_for_peft(model: ModelInfo, out: Path) -> dict[str, str | None]:
    """What adapter_config.json says of the base: never an absolute path, so that the adapter can be published.

    peft and transformers take a path from the working folder of whoever loads. So a base under ours is named from
    there; else one that lies beside the adapter, from the adapter's own folder. Of any other the name alone is left,
    and a reader must say where it is.

    Args:
        model: the base.
        out: folder of the adapter.
    """
    if model.revision is not None:
        return {"base_model_name_or_path": model.ref, "revision": model.revision}
    base, out, here = Path(model.path).resolve(), out.resolve(), Path.cwd()
    for around, start in ((here, here), (out.parent, out)):
        if around in base.parents:
            return {"base_model_name_or_path": os.path.relpath(base, start), "revision": None}
    return {"base_model_name_or_path": model.name, "revision": None}


def refuse_unless_plain(config: dict[str, Any], where: str) -> None:
    """Rank concatenation is exact for plain LoRA alone.

    Raises:
        UserError: DoRA, trained biases, whole modules saved, or another peft type.
    """
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type {config.get('peft_type')}")
    if config.get("use_dora"):
        reasons.append("use_dora")
    if config.get("bias", "none") != "none":
        reasons.append(f"bias {config['bias']}")
    reasons += [key for key in _NOT_PLAIN if config.get(key)]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        # pissa, olora, corda and loftq change the base too.
        reasons.append(f"init_lora_weights {config['init_lora_weights']}")
    if (targets := config.get("target_modules")) and not isinstance(targets, str):
        reasons += [f"an adapter on {name}" for name in targets if name.rsplit(".", 1)[-1] in _EMBEDDINGS]
    if reasons:
        raise UserError(
            where, f"cannot be continued exactly: {', '.join(reasons)}", "Start from a plain LoRA adapter, or merge it."
        )


def concatenate(first: Path, second: Path, out: Path) -> None:
    """Write the exact sum of two LoRA adapters of one base as a single adapter.

    Modules that only one of them touches are padded with zeros, so that the rank is the same everywhere and every
    engine can serve the result.

    Args:
        first: peft folder of the adapter that was frozen.
        second: peft folder of the adapter that was trained on top of it.
        out: folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` into.
    """
    import torch
    from safetensors.torch import load_file, save

    configs = [json.loads((folder / CONFIG).read_text()) for folder in (first, second)]
    for folder, config in zip((first, second), configs, strict=True):
        refuse_unless_plain(config, f"adapter {folder.name}")
    tensors = [load_file(folder / WEIGHTS) for folder in (first, second)]
    modules = sorted({name.rsplit(".lora_", 1)[0] for part in tensors for name in part})
    ranks = [max(t.shape[0] for n, t in part.items() if n.endswith("lora_A.weight")) for part in tensors]
    merged: dict[str, torch.Tensor] = {}
    for module in modules:
        a_parts, b_parts = [], []
        known = next(part for part in tensors if f"{module}.lora_A.weight" in part)
        width, height = known[f"{module}.lora_A.weight"].shape[1], known[f"{module}.lora_B.weight"].shape[0]
        for part, config, rank in zip(tensors, configs, ranks, strict=True):
            a, b = torch.zeros(rank, width), torch.zeros(height, rank)
            if f"{module}.lora_A.weight" in part:
                own_a, own_b = part[f"{module}.lora_A.weight"].float(), part[f"{module}.lora_B.weight"].float()
                a[: own_a.shape[0]] = own_a
                b[:, : own_b.shape[1]] = own_b * scale_of(config, module.removeprefix("base_model.model."))
            a_parts.append(a)
            b_parts.append(b)
        merged[f"{module}.lora_A.weight"] = torch.cat(a_parts).contiguous()
        merged[f"{module}.lora_B.weight"] = torch.cat(b_parts, dim=1).contiguous()
    total = sum(ranks)
    # By their last names where both have all such modules, else one by one.
    names = {module.removeprefix("base_model.model.") for module in modules}
    targets = sorted(names if any(map(_is_partial, configs)) else {name.rsplit(".", 1)[-1] for name in names})
    config = {**configs[1], "r": total, "lora_alpha": total, "rank_pattern": {}, "alpha_pattern": {}}
    config.update(target_modules=targets, use_rslora=False, inference_mode=True)
    config.update(layers_to_transform=None, layers_pattern=None, exclude_modules=None, init_lora_weights=True)
    write_bytes(out / WEIGHTS, save(merged, metadata={"format": "pt"}))
    write_bytes(out / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
