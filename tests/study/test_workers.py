"""A study in worker processes: the records of one process, and a crash that costs its own step and what hangs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import WATCHER, Write, records

CRASHING = """
import os
from harness import Aligner, Recipe, hookimpl

class Crashing(Aligner):
    name = "crashing"
    summary = "ends its process in the middle"
    consumes = "pairs"

    def trainer(self, job):
        os._exit(7)

@hookimpl
def register_aligners():
    yield Crashing()
"""
WORKERS = ("--set", "executor.workers=2")


def test_two_processes_leave_the_records_of_one(cli: Any, small: dict[str, Any], write: Write, small_run: Path) -> None:
    ran = cli("study", "run", write(small), "--out", "run", *WORKERS)
    assert ran.code == 0, ran.err
    assert records(Path("run")) == records(small_run)
    # Nothing is left to do, whoever does it.
    begun = Path("run/steps").stat().st_mtime_ns
    assert cli("study", "run", "study.yaml", "--out", "run").code == 0
    assert Path("run/steps").stat().st_mtime_ns == begun


def test_observers_hear_of_steps_elsewhere(
    cli: Any, small: dict[str, Any], write: Write, begun: Any, small_run: Path
) -> None:
    data = {**small, "merges": [], "grid": [{**small["grid"][0], "method": "sft"}]}
    assert cli("study", "run", write(data), "--out", "run", "--plugin", WATCHER, *WORKERS).code == 0
    heard = begun()
    assert sorted(line.partition(" ")[0] for line in heard) == ["align", *["answers"] * 2, *["scores"] * 2]


def test_a_crash_costs_its_own_arm(cli: Any, small: dict[str, Any], write: Write, alone: Path) -> None:
    (alone / "crashing.py").write_text(CRASHING, encoding="utf-8")
    broken = {**small["grid"][0], "method": "crashing"}
    data = {**small, "grid": [{**small["grid"][0], "method": "sft"}, broken]}
    data["merges"] = [{"name": "merged", "method": "linear", "inputs": ["sft-pairs-*", "crashing-pairs-*"]}]
    ran = cli("study", "run", write(data), "--out", "run", "--plugin", "crashing.py", *WORKERS)
    assert ran.code == 3, ran.err
    assert "Traceback" not in ran.err
    assert "left out: crashing-pairs-lora-tiny-s0 is not there" in ran.err
    status = json.loads(cli("study", "status", "run", "--json").out)
    states = {(one["kind"], one["arm"]): one["state"] for one in status["steps"] if one["kind"] in ("align", "merge")}
    assert states["align", "sft-pairs-lora-tiny-s0"] == "done"
    assert states["align", "crashing-pairs-lora-tiny-s0"] == "failed"
    assert states["merge", "merged-tiny-s0"] == "waiting"
    (crashed,) = [one for one in status["steps"] if one["state"] == "failed"]
    assert "7" in crashed["error"]
    report = json.loads(Path("run/report/tiny/report.json").read_text(encoding="utf-8"))
    assert {row["adapter"] for row in report["rows"]} == {None, "sft-pairs-lora-tiny-s0"}
    assert any("crashing-pairs-lora-tiny-s0: " in note for note in report["notes"])


def test_an_error_without_a_word_fails_its_arm_alone(
    cli: Any, small: dict[str, Any], write: Write, alone: Path
) -> None:
    (alone / "crashing.py").write_text(CRASHING.replace("os._exit(7)", "raise AssertionError"), encoding="utf-8")
    grid = [{**small["grid"][0], "method": method} for method in ("crashing", "sft")]
    ran = cli("study", "run", write({**small, "grid": grid, "merges": []}), "--out", "run", "--plugin", "crashing.py")
    assert ran.code == 3 and "Traceback" not in ran.err
    assert "AssertionError" in ran.err
    report = json.loads(Path("run/report/tiny/report.json").read_text(encoding="utf-8"))
    assert {row["adapter"] for row in report["rows"]} == {None, "sft-pairs-lora-tiny-s0"}


def test_an_unknown_executor_is_refused_and_nothing_is_written(cli: Any, small: dict[str, Any], write: Write) -> None:
    ran = cli("study", "run", write(small), "--out", "run", "--executor", "slurm")
    assert ran.code == 2 and "--executor: unknown executor 'slurm'" in ran.err
    assert not Path("run").exists()


def test_what_builds_on_a_step_that_is_made_again_has_no_numbers_meanwhile(
    cli: Any, small: dict[str, Any], write: Write, copied: Any, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made again it may come out otherwise: numbers of the one before must not stand under its name."""
    (weights,) = copied(small_run).glob("steps/align-sft-*/artifact/adapter_model.safetensors")
    weights.write_bytes(b"torn")
    monkeypatch.setattr("harness.study.make.carry_out_align", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli("study", "run", write(small), "--out", "run").code == 130
    cli("report", "run")
    report = json.loads(Path("run/report/tiny/report.json").read_text(encoding="utf-8"))
    assert {row["adapter"] for row in report["rows"]} == {None, "dpo-pairs-lora-tiny-s0"}
    assert report["differences"] == []
    assert sum("not finished" in note for note in report["notes"]) == 2
