"""Where caches lie: the harness's own, the hub's, and that of prepared data sets."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for the harness (``HARNESS_CACHE`` overrides)."""
    if root := os.environ.get("HARNESS_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "harness"


_TRUE = {"1", "ON", "YES", "TRUE"}


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    return _hf_home() / "hub"


def prepared_cache() -> Path:
    """Where datasets keeps what it has prepared."""
    folder = os.environ.get("HF_DATASETS_CACHE")
    return Path(folder).expanduser() if folder else _hf_home() / "datasets"


def _hf_home() -> Path:
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"


def offline() -> bool:
    """Whether the user forbids the network: ``HF_HUB_OFFLINE`` or one of its older names."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in _TRUE for name in names)


def stay_offline(*, online: bool) -> None:
    """Keep this process and those that it starts off the hub, unless the user asks for it.

    Before huggingface_hub is imported, which reads the variable then. ``HF_HUB_OFFLINE=0`` in the environment is such
    a wish too; ``online`` overrules a 1.
    """
    if online:
        os.environ["HF_HUB_OFFLINE"] = "0"
        os.environ.pop("HF_DATASETS_OFFLINE", None)
        os.environ.pop("TRANSFORMERS_OFFLINE", None)
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
