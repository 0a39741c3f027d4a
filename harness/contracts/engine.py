"""The contract of engines: what opens a model and turns prompts into completions and log-likelihoods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic

from harness.contracts.plugin import C, Plugin
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo, Output, Request


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do for one model; decided without loading anything."""

    generate: bool = False
    loglikelihood: bool = False
    prompt_embeds: bool = False
    """Puts the virtual tokens of ``Request.control`` into a prompt (:func:`harness.soft_prompt` reads them)."""
    loglikelihood_embeds: bool | None = None
    """Whether it does so for log-likelihoods too; None: as for generating."""
    max_adapters: int = 0
    """Adapters that one session holds beside the base; more are taken in groups, one session after another."""
    max_adapter_rank: int = 0
    chat_only: bool = False
    """Takes conversations alone and applies the template itself: a raw prompt cannot be sent."""
    preference: int = 0
    """`auto` takes the usable engine with the greatest; below 0: never by itself."""
    advice: str = ""
    """Why this preference for this model, in a few words."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """For each thing that it cannot do, why not."""

    def lacks(self, needs: Iterable[str]) -> dict[str, str]:
        """The needs that are not met, with reasons.

        They are "generate", "loglikelihood", "prompt_embeds", "loglikelihood_embeds" and "adapters".
        """
        embeds = self.prompt_embeds if self.loglikelihood_embeds is None else self.loglikelihood_embeds
        have = {
            "generate": self.generate,
            "loglikelihood": self.loglikelihood,
            "prompt_embeds": self.prompt_embeds,
            "loglikelihood_embeds": embeds and self.prompt_embeds,
            "adapters": self.max_adapters > 0,
        }
        reasons = {"loglikelihood_embeds": self.reasons.get("prompt_embeds", "not supported"), **self.reasons}
        return {need: reasons.get(need, "not supported") for need in needs if not have[need]}


@dataclass(frozen=True)
class Availability:
    """Whether an engine can run on this machine at all, and how to make it."""

    usable: bool
    reason: str = ""
    install: str | None = None


@dataclass(frozen=True)
class Serving(Generic[C]):
    """What an engine's own server is to serve, and where."""

    model: ModelInfo
    name: str
    """What requests call the base."""
    adapters: Mapping[str, AdapterInfo]
    """What requests call an adapter -> the adapter."""
    options: C
    host: str
    port: int
    template: Path | None = None
    """File with the chat template; None: there is none."""


@dataclass(frozen=True)
class ServerCommand:
    """``python -m module arguments``: a server that answers ``/health`` and ``/v1/models`` once it is ready."""

    module: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Laid over this process's own."""
    key_variable: str | None = None
    """Environment variable in which the server takes the API key that it asks for."""
    gpus: int = 0
    """GPUs it takes; 0: it runs on the processor."""
    gpu_share: float = 0.9
    """Share of each GPU's memory that it takes at once."""
    beside_gib: float = 0.0
    """Memory of the processor that it takes beside the weights (GiB)."""
    notes: tuple[str, ...] = ()
    """What a user of this server should know."""


class Session(ABC):
    """An open model. Closed exactly once, also after an error."""

    facts: Mapping[str, Any] = {}
    """device, dtype, library versions: goes into provenance."""
    progress: Callable[[int], None] | None = None
    """Set by whoever drives the session: told how many more requests are answered while a batch runs."""

    @abstractmethod
    def batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Plan: indices into ``requests``, each exactly once, grouped as they will run.

        The plan is a function of the whole list alone, so that an interrupted run meets the same batches again.
        """

    @abstractmethod
    def run(self, requests: Sequence[Request]) -> list[Output]:
        """Answer one batch, in order. A request that fails alone returns ``Output(error=...)``."""

    def tell(self, more: int) -> None:
        """For engines that know how a long batch gets on: so many more of its requests are answered, or as good as."""
        if self.progress is not None:
            self.progress(more)

    def close(self) -> None:  # noqa: B027 - optional
        """Release memory and processes."""


class Engine(Plugin[C]):
    """Turns prompts into completions and log-likelihoods."""

    kind = "engine"
    remote: ClassVar[bool] = False
    """Whether the model is somewhere else: then there are no weights to digest and perhaps no tokenizer."""

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this engine can run here. No heavy imports."""

    @abstractmethod
    def capabilities(self, model: ModelInfo, options: C) -> Capabilities:
        """What it can do for this model. No heavy imports."""

    def settle(self, model: ModelInfo, options: C) -> tuple[ModelInfo, Any]:
        """Model and options with everything filled in that identifies them; asked while planning.

        For a remote engine, which must ask what its server runs and learn tokenizer and template elsewhere.
        """
        return model, options

    def device(self, options: C) -> str | None:
        """The kind of device that it computes on (cpu, cuda, mps), found out without loading; None: it does not say.

        It decides what dtype ``auto`` means: ``model.spec["dtype"]`` is a type's name when :meth:`open` is called, and
        ``auto`` only where no kind is known.
        """
        return None

    def devices(self, options: C) -> int:
        """How many accelerators it takes: whoever decides where a model is opened gives it as many."""
        return 0 if self.device(options) in (None, "cpu") else 1

    def adapter_problem(self, model: ModelInfo, adapter: AdapterInfo, options: C) -> str | None:
        """Why this adapter cannot be served beside the base, found out without loading; None: it can be.

        Such an adapter is folded into a temporary checkpoint, which is opened on its own.
        """
        able = self.capabilities(model, options)
        if able.max_adapters < 1:
            return able.reasons.get("adapters", "this engine serves no adapters")
        if adapter.rank > able.max_adapter_rank:
            return f"rank {adapter.rank}, and this engine serves ranks up to {able.max_adapter_rank}"
        return None

    @abstractmethod
    def identity(self, options: C) -> dict[str, Any]:
        """Name, version and those options that may move a number: enters the id of every answers step."""

    @abstractmethod
    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: C) -> Session:
        """Load the model. ``Request.adapter`` is the ``name`` of one of ``adapters``, or None for the base.

        ``Request.control`` is one of that adapter's conditioning; of the model's own, where there is no adapter.
        """

    def server_problems(self, model: ModelInfo, options: C) -> list[UserError]:
        """Why this engine's own OpenAI-compatible server cannot serve the base; found out without loading."""
        return [UserError(f"--engine {self.name}", "brings no server of its own", "Use --engine vllm.")]

    def server(self, serving: Serving[C]) -> ServerCommand:
        """How that server is started; asked only where :meth:`server_problems` finds none."""
        raise NotImplementedError(f"engine {self.name} brings no server")
