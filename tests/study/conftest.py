"""One small study of everything: two methods, an arm from another, a checkpoint, merges, an adapter made elsewhere."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.conftest import zygote  # noqa: F401 - a fixture here, too
from tests.alignment.processes import TINY_STEPS, write_preferences
from tests.conftest import SUMS

Write = Callable[..., Path]
WATCHER = Path(__file__).parent / "watcher.py"


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A folder with `pairs.jsonl` (60 pairs), `tasks` (sums, and more of them) and `given`, an adapter made here."""
    from harness.testing import tiny_adapter

    folder = tmp_path_factory.mktemp("material")
    write_preferences(folder / "pairs.jsonl")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "sums.yaml").write_text(SUMS, encoding="utf-8")
    (folder / "tasks" / "more.yaml").write_text(SUMS.replace("name: sums", "name: more", 1), encoding="utf-8")
    rows = [{"id": f"s{i}", "a": i, "b": 7 * i % 11} for i in range(6)]
    (folder / "tasks" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tiny_adapter(folder / "given", tiny)
    return folder


@pytest.fixture(scope="session")
def small(tiny: Path, material: Path) -> dict[str, Any]:
    """One seed of two methods and their merge: 3 arms and their base."""
    return {
        "study": "small",
        "bases": {"tiny": str(tiny)},
        "data": {"pairs": f"jsonl:{material / 'pairs.jsonl'}"},
        "grid": [
            {"method": ["sft", "dpo"], "data": "pairs", "set": {**TINY_STEPS, "checkpoint_every": 2, "adapter.rank": 4}}
        ],
        "merges": [{"name": "merged", "method": "dare_ties", "inputs": ["sft-pairs-*", "dpo-pairs-*"]}],
        "evaluation": {"tasks": "sums", "task_folders": str(material / "tasks"), "engine": "transformers"},
    }


@pytest.fixture(scope="session")
def whole(small: dict[str, Any], material: Path) -> dict[str, Any]:
    """The same with everything else that a study can have: 11 arms and their base.

    sft and dpo of 2 seeds are 4; `on` goes on from one of them; `short` and its step 2 are 2; `given` was made
    elsewhere; `merged` is 2, one a seed; `sum` is one merge as an adapter.
    """
    study = copy.deepcopy(small)
    study["grid"][0]["seed"] = [0, 1]
    of_tiny = {"base": "tiny", "data": "pairs", "set": study["grid"][0]["set"]}
    study["arms"] = [
        {"name": "on", "method": "dpo", "from": "sft-pairs-lora-tiny-s0", **of_tiny},
        {"name": "short", "method": "sft", "samples": 20, "checkpoints": [2], **of_tiny},
        {"name": "given", "base": "tiny", "adapter": str(material / "given")},
    ]
    study["merges"].append(
        {"name": "sum", "method": "task_arithmetic", "inputs": ["on", "short"], "join": "base", "as": "adapter"}
    )
    return study


ARMS = {
    "tiny",
    *(f"{method}-pairs-lora-tiny-s{seed}" for method in ("sft", "dpo") for seed in (0, 1)),
    *("on", "short", "short-step2", "given", "merged-tiny-s0", "merged-tiny-s1", "sum-tiny"),
}
"""The arms of `whole`, by hand."""


@pytest.fixture
def write(alone: Path) -> Write:
    """Write a study's file: ``write(data)`` or ``write(data, "other.yaml")``."""

    def to_file(data: dict[str, Any], name: str = "study.yaml") -> Path:
        # JSON is YAML, with a line for every key.
        (alone / name).write_text(json.dumps(data, indent=1), encoding="utf-8")
        return alone / name

    return to_file


def run_once(data: dict[str, Any], folder: Path, cache: Path) -> Path:
    """Carry out a study in this process: its run folder, with reports."""
    from harness.report.build import write_all
    from harness.study.plan import plan_study
    from harness.study.run import run_study

    file = folder / "study.yaml"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(cache))
        done = run_study(plan_study(file), folder / "run")
        assert not done.failures
        write_all(folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Any], cache: Path) -> Path:
    """`whole`, carried out; nobody changes it."""
    return run_once(whole, tmp_path_factory.mktemp("whole"), cache)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, small: dict[str, Any], cache: Path) -> Path:
    """`small`, carried out; nobody changes it."""
    return run_once(small, tmp_path_factory.mktemp("small"), cache)


@pytest.fixture
def copied(alone: Path) -> Callable[[Path], Path]:
    """A copy of a run, in the working folder."""

    def copy_of(run: Path) -> Path:
        return Path(shutil.copytree(run, alone / "run"))

    return copy_of


@pytest.fixture
def begun(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Steps that have begun since it was last asked, as ``kind arm``; commands need ``--plugin WATCHER``."""
    file = alone / "begun"
    monkeypatch.setenv("WATCHED", str(file))

    def since() -> list[str]:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    return since


def records(run: Path) -> dict[str, tuple[str, str]]:
    """Step folder -> id and digest of each step that has ended well."""
    found = {}
    for file in sorted(run.glob("steps/*/status.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        assert record["status"] == "done", record
        found[file.parent.name] = record["id"], record["digest"]
    return found
