"""Small training jobs with rows made by hand, for tests of numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import TrainingJob

Job = Callable[..., TrainingJob]


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    """The tiny model's."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, Any]]:
    """Six pairs whose prompts and answers are of unequal length; 1 is EOS."""
    import random

    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, 300) for _ in range(count)]

    return [
        {
            "id": f"r{i}",
            "prompt_ids": [0, *ids(3 + 2 * i)],
            "chosen_ids": [*ids(9 - i), 1],
            "rejected_ids": [*ids(2 + i), 1],
        }
        for i in range(6)
    ]


@pytest.fixture
def adapted(tiny: Path) -> Callable[..., Any]:
    """``adapted(zero=False, **options)``: the tiny model in fp32 with a LoRA adapter through the plugin ``lora``."""

    def make(zero: bool = False, folder: Path = tiny, **options: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from harness_plugins.adapters.lora import Lora

        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        settings = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ("q_proj", "v_proj", "up_proj", "down_proj")}
        model = Lora().attach(base, Lora.Config(**{**settings, **options}))
        if not zero:
            # As attached, B is 0 and the policy is the reference: nothing would be tested.
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.05)
        return model

    return make


@pytest.fixture
def job(tokenizer: Any, tmp_path: Path) -> Job:
    """``job(aligner, model, rows, heldout, **config)``: a job as harness.alignment.run hands it over, CPU, seed 0."""

    def make(
        aligner: Any,
        model: Any,
        rows: list[dict[str, Any]],
        heldout: list[dict[str, Any]] | None = None,
        micro: int = 2,
        **config: Any,
    ) -> TrainingJob:
        from datasets import Dataset

        from harness.alignment.driver import settings

        recipe = aligner.Config(**{"batch_size": len(rows), "steps": 1, "log_every": 1, **config})
        fixed = settings(
            recipe, tmp_path / "checkpoints", seed=0, micro=micro, cuda=False, bf16=False, heldout=heldout is not None
        )
        return TrainingJob(
            stage=aligner.stages(recipe)[0],
            model=model,
            tokenizer=tokenizer,
            rows=Dataset.from_list(rows),
            config=recipe,
            seed=0,
            arguments=lambda cls, **overrides: cls(**{**fixed, "save_strategy": "no", **overrides}),
            heldout=Dataset.from_list(heldout) if heldout is not None else None,
        )

    return make
