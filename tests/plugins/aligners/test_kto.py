"""KTO: its loss by hand, which answers are paired with which prompts, what it refuses, and the contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness import Aligner, load_plugins
from harness.testing import check_aligner
from harness_plugins.aligners.kto import Kto
from harness_plugins.aligners.kto_loss import kto_losses, mismatched

ROWS = [
    {
        "id": f"r{i}",
        "prompt_ids": [0, 5 + i, 6],
        "completion_ids": [7, 8 + i, 9 + i % 2, 1],
        "labels_mask": [0, 0, 0, 1, 1, 1, 1],
        "ratings": {"preference": float(i % 2)},
    }
    for i in range(4)
]


def test_contract() -> None:
    check_aligner(Kto(), rows=ROWS, steps=3)
    assert type(load_plugins().find(Aligner, "kto", "test")) is Kto


def test_losses_by_hand() -> None:
    """beta 2, z 0.5: r = 0.5 gives 1 - sigmoid(0) = 1/2 both ways; r = 1 gives sigmoid(-1), 0.2689, and 0.7311."""
    config = Kto.Config(beta=2.0, desirable_weight=3.0, undesirable_weight=0.5)
    ratios, good = torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([True, False, True, False])
    found = kto_losses(ratios, good, torch.tensor(0.5), config).tolist()
    low = 1 / (1 + math.e)
    assert found == pytest.approx([3 * 0.5, 0.5 * 0.5, 3 * low, 0.5 * (1 - low)], rel=1e-6)


def test_prompts_are_paired_with_the_answer_before() -> None:
    """As TRL rotates them; what does not fit is cut at its end."""
    made = mismatched(ROWS, 6)
    assert [one["completion_ids"] for one in made] == [[7, 11, 10], [7, 8, 9], [7, 9, 10], [7, 10, 9]]
    assert made[1] == {"prompt_ids": [0, 6, 6], "completion_ids": [7, 8, 9], "labels_mask": [0, 0, 0, 1, 1, 1]}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"loss_on": "everything"}, "loss_on: an answer is rated, and so it alone carries loss: last"),
        ({"values": ["good", "good"]}, "values are two different labels, and both are 'good'"),
        ({"batch_size": 1}, "greater than or equal to 2"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Kto.Config(**options)
