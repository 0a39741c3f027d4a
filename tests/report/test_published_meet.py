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


def test_studies_hold_numbers_of_every_arm_and_prompt_and_no_text() -> None:
    files = sorted((REPORT / "records").glob("study-*.json"))
    worlds = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert [record["world"] for record in worlds] == [0, 1]
    for record in worlds:
        # Ten arms of three seeds, and the base.
        assert len(record["arms"]) == 31 and record["prompts"] == 120
        for arm in record["arms"].values():
            assert len(arm["rewards"]) == len(arm["lengths"]) == 120
            assert all(isinstance(value, int | float) for value in arm["rewards"] + arm["lengths"])
        steps = [arm["step"] for arm in record["arms"].values()]
        assert len(set(steps)) == len(steps)


def test_a_share_of_wins_of_the_page_is_counted_by_hand() -> None:
    record = json.loads((REPORT / "records" / "study-0.json").read_text(encoding="utf-8"))
    won = tied = 0
    for seed in range(3):
        own, other = (record["arms"][f"{name}-s{seed}"]["rewards"] for name in ("meet-prompt", "control-token"))
        won += sum(x > y for x, y in zip(own, other, strict=True))
        tied += sum(x == y for x, y in zip(own, other, strict=True))
    page = (REPORT / "README.md").read_text(encoding="utf-8")
    assert f"| meet-prompt | control-token | {(won + tied / 2) / 360:.2f} [" in page
