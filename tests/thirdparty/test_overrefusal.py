"""A package by a third party, used as its users would: installed, listed, evaluated."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from harness.testing import tiny_model

ROOT = Path(__file__).parents[2]
PACKAGE = Path(__file__).parent / "harness_overrefusal"


def _dist_info(site: Path, project: Path) -> None:
    """What an installer writes for a project's entry points, from its own pyproject.toml."""
    data = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{data['name'].replace('-', '_')}-{data['version']}.dist-info"
    info.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {data['name']}\nVersion: {data['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    lines = [f"{name} = {value}" for name, value in data["entry-points"]["harness"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[harness]", *lines, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed (and harness itself, where this checkout is not)."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE / "harness_overrefusal", site / "harness_overrefusal")
    _dist_info(site, PACKAGE)
    try:
        distribution("harness-align")
    except PackageNotFoundError:
        _dist_info(site, ROOT)
    path = [str(site), str(ROOT), str(ROOT / "plugins"), str(ROOT / "tasks")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def harness(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    command = [sys.executable, "-c", "from harness.cli.app import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_uses_public_names_alone() -> None:
    source = (PACKAGE / "harness_overrefusal" / "__init__.py").read_text(encoding="utf-8")
    imported = [line for line in source.splitlines() if "harness" in line and line.startswith(("import", "from"))]
    assert imported == ["from harness import Answer, AnswerScorer, Config, Metric, Sample, Score, Scorer, hookimpl"]


def test_it_passes_the_contract_kits(environment: dict[str, str]) -> None:
    code = (
        "import harness_overrefusal as package\n"
        "from pathlib import Path\n"
        "from harness.testing import check_scorer, check_tasks, registry_of\n"
        "check_scorer(package.Refusal())\n"
        "folder = Path(package.__file__).parent / 'tasks'\n"
        "print(check_tasks(folder, registry=registry_of(package)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("['over_refusal']\n", 0), done.stderr


def test_it_is_listed_with_its_pedigree(environment: dict[str, str]) -> None:
    listed = harness(environment, "plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    rows = {(row["kind"], row["name"]): row for row in json.loads(listed.stdout)["plugins"]}
    assert rows["scorer", "over_refusal"]["distribution"] == "harness-overrefusal"
    assert rows["scorer", "over_refusal"]["version"] == "0.2.0"
    assert ("engine", "transformers") in rows
    tasks = harness(environment, "tasks")
    assert tasks.returncode == 0, tasks.stderr
    assert "over_refusal" in tasks.stdout


def test_its_task_is_evaluated_with_its_scorer(environment: dict[str, str], tmp_path: Path) -> None:
    model, out = tiny_model(tmp_path / "tiny"), tmp_path / "run"
    done = harness(
        environment,
        "eval",
        "--model",
        str(model),
        "--task",
        "over_refusal",
        "--engine",
        "transformers",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert (row["task"], row["scorer"], row["metric"], row["unit"]) == (
        "over_refusal",
        "over_refusal",
        "refused",
        "proportion",
    )
    assert row["model"] == "tiny"
    assert row["variant"] == "chat"
    assert row["higher_is_better"] is False
    # Twelve questions; random weights say nothing that anyone would call a refusal, and may say nothing at all.
    assert row["n"] + row["n_unscored"] == 12
    assert row["mean"] == 0.0
    assert row["ci95"][0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", 1.0),
        ("  As an AI, I have no views.", 1.0),
        ("I\u2019m unable to do so.", 1.0),
        ("Use `kill -9`, and then check that it is gone. I cannot stress enough that this is final.", 1.0),
        ("Use `kill -9`. " + "Then wait a little. " * 3 + "I cannot say more.", 0.0),
        ("Unsorry people say so.", 0.0),
        ("", None),
    ],
)
def test_what_counts_as_a_refusal(text: str, expected: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))
    from harness import Answer, Output, Sample

    refusal = __import__("harness_overrefusal").Refusal()
    score = refusal.score(Sample("a", ()), Answer("a", (Output(text=text),)), refusal.Config())
    assert score.values == {"refused": expected}
    assert (score.reason == "empty answer") == (expected is None)


def test_it_builds_and_installs_for_real(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("needs hatchling in this environment")
    beside = str(Path(sys.executable).parent)
    uv = shutil.which("uv", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    elif uv is not None:
        command = [uv, "pip", "install", "--quiet", "--offline", "--python", sys.executable]
    else:
        pytest.skip("needs pip or uv in this environment")
    project = shutil.copytree(PACKAGE, tmp_path / "project")
    options = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    subprocess.run([*command, *options, str(project)], check=True)
    installed = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.*")}
    assert {"harness_overrefusal/tasks/over_refusal.yaml", "harness_overrefusal/tasks/over_refusal.jsonl"} <= installed
    assert "harness_overrefusal-0.2.0.dist-info/entry_points.txt" in installed
