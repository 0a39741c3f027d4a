"""A method of two stages that train the same adapter, on rows of two schemas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness import Aligner, PairLogps, PairwiseLoss, PairwiseRecipe, Stage, TrainerCall, TrainingJob, hookimpl
from harness_plugins.aligners.preference import Dpo
from harness_plugins.aligners.sft import Sft


class SftThenDpo(PairwiseLoss[PairwiseRecipe]):
    name = "sft-then-dpo"
    summary = "the chosen answers first, then the preference"

    def stages(self, config: PairwiseRecipe) -> tuple[Stage, ...]:
        return (Stage("sft", "demonstrations", 3, {"learning_rate": 0.01}), Stage("dpo", "pairs"))

    def trainer(self, job: TrainingJob[PairwiseRecipe]) -> TrainerCall:
        return Sft().trainer(job) if job.stage.name == "sft" else super().trainer(job)

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: PairwiseRecipe) -> Any:
        return Dpo().loss(policy, reference, config)


@hookimpl
def register_aligners() -> Iterator[Aligner]:
    yield SftThenDpo()
