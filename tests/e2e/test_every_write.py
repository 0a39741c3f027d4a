"""SIGKILL at every durable write of every kind of step: the same command ends with the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.merging.fold.run import fold
from tests.alignment.processes import TINY_STEPS, write_preferences

ADAPTER = {"rank": 2, "alpha": 4, "targets": ["q_proj"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, pairs, and a task."""
    from harness.testing import tiny_adapter, tiny_model

    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "base", seed=0)
    for number in range(2):
        tiny_adapter(root / f"a{number}", root / "base", seed=10 + number, rank=2)
    write_preferences(root / "pairs.jsonl")
    (root / "tasks").mkdir()
    (root / "tasks" / "sums.jsonl").write_text("".join(json.dumps({"id": str(n), "a": n}) + "\n" for n in range(6)))
    (root / "tasks" / "sums.yaml").write_text(
        'name: sums\nprompt: raw\ntemplate: "{{ a }}+1="\ntarget: "{{ a + 1 }}"\ndecoding: {max_new_tokens: 4}\n'
        "dataset: {name: jsonl, options: {path: sums.jsonl}}\nscorers: [{name: exact_match}]\n"
    )
    return root


def align(world: Path, out: Path) -> None:
    """Two steps, a checkpoint after each."""
    options = {**TINY_STEPS, "steps": 2, "checkpoint_every": 1, "max_length": 48, "adapter": ADAPTER}
    harness.align("dpo", str(world / "base"), f"jsonl:{world / 'pairs.jsonl'}", out=out, options=options)


def merge(world: Path, out: Path) -> None:
    """Two adapters into one model of several files."""
    harness.merge("linear", [world / "a0", world / "a1"], base=world / "base", out=out, shard_size=100_000)


def folding(world: Path, out: Path) -> None:
    """One adapter."""
    fold(str(world / "a0"), str(world / "base"), out=out, probe_prompts=0)


def evaluate(world: Path, out: Path) -> None:
    """Answers and scores of the base and of an adapter."""
    harness.evaluate(
        str(world / "base"),
        tasks=["sums"],
        task_folders=[str(world / "tasks")],
        adapters=[str(world / "a0"), str(world / "a1")],
        engine="transformers",
        out=out,
    )


COMMANDS: dict[str, tuple[Callable[[Path, Path], None], int]] = {
    "align": (align, 3),
    "merge": (merge, 1),
    "fold": (folding, 1),
    "answers and scores": (evaluate, 4),
}
"""What is killed, and at every how many of its writes: all of them would take minutes (``HARNESS_EVERY_WRITE=1``)."""
NEVER_ALIKE = {
    *("provenance.json", "log.jsonl", "step.json", "merge.json", "fold.json"),
    *("merge.html", "README.md", "checksums.json"),
}
"""Files that say when and how often something was done."""


def in_a_child(work: Callable[[], None], die_at: int | None) -> bool:
    """Do something in a forked process that kills itself at its ``die_at``-th fsync; returns whether it did."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if die_at is not None:
                _count_down(die_at)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _count_down(left: int) -> None:
    """Every durable write is followed by an fsync: of the file before it gets its name, of the folder after."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync


def contents(root: Path) -> dict[str, str]:
    """Relative name -> digest of every file that must come out the same; of records, all but times."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.name == "status.json":
            record = json.loads(path.read_text())
            found[name] = str([record[key] for key in ("id", "status", "digest", "files", "counts", "made_from")])
        elif path.is_file() and path.name not in NEVER_ALIKE and not path.name.startswith("."):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("kind", COMMANDS)
def test_killed_at_every_durable_write(kind: str, world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    command, stride = COMMANDS[kind]
    stride = 1 if os.environ.get("HARNESS_EVERY_WRITE") else stride
    # In this process first, so that the children have the imports behind them.
    command(world, tmp_path / "warm")
    assert not in_a_child(lambda: command(world, tmp_path / "whole"), None)
    whole, moment = contents(tmp_path / "whole"), 1 - stride
    assert whole == contents(tmp_path / "warm")
    while True:
        moment += stride
        out = tmp_path / f"killed-{moment}"
        if not in_a_child(lambda out=out: command(world, out), moment):  # type: ignore[misc]
            break
        assert not in_a_child(lambda out=out: command(world, out), None)  # type: ignore[misc]
        assert contents(out) == whole, f"killed at write {moment}"
    assert moment > 10
