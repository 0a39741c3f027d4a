"""The report on MEET says what its records say, and the records agree with themselves."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

REPORT = Path(__file__).resolve().parents[2] / "reports" / "meet-on-a-tiny-world"


def test_the_page_is_what_the_records_make() -> None:
    spec = importlib.util.spec_from_file_location("meet_report_build", REPORT / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert (REPORT / "README.md").read_text(encoding="utf-8") == build.render()


def test_means_are_those_of_the_seeds_and_lie_in_their_intervals() -> None:
    record = json.loads((REPORT / "records" / "arms.json").read_text(encoding="utf-8"))
    assert record["arms"]
    for arm in record["arms"]:
        assert len(set(arm["digests"])) == len(record["seeds"]), "seeds that gave the same adapter"
        for figure in arm["figures"].values():
            assert sum(figure["per_seed"]) / len(figure["per_seed"]) == pytest.approx(figure["mean"])
            assert figure["ci95"][0] <= figure["mean"] <= figure["ci95"][1]
