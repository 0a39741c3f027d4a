"""A stranger's method with rows of its own: pairs become an answer with a weight, which its trainer gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Aligner, Converter, DatasetRow, Recipe, TrainerCall, TrainingJob, TrainingRow, hookimpl


class Weighed(TrainingRow):
    answer: str
    weight: float
    columns = ("weight",)

    def render(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "completion": self.answer}


class Weigh(Converter):
    name = "weigh"
    summary = "chosen answers, weighed by their length"
    source = "pairs"
    target = Weighed

    def convert(self, row: DatasetRow) -> Iterator[DatasetRow]:
        answer = row.data["chosen"]
        yield DatasetRow(row.id, {"prompt": row.data["prompt"], "answer": answer, "weight": 1 / len(answer)})


class WeighedSft(Aligner["WeighedSft.Config"]):
    name = "weighed-sft"
    summary = "cross-entropy times a weight"
    consumes = Weighed

    class Config(Recipe):
        """The recipe's settings."""

    def trainer(self, job: TrainingJob[Config]) -> TrainerCall:
        import torch
        from transformers import Trainer, TrainingArguments

        # For the test: what came.
        seen = {"train": list(job.rows["weight"]), "heldout": list(job.heldout["weight"] if job.heldout else ())}
        Path("seen.json").write_text(json.dumps({**seen, "columns": job.rows.column_names}))

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            ids = [row["prompt_ids"] + row["completion_ids"] for row in rows]
            longest = max(map(len, ids))
            labels = [
                [-100] * len(row["prompt_ids"]) + row["completion_ids"] + [-100] * (longest - len(one))
                for row, one in zip(rows, ids, strict=True)
            ]
            return {
                "input_ids": torch.tensor([one + [0] * (longest - len(one)) for one in ids]),
                "labels": torch.tensor(labels),
                "weight": torch.tensor([row["weight"] for row in rows]),
            }

        class WeighedTrainer(Trainer):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
                logits_BTV = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
                losses_BT = torch.nn.functional.cross_entropy(
                    logits_BTV.transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
                )
                return (losses_BT.sum(1) * inputs["weight"]).mean()

        return TrainerCall(
            WeighedTrainer,
            {
                "model": job.model,
                "args": job.arguments(TrainingArguments, remove_unused_columns=False),
                "train_dataset": job.rows,
                "eval_dataset": job.heldout,
                "data_collator": collate,
            },
        )


@hookimpl
def register_converters() -> Iterator[Converter]:
    yield Weigh()


@hookimpl
def register_aligners() -> Iterator[Aligner]:
    yield WeighedSft()
