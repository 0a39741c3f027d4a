"""One small study of everything: two methods, an arm from another, a checkpoint, merges, an adapter made elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.processes import TINY_STEPS, write_preferences

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 60 preference pairs."""
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl")


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """An adapter of the tiny model that no study made."""
    from harness.testing import tiny_adapter

    return tiny_adapter(tmp_path_factory.mktemp("given") / "given", tiny)


@pytest.fixture
def whole(tiny: Path, sums: Path, pairs: Path, elsewhere: Path) -> dict[str, Any]:
    """The study as data: 11 arms and their base.

    sft and dpo of 2 seeds are 4; `on` goes on from one of them; `short` and its step 2 are 2; `given` was made
    elsewhere; `merged` is 2, one a seed; `sum` is one merge as an adapter.
    """
    return {
        "study": "small",
        "bases": {"tiny": str(tiny)},
        "data": {"pairs": f"jsonl:{pairs}"},
        "grid": [{"method": ["sft", "dpo"], "data": "pairs", "seed": [0, 1], "set": TINY_STEPS}],
        "arms": [
            {
                "name": "on",
                "base": "tiny",
                "method": "dpo",
                "data": "pairs",
                "from": "sft-pairs-lora-tiny-s0",
                "set": TINY_STEPS,
            },
            {
                "name": "short",
                "base": "tiny",
                "method": "sft",
                "data": "pairs",
                "samples": 20,
                "checkpoints": [2],
                "set": TINY_STEPS,
            },
            {"name": "given", "base": "tiny", "adapter": str(elsewhere)},
        ],
        "merges": [
            {"name": "merged", "method": "dare_ties", "inputs": ["sft-pairs-*", "dpo-pairs-*"]},
            {
                "name": "sum",
                "method": "task_arithmetic",
                "inputs": ["on", "short"],
                "join": "base",
                "as": "adapter",
            },
        ],
        "evaluation": {"tasks": "sums", "task_folders": str(sums), "engine": "transformers", "limit": 6},
    }


ARMS = {
    "tiny",
    *(f"{method}-pairs-lora-tiny-s{seed}" for method in ("sft", "dpo") for seed in (0, 1)),
    *("on", "short", "short-step2", "given", "merged-tiny-s0", "merged-tiny-s1", "sum-tiny"),
}
"""The arms of `whole`, by hand."""


@pytest.fixture
def write(alone: Path) -> Write:
    """Write a study's file: ``write(data)`` or ``write(data, "other.yaml")``."""

    def to_file(data: dict[str, Any], name: str = "study.yaml") -> Path:
        # JSON is YAML, with a line for every key.
        (alone / name).write_text(json.dumps(data, indent=1), encoding="utf-8")
        return alone / name

    return to_file
