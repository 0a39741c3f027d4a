"""The report on merges says what its records say, and the records agree with what a merge must do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPORT = Path(__file__).resolve().parents[2] / "reports" / "merge-on-tiny-models"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("merge_report_build", REPORT / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> Any:
    return json.loads((REPORT / "records" / name).read_text(encoding="utf-8"))


def test_the_page_is_what_the_records_make(build: ModuleType) -> None:
    assert (REPORT / "README.md").read_text(encoding="utf-8") == build.render()


def test_every_arm_and_merge_was_evaluated_on_every_task(build: ModuleType) -> None:
    found = {(row["arm"], row["task"]): row for row in read("scores.json")}
    assert set(found) == {
        (arm, task) for arm in ("base", *build.ARMS, *build.PAPER, *build.SWEEP) for task in build.TASKS
    }
    steps = [row["step"] for row in found.values()]
    assert len(set(steps)) == len(steps), "two rows share a scores step"
    for (arm, task), row in found.items():
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
        if arm != "base":
            # Paired on the same samples, so the difference of the means is the mean of the differences.
            assert row["minus_base"]["difference"] == pytest.approx(row["mean"] - found["base", task]["mean"])


def test_the_ends_of_a_slerp_are_its_inputs() -> None:
    merges = {one["name"]: one for one in read("merges.json")}
    for name, end in (("Slerp-DPO t=0", 0), ("Slerp-DPO t=1", 1)):
        total = merges[name]["total"]
        assert total["result_delta_norm"] == pytest.approx(total["delta_norm"][end], rel=1e-3)


def test_dare_keeps_what_its_density_says() -> None:
    for one in read("merges.json"):
        if one["method"] == "dare_ties":
            assert one["total"]["merger"]["kept_density"] == pytest.approx(one["options"]["density"], abs=2e-3)
            assert one["options"]["rescale"] == "density"
