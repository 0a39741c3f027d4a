"""What a folder that a step has made is to the steps that build on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.models.chat_templates import read_chat_template
from harness.models.lineage import CONFIG
from harness.steps.provenance import digest_of_bytes, files_digest

CONDITIONING = "conditioning"
"""How the names of files begin that change what evaluation sends."""


@dataclass(frozen=True)
class Artifact:
    """An adapter or a model, by content."""

    kind: Literal["adapter", "model"]
    digest: str
    """As ``AdapterInfo.digest`` or ``ModelInfo.weights_digest`` have it."""
    rank: int | None
    template: str | None
    """SHA-256 of its chat template."""


def read_artifact(folder: Path) -> Artifact:
    """Read an adapter's or a model's folder that the harness has just written."""
    template = read_chat_template(folder)
    found = digest_of_bytes(template.encode()) if template is not None else None
    if not (folder / CONFIG).is_file():
        weights = [*sorted(folder.glob("model*.safetensors")), *conditioning_files(folder)]
        return Artifact("model", files_digest(weights, folder), None, found)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return Artifact("adapter", adapter_digest(folder), largest_rank(config), found)


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the weights and the configuration of a peft adapter, and over what conditions its prompts."""
    weights = sorted(folder.glob("adapter_model*.safetensors"))
    return files_digest([*weights, folder / CONFIG, *conditioning_files(folder)], folder)


def conditioning_files(folder: Path) -> list[Path]:
    """All files that condition prompts, those of adapters in folders too."""
    found = sorted(folder.glob(f"{CONDITIONING}*"))
    return [file for one in found for file in ([one] if one.is_file() else sorted(one.rglob("*"))) if file.is_file()]


def largest_rank(config: dict[str, object]) -> int:
    """The largest LoRA rank of a peft configuration; 0 for methods that have none."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r") or 0, *(pattern.values() if isinstance(pattern, dict) else ())]
    return max(rank for rank in ranks if isinstance(rank, int))
