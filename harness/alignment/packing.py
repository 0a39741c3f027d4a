"""Several short demonstrations in one row, none of which sees another; the loss is that of rows of their own.

Packed is each micro batch by itself: rows are filled up to the length of its longest demonstration, so a step sees the
demonstrations that the batch plan names, in fewer and fuller rows. Heavy: imported when training starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harness.alignment.prefix_sharing import PADDING, PREFIX, block_mask, for_attention, why_not
from harness.core.errors import UserError

OPTION = "--set packing"


def bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which demonstrations share a row: longest first, each into the first row that has room for it.

    Args:
        lengths: tokens of each, none above ``room``.
        room: tokens of a row.

    Returns:
        per row, positions in ``lengths``.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, free in enumerate(left) if free >= lengths[index]), None)
        if row is None:
            rows.append([])
            left.append(room)
            row = len(rows) - 1
        rows[row].append(index)
        left[row] -= lengths[index]
    return rows


@dataclass(frozen=True)
class PackingCollator:
    """Packs a micro batch of rows with ``input_ids`` and ``labels``."""

    pad: int
    """Token id of padding."""
    config: Any
    """Of the model: how its attention takes a mask."""
    dtype: torch.dtype
    """Of the model."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> PackingCollator:
        """For a model and its tokenizer.

        Raises:
            UserError: packing is not exact for this model, with the reason.
        """
        reason = why_not(model.config)
        if reason is not None:
            raise UserError(
                f"{OPTION}=true", f"not exact for this model: {reason}", f"Leave it out, or {OPTION}=false."
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return cls(int(pad), model.config, model.dtype)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``position_ids``, each (B, T), and ``attention_mask``, (B, 1, T, T)."""
        lengths = [len(row["input_ids"]) for row in rows]
        made = [_joined([rows[index] for index in one]) for one in bins(lengths, max(lengths))]
        fill = {"input_ids": self.pad, "labels": -100, "position_ids": 0, "segments": PADDING}
        batch = {
            name: pad_sequence([torch.tensor(one[name]) for one in made], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        mask = block_mask(batch.pop("segments"))
        return {**batch, "attention_mask": for_attention(mask, self.config, self.dtype)}


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    joined: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "segments": []}
    for segment, row in enumerate(rows, PREFIX + 1):
        length = len(row["input_ids"])
        joined["input_ids"] += row["input_ids"]
        # Nothing predicts a first token: the one before it is another demonstration's.
        joined["labels"] += [-100, *row["labels"][1:]]
        joined["position_ids"] += range(length)
        joined["segments"] += [segment] * length
    return joined
