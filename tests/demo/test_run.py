"""The demo as a user meets it: an ordinary study over its world, whose known truths come out of the numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from harness.core.config import load_yaml
from harness.core.errors import UserError
from harness.demo.run import Demo, run_demo, write_study
from harness.demo.truths import Contrast, check_truths, read_truths
from harness.demo.world import ASSETS, World
from harness.study.spec import read_study

# One seed of each arm: half of the study.
LESS = ("grid=" + json.dumps([{**block, "seed": [0]} for block in load_yaml(ASSETS / "study.yaml").data["grid"]]),)


@pytest.fixture(scope="module")
def demo(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, list[str]]:
    """A demo of one seed, and what it printed at a width of 100."""
    import contextlib
    import io

    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(shown):
        patched.setenv("COLUMNS", "100")
        done = run_demo(world.root.parent, steps=world.steps, changes=LESS)
    return done, shown.getvalue().splitlines()


@pytest.mark.slow
def test_the_known_truths_of_the_world_come_out(demo: tuple[Demo, list[str]]) -> None:
    findings = demo[0].findings
    assert not demo[0].failures
    said = {(one.method, one.says): (one.verdict, [str(each) for each in one.measured]) for one in findings}
    assert len(said) == 18
    # Of half the arms, on a base half trained: what is small may stay undecided, and nothing comes out reversed.
    assert not [one for one in said.items() if one[1][0] in ("contradicted", "not measured")]
    every = [each for one in findings for each in one.measured]
    # Near the top of what the base knows, a merge and a helpful arm differ by little; so do these two from the base.
    small = [
        ("demo_questions", "-helpful-*", "merge"),
        ("demo_attacks", "base", "-helpful-"),
        ("demo_manners", "base", ""),
    ]
    firm = [each for each in every if not any(_is(each.contrast, *one) for one in small)]
    assert len(firm) == 18 and {each.verdict for each in firm} == {"supported"}, said


def _is(contrast: Contrast, task: str, than: str, arms: str) -> bool:
    merge = contrast.arms.startswith(("slerp-", "dare-"))
    return (
        contrast.task == task and contrast.than.endswith(than) and (merge if arms == "merge" else arms in contrast.arms)
    )


@pytest.mark.slow
def test_what_it_prints(demo: tuple[Demo, list[str]]) -> None:
    done, shown = demo
    text = " ".join(" ".join(shown).split())
    assert "310 arms (260 align, 50 merge) and 4 bases" in text
    assert re.search(r" \d+ of 18 supported\. .* over 1 seeds; training noise not estimated", text)
    page = done.root / "report" / "base" / "report.html"
    assert shown[-1] == str(page) and page.is_file()
    for arm in ("sft-harmless", "dpo-helpful", "slerp-sft", "dare-dpo"):
        assert arm in text


@pytest.mark.slow
def test_the_same_command_again_does_nothing_again(demo: tuple[Demo, list[str]]) -> None:
    done = demo[0]
    ended = {p: p.stat().st_mtime_ns for p in done.root.glob("steps/*/status.json")}
    again = run_demo(done.world.root.parent, steps=done.world.steps, changes=LESS)
    assert {p: p.stat().st_mtime_ns for p in done.root.glob("steps/*/status.json")} == ended
    assert [one.verdict for one in again.findings] == [one.verdict for one in done.findings]


@pytest.mark.slow
def test_a_damaged_or_missing_number_is_no_verdict(demo: tuple[Demo, list[str]], tmp_path: Path) -> None:
    """Without the scores of one arm, what is said of it is that it was not measured, and why."""
    root = shutil.copytree(demo[0].root, tmp_path / "run")
    for file in root.glob("steps/scores-*sft-helpful-lora-base-s0*/step.json"):
        if json.loads(file.read_text())["task"] == "demo_attacks":
            shutil.rmtree(file.parent)
    findings = check_truths(root, read_truths())
    without = {(one.method, one.says) for one in findings if one.verdict == "not measured"}
    assert ("sft", "helpful arms refuse fewer attacks than the base") in without
    attacks = [one for one in findings if one.measured[0].contrast.task == "demo_attacks" and one.method == "sft"]
    assert without == {("sft", one.says) for one in attacks if "harmless arms refuse more" not in one.says}
    assert any("demo_attacks failed or has not ended" in str(each) for one in findings for each in one.measured)


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
