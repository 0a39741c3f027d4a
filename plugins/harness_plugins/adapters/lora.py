"""LoRA, QLoRA and full fine-tuning, through peft and bitsandbytes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from harness import Adapter, Config, ParameterGroup, UserError


class LoraConfig(Config):
    """Shape of a LoRA adapter (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, description="rank r of the update")
    alpha: int = Field(32, ge=1, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input (probability)")
    targets: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1, description="names of linear layers")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    dora: bool = Field(False, description="train magnitudes apart from directions (arXiv 2402.09353)")
    # Left out of records and ids at its default, as it was before it existed.
    lora_plus_ratio: float | None = Field(
        None,
        ge=1,
        exclude_if=lambda ratio: ratio is None,
        description="learning rate of B over that of A, which has the recipe's (LoRA+, arXiv 2402.12354; no unit); "
        "null: the same",
    )


class Lora(Adapter["Lora.Config"]):
    """Low-rank adapters beside frozen weights."""

    name = "lora"
    summary = "LoRA adapters on a base in its own precision"

    class Config(LoraConfig):
        """Options of LoRA."""

    def attach(self, model: Any, config: Config) -> Any:
        """Add the trainable adapter ``default``; weights of the adapter are kept in fp32.

        Raises:
            UserError: a target is not in the model; lists the linear layers that are.
        """
        import torch
        from peft import LoraConfig as PeftLoraConfig, PeftModel, get_peft_model

        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        linear = _linear_layers(inner)
        missing = [target for target in config.targets if target not in linear]
        if missing:
            raise UserError(
                "--set adapter.targets",
                f"the model has no linear layer {', '.join(map(repr, missing))}",
                f"Its linear layers: {', '.join(linear)}.",
            )
        peft_config = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
            use_rslora=config.rslora,
            use_dora=config.dora,
            bias="none",
            task_type="CAUSAL_LM",
        )
        if isinstance(model, PeftModel):
            model.add_adapter("default", peft_config)
            attached: Any = model
        else:
            attached = get_peft_model(model, peft_config)
        for name, parameter in attached.named_parameters():
            if ".default." in name:
                parameter.data = parameter.data.to(torch.float32)
        return attached

    def parameter_groups(self, model: Any, config: Config) -> list[ParameterGroup] | None:
        """LoRA+: B at ``lora_plus_ratio`` times the rate of A (Hayou et al. 2024, section 5); None without a ratio."""
        if config.lora_plus_ratio is None:
            return None
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        return [
            ParameterGroup([p for name, p in trained if not _is_of_b(name, p)]),
            ParameterGroup([p for name, p in trained if _is_of_b(name, p)], config.lora_plus_ratio),
        ]


def _is_of_b(name: str, parameter: Any) -> bool:
    """Whether LoRA+ speeds a weight up: B, and DoRA's magnitudes, which are vectors (as in peft)."""
    return "lora_B" in name or parameter.ndim == 1


def _linear_layers(model: Any) -> list[str]:
    """Last names of the linear layers, those included that an adapter wraps already."""
    import torch

    found = set()
    for path, module in model.named_modules():
        wrapped = getattr(module, "base_layer", module)
        if isinstance(wrapped, torch.nn.Linear) and ".lora_" not in path and not path.endswith(".base_layer"):
            found.add(path.rsplit(".", 1)[-1])
    return sorted(found)


class Qlora(Lora):
    """LoRA over a 4-bit base (Dettmers et al. 2023, arXiv 2305.14314)."""

    name = "qlora"
    summary = "LoRA adapters on an NF4 base with double quantisation, through bitsandbytes"

    class Config(LoraConfig):
        """Options of QLoRA."""

        compute_dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="type of matrix products")

    def check(self, config: Any) -> None:
        """Refuse where bitsandbytes is not installed."""
        from importlib.util import find_spec

        if find_spec("bitsandbytes") is None:
            raise UserError("--adapter qlora", "bitsandbytes is not installed", "pip install bitsandbytes")

    def quantization(self, config: Any) -> Any:
        """NF4 with double quantisation."""
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
        )

    def attach(self, model: Any, config: Any) -> Any:
        """As LoRA, with bitsandbytes' CPU packing switched off before anything runs."""
        attached = super().attach(model, config)
        keep_unpacked(attached)
        return attached


def keep_unpacked(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights on a CPU.

    With AVX512-BF16 one forward in eval mode packs the NF4 weights in place, and every later backward gives wrong
    gradients in silence; held-out rows and reference passes are such forwards. Packed weights also round their scales
    to bf16, so that evaluation would see another base than training did.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


class Full(Adapter[Config]):
    """No adapter: all weights are trained."""

    name = "none"
    summary = "full fine-tuning: every weight is trained, in fp32"

    def attach(self, model: Any, config: Config) -> Any:
        """Every weight trainable, in fp32: small updates would round away in bf16."""
        import torch

        model.to(torch.float32)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model
