"""The contract of aligners: methods that turn a base model and rows into an adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from harness.contracts.dataset import RowSchema, TrainingRow, schema_name
from harness.contracts.plugin import C, Plugin
from harness.contracts.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


@dataclass(frozen=True)
class Stage:
    """One pass of training within an aligner."""

    name: str
    consumes: str
    """Name of the rows' schema; of a row class its own name."""


@dataclass
class TrainingJob(Generic[C]):
    """What an aligner's ``trainer`` gets: everything open, everything tokenised.

    ``rows`` carry ``id``, ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (pairs) or ``id``, ``prompt_ids``,
    ``completion_ids``, ``labels_mask`` (demonstrations); ``ratings`` beside that where they are rated; the ``columns``
    of a :class:`harness.TrainingRow` of the aligner's own; and ``ref_chosen_logps``, ``ref_rejected_logps`` (nats,
    summed) if the aligner needs a reference.
    """

    stage: Stage
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Any
    """A ``datasets.Dataset`` in the order in which steps see them."""
    config: C
    seed: int
    arguments: Callable[..., Any]
    """``arguments(SFTConfig, **overrides)`` builds the trainer's own configuration class."""
    heldout: Any = None
    """Held-out rows of the same form, or None."""


@dataclass(frozen=True)
class TrainerCall:
    """A trainer that is not yet built: its class, and what that is called with.

    The harness builds it, since it trains with a subclass of its own: checkpoints, resume and held-out rows go there.
    """

    cls: type[Trainer]
    """A subclass of ``transformers.Trainer``."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments: ``model``, ``args``, ``train_dataset``, ``eval_dataset`` and whatever else the class takes."""


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
    """Whether rows, which must be pairs then, carry their log-probabilities under the starting policy."""

    class Config(Recipe):
        """Settings of the method: extend the recipe, set its defaults."""

    def stages(self, config: C) -> tuple[Stage, ...]:
        """The passes of training, in order; one by default."""
        return (Stage("train", schema_name(self.consumes)),)

    @abstractmethod
    def trainer(self, job: TrainingJob[C]) -> TrainerCall:
        """The trainer of one stage, not yet built; the harness drives it (progress, checkpoints, resume, log, record).

        Its rows are ``job.rows`` and ``job.heldout``, in that order and none left out, and its arguments are made by
        ``job.arguments``. A method ``row_values(model, inputs)`` of the trainer says what each held-out row is worth
        (named tensors of shape (B,), ``loss`` among them); without one that is its loss.
        """
