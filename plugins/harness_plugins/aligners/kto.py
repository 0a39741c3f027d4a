"""KTO: answers that are desirable or not, each by itself, against a reference point that is shared by a batch."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from harness import Aligner, PairwiseRecipe, Recipe, TrainerCall, TrainingJob


class Kto(Aligner["Kto.Config"]):
    """Kahneman-Tversky optimisation."""

    name = "kto"
    summary = "Kahneman-Tversky optimisation: rated answers, no pairs needed (arXiv 2402.01306)"
    consumes = "rated"
    needs_reference = True

    class Config(Recipe):
        """Of the paper beta and the weights; the reference point is estimated from all rows of an optimiser step."""

        batch_size: int = Field(16, ge=2, description="rows per optimiser step, accumulated; 2 or more (rows)")
        beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference (no unit)")
        desirable_weight: float = Field(1.0, gt=0, description="weight of the loss of desirable answers (lambda_D)")
        undesirable_weight: float = Field(1.0, gt=0, description="weight of the loss of undesirable ones (lambda_U)")
        preference: str = Field("preference", min_length=1, description="which of a row's ratings decides")
        values: tuple[str, str] = Field(("good", "bad"), description="labels of desirable and of undesirable answers")
        threshold: float = Field(0.5, description="least rating of a desirable answer, of numbers (unit of ratings)")

        adapter_defaults: ClassVar[dict[str, Any]] = PairwiseRecipe.adapter_defaults

        @model_validator(mode="after")
        def _answers_alone(self) -> Kto.Config:
            if self.loss_on != "last":
                raise ValueError("loss_on: an answer is rated, and so it alone carries loss: last")
            if self.values[0] == self.values[1]:
                raise ValueError(f"values are two different labels, and both are {self.values[0]!r}")
            return self

    def trainer(self, job: TrainingJob[Config]) -> TrainerCall:
        """A trainer that sees an optimiser step as a whole before its micro batches."""
        from harness_plugins.aligners.kto_trainer import trainer_call

        return trainer_call(job, self.name)
