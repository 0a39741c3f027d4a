"""Which engine runs: the one that was named, or the best that can do what the tasks need. Loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.engine import Engine, Session
from harness.contracts.registry import Registry
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.records import Message, ModelInfo
from harness.core.specs import ModelSpec
from harness.models import prompts
from harness.models.inspect import inspect_model, open_tokenizer
from harness.models.locate import is_url
from harness.models.precision import settle_dtype
from harness.tasks.catalog import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def needs_of(chosen: Sequence[Chosen], *, embeddings: bool = False) -> set[str]:
    """What some tasks ask of an engine; ``embeddings``: under a control that virtual tokens stand for."""
    needs: set[str] = set()
    for one in chosen:
        default = ("generate", "loglikelihood") if one.spec.lm_eval is not None else ("generate",)
        needs |= set(one.spec.needs or default)
    if embeddings:
        needs |= {"prompt_embeds", *(("loglikelihood_embeds",) if "loglikelihood" in needs else ())}
    return needs


def choose_engine(
    name: str, given: Any, model: ModelInfo, needs: set[str], registry: Registry, *, adapters: bool = False
) -> tuple[Engine, Any, str]:
    """The engine, its options, and why it was taken.

    ``auto`` takes the usable engine with the greatest preference that can do what every task needs. An adapter that an
    engine cannot serve is no obstacle (it is folded), unless the engine is remote.

    Args:
        name: an engine's, or ``auto``.
        given: options of the engine.
        model: the model under test, perhaps a URL.
        needs: of :func:`needs_of`.
        registry: where engines are registered.
        adapters: whether there are adapters to serve.

    Raises:
        UserError: the named engine cannot run or cannot do it; or none can.
    """
    if not isinstance(given, dict):
        fix = f"Write --engine {given} to choose one, --set engine.KEY=VALUE for its options."
        raise UserError("--set engine", f"{given!r} is a value, not a group of options", fix)
    if is_url(model.ref) and name == "auto":
        name, given = "openai", {"base_url": model.ref, **given}
    if name == "auto":
        return _best(given, model, needs, registry)
    engine = registry.find(Engine, name, "--engine")
    options = parse_options(engine.Config, given, "--set engine")
    problem = _problem(engine, model, options, needs | ({"adapters"} if adapters and engine.remote else set()))
    if problem is not None:
        raise UserError(f"--engine {name}", problem[0], problem[1])
    return engine, options, "asked for"


def conversations_only(name: str, given: Any, model: ModelInfo, registry: Registry) -> bool:
    """Whether the engine that is named, or meant by a URL, takes conversations alone.

    What is wrong with the name or its options is for :func:`choose_engine` to say.
    """
    name = "openai" if is_url(model.ref) and name == "auto" else name
    if name == "auto" or not isinstance(given, dict):
        return False
    try:
        engine = registry.find(Engine, name, "--engine")
        options = parse_options(engine.Config, given, "--set engine")
    except UserError:
        return False
    return engine.capabilities(model, options).chat_only


def refuse_unspeakable(chosen: Sequence[Chosen]) -> None:
    """Refuse a task that needs log-likelihoods of an endpoint that only chats, naming the one that asks in words.

    Raises:
        UserError: for the first such task that has a generative variant.
    """
    for one in chosen:
        if one.spec.generative is not None and "loglikelihood" in one.spec.needs:
            raise UserError(
                f"--task {one.spec.name}",
                "needs log-likelihoods, and an endpoint that takes conversations alone gives none",
                f"Ask the same in words: --task {one.spec.generative} (not comparable with {one.spec.name}); or set "
                "engine.endpoint=completions and engine.tokenizer, if the server has that.",
            )


def _best(given: Mapping[str, Any], model: ModelInfo, needs: set[str], registry: Registry) -> tuple[Engine, Any, str]:
    usable: list[tuple[int, str, Engine, Any, str]] = []
    refused: list[str] = []
    for other, engine in registry.of_kind(Engine):
        if engine.remote:
            continue
        try:
            options = parse_options(engine.Config, dict(given), "--set engine")
        except UserError as error:
            refused.append(f"{other}: {error.what}. {error.fix.rstrip('.')}")
            continue
        problem = _problem(engine, model, options, needs)
        able = engine.capabilities(model, options)
        if problem is not None:
            refused.append(f"{other}: {problem[0]}")
        elif able.preference >= 0:
            usable.append((able.preference, other, engine, options, able.advice))
    if not usable:
        fix = "Take the engine that you mean by name (--engine), mend its options, or see `harness doctor`."
        raise UserError("--engine auto", f"no engine can do this ({'; '.join(refused)})", fix)
    usable.sort(key=lambda one: (-one[0], one[1]))
    _, first, engine, options, advice = usable[0]
    others = [f"{one[1]}: {one[4]}" for one in usable[1:] if one[4]] + refused
    return engine, options, "; ".join([f"{first}: {advice or 'usable'}", *others])


def _problem(engine: Engine, model: ModelInfo, options: Any, needs: set[str]) -> tuple[str, str] | None:
    """Why this engine cannot do it, and the remedy; None if it can."""
    available = engine.availability()
    if not available.usable:
        return available.reason or "not usable here", available.install or "See `harness doctor`."
    lacking = engine.capabilities(model, options).lacks(sorted(needs))
    if lacking:
        listed = "; ".join(f"{need}: {reason}" for need, reason in lacking.items())
        return f"cannot do what these tasks need ({listed})", "Take another engine, or leave those tasks out."
    return None


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
