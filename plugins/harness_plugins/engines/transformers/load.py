"""Loading models, tokenizers and adapters for the transformers engine, and saying why it failed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import AdapterInfo, ModelInfo, UserError, attach_adapter
from harness_plugins.adapters.lora import Qlora, keep_unpacked


def load_model(info: ModelInfo, device: str, attention: str, *, nf4: bool = False) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    spec, where = info.spec, f"--model {info.ref}"
    if info.pickled and not spec.get("allow_pickle"):
        raise _needs_pickle(where, "weights")
    dtype = spec.get("dtype", "auto")
    quantization = _nf4() if nf4 else None
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            info.path,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=None if spec.get("allow_pickle") else True,
            trust_remote_code=bool(spec.get("trust_remote_code")),
            attn_implementation=None if attention == "auto" else attention,
            device_map={"": device} if device.startswith("cuda") else None,
            quantization_config=quantization,
            output_loading_info=True,
        )
        model, loading = loaded
        model = model.to(device).eval()
        if nf4:
            keep_unpacked(model)
    except Exception as error:
        raise _explained(error, where) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise UserError(
            where,
            f"{len(names)} tensors of {info.architecture} are not in its weights ({', '.join(names[:3])}, ...)",
            "transformers would fill them with random numbers. Save the model again, whole, as a causal model.",
        )
    return model


def _nf4() -> Any:
    """The quantisation that the adapter ``qlora`` trains on."""
    try:
        Qlora().check(Qlora.Config())
        return Qlora().quantization(Qlora.Config())
    except UserError as error:
        raise UserError("engine option eval_base=nf4", error.what, error.fix) from None


def load_tokenizer(info: ModelInfo) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(info.path, trust_remote_code=bool(info.spec.get("trust_remote_code")))
    except Exception as error:
        raise _explained(error, f"--model {info.ref}, tokenizer") from error


def load_adapter(model: Any, adapter: AdapterInfo, name: str, info: ModelInfo) -> Any:
    """The PeftModel with one more adapter; ``model`` is the base for the first, the PeftModel for the others."""
    from peft import PeftConfig

    where = f"--adapter {adapter.ref}"
    if not (Path(adapter.path) / "adapter_model.safetensors").is_file() and not info.spec.get("allow_pickle"):
        if (Path(adapter.path) / "adapter_model.bin").is_file():
            raise _needs_pickle(where, "adapter_model.bin")
        raise UserError(
            where, "it holds no adapter_model.safetensors", "Give a folder that peft's save_pretrained wrote."
        )
    try:
        if PeftConfig.from_pretrained(adapter.path).is_prompt_learning:
            kind = adapter.config.get("peft_type", "prompt learning")
            raise UserError(where, f"{kind} adapters put embeddings before the prompt", "Only LoRA-like adapters work.")
        return attach_adapter(model, adapter, name, where)
    except UserError:
        raise
    except Exception as error:
        raise _explained(error, where) from error


def not_finite(model: Any, adapters: Iterable[str]) -> dict[str | None, str]:
    """What holds a number that is not finite: a name within peft, or None for the base -> which of its parts.

    Logits alone do not tell: torch's attention on a CPU makes zeros of queries that are not numbers.
    """
    found: dict[str | None, str] = {}
    names = list(adapters)
    for name, parameter in model.named_parameters():
        # Quantised weights are packed integers, and torch cannot look at numbers of eight bits.
        if not parameter.is_floating_point() or parameter.element_size() < 2 or not parameter.numel():
            continue
        if not all(math.isfinite(float(end)) for end in parameter.detach().aminmax()):
            owner = next((one for one in names if one in name.split(".")), None)
            shown = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found.setdefault(owner, f"weights are not finite ({shown.replace(f'.{owner}', '')})")
    for module in model.modules():
        scales = getattr(module, "scaling", None)
        for one in names:
            if isinstance(scales, dict) and not math.isfinite(scales.get(one, 1.0)):
                found.setdefault(one, f"scale is not finite ({scales[one]})")
    return found


def _needs_pickle(where: str, what: str) -> UserError:
    return UserError(
        where,
        f"{what}: pickled, not safetensors; unpickling can run code",
        "Convert to safetensors, or pass --allow-pickle if you trust where it comes from.",
    )


def _explained(error: Exception, where: str) -> UserError:
    """What transformers or peft said, with what to do about it."""
    if is_out_of_memory(error):
        return UserError(where, "does not fit the device's memory", "Take a smaller --dtype, or another device.")
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        fix = "Read that code; if you trust it, pass --trust-remote-code."
        return UserError(where, "needs Python code that comes with the model", fix)
    if ".safetensors" in text and "no file named" in text:
        return _needs_pickle(where, "no model.safetensors is there; what weights there are would be")
    what = f"cannot be loaded: {type(error).__name__}: {text[:300] or 'no message'}"
    return UserError(where, what, "Check that the folder is complete, or save the model again with save_pretrained.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is exhausted; torch has a class for it on accelerators only."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return bool(re.search(r"can't allocate memory|not enough memory|out of memory", str(error)))
