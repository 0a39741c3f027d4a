"""LoRA, QLoRA and full fine-tuning: the kit's rules, and what the options do to the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from harness import UserError
from harness.testing import check_adapter
from harness_plugins.adapters.lora import Full, Lora, Qlora

OPTIONS = {"rank": 4, "alpha": 8, "targets": ("q_proj", "down_proj")}


@pytest.fixture
def base(tiny: Path) -> Any:
    """The tiny model in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny)


@pytest.mark.parametrize("more", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_lora_passes_the_kit(more: dict[str, bool]) -> None:
    check_adapter(Lora(), options={**OPTIONS, **more})


def test_qlora_passes_the_kit() -> None:
    pytest.importorskip("bitsandbytes")
    check_adapter(Qlora(), options=OPTIONS)


def test_the_shape_of_an_adapter(base: Any) -> None:
    """Query: 64 -> 64; down: 128 -> 64. With rank 4: A (4, in), B (out, 4), in two blocks, all fp32, B zero."""
    import torch

    model = Lora().attach(base, Lora.Config(**OPTIONS, dropout=0.25))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sorted(tuple(p.shape) for p in trained.values()) == sorted([(4, 64), (64, 4), (4, 128), (64, 4)] * 2)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not any(p.any() for n, p in trained.items() if "lora_B" in n)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


@pytest.mark.parametrize(
    ("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))], ids=["alpha / rank", "alpha / sqrt(rank)"]
)
def test_the_scale_of_an_update(base: Any, rslora: bool, scale: float) -> None:
    """With A = B = 1 the update of a layer adds scale * rank * sum(x) to each output."""
    import torch

    model = Lora().attach(base, Lora.Config(**OPTIONS, dropout=0.0, rslora=rslora))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(1.0)
        x_D = torch.linspace(0, 1, 64)
        added_D = layer(x_D) - layer.base_layer(x_D)
    # The sum of 64 even steps from 0 to 1 is 32.
    assert torch.allclose(added_D, torch.full((64,), scale * 4 * 32.0), rtol=1e-5)


def test_a_target_that_the_model_has_not_is_refused(base: Any) -> None:
    with pytest.raises(UserError) as caught:
        Lora().attach(base, Lora.Config(targets=("q_proj", "query_key_value")))
    message = str(caught.value)
    assert "adapter.targets" in message
    assert "'query_key_value'" in message
    assert "'q_proj'" not in message
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in message


def test_qlora_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(UserError) as caught:
        Qlora().check(Qlora.Config())
    assert str(caught.value).split(": ")[0] == "--adapter qlora"
    assert "bitsandbytes is not installed" in str(caught.value)
    assert "pip install bitsandbytes" in str(caught.value)


def test_lora_opens_the_base_as_it_is() -> None:
    assert Lora().quantization(Lora.Config()) is None
    assert Full().quantization(Full.Config()) is None


def test_full_fine_tuning_trains_every_weight_in_fp32(base: Any) -> None:
    import torch

    model = Full().attach(base.to(torch.bfloat16).requires_grad_(False), Full.Config())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
