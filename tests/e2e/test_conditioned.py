"""From rated answers to both values of one adapter on a real, small model, as a user types it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

SHARED = os.environ.get("HARNESS_SHARED")
pytestmark = pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")
OPTIONS = {
    "steps": 3,
    "control_steps": 3,
    "batch_size": 4,
    "eval_rows": 4,
    "max_length": 128,
    "tokens": 4,
    "preferences": "{harmless: [good, bad]}",
    "adapter.rank": 2,
}


def ids_of(run: str) -> dict[str | None, set[str]]:
    """Control -> ids of the answers under it."""
    plan = json.loads(Path(run, "plan.json").read_text())
    names = {arm["name"]: arm.get("control") for arm in plan["arms"]}
    found: dict[str | None, set[str]] = {}
    for task in plan["tasks"]:
        found.setdefault(names[task["arm"]], set()).add(task["answers"])
    return found


def test_meet_is_aligned_and_asked_under_both_values(cli: Any, sums: Path, alone: Path) -> None:
    """PKU-SafeRLHF's flags; without --control the ids are those of the default, and nothing is answered again."""
    assert SHARED is not None
    base = f"{SHARED}/models/tiny-base"
    given = [part for key, value in OPTIONS.items() for part in ("--set", f"{key}={value}")]
    align = ["align", "meet", "--model", base, "--dataset", "beavertails-rated@main:safety", "--samples", "16"]
    ran = cli(*align, "--template", "vicuna", *given, "--out", "arm")
    assert ran.code == 0, ran.err
    ask = ["eval", "--model", base, "--adapter", "arm", "--task", "sums", "--tasks", str(sums)]
    ask += ["--limit", "4", "--engine", "transformers"]
    ran = cli(*ask, "--control", "good", "--control", "bad", "--out", "both")
    assert ran.code == 0, ran.err
    both = ids_of("both")
    assert both.keys() == {"good", "bad"}
    assert both["good"].isdisjoint(both["bad"])
    files = sorted(Path("both").glob("steps/answers-*/artifact/*.gz"))
    assert len({file.read_bytes() for file in files}) == len(files) == 2
    reports = json.loads(Path("both/report/report.json").read_text())["rows"]
    assert {row["control"] for row in reports} == {"good", "bad"}
    ran = cli(*ask, "--out", "default")
    assert ran.code == 0, ran.err
    assert ids_of("default") == {"good": both["good"]}
    assert "under control good, the default of its conditioning" in ran.out + Path("default/plan.json").read_text()
