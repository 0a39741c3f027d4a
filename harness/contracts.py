"""The plugin classes. This module is what third parties build on; it imports no heavy package.

A plugin is an object of one of these classes, registered by a hook of :mod:`harness.hookspecs` and chosen by name. Each
states a nested ``Config`` (frozen, extra fields forbidden, a description with unit per field) and the contract version
it was written for. Heavy imports (torch, transformers, vllm, datasets) go inside methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from harness import config
from harness.errors import UserError
from harness.recipes import Recipe
from harness.records import AdapterInfo, Answer, Metric, ModelInfo, Output, Request, Sample, Score

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

CONTRACT_VERSION = 1


class Plugin(ABC):
    """What all kinds share."""

    kind: ClassVar[str]
    name: ClassVar[str]
    summary: ClassVar[str] = ""
    contract: ClassVar[int] = CONTRACT_VERSION

    class Config(config.Config):
        """No options."""


# ---------------------------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do for one model; decided without loading anything."""

    generate: bool = False
    loglikelihood: bool = False
    prompt_embeds: bool = False
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
        """The needs ("generate", "loglikelihood", "prompt_embeds", "adapters") that are not met, with reasons."""
        have = {
            "generate": self.generate,
            "loglikelihood": self.loglikelihood,
            "prompt_embeds": self.prompt_embeds,
            "adapters": self.max_adapters > 0,
        }
        return {need: self.reasons.get(need, "not supported") for need in needs if not have[need]}


@dataclass(frozen=True)
class Availability:
    """Whether an engine can run on this machine at all, and how to make it."""

    usable: bool
    reason: str = ""
    install: str | None = None


@dataclass(frozen=True)
class Serving:
    """What an engine's own server is to serve, and where."""

    model: ModelInfo
    name: str
    """What requests call the base."""
    adapters: Mapping[str, AdapterInfo]
    """What requests call an adapter -> the adapter."""
    options: Any
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


class Engine(Plugin):
    """Turns prompts into completions and log-likelihoods."""

    kind = "engine"
    remote: ClassVar[bool] = False
    """Whether the model is somewhere else: then there are no weights to digest and perhaps no tokenizer."""

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this engine can run here. No heavy imports."""

    @abstractmethod
    def capabilities(self, model: ModelInfo, options: Any) -> Capabilities:
        """What it can do for this model. No heavy imports."""

    def settle(self, model: ModelInfo, options: Any) -> tuple[ModelInfo, Any]:
        """Model and options with everything filled in that identifies them; asked while planning.

        For a remote engine, which must ask what its server runs and learn tokenizer and template elsewhere.
        """
        return model, options

    def device(self, options: Any) -> str | None:
        """The kind of device that it computes on (cpu, cuda, mps), found out without loading; None: it does not say.

        It decides what dtype ``auto`` means: ``model.spec["dtype"]`` is a type's name when :meth:`open` is called, and
        ``auto`` only where no kind is known.
        """
        return None

    def adapter_problem(self, model: ModelInfo, adapter: AdapterInfo, options: Any) -> str | None:
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
    def identity(self, options: Any) -> dict[str, Any]:
        """Name, version and those options that may move a number: enters the id of every answers step."""

    @abstractmethod
    def open(self, model: ModelInfo, adapters: Sequence[AdapterInfo], options: Any) -> Session:
        """Load the model. ``Request.adapter`` is the ``name`` of one of ``adapters``, or None for the base."""

    def server_problems(self, model: ModelInfo, options: Any) -> list[UserError]:
        """Why this engine's own OpenAI-compatible server cannot serve the base; found out without loading."""
        return [UserError(f"--engine {self.name}", "brings no server of its own", "Use --engine vllm.")]

    def server(self, serving: Serving) -> ServerCommand:
        """How that server is started; asked only where :meth:`server_problems` finds none."""
        raise NotImplementedError(f"engine {self.name} brings no server")


# ---------------------------------------------------------------------------------------------------------- scorers


@dataclass(frozen=True)
class ScorerContext:
    """What a scorer may use besides samples and answers."""

    task: str
    seed: int
    folder: Path | None = None
    """A folder of the run that survives interruption: for a judge's verdicts, say."""
    shared: Path | None = None
    """The same for all steps of the run: what a judge said there needs no second call, nor a second payment."""
    progress: Callable[[int], None] = lambda more: None
    """Told how many more samples have been scored."""
    stored: Callable[[int], None] = lambda more: None
    """Told how many more samples an earlier run has scored: they cost no time now."""
    open_engine: Callable[..., Any] | None = None
    """Opens a model for the scorer (a judge, say): :func:`harness.engines.open_engine`; the scorer closes it."""
    runtime: Any = None
    """The open task; used by the scorer that hands lm-eval's own metrics through."""


Need = Literal["classifier", "engine", "endpoint"]


