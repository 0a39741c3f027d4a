"""KTO as `harness align` carries it out: what rows it refuses, and where it begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 2.0}, "kto: rows: none is 'good' (0 good, "),
        ({"preference": "tone"}, "is not rated for 'tone'; it is rated for: preference"),
    ],
)
def test_rows_that_do_not_do(align: Callable[..., Any], alone: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        align("kto", "out", **options)
    assert message in str(caught.value)


def test_one_held_out_row_has_no_other(align: Callable[..., Any], alone: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": f"a {n}", "rating": n % 2} for n in range(60)]
    Path("rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        align("kto", "out", data=Path("rated.jsonl"), eval_rows=1)
    assert "is alone, and the reference point needs prompts with answers of other rows" in str(caught.value)
    assert "--set eval_rows=N" in caught.value.fix


def test_what_is_aligned_goes_on_from_the_reference(align: Callable[..., Any], alone: Path) -> None:
    """Before the first step policy and reference are one: each loss is half its weight, and the KL nothing."""
    made = align("kto", "out", desirable_weight=1.5, undesirable_weight=0.5, lora={"dropout": 0.1}, learning_rate=1e-3)
    first = made.history[0]
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    # Of four rows so many are desirable: (1.5 n + 0.5 (4 - n)) / 2 / 4.
    assert min(abs(first["loss"] - (n + 2) / 8) for n in range(5)) < 0.01
    assert {"eval_loss", "eval_rewards/signed"} <= made.heldout.keys()
