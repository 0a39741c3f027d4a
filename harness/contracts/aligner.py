"""The contract of aligners: methods that turn a base model and rows into an adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from pydantic import BaseModel

from harness.contracts.dataset import RowSchema
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


@dataclass
class TrainingJob(Generic[C]):
    """What an aligner's ``trainer`` gets: everything open, everything tokenised.

    ``rows`` carry ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (pairs) or ``prompt_ids``, ``completion_ids``
    (demonstrations), and ``ref_chosen_logps``, ``ref_rejected_logps`` (nats, summed) if the aligner needs a reference.
    """

    stage: Stage
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Any
    config: C
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


class Aligner(Plugin[C]):
    """A method that turns a base model and rows into an adapter."""

    kind = "aligner"
    consumes: ClassVar[RowSchema | type[BaseModel]]
    needs_reference: ClassVar[bool] = False

    class Config(Recipe):
        """Settings of the method: extend the recipe, set its defaults."""

    def stages(self, config: C) -> tuple[Stage, ...]:
        """The passes of training, in order; one by default."""
        return (Stage("train", str(self.consumes)),)

    @abstractmethod
    def trainer(self, job: TrainingJob[C]) -> Trainer:
        """The trainer of one stage; the harness drives it (progress, checkpoints, resume, log, record)."""
