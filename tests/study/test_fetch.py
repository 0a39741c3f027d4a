"""What a study reads is listed with its size, fetched once, and then found without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.hub_files import HubFiles
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.study.needs import needs_of_study, needs_of_tasks, refuse_missing
from harness.study.spec import find_study, read_study
from harness.tasks.catalog import load_catalog
from tests.alignment.processes import TINY_STEPS
from tests.fake_hub import FakeHub, files

HARNESS = Path(sys.executable).with_name("harness")


@pytest.fixture
def hub(tiny: Path, material: Path, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with `me/tiny`, a model with a pickle beside it, and `me/pairs`, a data set."""
    hub = FakeHub()
    model = Path(shutil.copytree(tiny, tmp_path / "hub" / "tiny"))
    (model / "optimizer.pt").write_bytes(b"not wanted")
    hub.add("model", "me/tiny", model)
    data = tmp_path / "hub" / "pairs"
    data.mkdir()
    shutil.copy(material / "pairs.jsonl", data / "train.jsonl")
    hub.add("dataset", "me/pairs", data)
    yield hub
    hub.close()


@pytest.fixture
def study(material: Path) -> dict[str, Any]:
    """One arm on the hub's model and data."""
    return {
        "study": "hubbed",
        "bases": {"base": "me/tiny"},
        "data": {"pairs": "me/pairs"},
        "grid": [{"method": "sft", "data": "pairs", "set": {**TINY_STEPS, "adapter.rank": 4}}],
        "evaluation": {"tasks": "sums", "task_folders": str(material / "tasks"), "engine": "transformers"},
    }


