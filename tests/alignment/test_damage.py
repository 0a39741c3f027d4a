"""Every file of an alignment's folder, spoilt in four ways: named by the same command, and by whoever uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.alignment.folder import record_alignment
from harness.alignment.plan import AlignPlan
from harness.alignment.run import Alignment, run_align
from harness.contracts.registry import Registry, load_plugins
from harness.core.progress import Reporter
from harness.core.specs import ModelSpec
from harness.models.inspect import inspect_adapter, inspect_model
from harness.steps.checksums import PAGES
from harness.steps.files import write_json
from harness.steps.folder import StepFolder
from tests.alignment.processes import TINY_STEPS
from tests.damage import HARMS, files_of, one_by_one

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "lineage.json", "checksums.json"}
RECORDS = {"batches.jsonl.gz", "heldout.jsonl.gz", "log.jsonl", "provenance.json", "result.json", "status.json"}
FILES = {
    *ADAPTER,
    *(f"step-3/{name}" for name in ADAPTER),
    *(f"step/{name}" for name in (*RECORDS, "step.json")),
    "README.md",
    ".lock",
}
NOT_READ = {".lock": "the id of the process that wrote last; a lock is held by the process, not by the file"}
HOW = {"truncate": "", "flip": "", "delete": "is missing", "empty": "is "}
"""How the message goes on."""


@pytest.fixture(scope="module")
def made(tiny: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AlignPlan, Registry, Path]:
    """One alignment with a kept checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        registry = load_plugins([])
        out = tmp_path_factory.mktemp("made") / "out"
        done = harness.align(
            "dpo", str(tiny), f"jsonl:{pairs}", out=out, checkpoints=(3,), options=TINY_STEPS, registry=registry
        )
    return done.plan, registry, out


@pytest.fixture
def copy(made: tuple[AlignPlan, Registry, Path], alone: Path) -> Path:
    """To be spoilt."""
    return Path(shutil.copytree(made[2], alone / "out"))


@pytest.fixture
def again(made: tuple[AlignPlan, Registry, Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The same alignment once more, which must not train; returns what it said."""
    plan, registry, _ = made

    def run(out: Path, **more: Any) -> str:
        said: list[str] = []
        monkeypatch.setattr("harness.alignment.run._Run.carry_out", lambda _: pytest.fail("it trained again"))
        monkeypatch.setattr(Reporter, "note", lambda _, text: said.append(text))
        run_align(plan, registry, out, **more)
        return "\n".join(said)

    return run


@pytest.mark.parametrize("harm", HARMS)
def test_the_same_command_names_what_is_damaged(copy: Path, again: Callable[..., str], harm: str) -> None:
    assert files_of(copy) == FILES
    for name in one_by_one(copy, harm):
        if name in NOT_READ:
            again(copy)
        elif name in PAGES:
            assert f"out holds this alignment already; {name} " in again(copy)
        else:
            with pytest.raises(harness.UserError) as caught:
                again(copy)
            assert f"--out {copy}" == caught.value.where
            assert caught.value.what.startswith(f"{name} {HOW[harm]}")
            assert ";" not in caught.value.what
            assert "--fresh" in caught.value.fix
    assert again(copy) == f"{copy} holds this alignment already"


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("folder", ["", "step-3"])
def test_whoever_uses_the_adapter_names_what_is_damaged(copy: Path, tiny: Path, harm: str, folder: str) -> None:
    model, used = inspect_model(ModelSpec(model=str(tiny))), copy / folder
    own = {f"{folder}/{name}".strip("/") for name in ADAPTER}
    # Without a record it is taken as an outsider's: nothing tells it from one.
    own -= {f"{folder}/checksums.json".strip("/")} if harm == "delete" else set()
    for name in one_by_one(copy, harm):
        if name not in own:
            inspect_adapter(str(used), model)
            continue
        with pytest.raises(harness.UserError) as caught:
            inspect_adapter(str(used), model)
        assert caught.value.where == f"--adapter {used}"
        assert name.rpartition("/")[2] in caught.value.what


@pytest.mark.parametrize("lost", ["step/step.json", "step/status.json", "checksums.json", "lineage.json"])
def test_fresh_makes_a_damaged_alignment_again(
    made: tuple[AlignPlan, Registry, Path], copy: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Also where what is lost said whose folder it is."""
    (copy / lost).unlink()
    left: list[set[str]] = []

    def carry_out(run: Any) -> Alignment:
        left.append(files_of(run.out))
        return Alignment(run.out, run.plan, [])

    monkeypatch.setattr("harness.alignment.run._Run.carry_out", carry_out)
    run_align(*made[:2], copy, fresh=True)
    assert left == [{".lock"}]


def test_a_user_s_own_file_is_not_recorded(copy: Path, again: Callable[..., str]) -> None:
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    record_alignment(StepFolder.within(copy, "id", "align"))
    assert "notes.txt" not in json.loads((copy / "checksums.json").read_text())["files"]
    (copy / "notes.txt").unlink()
    again(copy)


def test_an_alignment_killed_before_its_end_is_on_record_goes_on(
    made: tuple[AlignPlan, Registry, Path], copy: Path, again: Callable[..., str]
) -> None:
    """The record of files is there, status.json is not, and the checkpoint says that there is something to go on."""
    (copy / "step" / "status.json").unlink()
    write_json(copy / "step" / "checkpoints" / "checkpoint-6" / "complete.json", {"step": 6})
    with pytest.raises(pytest.fail.Exception, match="it trained again"):
        again(copy)
