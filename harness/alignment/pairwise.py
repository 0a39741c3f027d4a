"""A preference method in one function: write the loss on summed log-probabilities, get an aligner.

class SimPO(PairwiseLoss):
    name = "simpo"
    needs_reference = False

    def loss(self, policy, reference, config):
        margin = policy.chosen / policy.chosen_tokens - policy.rejected / policy.rejected_tokens
        return -logsigmoid(config.beta * margin - config.gamma)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from typing_extensions import TypeVar

from harness.contracts.aligner import Aligner, PairLogps, TrainerCall, TrainingJob
from harness.contracts.dataset import RowSchema
from harness.contracts.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


class PairwiseRecipe(Recipe):
    """Settings of pairwise methods; the defaults are DPO's of arXiv 2406.04879, Table 6."""

    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference (no unit); ours")
    prefix_sharing: bool = Field(
        False,
        description="compute each prompt once for both answers: for long prompts; refused where it is not exact",
    )

    adapter_defaults: ClassVar[dict[str, Any]] = {
        "rank": 16,
        "alpha": 32,
        "dropout": 0.05,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }
    search_grid: ClassVar[dict[str, tuple[Any, ...]]] = {"adapter.rank": (8, 16, 32), "adapter.alpha": (16, 32, 64)}
    """arXiv 2406.04879, appendix B."""


P = TypeVar("P", bound=PairwiseRecipe, default=Any)
"""A pairwise method's own Config."""


class PairwiseLoss(Aligner[P]):
    """The short form of an aligner: a loss on pairs of answers."""

    consumes: ClassVar[RowSchema] = "pairs"
    needs_reference: ClassVar[bool] = True

    class Config(PairwiseRecipe):
        """Settings of the method."""

    @abstractmethod
    def loss(self, policy: PairLogps, reference: PairLogps | None, config: P) -> Tensor:
        """The loss of each pair.

        Args:
            policy: log-probabilities under the model in training (with gradient).
            reference: the same under the starting policy; None if ``needs_reference`` is False.
            config: this aligner's ``Config``.

        Returns:
            (B,) loss per pair; the harness takes the mean.
        """

    def rewards(self, policy: PairLogps, reference: PairLogps | None, config: P) -> tuple[Tensor, Tensor]:
        """Implicit rewards of the chosen and the rejected answers, each (B,), for accuracy and margin.

        beta * log(policy / reference) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5), or beta times the mean
        log-probability where there is no reference.
        """
        if reference is None:
            return config.beta * policy.chosen / policy.chosen_tokens, (
                config.beta * policy.rejected / policy.rejected_tokens
            )
        return config.beta * (policy.chosen - reference.chosen), config.beta * (policy.rejected - reference.rejected)

    def trainer(self, job: TrainingJob[P]) -> TrainerCall:
        """A DPO trainer of TRL's with this loss in it."""
        from harness.alignment.pairwise_trainer import trainer_call

        return trainer_call(self, job)
