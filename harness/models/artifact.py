"""What a folder that a step has made is to the steps that build on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.models.chat_templates import read_chat_template
from harness.models.lineage import CONFIG
from harness.steps.provenance import digest_of_bytes, files_digest


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
        return Artifact("model", files_digest(sorted(folder.glob("model*.safetensors")), folder), None, found)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return Artifact("adapter", adapter_digest(folder), largest_rank(config), found)


def adapter_digest(folder: Path) -> str:
    """SHA-256 over the weights and the configuration of a peft adapter, and over what conditions its prompts."""
    weights = sorted(folder.glob("adapter_model*.safetensors"))
    return files_digest([*weights, folder / CONFIG, *sorted(folder.glob("conditioning*"))], folder)


def largest_rank(config: dict[str, object]) -> int:
    """The largest LoRA rank of a peft configuration; 0 for methods that have none."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r") or 0, *(pattern.values() if isinstance(pattern, dict) else ())]
    return max(rank for rank in ranks if isinstance(rank, int))
