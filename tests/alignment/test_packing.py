"""Short demonstrations that share a row do not see each other: the loss is that of rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from harness import align
from harness.alignment.packing import PackingCollator, bins
from harness.core.errors import UserError
from tests.alignment.rows import events, short, write_pairs

ROWS: list[dict[str, Any]] = [
    {"input_ids": [0, 11, 12, 13, 14, 1], "labels": [-100, -100, -100, 13, 14, 1]},
    {"input_ids": [0, 21, 1], "labels": [-100, 21, 1]},
    # Loss on everything: the first token, too, is a label, which nothing predicts.
    {"input_ids": [0, 31, 1], "labels": [0, 31, 1]},
    {"input_ids": [0, 41, 42, 43, 1], "labels": [-100, -100, 42, 43, 1]},
]


def test_rows_are_filled_first_fit_longest_first() -> None:
    assert bins([6, 3, 3, 5], 6) == [[0], [3], [1, 2]]
    assert bins([2, 2, 5, 1], 6) == [[2, 3], [0, 1]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_each_has_one_place_and_no_row_is_overfull(lengths: list[int]) -> None:
    found = bins(lengths, max(lengths))
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= max(lengths) for row in found)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Any:
    """The tiny model in fp32, with TRL's head."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    made = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=request.param, dtype=torch.float32)
    add_fused_lm_head(made)
    return made.eval()


class Tokenizer:
    """What a collator needs of one."""

    pad_token_id, eos_token_id = 2, 1


def test_a_packed_batch(model: Any) -> None:
    batch = PackingCollator.of(model, Tokenizer())(ROWS)
    assert batch["input_ids"].tolist() == [[0, 11, 12, 13, 14, 1], [0, 41, 42, 43, 1, 2], [0, 21, 1, 0, 31, 1]]
    assert batch["position_ids"].tolist()[1:] == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 0, 1, 2]]
    assert batch["labels"].tolist()[1:] == [[-100, -100, 42, 43, 1, -100], [-100, 21, 1, -100, 31, 1]]


def test_losses_and_gradients_are_the_same(model: Any) -> None:
    """Against each row alone, without padding, mask or positions given."""
    import torch

    def gradients() -> dict[str, Any]:
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    alone, count = torch.tensor(0.0), 0
    for row in ROWS:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        kept = labels[0, 1:] != -100
        alone = alone - logps[kept, labels[0, 1:][kept]].sum()
        count += int(kept.sum())
    (alone / count).backward()
    expected = gradients()
    model.zero_grad()
    outputs = model(**PackingCollator.of(model, Tokenizer())(ROWS), use_cache=False, fused_lm_head=True)
    assert int(outputs.label_mask.sum()) == count == 10
    packed = -outputs.log_probs.sum() / outputs.label_mask.sum()
    packed.backward()
    assert abs(packed.item() - (alone / count).item()) <= 1e-5
    for name, gradient in gradients().items():
        assert (gradient - expected[name]).abs().max() <= 1e-5, name


def test_a_model_for_which_it_is_not_exact_is_refused(tiny: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny)
    config._attn_implementation = "flash_attention_2"

    class Flash:
        pass

    flash: Any = Flash()
    flash.config = config
    with pytest.raises(UserError) as caught:
        PackingCollator.of(flash, Tokenizer())
    assert str(caught.value) == (
        "--set packing=true: not exact for this model: attention 'flash_attention_2' takes no mask of blocks (sdpa and "
        "eager do)\n  Leave it out, or --set packing=false."
    )


def test_a_whole_alignment_ends_as_without(tiny: Path, alone: Path) -> None:
    from safetensors.torch import load_file

    pairs = write_pairs(alone)
    more: dict[str, Any] = {
        "learning_rate": 1e-3,
        "adapter": {"dropout": 0.0},
        "batch_size": 8,
        "micro_batch_size": 8,
        "eval_every": 2,
        "loss_on": "everything",
    }
    made = [
        align("sft", str(tiny), pairs, out=alone / str(packing), options=short(**more, packing=packing))
        for packing in (False, True)
    ]
    apart, packed = (load_file(one.folder / "adapter_model.safetensors") for one in made)
    assert max(tensor.abs().max() for name, tensor in apart.items() if "lora_B" in name) > 1e-3
    assert max((tensor - packed[name]).abs().max() for name, tensor in apart.items()) <= 1e-5
    for name, value in made[0].heldout.items():
        assert made[1].heldout[name] == pytest.approx(value, abs=1e-5), name
    losses = [[line["loss"] for line in events(one.folder, "train") if "loss" in line] for one in made]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert not any("num_tokens" in line for line in events(made[1].folder, "train"))
