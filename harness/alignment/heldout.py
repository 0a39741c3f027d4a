"""What a model in training is worth on held-out rows: a value per row, their means, and how sure those are.

A trainer's own evaluation averages the means of batches, where a last, smaller batch weighs as much as a full one. Here
every row weighs the same, and its values are kept, so that arms can be compared paired by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.stats import Summary, is_binary, summarise

if TYPE_CHECKING:
    from transformers import Trainer

HELDOUT = "heldout.jsonl.gz"
"""File of the values per row, in the folder of what is not the adapter."""
LOSS = "loss"
ACCURACY = "rewards/accuracies"
MARGIN = "rewards/margins"
TOKENS = "tokens"
"""Not a figure: how many tokens a row's loss is the mean of."""

Values = dict[str, float]


def measure(trainer: Trainer, ids: Sequence[str]) -> list[dict[str, Any]]:
    """The values of every held-out row under the model as it is; leaves the model in evaluation mode.

    A trainer says what a row is worth by a method ``row_values(model, inputs)`` that returns named tensors of shape
    (B,): ``loss``, whatever else is of interest, and ``tokens`` where the loss is a mean over so many. Of a trainer
    without one the loss alone is known, taken from batches of one row.

    Args:
        trainer: with ``eval_dataset`` in the order of ``ids``.
        ids: of the held-out rows.

    Returns:
        per row its ``id`` and values.
    """
    import torch

    assert trainer.model is not None
    values_of = getattr(trainer, "row_values", None)
    if values_of is None:
        trainer.args.per_device_eval_batch_size = 1
    trainer.model.eval()
    columns: dict[str, list[float]] = {}
    # accelerate has moved the inputs to the model's device.
    for inputs in trainer.get_eval_dataloader():
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if values_of is not None:
                found = values_of(trainer.model, inputs)
            else:
                # Not prediction_step: without a column `labels` transformers computes no loss there.
                loss: Any = trainer.compute_loss(trainer.model, inputs)
                found = {LOSS: loss.reshape(1)}
        for name, value_B in found.items():
            gathered_B = trainer.accelerator.gather_for_metrics(value_B.detach().float())
            columns.setdefault(name, []).extend(gathered_B.tolist())
    return [
        {"id": row_id, **{name: column[index] for name, column in columns.items()}} for index, row_id in enumerate(ids)
    ]


def means(rows: Sequence[Mapping[str, Any]]) -> Values:
    """The mean of each value over rows, and ``loss_per_token``, in which every token weighs the same."""
    names = [name for name in (rows[0] if rows else ()) if name not in ("id", TOKENS)]
    found = {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
    if rows and TOKENS in rows[0] and LOSS in found:
        tokens = math.fsum(row[TOKENS] for row in rows)
        found["loss_per_token"] = math.fsum(row[LOSS] * row[TOKENS] for row in rows) / tokens
    return found


def summaries(rows: Sequence[Mapping[str, Any]]) -> dict[str, Summary]:
    """n, mean, standard error and 95 % interval of each value: Wilson's for an accuracy, Student's t otherwise.

    Values that are not finite are counted as unscored.
    """
    found = {}
    for name in rows[0] if rows else ():
        if name in ("id", TOKENS):
            continue
        values = [row[name] if math.isfinite(row[name]) else None for row in rows]
        proportion = name == ACCURACY and is_binary(values)
        found[name] = summarise(values, kind="proportion" if proportion else "mean")
    return found