class Scorer(Plugin):
    """Turns answers into numbers; sees only samples and answers, never the model under test."""

    kind = "scorer"
    needs: ClassVar[Need | None] = None

    @abstractmethod
    def metrics(self, options: Any) -> tuple[Metric, ...]:
        """Direction, unit, range and chance level of every number that :meth:`score` returns."""

    def metrics_of(self, options: Any, context: ScorerContext) -> tuple[Metric, ...]:
        """As :meth:`metrics`, asked after :meth:`score`, for a scorer that learns its metrics from the open task."""
        return self.metrics(options)

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], context: ScorerContext) -> list[Score]:
        """One score per sample, in order. What cannot be scored is ``Score.absent``, never a number.

        Options are ``self.options``; a scorer's model is opened here once for all samples.
        """

    def identity(self, options: Any) -> dict[str, Any]:
        """What of the scorer enters a scores step's id; a scorer with a model adds the digest of its weights."""
        return {"name": self.name, "options": options.model_dump(mode="json")}

    def label(self, options: Any) -> str | None:
        """What a task's name carries in rows because of this scorer, the judge say: ``alpaca_eval2@LABEL``."""
        return None

    def aggregate(self, metric: Metric, scores: Sequence[Score]) -> float | None:
        """One number over samples, for a metric that declares ``aggregate="corpus"`` (perplexity, F1, BLEU)."""
        raise NotImplementedError(f"{self.name} declares {metric.name} as a corpus metric and does not aggregate it")

    def notes(self) -> tuple[str, ...]:
        """What should stand beside the numbers, asked after :meth:`score`: which judge, what it cost."""
        return ()

    def withheld(self, metric: Metric, scores: Sequence[Score]) -> str | None:
        """Why this metric's mean must not be shown although there are scores; None: it may."""
        return None

    def close(self) -> None:
        """Release what :meth:`score` opened; called once after the last call of it."""

    def check(self, options: Any) -> None:
        """Raise a UserError before anything runs if the scorer cannot work (a missing model, a missing key)."""

    @property
    def options(self) -> Any:
        """The options in force (set by the harness through :meth:`bound`)."""
        return self.__dict__.get("_options") or self.Config()

    def bound(self, options: Any) -> Scorer:
        """A copy of this scorer with its options."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, _options=options)
        return copy


# --------------------------------------------------------------------------------------------------------- datasets

RowSchema = Literal["prompts", "demonstrations", "pairs", "rated"]
"""What rows hold; :mod:`harness.row_schema` has an example of each."""


@dataclass(frozen=True)
class DatasetRow:
    """One row with a stable id; ``data`` follows the dataset's declared schema."""

    id: str
    data: Mapping[str, Any]


class Dataset(Plugin):
    """Rows with stable ids from a pinned revision; counts what it drops and why."""

    kind = "dataset"
    schema: ClassVar[RowSchema | type[BaseModel]]
    subsets: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""
    licence: ClassVar[str] = "unknown"
    revision: ClassVar[str | None] = None

    @abstractmethod
    def rows(self, job: DatasetJob) -> Iterator[DatasetRow]:
        """Yield rows in a fixed order. Call ``job.drop(reason)`` for every row left out."""

    def schema_of(self, job: DatasetJob) -> RowSchema | type[BaseModel]:
        """The schema of these rows, for a data set whose files decide it; ``schema`` otherwise."""
        return self.schema

    def heldout_split(self, job: DatasetJob) -> str | None:
        """Name of the official held-out split; None: there is none, and a hash of each prompt decides."""
        return None

    def identity(self, job: DatasetJob) -> dict[str, Any]:
        """What pins the rows: enters the id of every step that reads them."""
        return {
            "name": self.name,
            "subset": job.subset,
            "split": job.split,
            "revision": job.revision or self.revision,
            "options": job.options.model_dump(mode="json"),
        }


@dataclass
class DatasetJob:
    """One request for rows, and the count of what was dropped."""

    subset: str | None
    split: str | None
    revision: str | None
    options: Any
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something about the rows that a reader of the numbers should know; goes into the record."""
        self.notes.append(text)

    def drop(self, reason: str) -> None:
        """Count one row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


# --------------------------------------------------------------------------------------------------------- aligners


@dataclass(frozen=True)
class Stage:
    """One pass of training within an aligner."""

    name: str
    consumes: str


@dataclass
class TrainingJob:
    """What an aligner's ``trainer`` gets: everything open, everything tokenised.

    ``rows`` carry ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (pairs) or ``prompt_ids``, ``completion_ids``
    (demonstrations), and ``ref_chosen_logps``, ``ref_rejected_logps`` (nats, summed) if the aligner needs a reference.
    """

    stage: Stage
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Any
    config: Any
    seed: int
    arguments: Callable[..., Any]
    """``arguments(SFTConfig, **overrides)`` builds the trainer's own configuration class."""
    heldout: Any = None
    """Held-out rows of the same form, or None."""


@dataclass(frozen=True)
class PairLogps:
    """One model's view of a batch of B pairs, over answer tokens only (EOS included)."""

    chosen: Tensor
    """(B,) log p(chosen answer | prompt), summed over tokens, in nats"""
    rejected: Tensor
    """(B,) the same for the rejected answer"""
    chosen_tokens: Tensor
    """(B,) number of tokens summed over"""
    rejected_tokens: Tensor
    """(B,)"""


