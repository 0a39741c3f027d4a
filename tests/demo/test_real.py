"""``harness demo --real``: what it would fetch is said before; without a network that is an error with the commands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.contracts.registry import Registry, load_plugins
from harness.core.errors import UserError
from harness.demo import real
from harness.demo.real import Source, announced, duration, run_real, sized, sources_of, training_operations
from harness.study.arms import arms_of
from harness.study.spec import Read, find_study, read_study


@pytest.fixture
def registry() -> Registry:
    return load_plugins()


@pytest.fixture
def quick() -> Read:
    return read_study(find_study(Path("quick")))


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))


def test_it_knows_all_that_the_study_reads(quick: Read, registry: Registry) -> None:
    found = {(one.kind, one.id) for one in sources_of(quick, registry)}
    assert found == {
        ("model", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("dataset", "Anthropic/hh-rlhf"),
        ("dataset", "cais/mmlu"),
        ("dataset", "declare-lab/DangerousQA"),
    }
    pinned = next(one for one in sources_of(quick, registry) if one.id == "Anthropic/hh-rlhf")
    assert pinned.revision is not None and len(pinned.revision) == 40
    assert pinned.command == f"hf download --repo-type dataset Anthropic/hh-rlhf --revision {pinned.revision}"


def test_a_folder_is_not_fetched_and_a_revision_of_the_study_is(tmp_path: Path, registry: Registry) -> None:
    commits = {"Anthropic/hh-rlhf": "a" * 40}
    read = read_study(find_study(Path("quick")), models={"base": str(tmp_path)}, revisions=commits)
    found = sources_of(read, registry)
    assert not [one for one in found if one.kind == "model"]
    assert Source("dataset", "Anthropic/hh-rlhf", "a" * 40) in found


def test_what_the_caches_hold_is_not_fetched(tmp_path: Path) -> None:
    held = Source("dataset", "Anthropic/hh-rlhf", "b" * 40)
    assert not held.here
    (tmp_path / "HF_HUB_CACHE" / "datasets--Anthropic--hh-rlhf" / "snapshots" / ("b" * 40)).mkdir(parents=True)
    assert held.here and not Source("dataset", "Anthropic/hh-rlhf", "c" * 40).here


def test_offline_it_names_what_is_missing_and_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        run_real(tmp_path / "out")
    error = caught.value
    assert error.where == "harness demo --real"
    assert "model HuggingFaceTB/SmolLM2-135M-Instruct" in error.what and "HF_HUB_OFFLINE" in error.what
    assert "`hf download HuggingFaceTB/SmolLM2-135M-Instruct`" in error.fix
    assert "`hf download --repo-type dataset Anthropic/hh-rlhf --revision " in error.fix
    assert not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("harness.demo.real.offline", lambda: False)

    def nobody(*args: Any, **more: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", nobody)
    with pytest.raises(UserError) as caught:
        sized([Source("model", "a/b", None)])
    assert "the hub cannot be reached (OSError)" in caught.value.what
    assert "`hf download a/b`" in caught.value.fix


def test_sizes_are_those_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.demo.real.offline", lambda: False)
    told = {"a/b": [SimpleNamespace(size=70_000_000), SimpleNamespace(size=5_000_000)], "c/d": None}
    monkeypatch.setattr(
        "huggingface_hub.HfApi.repo_info", lambda self, name, **more: SimpleNamespace(siblings=told[name])
    )
    lines = announced(sized([Source("model", "a/b", None), Source("dataset", "c/d", "r")]), "8 arms")
    assert lines[1:] == [
        "  model a/b: 75 MB",
        "  dataset c/d: size not known",
        # 75 MB are 600 Mbit: 6 s.
        "  together 75 MB: 0 minutes at 100 Mbit/s",
    ]
    assert announced([], "8 arms") == ["study quick: 8 arms; everything is here, nothing is fetched"]


def test_the_time_is_that_of_the_arms(quick: Read) -> None:
    # Four SFT and four DPO arms of 50 steps of 16 rows of TOKENS tokens; 1e8 parameters in 2 bytes each.
    tokens = 50 * 16 * real.TOKENS
    expected = 4 * tokens * 1e8 * 6 + 4 * tokens * 1e8 * 16
    assert training_operations(arms_of(quick), 200_000_000) == pytest.approx(expected)
    assert duration(6e12, 1e11) == "1 minutes" and duration(7.2e14, 1e11) == "2.0 hours"
