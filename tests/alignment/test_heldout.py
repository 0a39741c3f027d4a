"""Held-out figures are means over rows, whatever the batches, with an interval and the values they come from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from harness import align
from harness.alignment.heldout import means, summaries
from harness.steps.journal import read_rows
from tests.alignment.rows import events, short, write_pairs


def test_every_row_weighs_the_same_and_every_token_in_the_other_figure() -> None:
    rows = [{"id": "a", "loss": 1.0, "tokens": 3.0}, {"id": "b", "loss": 4.0, "tokens": 1.0}]
    assert means(rows) == {"loss": 2.5, "loss_per_token": 7 / 4}


def test_accuracy_has_wilsons_interval_and_the_loss_students() -> None:
    rows = [{"id": str(i), "rewards/accuracies": float(i < 3), "loss": float(i)} for i in range(4)]
    found = summaries(rows)
    accuracy, loss = found["rewards/accuracies"], found["loss"]
    # Wilson, 3 of 4: (2*3 + z^2 -+ z sqrt(z^2 + 4*3*(1 - 3/4))) / (2 (4 + z^2)), z = 1.959964
    z = 1.959964
    half = z * math.sqrt(z * z + 3)
    assert accuracy.interval is not None and accuracy.interval.method == "wilson" and accuracy.n == 4
    assert accuracy.interval.low == pytest.approx((6 + z * z - half) / (2 * (4 + z * z)), abs=1e-5)
    # t(0.975; 3) = 3.182446; sd of 0..3 is sqrt(5/3)
    assert loss.interval is not None
    assert loss.interval.high - 1.5 == pytest.approx(3.182446 * math.sqrt(5 / 3) / 2, abs=1e-5)


def test_a_value_that_is_no_number_is_counted_as_unscored() -> None:
    found = summaries([{"id": "a", "loss": float("nan")}, {"id": "b", "loss": 2.0}])["loss"]
    assert (found.n, found.n_unscored, found.mean) == (1, 1, 2.0)


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_the_size_of_batches_changes_no_figure(tiny: Path, alone: Path, method: str) -> None:
    """7 rows in batches of 2 leave a last one of 1, which a mean of batch means counts double."""
    pairs = write_pairs(alone)

    def run(micro: int) -> dict[str, Any]:
        # One step at a rate near 0, in which dropout has no part: the models stay the same.
        options = short(steps=1, micro_batch_size=micro, eval_rows=7, learning_rate=1e-12)
        made = align(method, str(tiny), pairs, out=alone / f"{method}-{micro}", options=options)
        rows = read_rows(made.folder / "step" / "heldout.jsonl.gz")
        assert len(rows) % 2 == 1
        assert made.heldout["eval_loss"] == pytest.approx(math.fsum(r["loss"] for r in rows) / len(rows))
        return {row["id"]: row for row in rows}

    twos, ones = run(2), run(1)
    assert twos.keys() == ones.keys()
    for row_id, row in twos.items():
        assert row["loss"] == pytest.approx(ones[row_id]["loss"], rel=1e-5)


def test_figures_at_steps_are_in_the_log_and_the_last_in_the_result(tiny: Path, alone: Path) -> None:
    pairs = write_pairs(alone)
    made = align("dpo", str(tiny), pairs, out=alone / "out", options=short(steps=4, eval_every=2))
    logged = [line for line in events(made.folder, "train") if "eval_loss" in line]
    assert [line["step"] for line in logged] == [2, 4]
    result = json.loads((made.folder / "step" / "result.json").read_text())
    for key in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        assert result["heldout"][key] == logged[-1][key] == made.heldout[key]
    summary = result["summaries"]["rewards/accuracies"]
    assert summary["n"] == result["rows"] == made.summaries["loss"].n
    assert summary["interval"]["method"] == "wilson"
    again = align("dpo", str(tiny), pairs, out=alone / "out", options=short(steps=4, eval_every=2))
    assert again.heldout == made.heldout and again.summaries == made.summaries


def test_a_trainer_that_says_nothing_per_row_is_measured_row_by_row(tiny: Path, alone: Path) -> None:
    """A stranger's trainer has no ``row_values``: its own loss on batches of one row."""
    pairs = write_pairs(alone)
    from harness_plugins.aligners.sft_trainer import MaskedSftTrainer

    options = short(steps=1, learning_rate=1e-12)
    known = align("sft", str(tiny), pairs, out=alone / "known", options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(MaskedSftTrainer, "row_values")
        plain = align("sft", str(tiny), pairs, out=alone / "plain", options=options)
    rows = [read_rows(made.folder / "step" / "heldout.jsonl.gz") for made in (known, plain)]
    assert [row.keys() for row in rows[1]] == [{"id", "loss"}] * len(rows[0])
    for mine, its in zip(*rows, strict=True):
        assert its["id"] == mine["id"] and its["loss"] == pytest.approx(mine["loss"], rel=1e-4)
