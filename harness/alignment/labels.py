"""Score the positions that carry loss, and no others, on devices where TRL scores all of them.

TRL's fused LM head leaves out positions without a label where Triton is, and scores every one elsewhere, because some
devices compile anew for each shape. A CPU does not, and prompts are more than half of the tokens. Heavy: imported when
training starts.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that carries no loss."""


def project_labels_alone(model: Any) -> None:
    """Let a model's fused LM head see only positions whose label is not -100; the numbers are the same.

    TRL's ``add_fused_lm_head`` must have been called before (anew: call this anew, too). The hidden states of the other
    positions are taken out between backbone and head, and their zeros put back behind it.

    Args:
        model: a causal language model, bare or within adapters of peft; on another device than a CPU it stays as it is.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.device.type != "cpu":
        return
    fused = base.forward

    @functools.wraps(type(base).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **more: Any,
    ) -> Any:
        given = {
            name: value for name, value in (("labels", labels), ("shift_labels", shift_labels)) if value is not None
        }
        if not fused_lm_head:
            return fused(*args, **given, **more)
        is_shifted = shift_labels is not None
        if shift_labels is None:
            assert labels is not None
            # Nothing follows the last position; what TRL returns does not have it.
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        mask_BT = shift_labels != IGNORED

        def labelled(module: Any, inputs: Any, outputs: Any) -> Any:
            outputs.last_hidden_state = outputs.last_hidden_state[mask_BT][None]
            return outputs

        hook = self.base_model.register_forward_hook(labelled)
        try:
            outputs = fused(*args, fused_lm_head=True, shift_labels=shift_labels[mask_BT][None], **more)
        finally:
            hook.remove()
        return _spread(outputs, mask_BT if is_shifted else mask_BT[:, :-1])

    base.forward = types.MethodType(forward, base)


def _spread(outputs: Any, mask_BT: Tensor) -> Any:
    """Values of labelled positions, (1, N), as values of all positions, (B, T), which are 0 elsewhere."""
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"):
        value_1N = getattr(outputs, name)
        if value_1N is not None:
            # Connected to the model even where nothing is labelled.
            spread_BT = value_1N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, value_1N)
            setattr(outputs, name, spread_BT)
    outputs.label_mask = mask_BT
    return outputs
