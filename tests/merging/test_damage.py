"""Every file of a merged or folded folder, spoilt in four ways: named by the same command, and by whoever uses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.core.progress import Reporter
from harness.core.specs import ModelSpec
from harness.merging.fold.run import fold
from harness.models.inspect import inspect_adapter, inspect_model
from harness.steps.checksums import PAGES
from tests.damage import HARMS, files_of, one_by_one

MODEL = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
RECORD = {f"step/{name}" for name in ("step.json", "provenance.json", "status.json", "log.jsonl")}
COMMON = {"lineage.json", "README.md", "checksums.json", *RECORD}
FILES = {
    "merge": {*MODEL, *COMMON, "merge.json", "merge.html"},
    "merge as adapter": {*ADAPTER, *COMMON, "merge.json", "merge.html"},
    "fold": {*MODEL, *COMMON, "fold.json"},
}
HOW = {"truncate": "has SHA-256 ", "flip": "has SHA-256 ", "delete": "is missing", "empty": "is empty"}
"""How the message goes on."""


def carry_out(kind: str, made: Path, out: Path, reporter: Reporter | None = None, fresh: bool = False) -> None:
    """One of the three commands."""
    more: dict[str, Any] = {"out": out, "reporter": reporter, "fresh": fresh}
    if kind == "fold":
        fold(str(made / "a0"), str(made / "base"), probe_prompts=0, **more)
        return
    form = "adapter" if kind == "merge as adapter" else "model"
    harness.merge("linear", [made / "a0", made / "a1"], base=made / "base", form=form, **more)


@pytest.fixture(scope="module", params=FILES)
def whole(request: Any, made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Kind and folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    carry_out(request.param, made, out)
    return request.param, out


@pytest.fixture
def copy(whole: tuple[str, Path], alone: Path) -> Path:
    """To be spoilt."""
    return Path(shutil.copytree(whole[1], alone / "out"))


@pytest.fixture
def again(whole: tuple[str, Path], made: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """The same command once more, which must write nothing; returns what it said."""

    def run() -> str:
        said: list[str] = []
        monkeypatch.setattr("harness.merging.run.publish", lambda *_: pytest.fail("it was made again"))
        monkeypatch.setattr("harness.merging.fold.run.publish", lambda *_: pytest.fail("it was made again"))
        monkeypatch.setattr(Reporter, "note", lambda _, text: said.append(text))
        carry_out(whole[0], made, copy)
        return "\n".join(said)

    return run


@pytest.mark.parametrize("harm", HARMS)
def test_the_same_command_names_what_is_damaged(
    whole: tuple[str, Path], copy: Path, again: Callable[[], str], harm: str
) -> None:
    assert files_of(copy) == FILES[whole[0]]
    verb = whole[0].partition(" ")[0]
    for name in one_by_one(copy, harm):
        if name in PAGES:
            assert again().startswith(f"{copy} holds this {verb} already; {name} {HOW[harm]}")
            continue
        with pytest.raises(harness.UserError) as caught:
            again()
        own = {"delete": "is missing"}.get(harm, "is damaged")
        by_itself = name in ("checksums.json", "step/status.json")
        assert caught.value.where == f"--out {copy}"
        assert caught.value.what.startswith(f"{name} {own if by_itself else HOW[harm]}")
        assert caught.value.fix == "Give another --out, or --fresh to make it again."
    assert again() == f"{copy} holds this {verb} already"


@pytest.mark.parametrize("harm", HARMS)
def test_whoever_uses_it_names_what_is_damaged(whole: tuple[str, Path], copy: Path, made: Path, harm: str) -> None:
    base = inspect_model(ModelSpec(model=str(made / "base")))

    def use() -> None:
        if whole[0] == "merge as adapter":
            inspect_adapter(str(copy), base)
        else:
            inspect_model(ModelSpec(model=str(copy)))

    for name in one_by_one(copy, harm):
        # Without a record it is taken as an outsider's: nothing tells it from one.
        # Whoever uses a model or an adapter does not ask how it was made.
        if name in PAGES or name in RECORD or (name, harm) == ("checksums.json", "delete"):
            use()
            continue
        with pytest.raises(harness.UserError) as caught:
            use()
        assert caught.value.what.startswith(f"{name} is damaged" if name == "checksums.json" else f"{name} {HOW[harm]}")
        assert "delete checksums.json in it" in caught.value.fix


@pytest.mark.parametrize("lost", ["{kind}.json", "checksums.json", "lineage.json"])
def test_fresh_makes_a_damaged_folder_again(whole: tuple[str, Path], copy: Path, made: Path, lost: str) -> None:
    """Also where what is lost said whose folder it is."""
    (copy / lost.format(kind=whole[0].partition(" ")[0])).unlink()
    carry_out(whole[0], made, copy, fresh=True)
    assert files_of(copy) == FILES[whole[0]]


def test_a_whole_folder_without_its_status_is_not_cleared_for_another(made: Path, alone: Path) -> None:
    """What took work to make is deleted with --fresh alone."""
    carry_out("merge", made, alone / "out")
    (alone / "out" / "step" / "status.json").unlink()
    with pytest.raises(harness.UserError, match="holds another merge; different: "):
        harness.merge("linear", [made / "a0", made / "a2"], base=made / "base", out=alone / "out")
    assert (alone / "out" / "model.safetensors").is_file()
