"""`harness plugins new` writes packages whose own tests pass, and refuses what it cannot write."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.registry import KINDS as CONTRACTS
from harness.contracts.scaffold import KINDS, write_package
from harness.core.errors import UserError
from tests.alignment.rows import write_pairs

ROOT = Path(__file__).parents[2]


def test_every_kind_of_the_contracts_can_be_written() -> None:
    assert set(KINDS) == {*CONTRACTS, "task", "loss", "observer"}


LIGHT = ("converter", "dataset", "executor", "scorer", "section", "task")


@pytest.mark.parametrize(
    "kinds", [LIGHT, pytest.param(tuple(kind for kind in KINDS if kind not in LIGHT), marks=pytest.mark.slow)], ids=str
)
def test_the_tests_of_a_written_package_pass(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """In one process for all, since torch is slow to import; not installed, so nothing is fetched."""
    folders = [tmp_path / kind for kind in kinds]
    for kind, folder in zip(kinds, folders, strict=True):
        write_package(kind, f"made-{kind}", folder)
    path = [*folders, *_bundled(tmp_path / "site"), ROOT, ROOT / "plugins", ROOT / "tasks"]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull, f"--rootdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(folder / "tests") for folder in folders)],
        # Two threads on one tiny matrix wait for each other more than they work.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    # Each has its contract and its registration tested (an observer: steps and runs), and these what they make, too.
    more = len({"scorer", "dataset", "merger", "aligner", "converter", "loss"}.intersection(kinds))
    assert f"{2 * len(kinds) + more} passed" in done.stdout


def _bundled(site: Path) -> list[Path]:
    """The dist-info of harness itself, where this checkout is not installed."""
    try:
        distribution("harness-align")
    except PackageNotFoundError:
        info = site / "harness_align-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: harness-align\nVersion: 0\n")
        entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["harness"]
        (info / "entry_points.txt").write_text("[harness]\n" + "".join(f"{k} = {v}\n" for k, v in entry_points.items()))
        return [site]
    return []


def test_a_package_is_named_after_its_plugin(tmp_path: Path) -> None:
    written = write_package("scorer", "refusal-rate", tmp_path / "new" / "package")
    names = [path.relative_to(tmp_path / "new" / "package").as_posix() for path in written]
    assert names == ["README.md", "harness_refusal_rate/__init__.py", "pyproject.toml", "tests/test_refusal_rate.py"]
    project = tomllib.loads((tmp_path / "new" / "package" / "pyproject.toml").read_text())["project"]
    assert project["name"] == "harness-refusal-rate"
    assert project["entry-points"] == {"harness": {"refusal-rate": "harness_refusal_rate"}}
    assert 'class RefusalRate(AnswerScorer["RefusalRate.Config"]):' in written[1].read_text()
    (tmp_path / "empty").mkdir()
    task = write_package("task", "over_refusal", tmp_path / "empty")
    assert [path.name for path in task if path.parent.name == "tasks"] == ["over_refusal.jsonl", "over_refusal.yaml"]


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff in this environment")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_well_formed(tmp_path: Path, kind: str) -> None:
    write_package(kind, "brevity", tmp_path / "package")
    for command in (
        ["check", "--no-cache", "--select", "E,F,W,I,UP,B", "--line-length", "120"],
        ["format", "--no-cache", "--check", "--line-length", "120"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."],
            cwd=tmp_path / "package",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "Brevity", "1st", "two words", "a--b", "-a", "a/../b", "é", "a."])
def test_a_name_that_is_no_package_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        write_package("scorer", name, tmp_path / "package")
    assert str(caught.value) == (
        f"harness plugins new: {name!r} cannot be the name of a package\n"
        "  Use lower-case letters and digits, words joined by - or _, such as `brevity` or `refusal-rate`."
    )
    assert not (tmp_path / "package").exists()


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_package("scorers", "brevity", tmp_path / "package")
    assert str(caught.value).startswith("harness plugins new: unknown kind 'scorers'\n  Did you mean 'scorer'")


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError) as caught:
            write_package("scorer", "brevity", folder)
        assert str(caught.value) == (
            f"harness plugins new, {folder}: exists and is not an empty folder\n  Give another folder."
        )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# --------------------------------------------------------------------------------------------------- put to use

TRAIN = ["--steps", "1", "--set", "batch_size=2", "--set", "eval_rows=0", "--out", "out"]


def put_to_use(kind: str, tiny: Path, sums: Path, pairs: str) -> list[str | Path]:
    """The command of somebody who has written the plugin ``made`` and changed nothing about it."""
    align = ["align", "--model", tiny, *TRAIN]
    evaluate = ["eval", "--model", tiny, "--tasks", sums, "--limit", "2", "--out", "out"]
    if kind == "scorer":
        text = (sums / "sums.yaml").read_text(encoding="utf-8")
        (sums / "sums.yaml").write_text(text.replace("exact_match", "made"), encoding="utf-8")
    return {
        "dataset": [*align, "sft", "--dataset", "made"],
        "aligner": [*align, "made", "--dataset", pairs],
        "loss": [*align, "made", "--dataset", pairs],
        "adapter": [*align, "sft", "--dataset", pairs, "--adapter", "made"],
        "converter": [*align, "sft", "--dataset", write_rated(Path())],
        "merger": ["merge", "made", "--inputs", tiny, tiny, "--out", "out"],
        "scorer": [*evaluate, "--task", "sums", "--engine", "transformers"],
        "engine": [*evaluate, "--task", "sums", "--engine", "made"],
        "observer": [*evaluate, "--task", "sums", "--engine", "transformers"],
        "executor": [*evaluate, "--task", "sums", "--engine", "transformers", "--executor", "made"],
        "task": [*evaluate, "--task", "made", "--engine", "transformers"],
        "section": [*evaluate, "--task", "sums", "--engine", "transformers"],
    }[kind]


def write_rated(folder: Path) -> str:
    """A file of rated answers, every other of which is good; the data set that it is."""
    rows = [{"prompt": f"Say {i}.", "completion": f"It is {i}.", "ratings": {"helpful": i % 2}} for i in range(24)]
    (folder / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{folder / 'rated.jsonl'}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_trained_or_evaluated_with(kind: str, cli: Any, tiny: Path, sums: Path) -> None:
    """Not by its own kit alone: by the command that its author will type next."""
    write_package(kind, "made", "package")
    pairs = write_pairs(Path(), count=12)
    ran = cli(*put_to_use(kind, tiny, sums, pairs), "--plugin", "package/harness_made/__init__.py")
    assert (ran.code, "Traceback" in ran.err) == (0, False), ran.err
    made = dict.fromkeys(("adapter", "aligner", "converter", "dataset", "loss"), "adapter_config.json")
    made["merger"] = "model.safetensors"
    assert (Path("out") / made.get(kind, "report/report.json")).is_file()
    if kind == "scorer":
        (row,) = json.loads(Path("out/report/report.json").read_text(encoding="utf-8"))["rows"]
        assert (row["metric"], row["n"], row["n_unscored"]) == ("brevity", 2, 0)
    if kind == "section":
        assert "Numbers by task" in Path("out/report/report.html").read_text(encoding="utf-8")
    if kind == "observer":
        seen = [json.loads(line) for line in Path("made.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [(one["event"], one["what"].get("kind")) for one in seen] == [
            ("step_started", "answers"),
            ("step_finished", "answers"),
            ("step_started", "scores"),
            ("step_finished", "scores"),
            ("study_finished", None),
        ]
        listed = json.loads(cli("plugins", "--json", "--plugin", "package/harness_made/__init__.py").out)["plugins"]
        (watching,) = [one["hooks"] for one in listed if one["kind"] == "observer"]
        assert watching == "step_finished, step_started, study_finished"
