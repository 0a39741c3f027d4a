"""Trackers of a training: what they are told is what log.jsonl has, and nothing that they do reaches the weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorboardX
import torch

from harness.alignment.run import Alignment
from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.core.trackers import Tracking, open_run
from tests.event_files import scalars

WEIGHTS = "adapter_model.safetensors"


class Heard(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_curves_are_those_of_the_log(align: Callable[..., Alignment], monkeypatch: pytest.MonkeyPatch) -> None:
    """Live, and by a tracker that draws from every random state; with dropout, whose masks are drawn there too."""
    settings: dict[str, Any] = {"lora": {"dropout": 0.2}, "eval_every": 3}
    plain = align("sft", "plain", **settings)
    real = tensorboardX.SummaryWriter.add_scalar

    def greedy(self: Any, name: str, value: float, step: int, *more: Any) -> None:
        random.random(), np.random.rand(), torch.rand(3)
        torch.manual_seed(99)
        real(self, name, value, step, *more)

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", greedy)
    told = align("sft", "told", **settings, trackers=["tensorboard"])
    assert told.plan.id == plain.plan.id
    assert (told.folder / WEIGHTS).read_bytes() == (plain.folder / WEIGHTS).read_bytes()

    found = scalars(told.folder / "step" / "trackers" / "tensorboard" / told.plan.arm)
    # transformers writes `eval_loss` as `eval/loss`, and all else below `train/`.
    expected = {
        (f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}", line["step"]): value
        for line in told.history
        for key, value in line.items()
        if isinstance(value, int | float) and key not in ("step", "time")
    }
    assert {step for name, step in expected if name == "train/loss"} == {1, 2, 3, 4, 5, 6}
    assert {step for name, step in expected if name == "eval/loss"} == {3, 6}
    # Event files hold 32 bits of a value.
    assert {key: found.get(key) for key in expected} == {key: np.float32(value) for key, value in expected.items()}
    assert not [name for name, _ in found.keys() - expected.keys() if "loss" in name and name != "train/train_loss"]


def test_a_tracker_that_fails_is_named_and_left_out(
    align: Callable[..., Alignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fails(self: Any, name: str, *_: Any) -> None:
        calls.append(name)
        raise OSError("No space left on device")

    monkeypatch.setattr(tensorboardX.SummaryWriter, "add_scalar", fails)
    heard = Heard()
    made = align("sft", "failing", steps=2, trackers=["tensorboard"], reporter=heard)
    named = [note for note in heard.notes if note.startswith("tracker")]
    assert named == [
        f"tracker tensorboard: {made.plan.arm}: No space left on device; it is told no more of this training"
    ]
    assert len(calls) == 1
    assert [line["step"] for line in made.history if "loss" in line] == [1, 2]


def test_runs_of_one_second_do_not_write_over_each_other(tmp_path: Path) -> None:
    for number in range(4):
        run = open_run("tensorboard", Tracking(("tensorboard",), tmp_path, "study"), "arm", "scores")
        run.log({f"mmlu@{number}": number})
        run.close()
    assert scalars(tmp_path / "tensorboard" / "arm") == {(f"mmlu_{number}", 0): number for number in range(4)}
    with pytest.raises(ValueError, match="of 2 names 1 are left"):
        run.log({"mmlu@0": 1.0, "mmlu:0": 2.0})


def test_what_is_not_there_is_said_before_anything_runs(
    align: Callable[..., Alignment], alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.core.trackers.find_spec", lambda _: None)
    for name, message in (
        ("wandb", "--tracker: tracker 'wandb' is not installed\n  pip install wandb, or leave it out."),
        ("tensorboard", "--tracker: tracker 'tensorboard' is not installed\n  pip install tensorboardX, or leave"),
        ("tensorbord", "--tracker: unknown tracker 'tensorbord'\n  Did you mean 'tensorboard'?"),
    ):
        with pytest.raises(UserError) as raised:
            align("sft", "refused", trackers=[name])
        assert str(raised.value).startswith(message)
    assert not (alone / "refused").exists()
