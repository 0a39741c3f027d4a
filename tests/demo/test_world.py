"""The demo's world in a folder: made whole or not at all, to the same bytes, and taken again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.core.config import load_yaml, parse
from harness.core.errors import HarnessError, UserError
from harness.core.specs import SuiteSpec, TaskSpec
from harness.demo.world import World, build_world


def test_the_suite_names_the_tasks_that_lie_beside_it(world: World) -> None:
    suite = parse(SuiteSpec, load_yaml(world.tasks / "suite.yaml"))
    found = [parse(TaskSpec, load_yaml(world.tasks / f"{name}.yaml")) for name in ("questions", "attacks", "manners")]
    assert suite.tasks == tuple(task.name for task in found)
    for task in found:
        assert task.dataset is not None and (world.tasks / task.dataset.options["path"]).is_file()
    for file in world.tasks.glob("*.yaml"):
        assert str(world.root) not in file.read_text(), "a world can be moved"


def _times(world: World) -> dict[str, int]:
    return {str(p.relative_to(world.root)): p.stat().st_mtime_ns for p in world.root.rglob("*") if p.is_file()}


def test_a_finished_world_is_reused_and_can_be_moved(world: World, tmp_path: Path) -> None:
    said: list[str] = []
    before = _times(world)
    assert build_world(world.root, steps=world.steps, progress=said.append) == world
    assert said == ["the world is already there"] and _times(world) == before
    moved = shutil.copytree(world.root, tmp_path / "moved")
    again = build_world(moved, steps=world.steps, progress=said.append)
    assert said == ["the world is already there"] * 2
    assert again.base == moved / "base"


@pytest.mark.slow
def test_a_killed_build_is_built_anew_to_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from harness.demo.world import build_world\n"
        "build_world(pathlib.Path(sys.argv[1]), steps=8, progress=lambda line: print(line, flush=True))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    folder = tmp_path / "world"
    command = [sys.executable, "-c", code, str(folder)]
    # A group of its own: the kill takes parent and child at once, as an out-of-memory kill of a container does.
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as build:
        assert build.stdout is not None
        for line in build.stdout:
            if line.startswith("classifier:"):
                os.killpg(build.pid, signal.SIGKILL)
                break
    assert not (folder / "world.json").exists()
    # What was whole when it was killed is made again all the same: nothing says that it was.
    before = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    assert "model.safetensors" in before
    # A piece of an earlier world must not survive in the next one.
    (folder / "base" / "stray.bin").write_bytes(b"left over")
    said: list[str] = []
    build_world(folder, steps=8, progress=said.append)
    assert any(line.startswith("base: step") for line in said) and (folder / "world.json").is_file()
    assert {path.name: path.read_bytes() for path in (folder / "base").iterdir()} == before


@pytest.mark.parametrize("damage", ["flip", "delete", "tear"])
def test_a_damaged_world_is_not_taken_for_a_finished_one(
    world: World, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(world.root, tmp_path / "copy")
    weights, mark = copy / "base" / "model.safetensors", copy / "world.json"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "delete":
        weights.unlink()
    else:
        mark.write_bytes(mark.read_bytes()[:-20])

    rebuilt: list[Path] = []
    monkeypatch.setattr("harness.demo.world._train_apart", lambda world, lock, say: rebuilt.append(world.root))
    build_world(copy, steps=world.steps)
    assert rebuilt == [copy] and not (copy / "base").exists()


def test_another_seed_and_another_base_are_another_world(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuilt: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "harness.demo.world._train_apart", lambda world, lock, say: rebuilt.append((world.seed, world.steps))
    )
    for name, seed, steps in (("seed", 1, world.steps), ("steps", 0, world.steps + 1)):
        copy = shutil.copytree(world.root, tmp_path / name)
        build_world(copy, seed=seed, steps=steps)
    assert rebuilt == [(1, world.steps), (0, world.steps + 1)]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(UserError) as caught:
        build_world(tmp_path)
    assert str(tmp_path) in caught.value.where
    assert "thesis.tex" in caught.value.what
    assert "Give a new folder" in caught.value.fix
    assert (tmp_path / "thesis.tex").read_text() == "three years"


def test_training_that_fails_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the installation is broken."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho No module named torch >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(HarnessError) as caught:
        build_world(tmp_path / "world")
    assert str(caught.value) == (
        f"{tmp_path / 'world'}: training the demo's models failed: a process ended with code 1 and said nothing\n"
        "No module named torch\n"
    )
    assert not (tmp_path / "world" / "world.json").exists()
