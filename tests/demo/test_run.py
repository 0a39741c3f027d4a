"""The demo as a user meets it: an ordinary study over its world, whose known truths come out of the numbers."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.registry import load_plugins
from harness.core.config import load_yaml
from harness.core.errors import UserError
from harness.demo.run import STUDY, Demo, run_demo, write_study
from harness.demo.world import ASSETS, World
from harness.study.arms import arms_of
from harness.study.outline import undecidable
from harness.study.spec import read_study
from harness.tasks.catalog import load_catalog


def _less() -> tuple[str, ...]:
    """SFT with its Slerp merge, a third of what is asked: enough for what is large in this world."""
    given = load_yaml(STUDY).data
    grid = [block for block in given["grid"] if block["method"] == "sft"]
    merges = [one for one in given["merges"] if one["name"] == "slerp-sft"]
    claims = [one for one in given["claims"] if one["name"].startswith(("sft-", "slerp-sft-"))]
    kept: dict[str, Any] = {"grid": grid, "merges": merges, "claims": claims, "evaluation.limit": 120}
    return tuple(f"{key}={json.dumps(value)}" for key, value in kept.items())


@pytest.fixture(scope="module")
def demo(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, list[str]]:
    """A demo of fewer arms, and what it printed at a width of 100."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(shown):
        patched.setenv("COLUMNS", "100")
        done = run_demo(world.root.parent, steps=world.steps, changes=_less())
    return done, shown.getvalue().splitlines()


@pytest.mark.slow
def test_the_known_truths_of_the_world_come_out(demo: tuple[Demo, list[str]]) -> None:
    assert not demo[0].failures
    said = {one.name: (one.status, one.effect, one.why) for one in demo[0].board.claims}
    assert len(said) == 9 and not [one for one in said.items() if one[1][1] is None or one[1][0] == "contradicted"]
    # What the pairs are about; what follows from it elsewhere is small on a base half trained, and may stay undecided.
    taught = ("sft-harmless-refuse", "sft-helpful-answer", "slerp-sft-obeys-less")
    assert {name: said[name][0] for name in taught} == dict.fromkeys(taught, "supported"), said


@pytest.mark.slow
def test_what_it_prints(demo: tuple[Demo, list[str]]) -> None:
    done, shown = demo
    text = " ".join(" ".join(shown).split())
    assert "310 arms (260 align, 50 merge) and 4 bases" in text
    page = done.root / "report" / "report.html"
    assert shown[-1] == str(page) and page.is_file()
    assert {len(row.seeds) for row in done.board.rows if row.kind != "base"} == {3}
    for one in done.board.claims:
        assert f"claim {one.name}: {one.status} ({one.why})" in text


@pytest.mark.slow
def test_the_same_command_again_does_nothing_again(
    demo: tuple[Demo, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another working folder."""
    done = demo[0]
    ended = {p: p.stat().st_mtime_ns for p in done.root.glob("steps/*/status.json")}
    monkeypatch.chdir(tmp_path)
    again = run_demo(done.world.root.parent, steps=done.world.steps, changes=_less())
    assert {p: p.stat().st_mtime_ns for p in done.root.glob("steps/*/status.json")} == ended
    assert again.board == done.board


@pytest.mark.slow
def test_its_adapters_name_the_base_from_the_demos_folder(demo: tuple[Demo, list[str]]) -> None:
    """So their bytes, and with them the ids of all that is asked of them, are those of any other call."""
    files = list(demo[0].root.glob("steps/align-*/artifact/adapter_config.json"))
    assert len(files) == 6
    assert {json.loads(file.read_text())["base_model_name_or_path"] for file in files} == {"world/base"}


def test_every_claim_can_be_decided_and_every_arm_is_claimed_about() -> None:
    """A pattern that fits no arm would leave a claim undecided for ever."""
    read = read_study(STUDY)
    tasks = load_catalog(load_plugins(), [ASSETS / "tasks"]).tasks
    claims = read.spec.claims
    assert undecidable(read.spec, arms_of(read), list(tasks)) == []
    names = {arm.name.replace(f"-s{arm.factors['seed']}", "") for arm in arms_of(read) if arm.kind != "base"}
    sides = [side for claim in claims for side in (*claim.a, *claim.b)]
    assert names == {name for name in names for side in sides if fnmatch.fnmatchcase(name, str(side))}
    assert len(claims) == len({claim.name for claim in claims}) == 26


def test_its_study_is_a_file_that_harness_study_takes(world: World, tmp_path: Path) -> None:
    """Also where the folder's name means something in YAML or in an expression over data."""
    out = tmp_path / "a: b + 'c' {d}"
    shutil.copytree(world.root, out / "world")
    spec = read_study(write_study(out, World(out / "world", 0))).spec
    assert spec.bases["base"].model == str(out / "world" / "base")
    assert spec.data["harmless"] == f"jsonl:{out}/world/data/harmless.jsonl"
    assert spec.evaluation.task_folders == (f"{out}/world/tasks",)
    assert spec.evaluation.set == {"demo_manners": {"scorer": {"model": f"{out}/world/classifier"}}}


def test_an_edited_study_is_left_alone(world: World, tmp_path: Path) -> None:
    file = write_study(tmp_path, world)
    assert write_study(tmp_path, world) == file
    file.write_text(file.read_text().replace("steps: 40", "steps: 41"))
    with pytest.raises(UserError) as caught:
        write_study(tmp_path, world)
    assert caught.value.where == str(file) and "was edited" in caught.value.what
    assert f"harness study run {file} --out NEW" in caught.value.fix
    assert "steps: 41" in file.read_text()
    assert "steps: 40" in write_study(tmp_path, world, fresh=True).read_text()
