"""`--as adapter`: exact where the method works on factors, else the truncated SVD that numpy makes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.merging.low_rank import _from_factors, _truncated
from tests.merging.conftest import peft_state, weights


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([[0, 7, 8, 9, 10, 11]])).logits


def opened(base: Path, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))


def test_a_linear_merge_is_exact(made: Path, tmp_path: Path) -> None:
    """The adapter on its base computes what the merged model computes."""
    from transformers import AutoModelForCausalLM

    given = [(made / "a0", 0.4), (made / "a1", 0.9)]
    for form in ("model", "adapter"):
        harness.merge("task_arithmetic", given, base=made / "base", out=tmp_path / form, form=form)
    record = json.loads((tmp_path / "adapter" / "merge.json").read_text())
    assert record["low_rank"]["how"] == ["exact"]
    assert record["low_rank"]["relative_residual"] == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # Ranks 2 and 3, side by side.
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (5, 5, ["q_proj"])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert float((logits(opened(made / "base", tmp_path / "adapter")) - logits(whole)).abs().max()) < 1e-4
    ours, theirs = peft_state(made / "base", tmp_path / "adapter"), weights(tmp_path / "model")
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max()), name


def test_the_residual_is_what_numpy_says(made: Path, tmp_path: Path) -> None:
    import numpy as np

    given = [made / "a0", made / "a1"]
    harness.merge("ties", given, base=made / "base", out=tmp_path / "model")
    for rank in (1, 5, 64):
        out = tmp_path / f"adapter{rank}"
        harness.merge("ties", given, base=made / "base", out=out, form="adapter", rank=rank)
        base, merged = weights(made / "base"), weights(tmp_path / "model")
        found = json.loads((out / "merge.json").read_text())["low_rank"]
        lost = whole = 0.0
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            s = np.linalg.svd((merged[name] - base[name]).numpy().astype(np.float64), compute_uv=False)
            lost, whole = lost + (s[rank:] ** 2).sum(), whole + (s**2).sum()
            expected = math.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
            assert found["tensors"][name]["relative_residual"] == pytest.approx(expected, abs=1e-6)
        assert found["relative_residual"] == pytest.approx(math.sqrt(lost / whole), abs=1e-6)
        stored = weights(out)
        assert {tuple(t.shape) for n, t in stored.items() if "lora_A" in n} == {(rank, 64)}
    # At full rank nothing is lost.
    assert found["relative_residual"] < 1e-5


def test_modules_that_one_arm_leaves_alone_get_the_same_rank(made: Path, tmp_path: Path) -> None:
    """An arm on v_proj of one layer, another on q_proj of both: all three modules, rank 2 + 2."""
    import torch
    from safetensors.torch import save_file

    arm = tmp_path / "arm"
    arm.mkdir()
    config = json.loads((made / "a0" / "adapter_config.json").read_text())
    (arm / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["layers.1.self_attn.v_proj"]}))
    stem = "base_model.model.model.layers.1.self_attn.v_proj"
    save_file(
        {f"{stem}.lora_A.weight": torch.randn(2, 64), f"{stem}.lora_B.weight": torch.randn(64, 2)},
        arm / "adapter_model.safetensors",
    )
    out = tmp_path / "out"
    harness.merge("task_arithmetic", [(made / "a0", 1), (arm, 1)], base=made / "base", out=out, form="adapter")
    stored = weights(out)
    assert len(stored) == 6
    assert {tuple(t.shape) for t in stored.values()} == {(4, 64), (64, 4)}
    # Not every layer's v_proj is in it: the modules are named one by one.
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    ours, theirs = peft_state(made / "base", out), peft_state(made / "base", arm)
    name = "model.layers.1.self_attn.v_proj.weight"
    assert float((ours[name] - theirs[name]).abs().max()) < 1e-5


def test_a_checkpoints_change_as_an_adapter(made: Path, tmp_path: Path) -> None:
    """A folded adapter of rank 2 is found again, given that rank."""
    from harness.merging.fold.run import fold

    fold(str(made / "a0"), str(made / "base"), out=tmp_path / "whole", probe_prompts=0)
    out = tmp_path / "out"
    given = [(tmp_path / "whole", 1)]
    harness.merge("task_arithmetic", given, base=made / "base", out=out, form="adapter", rank=2)
    assert json.loads((out / "merge.json").read_text())["low_rank"]["relative_residual"] < 1e-5
    ours, theirs = peft_state(made / "base", out), weights(tmp_path / "whole")
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).abs().max()) < 1e-4, name


def test_factors_of_too_high_a_rank_are_compressed_through_their_core() -> None:
    """diag(3, 2, 1) in factors of rank 3, at rank 2: sqrt(1 / 14) is lost; with a column twice nothing is."""
    import torch

    a, b = torch.eye(3, 5), torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    found = _from_factors(a, b, 2)
    assert (found.how, found.lost, found.whole) == ("svd", pytest.approx(1), pytest.approx(14))
    expected = torch.zeros(3, 5)
    expected[0, 0], expected[1, 1] = 3, 2
    assert float((found.b @ found.a - expected).abs().max()) < 1e-6
    twice = _from_factors(torch.cat([a[:1], a[:1]]), torch.cat([b[:, :1], b[:, :1]], dim=1), 1)
    assert (twice.how, twice.whole) == ("exact", pytest.approx(36))
    assert float((twice.b @ twice.a)[0, 0]) == pytest.approx(6)


def test_the_randomised_decomposition_is_as_good_as_the_full_one() -> None:
    """On noise, whose singular values fall slowly: the hardest case. Within 1 % of the least possible loss."""
    import numpy as np
    import torch

    delta = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    found = _truncated(delta, 20, torch.Generator().manual_seed(1))
    assert found.how == "randomised svd"
    s = np.linalg.svd(delta.numpy().astype(np.float64), compute_uv=False)
    least = (s[20:] ** 2).sum()
    assert least * (1 - 1e-6) <= found.lost <= 1.01 * least
    again = _truncated(delta, 20, torch.Generator().manual_seed(1))
    assert torch.equal(again.a, found.a)
    low = delta[:, :20] @ delta[:20]
    assert _truncated(low, 20, torch.Generator().manual_seed(1)).lost < 1e-9 * float(low.pow(2).sum())