def harness(hub: FakeHub, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command, with a home of its own and that hub."""
    own = {"HF_HOME": str(folder / "home"), "HARNESS_CACHE": str(folder / "cache"), "HF_ENDPOINT": hub.url}
    hidden = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run([HARNESS, *words], cwd=folder, env={**kept, **own, **more}, capture_output=True, text=True)


def test_fetched_once_and_run_without_a_network(hub: FakeHub, study: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps(study), encoding="utf-8")

    unfetched = harness(hub, tmp_path, "study", "plan", "study.yaml")
    assert unfetched.returncode == 2
    assert "study.yaml:1, bases.base" in unfetched.stderr
    assert "`harness fetch study.yaml` fetches all that the study reads" in unfetched.stderr
    assert hub.requests == 0, "it was not asked to touch the network"

    listed = harness(hub, tmp_path, "fetch", "study.yaml", "--dry-run", "--json")
    assert listed.returncode == 0, listed.stderr
    told = json.loads(listed.stdout)
    wanted = {name: len(data) for name, data in files(hub.repos["model", "me/tiny"]).items() if name[-3:] != ".pt"}
    rows = {row["repository"]: row for row in told["files"]}
    assert rows["me/tiny"]["missing_bytes"] == rows["me/tiny"]["bytes"] == sum(wanted.values())
    assert rows["me/tiny"]["commit"] == hub.commit("me/tiny")[:12]
    assert rows["me/pairs"]["for"] == "me/pairs"
    assert told["missing_bytes"] == sum(row["bytes"] for row in rows.values())
    assert hub.asked == []

    fetched = harness(hub, tmp_path, "fetch", "study.yaml")
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stderr.rstrip().endswith("Everything is here. Next: harness study run study.yaml")
    assert sorted(hub.asked) == sorted([*(f"me/tiny/{name}" for name in wanted), "me/pairs/train.jsonl"])
    assert list((tmp_path / "home" / "hub").glob("datasets--me--pairs/snapshots/*/train.jsonl"))
    assert list((tmp_path / "home" / "datasets").glob("me___pairs/*/*/*/*.arrow"))

    again = harness(hub, tmp_path, "fetch", "study.yaml")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is here") == 2
    assert len(hub.asked) == len(wanted) + 1, "nothing is fetched twice"

    before = hub.requests
    ran = harness(hub, tmp_path, "study", "run", "study.yaml")
    assert ran.returncode == 0, ran.stderr
    assert hub.requests == before, "a run never touches the network unless asked"
    assert len(list(tmp_path.glob("runs/hubbed/steps/scores-*/status.json"))) == 2


MESSAGES = """
import sys
from harness.contracts.hub_files import HubFiles
from harness.core.errors import UserError
from harness.data.fetch import look

for repo, kind, revision, patterns in {asked!r}:
    try:
        look(HubFiles(repo, kind, revision, patterns))
        print("no error")
    except UserError as error:
        print(error)
    print("---")
"""


def test_what_the_hub_refuses_is_said(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("model", "me/gated", hub.repos["model", "me/tiny"])
    hub.gated.add("me/gated")
    asked = [
        ("me/gated", "model", None, None),
        ("me/nothing", "dataset", None, None),
        ("me/tiny", "model", "0" * 40, None),
        ("me/tiny", "model", None, ("*.gguf",)),
    ]
    own = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    code = MESSAGES.format(asked=asked)
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True)
    gated, nothing, revision, empty, _ = ran.stdout.split("---\n")
    assert "model me/gated: is gated: the hub gives it to those who have accepted its licence" in gated, ran.stderr
    assert f"Accept its licence at {hub.url}/me/gated and log in (`hf auth login`)" in gated
    assert "data set me/nothing: is not on the hub, or not for you" in nothing
    assert f"Check the name at {hub.url}/datasets/me/nothing" in nothing
    assert f"model me/tiny at {'0' * 40}: the hub has no such revision" in revision
    assert "model me/tiny: holds none of *.gguf" in empty
    hub.close()
    code = MESSAGES.format(asked=asked[1:2])
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True)
    assert f"data set me/nothing: cannot be fetched from {hub.url}" in ran.stdout
    assert "Check the network (HF_ENDPOINT, HTTPS_PROXY)" in ran.stdout


def test_offline_it_is_an_error(hub: FakeHub, study: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    ran = harness(hub, tmp_path, "fetch", "study.yaml", HF_HUB_OFFLINE="1")
    assert ran.returncode == 2
    assert "the network is switched off (HF_HUB_OFFLINE=1)" in ran.stderr
    assert hub.requests == 0


def test_a_run_names_the_data_that_is_in_no_cache(
    study: dict[str, Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "study.yaml").write_text(json.dumps(study), encoding="utf-8")
    read = read_study(tmp_path / "study.yaml", models={"base": str(tiny)})
    with pytest.raises(UserError) as error:
        refuse_missing(read, load_plugins([]), "harness fetch study.yaml")
    assert "study hubbed: 1 of what it reads is in no cache here: me/pairs (me/pairs)" in str(error.value)
    assert "`harness fetch study.yaml`; or let `harness study run --online` do it" in error.value.fix


def test_what_the_shipped_quick_study_reads(tiny: Path) -> None:
    registry = load_plugins([])
    needs = needs_of_study(read_study(find_study(Path("quick"))), registry)
    assert {(one.repo, one.kind) for one in needs.files} == {
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "model"),
        ("Anthropic/hh-rlhf", "dataset"),
        ("cais/mmlu", "dataset"),
        ("declare-lab/DangerousQA", "dataset"),
    }
    hh = next(one for one in needs.files if one.repo == "Anthropic/hh-rlhf")
    # As the loader pins it.
    assert hh.revision == "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
    assert needs.files[hh] == ["hh-rlhf:harmless", "hh-rlhf:helpful"]
    # A base by path is no matter of the hub's.
    here = needs_of_study(read_study(find_study(Path("quick")), models={"base": str(tiny)}), registry)
    assert {one.kind for one in here.files} == {"dataset"}


def test_what_the_paper_suite_reads() -> None:
    registry = load_plugins([])
    given = {"alpaca_eval_paper": {"scorer": {"model": "me/judge", "revision": "v1"}}}
    needs = needs_of_tasks([], "paper", registry, load_catalog(registry), options=given, revisions={})
    found = {one.repo: one for one in needs.files}
    assert needs.files[found["nicholasKluge/ToxicityModel"]] == ["scorer toxicity"]
    assert found["nicholasKluge/ToxicityModel"].revision == "055c256c38134ab0d01bc6375bfee3a056ccc4a0"
    assert found["me/judge"].revision == "v1"
    assert "tatsu-lab/alpaca_eval" in found
    assert HubFiles("cais/mmlu", "dataset") in needs.files
    # Every judge of a task that names several, once.
    asked = ["me/one", {"model": "me/two", "revision": "v2"}, "refusal"]
    judges = {"dangerous_qa": {"judges": asked, "wordings": 2}}
    needs = needs_of_tasks(["dangerous_qa"], None, registry, load_catalog(registry), options=judges, revisions={})
    assert [(one.repo, one.revision) for one in needs.files if one.kind == "model"] == [
        ("me/one", None),
        ("me/two", "v2"),
    ]
    # Another commit of a data set, where the user says so.
    commit = "a" * 40
    needs = needs_of_tasks(
        ["real_toxicity"],
        None,
        registry,
        load_catalog(registry),
        options={},
        revisions={"allenai/real-toxicity-prompts": commit},
    )
    assert HubFiles("allenai/real-toxicity-prompts", "dataset", commit) in needs.files
