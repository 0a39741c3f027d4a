"""The report on alignment says what its records say, and the records agree with themselves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

REPORT = Path(__file__).resolve().parents[2] / "reports" / "align-on-tiny-models"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("align_report_build", REPORT / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_records_make(build: ModuleType) -> None:
    assert (REPORT / "README.md").read_text(encoding="utf-8") == build.render()


def test_means_are_those_of_the_seeds_and_lie_in_their_intervals() -> None:
    record = json.loads((REPORT / "records" / "arms.json").read_text(encoding="utf-8"))
    rows = [(arm["data"], arm["method"], arm["adapter"]) for arm in record["arms"]]
    assert len(set(rows)) == len(rows) and {method for _, method, _ in rows} == {"sft", "dpo"}
    for arm in record["arms"]:
        assert len(set(arm["digests"])) == len(record["seeds"]), "seeds that gave the same adapter"
        for figure in arm["figures"].values():
            assert sum(figure["per_seed"]) / len(figure["per_seed"]) == pytest.approx(figure["mean"])
            assert figure["ci95"][0] <= figure["mean"] <= figure["ci95"][1]


def test_every_arm_of_the_first_seed_was_evaluated() -> None:
    evaluated = json.loads((REPORT / "records" / "toxicity.json").read_text(encoding="utf-8"))
    arms = json.loads((REPORT / "records" / "arms.json").read_text(encoding="utf-8"))["arms"]
    names = {f"{arm['method']}-{arm['adapter']}-{arm['data'].replace(':', '-')}-s0" for arm in arms}
    assert evaluated[0]["arm"] == "base" and names <= {row["arm"] for row in evaluated}
    assert len({row["step"] for row in evaluated}) == len(evaluated), "two arms share a scores step"
