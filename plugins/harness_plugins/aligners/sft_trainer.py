"""TRL's SFT trainer on tokenised, masked rows. Heavy: imported when training starts."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from harness import PackingCollator, TrainerCall, TrainingJob


class MaskedSftTrainer(SFTTrainer):  # type: ignore[misc]  # mypy does not follow trl
    """Rows carry ``input_ids`` and ``labels``; nothing is prepared again."""

    def __init__(self, **arguments: Any) -> None:
        collator = arguments.get("data_collator")
        self._packing = collator if isinstance(collator, PackingCollator) else None
        trainable = {n: p.data for n, p in arguments["model"].named_parameters() if p.requires_grad}
        super().__init__(**arguments)
        # TRL casts the trainable weights over a 4-bit base to bf16, where small updates round away.
        for name, parameter in self.model.named_parameters():
            if name in trainable and parameter.dtype != trainable[name].dtype:
                parameter.data = trainable[name].to(parameter.device)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's: the mean over the tokens of an optimiser step that carry loss."""
        result = super().compute_loss(*args, **kwargs)
        if self._packing is not None:
            # TRL counts tokens by the sum of the mask, which here is one of blocks.
            self._metrics["train" if self.model.training else "eval"].pop("num_tokens", None)
        return result

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Held-out rows are never packed: each has values of its own."""
        if self._packing is None:
            return super().get_eval_dataloader(eval_dataset)
        self.data_collator = DataCollatorForLanguageModeling(pad_token_id=self._packing.pad)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self._packing

    def row_values(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Of each held-out row, (B,): mean negative log-likelihood of tokens that carry loss (nats), their number."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        tokens_B = outputs.label_mask.sum(dim=1)
        return {"loss": -outputs.log_probs.float().sum(dim=1) / tokens_B.clamp(min=1), "tokens": tokens_B}


def labelled(rows: Any) -> Dataset | None:
    """Rows with ``input_ids`` and ``labels`` (-100 where there is no loss)."""
    if rows is None:
        return None

    def one(row: dict[str, Any]) -> dict[str, Any]:
        ids = [*row["prompt_ids"], *row["completion_ids"]]
        mask = row.get("labels_mask") or [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"])
        return {"input_ids": ids, "labels": [t if m else -100 for t, m in zip(ids, mask, strict=True)]}

    return Dataset.from_list([one(row) for row in rows])


def trainer_call(job: TrainingJob) -> TrainerCall:
    """The trainer of one stage, not yet built.

    Raises:
        UserError: packing that would not be exact.
    """
    arguments = job.arguments(
        SFTConfig,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    collator = PackingCollator.of(job.model, job.tokenizer) if getattr(job.config, "packing", False) else None
    return TrainerCall(
        MaskedSftTrainer,
        {
            "model": job.model,
            "args": arguments,
            "train_dataset": labelled(job.rows),
            "eval_dataset": labelled(job.heldout),
            "processing_class": job.tokenizer,
            "data_collator": collator,
        },
    )
