"""How a model is trained: settings that every aligner shares; a method's Config extends them and sets its defaults."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from harness.core.config import Config

LossOn = Literal["last", "all_answers", "everything"]


class Recipe(Config):
    """Settings of one training run. ``batch_size`` is what one optimiser step sees, whatever fits into memory."""

    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate (no unit)")
    batch_size: int = Field(16, ge=1, description="rows per optimiser step, accumulated (rows)")
    micro_batch_size: int = Field(4, ge=1, description="rows per forward pass; halved when memory runs out (rows)")
    steps: int = Field(700, ge=1, description="optimiser steps")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="learning-rate schedule")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up (optimiser steps)")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    adam_beta1: float = Field(0.9, gt=0, lt=1, description="AdamW's first moment decay")
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="AdamW's second moment decay")
    max_length: int = Field(1024, ge=8, description="prompt and answer (tokens); longer answers are cut")
    loss_on: LossOn = Field("last", description="which turns carry loss (demonstrations)")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about a third slower")
    checkpoint_every: int = Field(100, ge=1, description="resumable checkpoint (optimiser steps)")
    eval_every: int = Field(0, ge=0, description="evaluate held-out rows; 0: only at the end (optimiser steps)")
    eval_rows: int = Field(256, ge=0, description="held-out rows to evaluate on; 0: none (rows)")
    log_every: int = Field(10, ge=1, description="line in log.jsonl (optimiser steps)")

    adapter_defaults: ClassVar[dict[str, Any]] = {}
    """The method's own defaults for the adapter's options (rank, alpha, ...)."""

    search_grid: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """What `--search` varies unless told otherwise: key of the recipe, or ``adapter.KEY``, -> values."""
