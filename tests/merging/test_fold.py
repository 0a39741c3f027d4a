"""`harness fold` against peft's own merging, kind by kind, and against bitsandbytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.specs import ModelSpec
from harness.merging.fold.probe import SENTENCES, probe_texts
from harness.merging.fold.run import fold, fold_into
from harness.models.inspect import inspect_adapter, inspect_model
from tests.merging.conftest import changed_config, peft_state, weights

Write = Callable[..., Path]


def folded(base: Path, adapter: Path, out: Path, **more: Any) -> dict[str, Any]:
    """The tensors of a fold without a probe."""
    fold(str(adapter), str(base), out=out, probe_prompts=0, **more)
    return weights(out)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], *, allowed: float) -> None:
    """Every tensor of ours is theirs up to a share of its greatest entry."""
    for name, tensor in ours.items():
        far, size = (tensor.double() - theirs[name].double()).abs().max(), theirs[name].double().abs().max()
        assert float(far) <= allowed * float(size), f"{name}: {far} of {size}"


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole modules": {"modules_to_save": ["lm_head", "norm"]},
    "token rows": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "one layer": {"layers_to_transform": [1]},
    "head": {"target_modules": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_is_what_peft_makes(kind: str, made: Path, tmp_path: Path, peft_adapter: Write) -> None:
    adapter = peft_adapter(made / "base", "adapter", **KINDS[kind])
    ours = folded(made / "base", adapter, tmp_path / "out")
    theirs = peft_state(made / "base", adapter)
    # A few roundings of fp32 (6e-8) in a product and a sum.
    assert_equal(ours, theirs, allowed=1e-6)
    before = weights(made / "base")
    # Or the comparison would prove nothing.
    assert any(not ours[name].equal(tensor) for name, tensor in before.items())
    assert ours.keys() == before.keys()


def test_biases_and_layers_stored_the_other_way_round(tmp_path: Path, peft_adapter: Write, made: Path) -> None:
    """GPT-2 keeps (in, out) and has biases: trained ones take the base's place, LoRA's own are added."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=120, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(base)
    for number, more in enumerate(({"bias": "lora_only"}, {"lora_bias": True}, {"use_dora": True})):
        targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, **more}
        adapter = peft_adapter(base, f"adapter{number}", **targets)
        ours = folded(base, adapter, tmp_path / f"out{number}")
        assert "lm_head.weight" not in ours
        assert_equal(ours, peft_state(base, adapter), allowed=1e-6)


def test_a_bf16_base_is_rounded_once(bf16: Path, made: Path, tmp_path: Path) -> None:
    """fp32 base + s B A, then bf16; peft rounds the product first (so it differs in the last bit here and there)."""
    import torch

    ours = folded(bf16, made / "a0", tmp_path / "out")
    base, adapter = weights(bf16), weights(made / "a0")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        stem = f"base_model.model.{name}"
        product = adapter[f"{stem}.lora_B.weight"].double() @ adapter[f"{stem}.lora_A.weight"].double()
        exact = base[f"{name}.weight"].double() + product  # alpha / r is 1
        assert ours[f"{name}.weight"].dtype == torch.bfloat16
        # Half a unit in the last of 8 bits, and a little for fp32.
        assert float(((ours[f"{name}.weight"].double() - exact) / exact).abs().max()) <= 2**-8 * 1.001
    name = "model.layers.0.mlp.up_proj.weight"
    assert ours[name].equal(base[name])


