"""`harness push`: what would be sent, what is refused, and that it is sent in one commit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.contracts.registry import load_plugins
from harness.core.errors import CorruptionError
from harness.publishing.card import published_card
from harness.publishing.push import Parcel, datasets_of, pack_arm, send
from harness.steps.files import read_json, write_json
from tests.study.conftest import (  # noqa: F401 - fixtures here, too
    copied,
    material,
    small,
    small_run,
    zygote,
)

ARM = "dpo-pairs-lora-tiny-s0"


@pytest.fixture
def run(small_run: Path, copied: Callable[[Path], Path]) -> Path:  # noqa: F811
    return copied(small_run)


def adapter(run: Path) -> Path:
    (found,) = run.glob(f"steps/align-{ARM}-*/artifact")
    return found


def metadata(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_an_arm_goes_with_its_files_and_what_was_measured(cli: Any, run: Path) -> None:
    said = cli("push", "run", "--arm", ARM, "--to", "me/arm", "--base-model", "them/base", "--licence", "mit", "--json")
    assert said.code == 0, said.err
    assert "a dry run: nothing was sent" in said.err
    found = json.loads(said.out)
    folder = adapter(run)
    assert set(found["files"]) == {path.name for path in folder.iterdir()}
    about = metadata(found["card"])
    assert (about["base_model"], about["license"], about["library_name"]) == ("them/base", "mit", "peft")
    (scores,) = run.glob(f"steps/scores-*{ARM}*/artifact/scores.json")
    rows = [row for row in json.loads(scores.read_text())["rows"] if row["leaf"] is None]
    (model,) = about["model-index"]
    assert model["name"] == ARM
    values = [result["metrics"][0]["value"] for result in model["results"]]
    assert values == [row["mean"] for row in rows] and values
    assert f"n = {rows[0]['n']}" in model["results"][0]["metrics"][0]["name"]
    assert f"`{rows[0]['step'][:12]}`" in found["card"]
    assert "Not measured here" not in found["card"]


def test_the_card_is_read_as_the_hub_reads_it(cli: Any, run: Path) -> None:
    """By its own library, which refuses a model-index that is none."""
    from huggingface_hub import ModelCard

    (merged,) = run.glob("steps/merge-merged-*")
    for step in [*run.glob("steps/align-*"), merged]:
        # As if the pairs were of the hub.
        told = read_json(step / "step.json")
        for number, part in enumerate(told["identity"].get("data", {}).get("parts", ())):
            part["dataset"] = {"name": "jsonl", "options": {"path": f"them/{told['arm'].split('-')[0]}-{number}"}}
        write_json(step / "step.json", told)
    told = pack_arm(adapter(run), results=run, base_model="them/base", licence="mit").card
    data = ModelCard(told).data
    assert (data.base_model, data.base_model_relation, data.license) == ("them/base", "adapter", "mit")
    assert data.datasets == ["them/dpo-0"]
    (result,) = data.eval_results
    assert "95 % interval" in result.metric_name and "n = 6" in result.metric_name
    (scores,) = run.glob(f"steps/scores-*{ARM}*/artifact/scores.json")
    assert result.metric_value == json.loads(scores.read_text())["rows"][0]["mean"]

    # A merge names the data of what it was made from.
    records_of = merged / "artifact"
    assert datasets_of(records_of, json.loads((records_of / "lineage.json").read_text()), None, load_plugins()) == (
        ["them/sft-0", "them/dpo-0"],
        [],
    )
    (sft,) = run.glob("steps/align-sft-*")
    digest = read_json(sft / "status.json")["digest"]
    shutil.rmtree(sft)
    assert datasets_of(records_of, json.loads((records_of / "lineage.json").read_text()), None, load_plugins()) == (
        ["them/dpo-0"],
        [f"artifact ({digest[:12]})"],
    )
    card = published_card(
        adapter(run), base_model="them/base", datasets=[], licence=None, results=None, unknown=["a", "b\u202e"]
    )
    assert card.endswith("Not on record here: what a, b⟨U+202E⟩ was trained on.\n")


@pytest.mark.parametrize("broken", ["model-index: [{name: x}]", "tags: {"])
def test_metadata_that_the_hub_would_not_read_is_refused(run: Path, broken: str) -> None:
    card = adapter(run) / "README.md"
    card.write_text(card.read_text().replace("library_name: peft", broken))
    with pytest.raises(CorruptionError, match=r"README\.md: no model card"):
        published_card(adapter(run), base_model="them/base", datasets=[], licence=None, results=None)


def test_results_are_found_by_content_and_not_by_name(run: Path) -> None:
    """Another adapter under the arm's folder name has no results here."""
    folder = adapter(run)
    (other,) = run.glob("steps/align-sft-*/artifact")
    for file in folder.iterdir():
        file.unlink()
    shutil.copytree(other, folder, dirs_exist_ok=True)
    mine = pack_arm(folder, results=run, base_model="them/base").card
    its = pack_arm(other, results=run, base_model="them/base").card
    assert "# sft-pairs-lora-tiny-s0" in mine
    assert metadata(mine)["model-index"] == metadata(its)["model-index"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--arm", ARM, "--to", "me/arm"], "--base-model: the base, tiny, was a folder"),
        (["run", "--arm", ARM, "--to", "me/arm", "--base-model", "base"], "'base' is no hub id"),
        (["run", "--arm", "dpo", "--to", "me/arm"], "has made no arm of this name"),
        (["run", "--to", "me/arm", "--licence", "mit"], "--licence: is of an arm"),
        ([".", "--to", "me/arm"], "is no adapter or model that"),
        ([".", "--arm", ARM, "--to", "me/arm"], ". is no run folder"),
    ],
)
def test_what_is_refused(cli: Any, run: Path, arguments: list[str], told: str) -> None:
    said = cli("push", *arguments)
    assert said.code == 2
    assert told in said.err


