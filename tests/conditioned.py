"""Tiny adapters and models with a conditioning of every kind, for tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from harness.testing import tiny_adapter

SOFT = "conditioning.safetensors"
GOOD, BAD = (7, 30, 99), (8, 9)
"""Tokens whose embeddings stand for the values of :func:`soft`."""


def describe(folder: Path, values: Mapping[str, Any], default: str = "good", **more: Any) -> Path:
    """Write ``conditioning.json``; returns the folder."""
    found = {"values": values, "default": default, "position": "after_bos", **more}
    (folder / "conditioning.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def embeddings_of(model: Path, ids: Sequence[int]) -> Any:
    """The model's own embeddings of some tokens."""
    return load_file(model / "model.safetensors")["model.embed_tokens.weight"][list(ids)]


def soft(folder: Path, model: Path, **more: Any) -> Path:
    """An adapter whose values are the embeddings of real tokens: good of GOOD, bad of BAD."""
    tiny_adapter(folder, model)
    return with_soft(folder, model, **more)


def with_soft(folder: Path, model: Path, **more: Any) -> Path:
    """The same for a folder that is there: of an adapter, or a whole model."""
    save_file({"good": embeddings_of(model, GOOD), "bad": embeddings_of(model, BAD)}, folder / SOFT)
    return describe(folder, {"good": {"embeddings": SOFT}, "bad": {"embeddings": SOFT}}, **more)


def written(folder: Path, model: Path, **more: Any) -> Path:
    """An adapter whose values are texts."""
    tiny_adapter(folder, model)
    return describe(folder, {"good": {"text": "A good answer: "}, "bad": {"text": "No! "}}, **more)


def lora(folder: Path, model: Path, **more: Any) -> Path:
    """An adapter whose values are adapters, of rank 3 and 1."""
    tiny_adapter(folder, model)
    tiny_adapter(folder / "conditioning" / "good", model, seed=5, rank=3)
    tiny_adapter(folder / "conditioning" / "bad", model, seed=6, rank=1)
    values = {name: {"adapter": f"conditioning/{name}"} for name in ("good", "bad")}
    return describe(folder, values, **more)


def whole(folder: Path, model: Path) -> Path:
    """A whole model with virtual tokens."""
    shutil.copytree(model, folder)
    return with_soft(folder, model)


def not_a_number(folder: Path) -> None:
    """Damage one number of the virtual tokens."""
    tensors = load_file(folder / SOFT)
    tensors["bad"][0, 3] = np.nan
    save_file(tensors, folder / SOFT)
