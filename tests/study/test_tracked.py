"""What a study tells its trackers: the scores of every arm, once, and without moving a step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorboardX

from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.study.plan import plan_study
from harness.study.run import run_study
from tests.event_files import scalars
from tests.study.conftest import Write, records


class Heard(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_scores_are_told_once_and_no_step_moves(
    small: dict[str, Any],
    small_run: Path,
    copied: Callable[[Path], Path],
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copied(small_run)
    before = records(run)
    told = copy.deepcopy(small) | {"trackers": "tensorboard"}
    plan = plan_study(write(told))
    assert plan.to_json() == plan_study(write(small, "plain.yaml")).to_json()

    def full(self: Any, name: str, *_: Any) -> None:
        raise OSError("No space left on device")

    heard = Heard()
    with monkeypatch.context() as patch:
        patch.setattr(tensorboardX.SummaryWriter, "add_scalar", full)
        assert not run_study(plan, run, reporter=heard).failures
    assert [note for note in heard.notes if note.startswith("tracker ")] == [
        "tracker tensorboard: scores of tiny: No space left on device; it is told no more scores"
    ]
    assert not run_study(plan, run).failures
    assert records(run) == before

    rows = {
        row["adapter"] or row["model"]: row
        for row in json.loads((run / "report" / "tiny" / "report.json").read_text())["rows"]
    }
    folders = {folder.name: scalars(folder) for folder in (run / "trackers" / "tensorboard").iterdir()}
    assert folders.keys() == rows.keys() and len(rows) == 4
    for arm, row in rows.items():
        name = f"scores/sums_{row['variant']}/{row['metric']}"
        low, high = row["ci95"]
        expected = {name: row["mean"], f"{name}/n": 6, f"{name}/low": low, f"{name}/high": high}
        assert folders[arm] == {(key, 0): np.float32(value) for key, value in expected.items()}

    files = sorted(run.rglob("events.out.*"))
    run_study(plan, run)
    assert sorted(run.rglob("events.out.*")) == files
    # Whoever takes the key out is told nothing, and the folder is still a run's.
    run_study(plan_study(write(small)), run)
    assert sorted(run.rglob("events.out.*")) == files


def test_a_tracker_that_is_not_there_is_an_error_of_the_plan(small: dict[str, Any], write: Write) -> None:
    for name, message in (
        (
            "wandb",
            r"study\.yaml:\d+, trackers: tracker 'wandb' is not installed\n  pip install wandb, or leave it out\.",
        ),
        ("wandbe", r"study\.yaml:\d+, trackers: unknown tracker 'wandbe'\n  Did you mean 'wandb'\?"),
    ):
        with pytest.raises(UserError, match=message):
            plan_study(write(copy.deepcopy(small) | {"trackers": ["tensorboard", name]}))
