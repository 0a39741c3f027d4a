"""The base as QLoRA training saw it: through NF4 with double quantisation and back (Dettmers et al. 2023, 2305.14314).

Folding an adapter into the base's own precision gives another model than the one that was trained: the adapter made
up for the rounding of the 4-bit base (peft issues 2105 and 2321).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.core.errors import UserError
from harness.core.records import ModelInfo

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Numbers that share a scale: bitsandbytes' default, with which training quantises."""


def require_bitsandbytes(where: str) -> None:
    """Raise a UserError unless bitsandbytes is installed."""
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise UserError(where, "nf4-roundtrip needs bitsandbytes, which is not installed", "pip install bitsandbytes")


def quantised_modules(info: ModelInfo) -> dict[str, bool]:
    """Modules that transformers quantises for QLoRA -> whether their weights are stored as (in, out).

    Found by transformers' own rule on a model without memory: linear layers, the output embeddings left out.

    Raises:
        UserError: transformers does not know the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    trust = bool(info.spec.get("trust_remote_code"))
    try:
        config = AutoConfig.from_pretrained(info.path, trust_remote_code=trust)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)  # type: ignore[no-untyped-call]
    except (ValueError, OSError, KeyError, ImportError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"--base {info.ref}", f"transformers cannot build it: {line}", "Use --precision bf16."
        ) from None
    kept = get_keys_to_not_convert(model)
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if should_convert_module(name, kept) and (isinstance(module, Conv1D) or type(module) is torch.nn.Linear)
    }


def roundtrip(weight: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """Quantise and dequantise one weight.

    Args:
        weight: (out, in), or (in, out) if ``transposed``; its type is the one that training opens the base in.
        transposed: whether it is stored as (in, out).

    Returns:
        A tensor of the same shape and type.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    oriented = (weight.t() if transposed else weight).contiguous()
    packed, state = quantize_4bit(oriented, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    seen: torch.Tensor = dequantize_4bit(packed, state).to(weight.dtype)
    return (seen.t() if transposed else seen).contiguous()
