"""A small slice of `make fuzz`: cases of every kind, the same each time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MUTATED = range(0, 3000, 63)
HOSTILE = (
    "yaml, function",
    "yaml, include",
    "yaml, class",
    "yaml, metric",
    "settings, plugins ./evil.py",
    "name, tasks",
)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The modules of the fuzz, and what its cases work on."""
    sys.path.insert(0, str(HERE))
    try:
        found = {name: importlib.import_module(name) for name in ("cases", "configurations", "hostile", "running")}
        yield {**found, "models": found["running"].make_models(tmp_path_factory.mktemp("fuzz") / "models")}
    finally:
        sys.path.remove(str(HERE))


@pytest.mark.parametrize("number", MUTATED)
def test_a_mutated_configuration(fuzz: dict[str, Any], number: int, tmp_path: Path) -> None:
    known = fuzz["configurations"].bases(fuzz["models"], fuzz["running"].ENGINE)
    verdict = fuzz["cases"].run_case(fuzz["configurations"].mutated(number, 0, known), tmp_path)
    assert verdict.wrong == "", verdict.said


def test_hostile_cases(fuzz: dict[str, Any], tmp_path: Path) -> None:
    with fuzz["hostile"].hostile_cases(fuzz["models"], fuzz["running"].ENGINE) as cases:
        chosen = [case for case in cases if case.name.startswith(HOSTILE)]
        assert len(chosen) >= 20
        for number, case in enumerate(chosen):
            (tmp_path / str(number)).mkdir()
            verdict = fuzz["cases"].run_case(case, tmp_path / str(number))
            assert verdict.wrong == "", (case.name, verdict.said)
