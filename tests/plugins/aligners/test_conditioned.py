"""MEET and its baselines: what they train, where the control stands, and what they leave."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.testing import check_aligner
from harness_plugins.aligners.conditioned.methods import ControlToken, Meet

ROWS = [
    {
        "id": f"r{i}",
        "prompt_ids": [0, 5 + i, 6],
        "completion_ids": [7, 8 + i, 9 + i % 2, 1],
        "labels_mask": [0, 0, 0, 1, 1, 1, 1],
        "ratings": {"preference": float(i % 2)},
    }
    for i in range(4)
]
PROMPT = {"control": "prompt", "tokens": 3, "control_steps": 4}
LORA = {"control": "lora", "control_rank": 2, "control_steps": 4, "control_rate": 0.01}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Meet(), PROMPT),
        (Meet(), {**LORA, "stages": ["control"]}),
        (Meet(), {**LORA, "freeze_control": True}),
        (ControlToken(), {}),
        (ControlToken(), {"control": "embedding", "position": "before_answer"}),
    ],
    ids=["prompt", "lora-control", "lora-frozen", "text", "embedding"],
)
def test_contract(method: Any, options: dict[str, Any]) -> None:
    check_aligner(method, options=options, rows=ROWS)
