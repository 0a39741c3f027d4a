"""The policy in training: how base and adapters are opened, and the policy that it started from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from harness.alignment.plan import AlignPlan
from harness.core.errors import UserError
from harness.core.machine import torch_device
from harness.models.attaching import attach_adapter
from harness.steps.provenance import NUMERICS


def open_base(plan: AlignPlan, device: int) -> Any:
    """The base as it is trained on, with nothing attached to it."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.utils import logging

    # The harness shows progress itself.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.is_available()
    if torch_device() == "cuda" and not cuda:
        raise UserError(
            "harness align",
            f"torch {torch.__version__} cannot use the GPU that is here",
            "Mend the driver or torch's build (`harness doctor`), or hide it: CUDA_VISIBLE_DEVICES=-1.",
        )
    quantization = plan.adapter.quantization(plan.adapter_options)
    dtype = getattr(torch, plan.spec.model.dtype)
    set_seed(plan.spec.seed)
    base = AutoModelForCausalLM.from_pretrained(
        plan.model.path,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device} if cuda else None,
        use_safetensors=True if not plan.spec.model.allow_pickle else None,
        trust_remote_code=plan.spec.model.trust_remote_code,
    )
    base.config.use_cache = False
    return base


def attach_policy(plan: AlignPlan, base: Any) -> tuple[Any, bool, bool]:
    """The base with its trainable weights attached; whether on CUDA, and whether under bf16 autocast."""
    import torch
    from transformers import set_seed

    cuda, dtype = torch.cuda.is_available(), getattr(torch, plan.spec.model.dtype)
    if plan.start is not None:
        base = attach_adapter(base, plan.start, "start", f"--from {plan.start.ref}")
        without_dropout(base)
    set_seed(plan.spec.seed)
    model = plan.adapter.attach(base, plan.adapter_options)
    if plan.start is not None:
        activate(model, ["start", "default"])
    return model, cuda, cuda and dtype == torch.bfloat16


@contextlib.contextmanager
def starting_policy(model: Any, continued: bool) -> Iterator[None]:
    """The policy before any step: the adapter off, or (continued) only the frozen start adapter on."""
    if continued:
        activate(model, ["start"])
        try:
            yield
        finally:
            activate(model, ["start", "default"])
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def described_policy(plan: AlignPlan, model: Any, bf16: bool) -> dict[str, Any]:
    """All that the starting policy's log-probabilities hang on, besides the rows."""
    import torch

    return {
        "model": plan.model.identity()["weights"],
        "from": plan.start.digest if plan.start is not None else None,
        "quantization": described_quantization(plan.adapter.quantization(plan.adapter_options)),
        "dtype": str(getattr(torch, plan.spec.model.dtype)),
        # Full fine-tuning computes in fp32 whatever the weights were opened in.
        "computes": sorted({str(p.dtype) for n, p in model.named_parameters() if ".default." not in n}),
        "autocast": bf16,
        "device": str(next(model.parameters()).device.type),
        "numerics": NUMERICS,
    }


def without_dropout(model: Any) -> None:
    """The adapter that is continued from is part of the policy now: with dropout the reference would be another."""
    import torch

    for module in model.modules():
        if "start" in getattr(module, "lora_dropout", {}):
            module.lora_dropout["start"] = torch.nn.Identity()


def activate(model: Any, names: list[str]) -> None:
    """Make adapters active; only ``default`` is ever trained."""
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if ".start." in name:
            parameter.requires_grad_(False)
        elif ".default." in name:
            parameter.requires_grad_(True)


def described_quantization(config: Any) -> dict[str, Any] | None:
    return None if config is None else {k: str(v) for k, v in sorted(config.to_dict().items())}


def release() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
