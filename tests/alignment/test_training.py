"""What goes wrong while training: a loss that is no number, memory that runs out, batches that do not divide."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.alignment.driver import micro_batch_size, order_rows, out_of_memory
from harness.alignment.run import Alignment
from harness.alignment.stage import StageTraining
from harness.core.errors import StepError
from harness.core.progress import Reporter
from harness.steps.journal import read_rows
from tests.alignment.processes import as_set, log_of

Align = Callable[..., Alignment]
FRAGILE = Path(__file__).parent / "fragile_loss.py"
WEIGHTS = "adapter_model.safetensors"


class Ear(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def furthest(one: str | Path, two: str | Path) -> float:
    """Greatest difference of two adapters' weights, relative to the greatest weight."""
    a, b = (load_file(Path(folder) / WEIGHTS) for folder in (one, two))
    assert a.keys() == b.keys()
    largest = max(float(t.abs().max()) for t in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


def batches(out: str) -> list[list[str]]:
    """Row ids of every optimiser step."""
    return [row["rows"] for row in read_rows(Path(out) / "step" / "batches.jsonl.gz")]


# ------------------------------------------------------------------------------------------------ no number


@pytest.mark.parametrize(
    ("odd", "seen"),
    [
        ("seven", "`loss` returned shape [7] for pairs of shape [2]"),
        ("square", "`loss` returned shape [2, 2] for pairs of shape [2]"),
        ("detached", "`loss` returned a tensor without a gradient: it does not depend on the policy, or is detached"),
        ("referring", "`loss` uses the reference, and `needs_reference` is False"),
    ],
)
def test_what_is_no_loss_per_pair_stops_before_the_first_step(
    cli: Any, command: list[str], monkeypatch: pytest.MonkeyPatch, alone: Path, odd: str, seen: str
) -> None:
    """The mean of any shape is a number, so the first two would train, on something else than the method says."""
    monkeypatch.setenv("ODD", odd)
    ran = cli(*command, "odd", "--plugin", FRAGILE, "--out", "out")
    assert ran.code == 3
    assert ran.err.endswith(
        f"error: aligner odd: {seen}\n  This is a fault of the method: `harness.testing.check_aligner` finds such.\n"
    )
    assert "Traceback" not in ran.err
    assert not log_of(alone / "out", "train")


def test_nan_stops_with_step_rows_and_hint(
    cli: Any, command: list[str], monkeypatch: pytest.MonkeyPatch, alone: Path
) -> None:
    """Two micro batches a step: the fifth is the first of step 3. Exit 3; a corrected command finds the folder free."""
    monkeypatch.setenv("NAN_AT", "5")
    broken = [*command, "nan", "--plugin", str(FRAGILE), "--out", "out"]
    ended = cli(*broken)
    assert ended.code == 3
    rows = batches("out")[2]
    assert f"error: step 3: the loss is nan on rows {', '.join(rows)}\n  Lower learning_rate, or look" in ended.err
    assert "Traceback" not in ended.err
    assert len(log_of(alone / "out", "train")) == 2
    monkeypatch.setenv("NAN_AT", "0")
    # Nothing that took training to make is there: another recipe may have the folder.
    assert cli(*broken, *as_set(learning_rate=1e-4)).code == 0


def test_after_a_checkpoint_the_folder_is_kept(
    cli: Any, command: list[str], monkeypatch: pytest.MonkeyPatch, alone: Path
) -> None:
    """What took training is deleted by --fresh alone."""
    monkeypatch.setenv("NAN_AT", "7")
    broken = [*command, "nan", "--plugin", str(FRAGILE), "--out", "out", *as_set(checkpoint_every=2)]
    assert cli(*broken).code == 3
    monkeypatch.setenv("NAN_AT", "0")
    other = [*broken, *as_set(learning_rate=1e-4)]
    refused = cli(*other)
    assert refused.code == 2
    assert "holds another alignment; different: recipe.learning_rate was 0.001, is 0.0001\n" in refused.err
    assert (alone / "out/step/checkpoints/checkpoint-2/complete.json").exists()
    assert cli(*other, "--fresh").code == 0


# ------------------------------------------------------------------------------------------------ out of memory


@pytest.mark.parametrize("start", ["0", "5"], ids=["at once", "after a checkpoint"])
def test_out_of_memory_halves(align: Align, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    """8 -> 4 -> 2 rows; the effective batch stays 8, and the weights are those of a run that began with 2."""
    monkeypatch.setenv("HUNGRY_FROM", start)
    monkeypatch.setenv("ROWS_THAT_FIT", "2")
    settings = {"batch_size": 8, "lora": {"dropout": 0.0}, "plugins": [FRAGILE], "checkpoint_every": 2}
    ear = Ear()
    hungry = align("hungry", "halved", micro_batch_size=8, reporter=ear, **settings)
    align("hungry", "small", micro_batch_size=2, **settings)
    assert [line["micro_batch_size"] for line in log_of(hungry.folder, "out_of_memory")] == [4, 2]
    assert all("CUDA out of memory. Tried" in line["error"] for line in log_of(hungry.folder, "out_of_memory"))
    assert "out of memory: going on with micro batches of 4" in ear.said
    engine = json.loads((hungry.folder / "step" / "provenance.json").read_text())["engine"]
    assert (engine["micro_batch_size"], engine["accumulation"]) == (2, 4)
    assert json.loads((hungry.folder / "step" / "status.json").read_text())["counts"]["micro_batch_size"] == 2
    assert batches("halved") == batches("small")
    assert furthest("halved", "small") < 1e-4
    # Steps that were done again are in the history once.
    assert [line["step"] for line in hungry.history if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_out_of_memory_on_held_out_rows(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last step: nothing is trained again."""
    monkeypatch.setenv("HELD_THAT_FIT", "1")
    made = align("hungry", "out", plugins=[FRAGILE])
    assert [line["micro_batch_size"] for line in log_of(made.folder, "out_of_memory")] == [1]
    assert [line["checkpoint"] for line in log_of(made.folder, "resumed")] == ["checkpoint-6"]
    assert made.heldout["eval_loss"] == pytest.approx(made.heldout["eval_loss"])
    assert len(log_of(made.folder, "train")) == len({json.dumps(line) for line in log_of(made.folder, "train")})


def test_out_of_memory_in_the_reference_pass(align: Align, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its batches are halved; training's are not."""
    from harness.alignment import pairwise_trainer

    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "own"))
    real, sizes = pairwise_trainer.pair_logps, []

    def pair_logps(model: Any, inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            sizes.append(len(inputs["input_ids"]) // 2)
            if sizes[-1] > 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, inputs)

    monkeypatch.setattr(pairwise_trainer, "pair_logps", pair_logps)
    made = align("dpo", "out")
    assert max(sizes) > 4
    assert not log_of(made.folder, "out_of_memory")
    assert made.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_nothing_fits(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving ends at one row, with advice."""
    monkeypatch.setenv("ROWS_THAT_FIT", "0")
    with pytest.raises(StepError, match=r"out of memory with one row at a time: CUDA out of memory\. Tried") as failed:
        align("hungry", "out", plugins=[FRAGILE])
    assert "gradient_checkpointing=true" in failed.value.fix


def test_what_did_not_fit_is_let_go(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt must not find the first one's model still in memory."""
    monkeypatch.setenv("ROWS_THAT_FIT", "1")
    opened: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = StageTraining.open_model

    def open_model(run: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in opened))
        found = real(run)
        opened.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(StageTraining, "open_model", open_model)
    align("hungry", "out", plugins=[FRAGILE])
    assert alive == [0, 0]


def test_what_is_no_want_of_memory() -> None:
    """Other errors are bugs and stay what they are."""
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")) is not None
    assert out_of_memory(MemoryError()) == "MemoryError"
    assert out_of_memory(RuntimeError("shape mismatch")) is None
    assert out_of_memory(ValueError("out of memory")) is None


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(("batch", "asked", "found"), [(16, 4, 4), (16, 3, 2), (6, 4, 3), (7, 4, 1), (4, 9, 4)])
def test_micro_batches_divide(batch: int, asked: int, found: int) -> None:
    """The greatest divisor up to what was asked for."""
    assert micro_batch_size(batch, asked) == found


def test_a_micro_batch_that_does_not_divide(align: Align) -> None:
    """4 rows at a time of 6 would make 8: 3 are taken, it is said, and the bytes are those of 3."""
    ear = Ear()
    align("dpo", "four", batch_size=6, micro_batch_size=4, reporter=ear)
    align("dpo", "three", batch_size=6, micro_batch_size=3)
    assert "micro batches of 3: the most that divides 6 evenly" in ear.said
    assert (Path("four") / WEIGHTS).read_bytes() == (Path("three") / WEIGHTS).read_bytes()
    assert {len(step) for step in batches("four")} == {6}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_micro_batches_change_nothing(align: Align, method: str) -> None:
    """Each step sees batch_size rows, whatever fits; weights agree to the precision of fp32."""
    for micro in (1, 4):
        align(method, f"micro{micro}", micro_batch_size=micro, lora={"dropout": 0.0})
    assert batches("micro1") == batches("micro4")
    assert [len(step) for step in batches("micro1")] == [4] * 6
    assert furthest("micro1", "micro4") < 1e-3


def test_gradient_checkpointing_changes_nothing(align: Align) -> None:
    """It recomputes, with the same dropout."""
    align("dpo", "plain", lora={"dropout": 0.2})
    align("dpo", "frugal", lora={"dropout": 0.2}, gradient_checkpointing=True)
    assert furthest("plain", "frugal") < 1e-5


def test_order_of_rows() -> None:
    """Every row once an epoch; another seed, another order; a shorter run is a prefix; longest first in a batch."""
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    one = order_rows(lengths, batch_size=4, steps=4, seed=0)
    assert sorted(one[0] + one[1]) == sorted(one[2] + one[3]) == list(range(8))
    assert one[0] + one[1] != one[2] + one[3]
    assert order_rows(lengths, batch_size=4, steps=2, seed=0) == one[:2]
    assert order_rows(lengths, batch_size=4, steps=4, seed=1) != one
    assert all([lengths[i] for i in step] == sorted((lengths[i] for i in step), reverse=True) for step in one)
