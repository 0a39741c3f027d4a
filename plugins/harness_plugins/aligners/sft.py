"""SFT on TRL's trainer."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from harness import Aligner, Recipe, TrainerCall, TrainingJob


class Sft(Aligner["Sft.Config"]):
    """Supervised fine-tuning on demonstrations (of pairs: on the chosen answers)."""

    name = "sft"
    summary = "supervised fine-tuning on the chosen answers, loss on answers alone"
    consumes = "demonstrations"

    class Config(Recipe):
        """Defaults of arXiv 2406.04879, Table 6."""

        learning_rate: float = Field(2e-4, gt=0, description="peak learning rate (no unit)")
        max_grad_norm: float = Field(0.3, gt=0, description="gradient norm above which gradients are scaled down")
        weight_decay: float = Field(0.001, ge=0, description="AdamW's weight decay")
        schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="learning-rate schedule")
        packing: bool = Field(
            False,
            description="fill rows with several short demonstrations, none of which sees another; refused where it is "
            "not exact",
        )

        adapter_defaults: ClassVar[dict[str, Any]] = {
            "rank": 64,
            "alpha": 16,
            "dropout": 0.1,
            "targets": ["q_proj", "v_proj"],
        }
        search_grid: ClassVar[dict[str, tuple[Any, ...]]] = {
            "adapter.rank": (32, 64, 128),
            "adapter.alpha": (16, 32, 64),
        }

    def trainer(self, job: TrainingJob[Config]) -> TrainerCall:
        """TRL's SFT trainer on rows whose labels are already masked."""
        from harness_plugins.aligners.sft_trainer import trainer_call

        return trainer_call(job)
