"""The contract of aligners: methods that turn a base model and rows into an adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol

from harness.contracts.dataset import RowSchema, TrainingRow, schema_name
from harness.contracts.plugin import C, Plugin
from harness.contracts.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class Stage:
    """One pass of training within an aligner.

    Stages of one method are a chain: each begins with the weights that those before it trained, is resumed where it was
    interrupted, and has a record and a log of its own.
    """

    name: str
    """Letters, digits and . _ @ + -; different from those of the method's other stages."""
    consumes: str | type[TrainingRow]
    """Schema of its rows: a name, or a class of rows (whose name will do where the aligner consumes that class)."""
    steps: int | None = None
    """Optimiser steps; None: as many as the recipe says."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are others in this stage: key of the method's Config -> value."""


@dataclass
class TrainingJob(Generic[C]):
    """What an aligner's ``trainer`` gets, once per stage: everything open, everything tokenised.

    ``rows`` carry ``id``, ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (pairs) or ``id``, ``prompt_ids``,
    ``completion_ids``, ``labels_mask`` (demonstrations); ``ratings`` beside that where they are rated; the ``columns``
    of a :class:`harness.TrainingRow` of the aligner's own; and ``ref_chosen_logps``, ``ref_rejected_logps`` for pairs,
    ``ref_completion_logps`` for all others (nats, summed over the tokens that carry loss), if the aligner needs a
    reference, which is the policy that the stage begins with.
    """

    stage: Stage
    model: PreTrainedModel
    """With its adapter, the modules of the method's own, and the weights that earlier stages trained."""
    tokenizer: PreTrainedTokenizerBase
    rows: Any
    """A ``datasets.Dataset`` in the order in which steps see them."""
    config: C
    """With the stage's own settings laid over."""
    seed: int
    arguments: Callable[..., Any]
    """``arguments(SFTConfig, **overrides)`` builds the trainer's own configuration class."""
    heldout: Any = None
    """Held-out rows of the same form, or None."""
    reference: Callable[[Sequence[Mapping[str, Any]]], list[float]] | None = None
    """log p (nats, summed over the tokens that carry loss) of further rows, ``prompt_ids``, ``completion_ids`` and
    ``labels_mask``, under the policy that the stage begins with, for an aligner that needs a reference; None elsewhere.
    To be asked in ``trainer``, before anything is trained; what is known already is not computed again."""


@dataclass(frozen=True)
class TrainerCall:
    """A trainer that is not yet built: its class, and what that is called with.

    The harness builds it, since it trains with a subclass of its own: checkpoints, resume and held-out rows go there.
    """

    cls: type[Trainer]
    """A subclass of ``transformers.Trainer``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments: ``model``, ``args``, ``train_dataset``, ``eval_dataset`` and whatever else the class takes."""


class ArtifactFiles(Protocol):
    """Writes into the folder of an adapter, atomically, and nowhere else; names are relative, with ``/``.

    What is written enters ``checksums.json``. Files named ``conditioning*`` change what evaluation sends, and so enter
    the digest by which other steps know the adapter.
    """

    def write(self, name: str, data: bytes) -> None:
        """Write a file as it is."""

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an object as JSON, with a schema version and a checksum."""

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors."""


@dataclass(frozen=True)
class PairLogps:
    """One model's view of a batch of B pairs, over answer tokens only (EOS included)."""

    chosen: Tensor
    """(B,) log p(chosen answer | prompt), summed over tokens, in nats"""
    rejected: Tensor
    """(B,) log p(rejected answer | prompt), summed over tokens, in nats"""
    chosen_tokens: Tensor
    """(B,) number of tokens of the chosen answer that are summed over"""
    rejected_tokens: Tensor
    """(B,) number of tokens of the rejected answer that are summed over"""


class Aligner(Plugin[C]):
    """A method that turns a base model and rows into an adapter."""

    kind = "aligner"
    consumes: ClassVar[RowSchema | type[TrainingRow]]
    needs_reference: ClassVar[bool] = False
    """Whether rows carry their log-probabilities under the starting policy, and ``TrainingJob.reference`` is there."""

    class Config(Recipe):
        """Settings of the method: extend the recipe, set its defaults."""

    def stages(self, config: C) -> tuple[Stage, ...]:
        """The passes of training, in order; one by default."""
        return (Stage("train", schema_name(self.consumes)),)

    def attach(self, model: Any, tokenizer: PreTrainedTokenizerBase, config: C) -> None:
        """Add modules of the method's own to a model that carries its adapter; none by default.

        Called before every stage, and then the weights that earlier stages trained are put back by name: what one has
        trained must be there again. ``trainer`` says by ``requires_grad`` which weights a stage trains; those of the
        adapter are trained unless it freezes them. The modules are no part of what is saved: see ``export``.
        """

    def controls(self, config: C) -> Mapping[str, Sequence[str]] | None:
        """Preference -> the values that ``export`` will leave a conditioning of, the default first; known untrained.

        A study plans an arm for each value by it. One preference may have any name: its values go by their own.
        Empty: the method trains no values. None, the default: only what is exported says, where there is an ``export``.
        """
        return {} if type(self).export is Aligner.export else None

    @abstractmethod
    def trainer(self, job: TrainingJob[C]) -> TrainerCall:
        """The trainer of one stage, not yet built; the harness drives it (progress, checkpoints, resume, log, record).

        Its rows are ``job.rows`` and ``job.heldout``, in that order and none left out, and its arguments are made by
        ``job.arguments``. A method ``row_values(model, inputs)`` of the trainer says what each held-out row is worth
        (named tensors of shape (B,), ``loss`` among them); without one that is its loss.
        """

    def export(self, job: TrainingJob[C], model: Any, files: ArtifactFiles) -> None:
        """Write what the method leaves beside the adapter; nothing by default.

        Args:
            job: of the last stage.
            model: the trainer's, with the weights that are exported: the final ones, or those of a kept checkpoint.
            files: of the folder that the adapter lies in; called once for each such folder.
        """
