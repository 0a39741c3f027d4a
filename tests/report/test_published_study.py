"""The report on a whole study is what its packed records make, byte for byte, and the records agree with themselves."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPORT = Path(__file__).resolve().parents[2] / "reports" / "study-on-tiny-models"
METHODS, DATA, ADAPTERS, BASES, SEEDS = 2, 2, 2, 2, 3
TASKS = 6
"""Two of them are of BBH."""
ALIGNED = METHODS * DATA * ADAPTERS * BASES * SEEDS
MERGED = METHODS * BASES * SEEDS
PREPARED = METHODS * DATA * ADAPTERS * BASES
"""Rows that seeds share, once for each method, data set, adapter and base."""


@pytest.fixture(scope="module")
def build() -> ModuleType:
    sys.path.insert(0, str(REPORT))
    try:
        spec = importlib.util.spec_from_file_location("study_report_build", REPORT / "build.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REPORT))
    return module


def test_page_board_tables_and_figures_are_what_the_records_make(build: ModuleType, tmp_path: Path) -> None:
    page = build.render(tmp_path)
    assert (REPORT / "README.md").read_text(encoding="utf-8") == page
    made = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    kept = {file.relative_to(REPORT) for name in build.MADE for file in _files(REPORT / name)}
    assert made == kept and any(path.suffix == ".svg" for path in made)
    for path in made:
        assert (REPORT / path).read_bytes() == (tmp_path / path).read_bytes(), path


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def test_every_step_of_the_grid_is_there_and_was_so_after_ten_kills(build: ModuleType, tmp_path: Path) -> None:
    root = build.unpack(tmp_path)
    ended = [json.loads(file.read_text(encoding="utf-8")) for file in root.glob("steps/*/status.json")]
    kinds = [status["kind"] for status in ended]
    asked = (ALIGNED + MERGED + BASES) * TASKS
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "align": ALIGNED,
        "merge": MERGED,
        "prepare": PREPARED,
        "answers": asked,
        "scores": asked,
    }
    assert {status["status"] for status in ended} == {"done"}
    adapters = {status["digest"] for status in ended if status["kind"] == "align"}
    assert len(adapters) == ALIGNED, "two arms with one adapter"
    killed = json.loads((REPORT / "records" / "killed.json").read_text(encoding="utf-8"))
    assert killed["differ"] == [] and killed["steps"] == len(ended)
    assert len(killed["kills"]) == 10 and sum("torn" in kill for kill in killed["kills"]) == 1
