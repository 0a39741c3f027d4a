"""How far a study is: time that is left by hand, lost steps, and a torn plan."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from harness.core.costs import Costs
from harness.core.errors import UserError
from harness.steps.costs import HEARTBEAT
from harness.steps.files import write_json
from harness.steps.lock import FolderLock
from harness.study.status import LOST_AFTER, Left, StepState, is_alive, states_of, time_left
from tests.study.conftest import Write


def step(state: str, like: str, seconds: float = 0.0, **more: object) -> StepState:
    return StepState("k", like.partition(" ")[0], "arm", state, seconds=seconds, like=like, **more)  # type: ignore[arg-type]


def test_time_left_is_that_of_like_steps() -> None:
    running = Costs(seconds=30)
    states = [
        step("done", "align sft", 10),
        step("done", "align sft", 30),
        step("done", "align dpo", 100),
        step("ready", "align sft"),  # the median of 10 and 30: 20
        step("waiting", "align orpo"),  # of all aligns: 30
        step("begun", "align dpo", 30, silent=1.0, progress=0.6, costs=running, pid=1),  # 30 x 0.4 / 0.6 = 20
        step("begun", "align dpo", 40, silent=1.0, costs=Costs(seconds=40), pid=2),  # 100 - 40 = 60
        step("begun", "align dpo", 40, silent=LOST_AFTER + 1, pid=3),  # lost, so done again: 100
        step("failed", "align dpo", 7),
    ]
    assert time_left(states) == Left((20 + 30 + 20 + 60 + 100) / 2, at_once=2, unknown=0)
    assert time_left([*states, step("waiting", "merge x")]) == Left(115, at_once=2, unknown=1)
    assert time_left([step("ready", "align sft")]) == Left(None, at_once=1, unknown=1)
    assert time_left([step("done", "align sft", 3)]) == Left(0, at_once=1, unknown=0)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A run folder of one alignment that has begun."""
    steps = [{"key": "a" * 64, "kind": "align", "arm": "one", "parents": []}]
    write_json(tmp_path / "plan.json", {"study": "s", "steps": steps, "arms": [], "evaluations": []})
    write_json(tmp_path / "index.json", {"ids": {"a" * 64: "b" * 64}})
    folder = tmp_path / "steps" / f"align-one-{'b' * 12}"
    folder.mkdir(parents=True)
    write_json(folder / "step.json", {"attempt": 1})
    return tmp_path


def beat(study: Path, ago: float, **more: object) -> Path:
    file = next(study.glob("steps/*")) / HEARTBEAT
    now = time.time() - ago
    costs = Costs(seconds=12, devices=1, gpu_seconds=12, device="H100", rss_bytes=5, device_bytes=7)
    write_json(file, {**costs.model_dump(mode="json"), "time": now, "begun": now, "pid": 4, **more})
    return file


def test_a_heartbeat_says_how_far_a_step_is(study: Path) -> None:
    beat(study, 0, done=3, total=12)
    (one,) = states_of(study)
    assert (one.state, one.progress, one.pid, one.seconds) == ("begun", 0.25, 4, 12)
    assert one.costs is not None and (one.costs.device, one.costs.device_bytes) == ("H100", 7)
    assert is_alive(one)
    assert json.loads(json.dumps(one.to_json()))["costs"]["rss_bytes"] == 5


@pytest.mark.parametrize("damage", ["torn", "nan", "of another kind"])
def test_a_damaged_heartbeat_says_nothing(study: Path, damage: str) -> None:
    file = beat(study, 0)
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:40])
    elif damage == "nan":
        file.write_text('{"seconds": NaN, "time": 1, "begun": 1}')
    else:
        file.write_text("[1]")
    (one,) = states_of(study)
    assert (one.state, one.costs, one.progress) == ("begun", None, None)


def test_a_torn_plan_says_how_to_go_on(study: Path) -> None:
    file = study / "plan.json"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError) as error:
        states_of(study)
    assert error.value.where == str(file)
    assert error.value.what.startswith("is damaged (")
    assert "The same `harness study run` writes it again" in error.value.fix
    file.write_text('{"study": "s", "steps": 3}')
    with pytest.raises(UserError, match="its steps are no list"):
        states_of(study)


def test_a_step_that_was_killed_is_ready_again(
    cli: Any, small: dict[str, Any], write: Write, small_run: Path, copied: Any
) -> None:
    """One that a living process holds is not; both are said to have begun."""
    file, folder = write(small), copied(small_run)
    (align,) = folder.glob("steps/align-sft-*")
    (align / "status.json").unlink()
    (row,) = json.loads(cli("study", "steps", file, "--out", "run", "--ready", "--json").out)
    assert (row["kind"], row["state"], row["held"]) == ("align", "begun", False)
    with FolderLock(align, "step", keep=False):
        assert json.loads(cli("study", "steps", file, "--out", "run", "--ready", "--json").out) == []
        rows = json.loads(cli("study", "steps", file, "--out", "run", "--json").out)
    assert [one["held"] for one in rows if one["state"] == "begun"] == [True]
    assert cli("study", "step", file, row["key"], "--out", "run").code == 0
    # What builds on it is looked at again.
    rows = json.loads(cli("study", "steps", file, "--out", "run", "--ready", "--json").out)
    assert {row["kind"] for row in rows} <= {"answers", "merge"} and not any("held" in row for row in rows)
