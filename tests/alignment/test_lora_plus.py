"""LoRA+ (arXiv 2402.12354): groups and rates against peft's own optimiser, in training, and what it does to ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import StepError
from harness.testing import check_adapter
from harness_plugins.adapters.lora import Lora, Qlora

TARGETS = ("q_proj", "v_proj")


def attached(tiny: Path, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    config = Lora.Config(**{"rank": 4, "targets": TARGETS, **options})
    return Lora().attach(AutoModelForCausalLM.from_pretrained(tiny), config), config


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_groups_and_rates_are_pefts(tiny: Path, dora: bool) -> None:
    """peft: A at lr; B and DoRA's magnitudes at lr times the ratio (it keeps those that do not decay apart)."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    model, config = attached(tiny, dora=dora, lora_plus_ratio=16)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    expected = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    groups = Lora().parameter_groups(model, config)
    assert groups is not None
    ours = {id(p): 1e-3 * group.rate for group in groups for p in group.parameters}
    assert ours == expected
    # Two layers of two targets each: A, B and, with DoRA, a vector of magnitudes.
    assert [len(group.parameters) for group in groups] == ([4, 8] if dora else [4, 4])
    check_adapter(Lora(), options={"rank": 4, "targets": TARGETS, "dora": dora, "lora_plus_ratio": 16})


def test_without_a_ratio_nothing_changes(tiny: Path) -> None:
    """Neither groups, nor what stands in records and enters ids: the field is as good as not there."""
    model, config = attached(tiny)
    assert Lora().parameter_groups(model, config) is None
    for adapter in (Lora, Qlora):
        assert "lora_plus_ratio" not in adapter.Config().model_dump(mode="json")
        assert adapter.Config(lora_plus_ratio=2).model_dump(mode="json")["lora_plus_ratio"] == 2


def test_a_ratio_is_in_the_id_and_the_rates_are_in_force(align: Callable[..., Any], alone: Path) -> None:
    """Cosine over 6 steps, of which the last is logged: both groups end at the same share of their rates."""
    lora = {"rank": 4, "targets": list(TARGETS)}
    options = {"weight_decay": 0.1, "learning_rate": 1e-3, "checkpoint_every": 3, "checkpoints": (3,)}
    plain = align("dpo", "plain", lora=lora, **options)
    ratios = {ratio: align("dpo", f"r{ratio}", lora={**lora, "lora_plus_ratio": ratio}, **options) for ratio in (1, 8)}
    ids = {plain.plan.id, *(one.plan.id for one in ratios.values())}
    assert len(ids) == 3
    weights = {ratio: (one.folder / "adapter_model.safetensors").read_bytes() for ratio, one in ratios.items()}
    assert weights[1] == (plain.folder / "adapter_model.safetensors").read_bytes(), "a ratio of 1 is plain LoRA"
    assert weights[8] != weights[1]
    rates = [[line["learning_rate"] for line in one.history if "loss" in line] for one in (plain, *ratios.values())]
    assert rates[0] == rates[1] == rates[2], "what is logged is the recipe's"
    step = json.loads((ratios[8].folder / "step" / "step.json").read_text())
    assert step["identity"]["adapter"]["lora_plus_ratio"] == 8


def test_the_optimiser_has_the_groups_with_the_recipes_decay(tiny: Path, alone: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from harness import TrainerCall, TrainingJob
    from harness.alignment.driven import IN_ORDER, build

    model, config = attached(tiny, lora_plus_ratio=4, dora=True)
    rows = Dataset.from_list([{"input_ids": [1, 2]}])
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "train_sampling_strategy": IN_ORDER, "use_cpu": True}
    arguments = TrainingArguments("out", **options)
    job: Any = TrainingJob(None, model, None, rows, None, 0, TrainingArguments)  # type: ignore[arg-type]
    call = TrainerCall(Trainer, {"model": model, "args": arguments, "train_dataset": rows})
    optimizer = build(call, job, Lora().parameter_groups(model, config)).create_optimizer()
    # Two layers of two targets: A; B and magnitudes. By its name a magnitude is neither bias nor norm: it decays.
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert found == [(1e-3, 0.1, 4), (4e-3, 0.1, 8)]

    brought = build(TrainerCall(Trainer, {**call.arguments, "optimizers": (optimizer, None)}), job, [])
    with pytest.raises(StepError) as caught:
        brought.create_optimizer()
    assert str(caught.value) == (
        "the method's trainer: its trainer brings an optimiser, and the adapter has parameter groups: one would be "
        "ignored\n  This is a fault of the method: `harness.testing.check_aligner` finds such."
    )


def test_a_ratio_below_one_is_refused(cli: Any, tiny: Path, alone: Path) -> None:
    ran = cli("align", "dpo", "--model", tiny, "--dataset", "jsonl:x.jsonl", "--set", "adapter.lora_plus_ratio=0.5")
    assert ran.code == 2
    assert "lora_plus_ratio" in ran.err and "greater than or equal to 1" in ran.err