def test_a_tied_head_is_untied_where_the_adapter_has_its_own(made: Path, tmp_path: Path, peft_adapter: Write) -> None:
    from transformers import AutoModelForCausalLM

    tied = tmp_path / "tied"
    model = AutoModelForCausalLM.from_pretrained(made / "base")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tied)
    assert "lm_head.weight" not in weights(tied)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tied / file).write_bytes((made / "base" / file).read_bytes())
    plain = folded(tied, peft_adapter(tied, "plain"), tmp_path / "plain-out")
    assert "lm_head.weight" not in plain
    assert json.loads((tmp_path / "plain-out" / "config.json").read_text())["tie_word_embeddings"] is True
    head = peft_adapter(tied, "head", target_modules=["lm_head"])
    made_of = folded(tied, head, tmp_path / "head-out")
    change = weights(head)
    product = change["base_model.model.lm_head.lora_B.weight"] @ change["base_model.model.lm_head.lora_A.weight"]
    embeddings = weights(tied)["model.embed_tokens.weight"]
    assert made_of["model.embed_tokens.weight"].equal(embeddings)
    assert_equal(made_of, {**made_of, "lm_head.weight": embeddings + 6 / 4 * product}, allowed=1e-6)
    config = json.loads((tmp_path / "head-out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_nf4_roundtrip_is_bitsandbytes_base_plus_delta(made: Path, tmp_path: Path, peft_adapter: Write) -> None:
    """The peer is the 4-bit model that transformers opens for QLoRA, dequantised layer by layer."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    adapter = peft_adapter(made / "base", "adapter")
    ours = folded(made / "base", adapter, tmp_path / "out", precision="nf4-roundtrip")
    four_bit = AutoModelForCausalLM.from_pretrained(
        made / "base",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    change, base = weights(adapter), weights(made / "base")
    expected = dict(base)
    quantised = 0
    for name, module in four_bit.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            quantised += 1
            state = module.weight.quant_state
            expected[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, state)
            if (key := f"base_model.model.{name}.lora_A.weight") in change:
                product = change[key.replace("lora_A", "lora_B")] @ change[key]
                expected[f"{name}.weight"] = expected[f"{name}.weight"] + 6 / 4 * product
    assert quantised == 2 * 7
    assert_equal(ours, expected, allowed=1e-6)
    assert ours["lm_head.weight"].equal(base["lm_head.weight"])
    assert not ours["model.layers.0.mlp.up_proj.weight"].equal(base["model.layers.0.mlp.up_proj.weight"])


def test_the_record_says_how_far_the_folded_model_is(made: Path, tmp_path: Path) -> None:
    """Into its own base nothing is lost but rounding; into the other one what quantisation does, which is much more."""
    record = fold(str(made / "a0"), str(made / "base"), out=tmp_path / "out", probe_prompts=4).record
    probe = record["probe"]
    own, other, bases = probe["comparisons"]
    assert (own["of"], own["against"]) == ("stored base with the adapter live", "folded into the stored base")
    assert (other["of"], bases["against"]) == ("nf4 base with the adapter live", "nf4 base")
    assert probe["direction"] == "KL(of || against): the expectation is under `of`"
    assert own["texts"] == 4
    assert 0 <= own["mean"] < 1e-8
    assert other["mean"] > 0.01
    assert own["tokens"] == bases["tokens"] > 4 * 10
    low, high = other["ci95"]
    assert low < other["mean"] < high


def test_divergence_by_hand(made: Path) -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log(2/3) = 0.1438410362."""
    import torch

    from harness.merging.fold.probe import _Distributions, _divergence

    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    same = torch.cat([half, half])
    found = _divergence(_Distributions("p", [half, same]), _Distributions("q", [quarter, same]))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert expected == pytest.approx(0.1438410362, abs=1e-10)
    # Two texts: one all different, one the same.
    assert found["mean"] == pytest.approx(expected / 2, abs=1e-7)
    assert (found["texts"], found["tokens"]) == (2, 3)
    # Student's t on one degree of freedom: 12.7062 standard errors; the two values' is half their difference.
    assert found["ci95"][1] - found["mean"] == pytest.approx(12.7062 * expected / 2, rel=1e-4)


def test_texts_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "One."}\n\n{"prompt": "Zwei, größer."}\n', encoding="utf-8")
    assert probe_texts(file, None) == ("One.", "Zwei, größer.")
    assert probe_texts(file, 1) == ("One.",)
    assert probe_texts(None, 0) == ()
    assert probe_texts(None, None) == SENTENCES


def test_an_embedding_saved_beside_its_factors_is_what_they_are_added_to(made: Path, tmp_path: Path) -> None:
    """peft writes the whole embedding too, which may have been trained, or mended, after the base."""
    from safetensors.torch import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = json.loads((made / "a0" / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["embed_tokens"]}))
    before = weights(made / "base")["model.embed_tokens.weight"]
    import torch

    stem = "base_model.model.model.embed_tokens"
    a, b = torch.randn(2, before.shape[0]), torch.randn(64, 2)
    tensors = {f"{stem}.base_layer.weight": before + 1, f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    ours = folded(made / "base", adapter, tmp_path / "out")
    expected = before + 1 + (b @ a).t()  # alpha / r is 1
    assert_equal({"it": ours["model.embed_tokens.weight"]}, {"it": expected}, allowed=1e-6)


def test_fold_into_twice_is_done_once(made: Path, tmp_path: Path) -> None:
    model = inspect_model(ModelSpec(model=str(made / "base")))
    first, second = (inspect_adapter(str(made / name), model) for name in ("a0", "a1"))
    out = fold_into(model, first, tmp_path / "out")
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert fold_into(model, first, out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="holds another fold"):
        fold_into(model, second, out)
    assert_equal(weights(out), peft_state(made / "base", made / "a0"), allowed=1e-6)
    # What an engine opens is recorded as the base's, template and all.
    opened = inspect_model(ModelSpec(model=str(out)))
    assert opened.template_digest == model.template_digest
    assert opened.tokenizer_digest == model.tokenizer_digest


def test_the_adapters_template_comes_along(made: Path, tmp_path: Path) -> None:
    from harness.testing import tiny_adapter, tiny_model

    base = tiny_model(tmp_path / "raw", chat_template=False)
    adapter = tiny_adapter(tmp_path / "arm", base)
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    folded(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_other_dtypes(made: Path, tmp_path: Path) -> None:
    import torch

    ours = folded(made / "base", made / "a0", tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert ours["model.norm.weight"].equal(weights(made / "base")["model.norm.weight"].bfloat16())
    changed_config(tmp_path / "out", dtype="float32")
