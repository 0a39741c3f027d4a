"""A prompt computed once for both answers changes neither losses nor gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness import align
from harness.core.errors import UserError
from tests.alignment.rows import short, write_pairs

# Prompts of 1, 3 and 5 tokens; answers of unlike length; row 1's answers begin alike.
ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [0, 11, 12], "chosen_ids": [13, 14, 1], "rejected_ids": [15, 1]},
    {"prompt_ids": [0, 21, 22, 23, 24], "chosen_ids": [25, 26, 1], "rejected_ids": [25, 27, 28, 29, 1]},
    {"prompt_ids": [0], "chosen_ids": [1], "rejected_ids": [31, 32, 33, 1]},
]


def test_a_pair_as_one_row() -> None:
    from harness.alignment.prefix_sharing import PrefixCollator

    batch = PrefixCollator(pad=2)([{**row, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5} for row in ROWS[:2]])
    assert {name: value.tolist()[0] for name, value in batch.items()} == {
        "input_ids": [0, 11, 12, 13, 14, 12, 15, 2, 2, 2, 2, 2],
        "position_ids": [0, 1, 2, 3, 4, 2, 3, 0, 0, 0, 0, 0],
        "segments": [0, 0, 1, 1, 1, 2, 2, -1, -1, -1, -1, -1],
        "shift_labels": [-100, -100, 13, 14, 1, 15, 1, -100, -100, -100, -100, -100],
        "ref_chosen_logps": -1.5,
        "ref_rejected_logps": -2.5,
    }


def test_each_block_sees_the_prefix_and_itself() -> None:
    import torch

    from harness.alignment.prefix_sharing import block_mask

    seen = block_mask(torch.tensor([[0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Any:
    """The tiny model with a LoRA adapter in which every weight is random, in fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=request.param, dtype=torch.float32)
    add_fused_lm_head(base)
    made = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return made.eval()


def both(model: Any, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Log-probabilities with each prompt computed twice (TRL's collator), and once."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from harness.alignment.pairwise_trainer import pair_logps
    from harness.alignment.prefix_sharing import PrefixCollator, shared_logps

    twice = pair_logps(model, DataCollatorForPreference(pad_token_id=2)(rows))
    return twice, shared_logps(model, PrefixCollator(2)(rows))


def test_log_probabilities_and_token_counts_are_the_same(model: Any) -> None:
    twice, once = both(model, ROWS)
    assert once.chosen_tokens.tolist() == twice.chosen_tokens.tolist() == [3, 3, 1]
    assert once.rejected_tokens.tolist() == twice.rejected_tokens.tolist() == [2, 5, 4]
    for name in ("chosen", "rejected"):
        assert (getattr(once, name) - getattr(twice, name)).abs().max() <= 1e-5
    # The two answers of one pair are not mixed up, and are not alike.
    assert (once.chosen - once.rejected).abs().min() > 1e-2


def test_losses_and_gradients_are_the_same(model: Any) -> None:
    import torch

    from harness.alignment.pairwise import PairLogps
    from harness_plugins.aligners.preference import Dpo

    method, config = Dpo(), Dpo.Config()
    found = []
    for logps in both(model, ROWS):
        reference = PairLogps(torch.full((3,), -9.0), torch.full((3,), -14.0), logps.chosen, logps.rejected)
        loss_B = method.loss(logps, reference, config)
        model.zero_grad()
        loss_B.mean().backward()
        found.append((loss_B.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (twice_B, twice), (once_B, once) = found
    assert (twice_B - once_B).abs().max() <= 1e-5
    assert twice.keys() == once.keys() and len(twice) == 28
    for name, gradient in twice.items():
        assert (gradient - once[name]).abs().max() <= 1e-5, name
        assert gradient.abs().max() > 1e-5, name


def test_the_mask_matters(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask that is causal alone the rejected answer sees the chosen one, and the comparison notices."""
    import torch

    import harness.alignment.prefix_sharing as module

    def causal(segments_BT: Any) -> Any:
        length = segments_BT.size(1)
        return torch.ones(length, length, dtype=torch.bool).tril().expand(len(segments_BT), 1, -1, -1)

    monkeypatch.setattr(module, "block_mask", causal)
    twice, once = both(model, ROWS)
    assert (once.rejected - twice.rejected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_attn_implementation": "flash_attention_2"}, "attention 'flash_attention_2' takes no mask of blocks"),
        ({"sliding_window": 64}, "attention slides over 64 tokens"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "it has layers of linear_attention"),
        ({"rope_parameters": None}, "its positions are not rotary"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rotary scaling 'dynamic' depends on the length of the row"),
    ],
)
def test_models_for_which_it_is_not_exact_are_refused(tiny: Path, changes: dict[str, Any], reason: str) -> None:
    from transformers import AutoConfig

    from harness.alignment.prefix_sharing import refuse_unless_exact

    config = AutoConfig.from_pretrained(tiny)
    config._attn_implementation = "sdpa"
    refuse_unless_exact(config)
    for name, value in changes.items():
        object.__setattr__(config, name, value) if name != "_attn_implementation" else setattr(config, name, value)
    with pytest.raises(UserError) as caught:
        refuse_unless_exact(config)
    text = str(caught.value)
    assert text.startswith(f"--set prefix_sharing=true: not exact for this model: {reason}")
    assert text.endswith("Leave it out, or --set prefix_sharing=false.")


def test_a_whole_alignment_ends_as_without(tiny: Path, alone: Path) -> None:
    from safetensors.torch import load_file

    pairs = write_pairs(alone)
    more: dict[str, Any] = {"learning_rate": 1e-3, "adapter": {"dropout": 0.0}}
    made = [
        align("dpo", str(tiny), pairs, out=alone / str(sharing), options=short(**more, prefix_sharing=sharing))
        for sharing in (False, True)
    ]
    twice, once = (load_file(one.folder / "adapter_model.safetensors") for one in made)
    assert max(tensor.abs().max() for name, tensor in twice.items() if "lora_B" in name) > 1e-3
    assert max((tensor - once[name]).abs().max() for name, tensor in twice.items()) <= 1e-5
    for name, value in made[0].heldout.items():
        assert made[1].heldout[name] == pytest.approx(value, abs=1e-5), name
