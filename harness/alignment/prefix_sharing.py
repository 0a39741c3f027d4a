"""Pairs whose prompt is computed once for both answers (Wang and Hegde 2024, arXiv 2410.20305).

A pair becomes one row: the prompt but for its last token, then twice that last token with an answer after it::

    p1 p2 | p3 c1 c2 | p3 r1        position 0 1 | 2 3 4 | 2 3

Each block sees the prefix and itself, never the other; positions go on from the prefix in both. So every token has the
context that it has in a row of its own, and every label one position that predicts it. Heavy: imported when training
starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from harness.contracts.aligner import PairLogps
from harness.core.errors import UserError

OPTION = "--set prefix_sharing"
PADDING, PREFIX, CHOSEN, REJECTED = -1, 0, 1, 2
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary scalings that do not look at the length of the row."""
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


def why_not(config: Any) -> str | None:
    """Why a model cannot share prefixes exactly; None if it can.

    Args:
        config: of the model (transformers).
    """
    text = config.get_text_config()
    attention = getattr(text, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r} takes no mask of blocks (sdpa and eager do)"
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        return f"it has layers of {', '.join(sorted(layers - {'full_attention'}))}"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return f"attention slides over {text.sliding_window} tokens"
    rotary = getattr(text, "rope_parameters", None)
    if not rotary and getattr(text, "rope_theta", None) is None:
        return "its positions are not rotary"
    kind = (rotary or {}).get("rope_type", "default")
    if kind not in FIXED_ROTARY:
        return f"rotary scaling {kind!r} depends on the length of the row"
    return None


def refuse_unless_exact(config: Any) -> None:
    """Stop before training a model that cannot share prefixes exactly.

    Raises:
        UserError: with the reason.
    """
    reason = why_not(config)
    if reason is not None:
        raise UserError(f"{OPTION}=true", f"not exact for this model: {reason}", f"Leave it out, or {OPTION}=false.")


@dataclass(frozen=True)
class PrefixCollator:
    """Makes a batch of pairs in which each prompt stands once."""

    pad: int
    """Token id of padding."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch.

        Args:
            rows: with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, and reference log-probabilities or none.

        Returns:
            ``input_ids``, ``position_ids``, ``segments`` and ``shift_labels`` (of each position the token that it
            predicts, or -100), each (B, T); references (B,).
        """
        made = [_joined(row) for row in rows]
        fill = {"input_ids": self.pad, "position_ids": 0, "segments": PADDING, "shift_labels": -100}
        batch = {
            name: pad_sequence([torch.tensor(one[name]) for one in made], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        for name in REFERENCES:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def _joined(row: Mapping[str, Any]) -> dict[str, list[int]]:
    prompt, answers = list(row["prompt_ids"]), (list(row["chosen_ids"]), list(row["rejected_ids"]))
    start = len(prompt) - 1
    ids, positions, segments, labels = prompt[:-1], list(range(start)), [PREFIX] * start, [-100] * start
    for segment, answer in zip((CHOSEN, REJECTED), answers, strict=True):
        # The last token of an answer predicts nothing.
        ids += [prompt[-1], *answer[:-1]]
        positions += range(start, start + len(answer))
        segments += [segment] * len(answer)
        labels += answer
    return {"input_ids": ids, "position_ids": positions, "segments": segments, "shift_labels": labels}


def block_mask(segments_BT: Tensor) -> Tensor:
    """(B, 1, T, T): whether a position (row) sees another (column): no later one, of its own block or the prefix."""
    length = segments_BT.size(1)
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    of_prefix_B1T = (segments_BT == PREFIX)[:, None, :]
    # Padding sees itself: a row of a mask without anything to see gives no number.
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    is_text_BT1 = (segments_BT != PADDING)[:, :, None]
    return ((same_BTT | (of_prefix_B1T & is_text_BT1)) & causal_TT)[:, None]


def for_attention(mask: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    """A mask as the model's attention takes it: booleans for sdpa, numbers to add for eager."""
    if config.get_text_config()._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def shared_logps(model: Any, inputs: Mapping[str, Tensor]) -> PairLogps:
    """Summed log-probabilities of the answers, as ``pair_logps`` of a batch in which each prompt stands twice.

    Args:
        model: with TRL's fused LM head.
        inputs: of :class:`PrefixCollator`.
    """
    # What data-parallel training wraps around a model does not hand its configuration on.
    inner = getattr(model, "module", model)
    outputs = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        attention_mask=for_attention(block_mask(inputs["segments"]), inner.config, inner.dtype),
        shift_labels=inputs["shift_labels"],
        use_cache=False,
        fused_lm_head=True,
    )
    logps_BT = outputs.log_probs.float()
    sums, counts = [], []
    for segment in (CHOSEN, REJECTED):
        of_answer_BT = inputs["segments"] == segment
        sums.append((logps_BT * of_answer_BT).sum(dim=1))
        counts.append(of_answer_BT.sum(dim=1))
    return PairLogps(*sums, *counts)
