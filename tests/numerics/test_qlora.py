"""QLoRA on a CPU: gradients against a model whose weights are the dequantised ones, also after a pass in eval mode."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import align
from harness_plugins.adapters.lora import Qlora
from harness_plugins.aligners.preference import Dpo
from harness_plugins.aligners.sft import Sft
from tests.numerics.building import built

bnb = pytest.importorskip("bitsandbytes")
Job = Callable[..., Any]
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def options(**more: Any) -> Any:
    return Qlora.Config(**{"rank": 4, "alpha": 8, "dropout": 0.0, "targets": TARGETS, **more})


def linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """4-bit layers by the name that they have in the base."""
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            yield name.replace(".base_layer", "").removeprefix("base_model.model."), module


def quantised(folder: Path, config: Any) -> Any:
    """The base in 4 bit as harness.alignment.run opens it, with an adapter whose B is not zero."""
    import torch
    from transformers import AutoModelForCausalLM

    plugin = Qlora()
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=plugin.quantization(config)
    )
    torch.manual_seed(1)
    model = plugin.attach(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def dequantised(folder: Path, model: Any) -> Any:
    """The same policy with every 4-bit weight written out in fp32: what the 4-bit one stands for."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, module in linear_layers(model):
            written = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = base.get_submodule(name).weight
            assert written.shape == plain.shape
            assert not torch.equal(written.float(), plain)
            plain.copy_(written)
    peer = get_peft_model(base, model.peft_config["default"])
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "lora_" in name:
                parameter.copy_(weights[name])
    return peer


def gradients(model: Any) -> dict[str, Any]:
    """Of a language-modelling loss on three fixed rows in training mode, by name of LoRA weight."""
    import torch

    ids_BT = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    model.train()
    model.zero_grad()
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def look(model: Any) -> None:
    """A forward in eval mode without gradient: what a reference pass or an evaluation of held-out rows does."""
    import torch

    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 40)[None])


