"""What KTO minimises, as a function of log-ratios, and which answers its reference point is estimated from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Weights(Protocol):
    """What of the method's Config is asked here."""

    @property
    def beta(self) -> float:
        """Strength of the pull towards the reference."""

    @property
    def desirable_weight(self) -> float:
        """Weight of the loss of desirable answers."""

    @property
    def undesirable_weight(self) -> float:
        """Weight of the loss of undesirable answers."""


def mismatched(rows: Sequence[Mapping[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Each prompt with the answer of the row before it, the first with that of the last: what TRL's KTO pairs up.

    Args:
        rows: of one optimiser step; two or more.
        max_length: prompt and answer (tokens); longer answers are cut.
    """
    found = []
    for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        prompt = list(row["prompt_ids"])
        answer = list(other["completion_ids"])[: max(1, max_length - len(prompt))]
        mask = [0] * len(prompt) + [1] * len(answer)
        found.append({"prompt_ids": prompt, "completion_ids": answer, "labels_mask": mask})
    return found


def kto_losses(ratios_B: Tensor, desirable_B: Tensor, point: Tensor, config: Weights) -> Tensor:
    """lambda_D (1 - sigmoid(beta (r - z))) of desirable answers, lambda_U (1 - sigmoid(beta (z - r))) of others, (B,).

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8 without the constant lambda_y - ...; z is held fixed.

    Args:
        ratios_B: r, log policy / reference of each answer in nats.
        desirable_B: which answers are desirable.
        point: z, the KL divergence of policy and reference in nats, 0 or more.
        config: of the method.
    """
    import torch

    signed_B = torch.where(desirable_B, ratios_B - point, point - ratios_B)
    weight_B = torch.where(desirable_B, config.desirable_weight, config.undesirable_weight)
    return weight_B * (1 - torch.sigmoid(config.beta * signed_B))