class Aligner(Plugin):
    """A method that turns a base model and rows into an adapter."""

    kind = "aligner"
    consumes: ClassVar[RowSchema | type[BaseModel]]
    needs_reference: ClassVar[bool] = False

    class Config(Recipe):
        """Settings of the method: extend the recipe, set its defaults."""

    def stages(self, config: Any) -> tuple[Stage, ...]:
        """The passes of training, in order; one by default."""
        return (Stage("train", str(self.consumes)),)

    @abstractmethod
    def trainer(self, job: TrainingJob) -> Trainer:
        """The trainer of one stage; the harness drives it (progress, checkpoints, resume, log, record)."""


class Adapter(Plugin):
    """How trainable weights are attached to a base."""

    kind = "adapter"

    def quantization(self, config: Any) -> Any | None:
        """How the base is opened: None, or a transformers quantisation config."""
        return None

    @abstractmethod
    def attach(self, model: PreTrainedModel, config: Any) -> Any:
        """Return the model with trainable weights attached (peft's classes and file format)."""


# ---------------------------------------------------------------------------------------------------------- mergers


@dataclass(frozen=True)
class Merged:
    """One merged tensor and what is worth knowing about how it came about."""

    tensor: torch.Tensor
    stats: Mapping[str, float] = field(default_factory=dict)
    """Finite numbers, per tensor: kept density, slerp angle (radians), ... They go into the record as they are."""


@dataclass(frozen=True)
class Factors:
    """One low-rank delta, ``scale * B @ A``: what a LoRA layer adds to a weight."""

    A: torch.Tensor
    """(rank, in)"""
    B: torch.Tensor
    """(out, rank)"""
    scale: float


class Merger(Plugin):
    """Merges models tensor by tensor; pure, with randomness from ``generator`` alone."""

    kind = "merger"
    operates_on: ClassVar[Literal["weights", "deltas"]] = "weights"
    """What ``tensors`` are and what is returned: whole weights, or differences from the base.

    Deltas are formed exactly, also those of an adapter; the harness adds the merged delta to the base itself."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """Least and greatest number of models; None: any number."""
    per_model: ClassVar[tuple[str, ...]] = ()
    """Fields of Config of the type ``float | tuple[float, ...]``: one value, or one for each model in their order."""

    def settle(self, weights: Sequence[float] | None, count: int, config: Any) -> tuple[tuple[float, ...], Any]:
        """Weights and options with everything filled in, for ``count`` models; asked before anything is read.

        Args:
            weights: as the user gave them; None: not at all.

        Raises:
            UserError: they make no sense together; ``where`` is ``weights`` or the option.
        """
        given = tuple(weights) if weights is not None else (1 / count,) * count
        if any(weight < 0 for weight in given):
            shown = ", ".join(f"{weight:g}" for weight in given)
            raise UserError("weights", f"{self.name} takes no weight below 0, found {shown}", "Give weights from 0 on.")
        return given, config

    def prepare(self, models: Sequence[Mapping[str, Callable[[], torch.Tensor]]], config: Any) -> Merger:
        """Optional look at whole models (name -> a function that reads the tensor) before the first tensor.

        Returns the merger to use: this one, or a copy that knows more.
        """
        return self

    @abstractmethod
    def merge(
        self,
        tensors: Sequence[torch.Tensor],
        *,
        base: torch.Tensor | None,
        weights: Sequence[float],
        config: Any,
        generator: Callable[[int], torch.Generator],
    ) -> Merged:
        """Merge one tensor of each model.

        Args:
            tensors: one per model, float32, of one shape; weights or deltas, as ``operates_on`` says. Never changed.
            base: the base's tensor, where there is a base.
            weights: one per model.
            config: options in force for this very tensor.
            generator: ``generator(i)`` is a CPU generator for model ``i``, seeded by (seed, tensor name, i).
        """

    def keeps_equal(self, weights: Sequence[float], config: Any) -> bool:
        """Whether equal weights (zero deltas) come back as they are.

        Then tensors that no input changes are copied from the base byte for byte, without being merged.
        """
        return False

    def merge_factors(self, factors: Sequence[Factors], *, weights: Sequence[float], config: Any) -> Factors | None:
        """The same merge on low-rank deltas, exact, where the method is linear; None where it is not."""
        return None


# -------------------------------------------------------------------------------------------------------- executors


class Executor(Plugin):
    """Carries out ready groups of steps."""

    kind = "executor"

    @abstractmethod
    def carry_out(self, groups: Iterable[Any], work: Callable[[Any], None], options: Any) -> None:
        """Call ``work`` once for every group; groups share nothing but the run directory."""


@dataclass(frozen=True)
class TaskFolder:
    """A folder of task and suite YAML, and who brings it."""

    path: Path
    owner: str = ""


Observer = Callable[..., None]
KINDS: dict[str, type[Plugin]] = {
    cls.kind: cls for cls in (Aligner, Adapter, Merger, Scorer, Dataset, Engine, Executor)
}
