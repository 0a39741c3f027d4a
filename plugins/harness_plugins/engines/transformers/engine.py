"""The ``transformers`` engine: any causal language model that transformers opens, on any device that torch has.

Semantics are those of lm-eval's ``hf`` model: a log-likelihood is the sum of fp32 log-softmax values over the
continuation; a generation is decoded without special tokens and cut at the first stop string.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, PositiveInt

from harness import AdapterInfo, Availability, Capabilities, Engine, ModelInfo, Session, UserError, torch_device
from harness_plugins.engines.transformers.plan import Limits

VERSION = 1
"""Raised when a change of this engine may move a number."""

AUTO_ROWS = 256
AUTO_TOKENS = {"cpu": 8_192, "mps": 8_192, "cuda": 65_536}
"""Constants rather than shares of free memory, so that a plan is the same on every run."""

NEEDS = ("generate", "loglikelihood", "adapters")
MOST_ADAPTERS = 32
"""Adapters that lie beside the base in memory, in fp32: at rank 64 on all projections of a 7B, 0.6 GB each."""

LOGITS_PER_BATCH = 2**28
"""Most logits that a batch may need at once: 1 GiB in fp32. A 152k vocabulary gets 1,766 scored positions."""


class TransformersEngine(Engine["TransformersEngine.Config"]):
    """transformers, on any device: log-likelihoods, generation, LoRA-like adapters beside the base.

    * A batch is planned by padded tokens from the whole request list; see :func:`plan`.
    * Log-likelihoods that differ in their last token alone cost one forward row; logits exist only where needed.
    * Generation obeys ``Decoding`` and the model's EOS ids (of its generation_config.json and of its tokenizer),
      nothing else: sampling settings, penalties and minimum lengths of the model's generation_config.json are ignored.
      ``Decoding.seed`` None samples as seed 0. ``Output.token_ids`` holds the new ids before EOS; where a stop string
      ended the answer, up to and with the token that completed it, although ``text`` is cut before it. An answer
      that would leave the model's context ends there, with finish "length".
    * Under a control that virtual tokens stand for, a batch is embedded here, and the vectors are laid in: rows of
      other controls and of none in it are what they are without.
    * Out of memory halves the batch; outputs of a halved batch, and all outputs below fp32, are batch-dependent.
    """

    name = "transformers"
    summary = "any causal model of transformers, on any device"

    class Config(Engine.Config):
        """Options of the transformers engine."""

        device: str = Field(
            "auto",
            pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
            description="cpu, mps, cuda or cuda:N; auto: cuda, else mps, else cpu",
        )
        batch_size: PositiveInt | Literal["auto"] = Field(
            "auto", description=f"most rows of a batch (rows; requests that share one count once); auto: {AUTO_ROWS}"
        )
        max_batch_tokens: PositiveInt | Literal["auto"] = Field(
            "auto",
            description="budget of a batch: rows x longest row, new tokens included, padding too (tokens); auto: "
            + ", ".join(f"{tokens} on {device}" for device, tokens in AUTO_TOKENS.items()),
        )
        attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = Field(
            "auto", description="attention implementation; auto: what transformers takes for the model"
        )
        eval_base: Literal["bf16", "nf4"] = Field(
            "bf16", description="base under an adapter: bf16 is the model as its dtype says, nf4 as QLoRA trained on it"
        )

    def availability(self) -> Availability:
        """Usable where torch, transformers and (for adapters) peft are installed."""
        missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
        if missing:
            return Availability(False, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
        return Availability(True, f"device {resolve_device('auto')}")

    def capabilities(self, model: ModelInfo, options: Config) -> Capabilities:
        """Everything, for decoder-only models; virtual tokens where the token ids enter the first layer alone."""
        if model.config.get("is_encoder_decoder"):
            reason = f"{model.architecture} is an encoder-decoder; only decoder-only models are supported"
            return Capabilities(reasons=dict.fromkeys((*NEEDS, "prompt_embeds"), reason))
        text = model.config.get("text_config") or model.config
        layered = bool(text.get("hidden_size_per_layer_input"))
        reasons = {"prompt_embeds": f"{model.architecture} looks token ids up in every layer"} if layered else {}
        # peft bounds no rank; this one only keeps the field a number.
        return Capabilities(
            generate=True,
            loglikelihood=True,
            prompt_embeds=not layered,
            max_adapters=MOST_ADAPTERS,
            max_adapter_rank=1_000_000,
            reasons=reasons,
        )

    def device(self, options: Config) -> str:
        """The kind of device: cpu, cuda or mps."""
        return resolve_device(options.device).partition(":")[0]

    def identity(self, options: Config) -> dict[str, Any]:
        """Device kind and everything that shapes a batch may move last bits; ``auto`` is resolved, without torch."""
        rows, tokens = _budget(options)
        return {
            "name": self.name,
            "version": VERSION,
            "device": self.device(options),
            "batch_size": rows,
            "max_batch_tokens": tokens,
            "attention": options.attention,
            **({"eval_base": "nf4"} if options.eval_base == "nf4" else {}),
        }

    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Config) -> Session:
        """Load model, tokenizer and adapters.

        Raises:
            UserError: the folder cannot be loaded as asked, or needs leave that was not given.
        """
        from harness_plugins.engines.transformers.load import load_adapter, load_model, load_tokenizer
        from harness_plugins.engines.transformers.session import TransformersSession

        device = _checked_device(options.device)
        loaded = load_model(model, device, options.attention, nf4=options.eval_base == "nf4")
        tokenizer = load_tokenizer(model)
        vocabulary = int(loaded.get_input_embeddings().weight.shape[0])
        rows, tokens = _budget(options)
        limits = Limits(rows, tokens, max(1, LOGITS_PER_BATCH // vocabulary), model.max_length, vocabulary)
        peft, names = None, {}
        for number, adapter in enumerate(adapters):
            names[adapter.name] = f"adapter_{number}"  # peft uses names as module names: no dots
            peft = load_adapter(peft or loaded, adapter, names[adapter.name], model)
        conditioned: dict[str | None, AdapterInfo | ModelInfo] = {one.name: one for one in adapters if one.conditioning}
        conditioned |= {None: model} if model.conditioning is not None else {}
        return TransformersSession(loaded, tokenizer, limits, names, peft, conditioned)


def _budget(options: Any) -> tuple[int, int]:
    kind = resolve_device(options.device).partition(":")[0]
    rows = AUTO_ROWS if options.batch_size == "auto" else options.batch_size
    tokens = AUTO_TOKENS[kind] if options.max_batch_tokens == "auto" else options.max_batch_tokens
    return rows, tokens


def resolve_device(option: str) -> str:
    """The device that ``auto`` means here; step ids depend on it."""
    return torch_device() if option == "auto" else option


def _checked_device(option: str) -> str:
    import torch

    device = resolve_device(option)
    kind, _, number = device.partition(":")
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable[kind]:
        raise UserError(
            f"engine option device={option}",
            f"torch {torch.__version__} cannot use {kind} here",
            "Mend the driver or torch's build (`harness doctor`), or set device=cpu.",
        )
    if number and int(number) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"engine option device={option}", "no such device", f"Devices: cuda:0 to cuda:{last}.")
    return device
