"""One more model, for a scorer's own use: a judge in the same engines as the model under test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import prompts
from harness.choose_engine import choose_engine
from harness.contracts import Session
from harness.errors import UserError
from harness.models import inspect_model, open_tokenizer
from harness.precision import settle_dtype
from harness.records import Message, ModelInfo
from harness.registry import Registry
from harness.specs import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class OpenedEngine:
    """An open model, its tokenizer, and prompts for it as evaluation makes them."""

    session: Session
    model: ModelInfo
    tokenizer: PreTrainedTokenizerBase

    def chat(self, messages: Sequence[Message]) -> tuple[list[int], str]:
        """Token ids and text of a conversation up to where the model answers."""
        return prompts.encode_chat(self.tokenizer, messages)

    def continuation(self, text: str, ids: Sequence[int], more: str) -> tuple[int, ...]:
        """Token ids of ``more`` after a prompt: as they follow it, where the prompt's own ids stay what they are."""
        whole = prompts.encode_rendered(self.tokenizer, [text + more])[0]
        if whole[: len(ids)] == list(ids) and len(whole) > len(ids):
            return tuple(whole[len(ids) :])
        return tuple(prompts.encode_rendered(self.tokenizer, [more])[0])

    def close(self) -> None:
        """Release memory and processes."""
        self.session.close()


def open_engine(
    registry: Registry,
    model: str,
    engine: str = "auto",
    options: Mapping[str, Any] | None = None,
    *,
    needs: Sequence[str] = ("generate",),
    where: str = "judge",
    **spec: Any,
) -> OpenedEngine:
    """Open a local model with a chat template.

    Args:
        registry: whose engines are there.
        model: folder or hub id.
        engine: an engine's name, or auto.
        options: the engine's own.
        needs: what will be asked of it: generate, loglikelihood.
        where: what messages call it.
        **spec: further fields of ``ModelSpec``: revision, dtype, ...

    Raises:
        UserError: no such model; no engine can do it; it has no chat template.
    """
    info = inspect_model(ModelSpec(model=model, **spec), f"{where}, model")
    if info.chat_template is None:
        raise UserError(
            f"{where}, model",
            f"{model} has no chat template, and is asked in conversations",
            "Give a model that was tuned to chat, or add a chat_template.jinja to its folder.",
        )
    try:
        chosen, settings, _ = choose_engine(engine, dict(options or {}), info, set(needs), registry)
    except UserError as error:
        raise UserError(f"{where}, engine", error.what, error.fix) from None
    info, _ = settle_dtype(info, chosen.device(settings))
    tokenizer = open_tokenizer(info, f"{where}, model")
    return OpenedEngine(chosen.open(info, [], settings), info, tokenizer)