def greatest_error(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Greatest difference, relative to the greatest gradient of the same weight; infinite where one is missing."""
    if ours.keys() != theirs.keys():
        return math.inf
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)


def test_gradients_after_an_eval_pass_are_those_of_the_dequantised_model(tiny: Path) -> None:
    model = quantised(tiny, options(compute_dtype="float32"))
    assert len(list(linear_layers(model))) == 2 * 7, "all linear layers of both blocks are in 4 bit"
    peer = dequantised(tiny, model)
    expected = gradients(peer)
    assert len(expected) == 2 * len(TARGETS) * 2
    assert all(gradient.any() for gradient in expected.values())
    assert greatest_error(gradients(model), expected) < 1e-5
    look(model)
    assert greatest_error(gradients(model), expected) < 1e-5
    look(model)
    assert greatest_error(gradients(model), expected) < 1e-5


def test_without_our_switch_they_would_be_wrong(tiny: Path) -> None:
    """The bug itself, so that we hear of it when bitsandbytes mends it."""
    if not bnb.functional.has_avx512bf16():
        pytest.skip("needs a CPU with AVX512-BF16: others do not pack weights")
    model = quantised(tiny, options(compute_dtype="float32"))
    expected = gradients(dequantised(tiny, model))
    for _, module in linear_layers(model):
        module.support_avx512bf16_for_cpu = True
    assert greatest_error(gradients(model), expected) < 1e-5, "before the pass all is well"
    look(model)
    assert greatest_error(gradients(model), expected) > 0.1


def test_bf16_products_are_near(tiny: Path) -> None:
    """bf16 keeps 8 bits: gradients agree to a few per cent of the greatest, in training after an eval pass."""
    model = quantised(tiny, options(compute_dtype="bfloat16"))
    look(model)
    assert greatest_error(gradients(model), gradients(dequantised(tiny, model))) < 0.05


def test_the_base_is_opened_as_the_papers_ask(tiny: Path) -> None:
    """Dettmers et al., section 3: NF4, double quantisation; the type of matrix products as asked."""
    import torch

    model = quantised(tiny, options())
    for _, module in linear_layers(model):
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert module.compute_dtype == torch.bfloat16
    for _, module in linear_layers(quantised(tiny, options(compute_dtype="float32"))):
        assert module.compute_dtype == torch.float32


@pytest.mark.parametrize("method", [Dpo(), Sft()], ids=lambda method: method.name)
def test_trainable_weights_stay_as_they_are(method: Any, tiny: Path, pairs: list[dict[str, Any]], job: Job) -> None:
    """TRL casts them to bf16; ours come back in fp32, to the last bit, and train."""
    import torch

    model = quantised(tiny, options())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(p, p.bfloat16().float()) for p in before.values()), "rounding would show"
    rows = [
        {**row, "completion_ids": row["chosen_ids"], "ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0}
        for row in pairs
    ]
    trainer = built(method, job(method, model, rows))
    after = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name
    trainer.train()
    # Adam moves a weight by about the learning rate, 5e-5 or more: bf16 would round most of that away.
    moved = [not torch.equal(p, before[name]) for name, p in after.items()]
    assert all(moved)


def test_align_with_qlora_reads_its_reference_and_trains(tiny: Path, alone: Path) -> None:
    """The reference pass and the evaluation of held-out rows are eval passes: the training between them must be right.

    Dropout off and B zero: the first loss is ln 2, as far as bf16 products of differently padded batches agree.
    """
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": f"Never, {i}."} for i in range(40)]
    file = alone / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = align(
        "dpo",
        str(tiny),
        f"jsonl:{file}",
        out=alone / "out",
        adapter="qlora",
        options={"batch_size": 4, "steps": 6, "log_every": 1, "eval_every": 3, "learning_rate": 0.02, "eval_rows": 4},
    )
    losses = [line["loss"] for line in made.history if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)
    # All pairs say the same two things, so six great steps are enough.
    assert losses[-1] < 0.5 * losses[0]
    engine = json.loads((made.folder / "step" / "provenance.json").read_text())["engine"]
    assert engine["trainable_dtypes"] == ["torch.float32"]
    lineage = json.loads((made.folder / "lineage.json").read_text())
    assert lineage["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert lineage["quantization"]["bnb_4bit_use_double_quant"] == "True"


def test_an_adapter_is_evaluated_on_the_base_that_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    """``eval_base=nf4``: the very policy that was trained; by default the base in its own type, which is another."""
    import torch

    from harness import ModelSpec, Request, inspect_model
    from harness.models.inspect import inspect_adapter
    from harness_plugins.engines.transformers.engine import TransformersEngine

    trained = quantised(tiny, options())
    trained.save_pretrained(tmp_path / "adapter")
    prompt, answer = (0, 40, 41, 42, 43), (50, 51, 52, 1)
    with torch.no_grad():
        logits = trained.eval()(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float()
    logps = logits.log_softmax(-1)
    expected = sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))

    engine, model = TransformersEngine(), inspect_model(ModelSpec(model=str(tiny)))
    adapter = inspect_adapter(str(tmp_path / "adapter"), model, allow_template_mismatch=True)
    found = {}
    for base in ("nf4", "bf16"):
        session = engine.open(model, [adapter], engine.Config(device="cpu", eval_base=base))
        (output,) = session.run([Request("loglikelihood", prompt, answer, adapter=adapter.name)])
        session.close()
        found[base] = output.logprob
    assert found["nf4"] == pytest.approx(expected, rel=1e-4)
    assert abs(found["bf16"] - expected) > 0.01
    identities = [engine.identity(engine.Config(device="cpu", eval_base=base)) for base in ("nf4", "bf16")]
    assert identities[0].pop("eval_base") == "nf4"
    assert identities[0] == identities[1] == engine.identity(engine.Config(device="cpu"))


def test_an_nf4_base_without_bitsandbytes_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import ModelSpec, UserError, inspect_model
    from harness_plugins.engines.transformers.engine import TransformersEngine

    engine, model = TransformersEngine(), inspect_model(ModelSpec(model=str(tiny)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(UserError) as caught:
        engine.open(model, [], engine.Config(device="cpu", eval_base="nf4"))
    assert "engine option eval_base=nf4: bitsandbytes is not installed" in str(caught.value)
    assert "pip install bitsandbytes" in str(caught.value)
