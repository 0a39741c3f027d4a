"""What a plugin reads from the hub, so that it can be fetched before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class HubFiles:
    """Files of one repository of the hub, at one revision."""

    repo: str
    """``owner/name``."""
    kind: Literal["model", "dataset"]
    revision: str | None = None
    """Commit, tag or branch; None: what ``main`` is."""
    patterns: tuple[str, ...] | None = None
    """Names of the files that are read, with ``*``; None: all."""


MODEL_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
"""Files that a model or an adapter is opened from: no pickled weights."""


def model_files(ref: str | None, revision: str | None = None) -> tuple[HubFiles, ...]:
    """What opening a model or an adapter reads from the hub: nothing of a folder or an endpoint."""
    return (HubFiles(ref, "model", revision, MODEL_PATTERNS),) if ref is not None and is_hub_id(ref) else ()


def is_hub_id(ref: str) -> bool:
    """Whether a reference is an id of the hub: no folder here, no address, and of the form ``owner/name``."""
    return _HUB_ID.fullmatch(ref) is not None and not Path(ref).expanduser().exists()
