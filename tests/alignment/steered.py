"""A stranger's method in one file: control embeddings are trained alone, then the model conditioned on them.

The hardest customer of the aligner's contract (after MEET, arXiv 2310.00819): two stages, a module of its own beside a
frozen model without an adapter in force, rated rows with a value for each row, and files of its own beside the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from harness import Aligner, ArtifactFiles, Recipe, Stage, TrainerCall, TrainingJob, hookimpl

VALUES = ("good", "bad")


class Steered(Aligner["Steered.Config"]):
    name = "steered"
    summary = "control embeddings with the model frozen, then the model under them"
    consumes = "rated"

    class Config(Recipe):
        """The recipe's settings are those of the second stage."""

        tokens: int = Field(4, ge=1, description="virtual tokens per value (tokens)")
        control_steps: int = Field(4, ge=1, description="optimiser steps of the first stage")
        control_rate: float = Field(0.03, gt=0, description="learning rate of the first stage (no unit)")

    def stages(self, config: Config) -> tuple[Stage, ...]:
        own = {"learning_rate": config.control_rate}
        return (Stage("control", "rated", config.control_steps, own), Stage("model", "rated"))

    def attach(self, model: Any, tokenizer: Any, config: Config) -> None:
        import torch

        width = model.get_input_embeddings().weight.shape[1]
        model.control = torch.nn.Embedding(len(VALUES) * config.tokens, width, device=model.device)

    def trainer(self, job: TrainingJob[Config]) -> TrainerCall:
        import torch
        from transformers import Trainer, TrainingArguments

        tokens, is_control = job.config.tokens, job.stage.name == "control"
        for name, parameter in job.model.named_parameters():
            if is_control or name.startswith("control."):
                parameter.requires_grad_(is_control and name.startswith("control."))

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            ids = [row["prompt_ids"] + row["completion_ids"] for row in rows]
            longest = max(map(len, ids))
            padded = [one + [0] * (longest - len(one)) for one in ids]
            shown = [
                [t if m else -100 for t, m in zip(one, row["labels_mask"], strict=True)] + [-100] * (longest - len(one))
                for one, row in zip(ids, rows, strict=True)
            ]
            values = [int(row["ratings"]["preference"] < 0.5) for row in rows]
            return {"ids": torch.tensor(padded), "labels": torch.tensor(shown), "values": torch.tensor(values)}

        class SteeredTrainer(Trainer):
            def row_values(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
                places_BK = inputs["values"][:, None] * tokens + torch.arange(tokens, device=inputs["values"].device)
                words_BTD = job.model.get_input_embeddings()(inputs["ids"])
                whole_BSD = torch.cat([job.model.control(places_BK).to(words_BTD.dtype), words_BTD], dim=1)
                logits_BTV = model(inputs_embeds=whole_BSD).logits[:, tokens:-1].float()
                labels_BT = inputs["labels"][:, 1:]
                losses_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, reduction="none")
                return {"loss": losses_BT.sum(1) / (labels_BT >= 0).sum(1)}

            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
                return self.row_values(model, inputs)["loss"].mean()

        arguments = job.arguments(TrainingArguments, remove_unused_columns=False, label_names=["labels"])
        rows = {"train_dataset": job.rows, "eval_dataset": job.heldout, "data_collator": collate}
        return TrainerCall(SteeredTrainer, {"model": job.model, "args": arguments, **rows})

    def export(self, job: TrainingJob[Config], model: Any, files: ArtifactFiles) -> None:
        parts = model.control.weight.detach().chunk(len(VALUES))
        files.write_tensors("conditioning.safetensors", dict(zip(VALUES, parts, strict=True)))
        values = {value: {"embeddings": "conditioning.safetensors"} for value in VALUES}
        files.write_json("conditioning.json", {"values": values, "default": "good", "position": "after_bos"})


@hookimpl
def register_aligners() -> Iterator[Aligner]:
    yield Steered()
