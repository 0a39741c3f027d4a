"""Made-up pairs that a tiny model can learn to tell apart, and a short alignment of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHORT: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 5e-3,
    "max_length": 96,
    "eval_rows": 7,
    "log_every": 1,
    "adapter": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
}


def write_pairs(folder: Path, count: int = 60) -> str:
    """Write pairs whose chosen answers are polite; returns the expression for ``--dataset``."""
    rows = [
        {
            "prompt": f"Question {i}: what is {i % 7} and {i % 5}{' or more' * (i % 4)}?",
            "chosen": f"It is {i % 7 + i % 5}, thank you{' for asking' * (i % 3)}.",
            "rejected": f"No {'no ' * (i % 6)}{i}!",
        }
        for i in range(count)
    ]
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{file}"


def short(**more: Any) -> dict[str, Any]:
    """Options of a short alignment; ``adapter`` is laid over key by key."""
    return {**SHORT, **more, "adapter": {**SHORT["adapter"], **more.get("adapter", {})}}


def events(folder: Path, event: str) -> list[dict[str, Any]]:
    """Lines of an alignment's log about one event."""
    lines = (folder / "step" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]