def test_a_damaged_adapter_is_refused(cli: Any, run: Path) -> None:
    file = adapter(run) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    said = cli("push", "run", "--arm", ARM, "--to", "me/arm", "--base-model", "them/base")
    assert said.code == 2
    assert "is not as it was made: adapter_model.safetensors" in said.err


def test_a_path_of_this_machine_is_refused(cli: Any, run: Path) -> None:
    card = adapter(run) / "README.md"
    card.write_text(card.read_text() + f"\nMade in {Path.cwd()}/secret\n")
    said = cli("push", "run", "--arm", ARM, "--to", "me/arm", "--base-model", "them/base")
    assert said.code == 2
    assert f"README.md: names a folder of this machine, {Path.cwd()}" in said.err


def test_a_report_is_a_static_space_made_anew(cli: Any, run: Path) -> None:
    shutil.rmtree(run / "report")
    said = cli("push", "run", "--to", "me/board", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["kind"] == "space"
    assert any(name.endswith("report.html") for name in found["files"])
    assert metadata(found["card"]) == {"title": "board", "sdk": "static", "app_file": "index.html"}


def test_it_is_sent_in_one_commit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    done: list[tuple[Any, ...]] = []

    def create_repo(self: Any, to: str, **how: Any) -> None:
        done.append(("repo", to, how["repo_type"], how["space_sdk"]))

    def create_commit(self: Any, to: str, adds: list[Any], **how: Any) -> Any:
        done.append(("commit", to, sorted(one.path_in_repo for one in adds)))
        return type("Commit", (), {"commit_url": "https://hub/1"})

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    parcel = pack_arm(adapter(run), base_model="them/base")
    assert send(parcel, "me/arm") == "https://hub/1"
    assert done == [("repo", "me/arm", "model", None), ("commit", "me/arm", sorted(parcel.files))]


def test_offline_is_said(cli: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(Exception, match="--to me/arm: HF_HUB_OFFLINE is set"):
        send(Parcel("model", {"README.md": b"x"}), "me/arm")
