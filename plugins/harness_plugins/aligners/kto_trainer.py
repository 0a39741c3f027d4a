"""Trains on rated answers against a reference point that is estimated once per optimiser step. Heavy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments
from trl.trainer import add_fused_lm_head

from harness import TrainerCall, TrainingJob, UserError
from harness_plugins.aligners.conditioned.values import check_spread, values_of
from harness_plugins.aligners.kto_loss import Weights, kto_losses, mismatched

IGNORED = -100
OWN, OTHER = "", "other_"
"""Before the columns of rows as they are rated, and of prompts with answers of other rows."""


class KtoCollator:
    """Rows as a batch: each answer, and the answer of another row, behind its prompt."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``ids``, ``shown`` and ``labels``, (B, S), of both kinds, reference log-probabilities and ratings, (B,)."""
        made = {"desirable": torch.tensor([bool(row["desirable"]) for row in rows])}
        for kind in (OWN, OTHER):
            whole = [[*row["prompt_ids"], *row[f"{kind}completion_ids"]] for row in rows]
            starts = [len(row["prompt_ids"]) for row in rows]
            labels = [[IGNORED] * start + ids[start:] for ids, start in zip(whole, starts, strict=True)]
            made[f"{kind}ids"] = _padded(whole, self.pad)
            made[f"{kind}shown"] = _padded([[1] * len(ids) for ids in whole], 0)
            made[f"{kind}labels"] = _padded(labels, IGNORED)
            made[f"{kind}reference"] = torch.tensor([row[f"{kind}reference"] for row in rows])
        return made


def _padded(sequences: list[list[int]], value: int) -> Tensor:
    tensors = [torch.tensor(one) for one in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


class KtoTrainer(Trainer):
    """The mean of :func:`kto_losses` over the rows of an optimiser step, whatever the micro batches."""

    def __init__(self, *, config: Weights, **arguments: Any) -> None:
        super().__init__(**arguments)
        # The loss of a micro batch is a mean over its rows: the trainer divides it by their number.
        self.model_accepts_loss_kwargs = False
        self._config = config
        self._of_rows: defaultdict[str, list[float]] = defaultdict(list)
        self._held_point = torch.zeros(())
        model: Any = self.model
        add_fused_lm_head(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro batches of a step, each with the reference point of the whole step."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if batches:
            model: Any = self.model
            training = model.training
            # Without dropout: it is an estimate of the policy itself, and draws no random numbers.
            model.eval()
            try:
                point = self._point(batches)
            finally:
                model.train(training)
            self._of_rows["kl"].append(float(point))
            batches = [{**batch, "point": point} for batch in batches]
        return batches, count

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Held-out rows, whose reference point is that of all of them."""
        self._held_point = self._point(super().get_eval_dataloader(eval_dataset))
        return super().get_eval_dataloader(eval_dataset)

    def _point(self, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """The mean of log policy / reference over answers to other prompts, 0 or more: a biased estimate of the KL."""
        ratios = []
        for batch in batches:
            inputs = self._prepare_inputs(dict(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                ratios.append(self.accelerator.gather_for_metrics(self._ratios(self.model, inputs, OTHER)))
        return torch.cat(ratios).mean().clamp(min=0)

    def _ratios(self, model: Any, inputs: Mapping[str, Tensor], kind: str) -> Tensor:
        """(B,) log policy / reference of answers, in nats."""
        outputs = model(
            input_ids=inputs[f"{kind}ids"],
            attention_mask=inputs[f"{kind}shown"],
            labels=inputs[f"{kind}labels"],
            use_cache=False,
            fused_lm_head=True,
        )
        logps_B: Tensor = outputs.log_probs.float().sum(dim=1)
        return logps_B - inputs[f"{kind}reference"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a micro batch; rewards go to the log."""
        ratios_B = self._ratios(model, inputs, OWN)
        desirable_B = inputs["desirable"]
        with torch.no_grad():
            both = (self._config.beta * ratios_B.detach(), desirable_B)
            rewards_B, good_B = (self.accelerator.gather_for_metrics(one) for one in both)
            self._of_rows["rewards/chosen"] += rewards_B[good_B].tolist()
            self._of_rows["rewards/rejected"] += rewards_B[~good_B].tolist()
        loss = kto_losses(ratios_B, desirable_B, inputs["point"], self._config).mean()
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the means of the reference point and of rewards since the last time."""
        model: Any = self.model
        if model.training:
            logs.update({name: sum(some) / len(some) for name, some in self._of_rows.items() if some})
            self._of_rows.clear()
        super().log(logs, *args, **kwargs)

    def row_values(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Of each held-out row, (B,): its loss, and its reward with the sign that training gives it."""
        ratios_B = self._ratios(model, inputs, OWN)
        desirable_B = inputs["desirable"]
        return {
            "loss": kto_losses(ratios_B, desirable_B, self._held_point.to(ratios_B), self._config),
            "rewards/signed": self._config.beta * torch.where(desirable_B, ratios_B, -ratios_B),
        }


def trainer_call(job: TrainingJob[Any], method: str) -> TrainerCall:
    """The trainer of the stage, not yet built.

    Raises:
        UserError: rows without ratings, or all desirable, or none; one row alone, which has no other's answer.
    """
    config = job.config
    preferences = {config.preference: config.values}
    rows, held = _rows(job, job.rows, config.batch_size), None
    check_spread([[int(not row["desirable"])] for row in rows], preferences, method)
    if job.heldout is not None:
        held = _rows(job, job.heldout, len(job.heldout))
    pad = job.tokenizer.pad_token_id if job.tokenizer.pad_token_id is not None else job.tokenizer.eos_token_id
    arguments = job.arguments(TrainingArguments, remove_unused_columns=False, label_names=["desirable"])
    return TrainerCall(
        KtoTrainer,
        {
            "config": config,
            "model": job.model,
            "args": arguments,
            "train_dataset": Dataset.from_list(rows),
            "eval_dataset": Dataset.from_list(held) if held is not None else None,
            "data_collator": KtoCollator(int(pad)),
        },
    )


def _rows(job: TrainingJob[Any], given: Any, at_once: int) -> list[dict[str, Any]]:
    """Rows with whether they are desirable, and each with the answer of another of the same batch."""
    config = job.config
    preferences = {config.preference: config.values}
    rows = [dict(row) for row in given]
    others = []
    for start in range(0, len(rows), at_once):
        batch = rows[start : start + at_once]
        if len(batch) < 2:
            what = "is alone, and the reference point needs prompts with answers of other rows"
            raise UserError(f"row {batch[0]['id']}", what, "Take two rows or more: --samples, --set eval_rows=N.")
        others += mismatched(batch, config.max_length)
    assert job.reference is not None
    return [
        {
            "id": row["id"],
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["completion_ids"],
            "other_completion_ids": other["completion_ids"],
            "reference": row["ref_completion_logps"],
            "other_reference": reference,
            "desirable": values_of(row, preferences, config.threshold) == [0],
        }
        for row, other, reference in zip(rows, others, job.reference(others), strict=True)
    ]
