"""DPO, IPO, cDPO and ORPO: one function each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from harness import PairLogps, PairwiseLoss, PairwiseRecipe

if TYPE_CHECKING:
    from torch import Tensor


class Dpo(PairwiseLoss[PairwiseRecipe]):
    """Direct preference optimisation."""

    name = "dpo"
    summary = "direct preference optimisation (arXiv 2305.18290)"

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: PairwiseRecipe) -> Tensor:
        """-log sigmoid(beta * (h_chosen - h_rejected)), h = log policy / reference (Rafailov et al. 2023, eq. 7)."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(config.beta * _delta(policy, reference))


class Cdpo(PairwiseLoss["Cdpo.Config"]):
    """Conservative DPO: labels are wrong with probability epsilon."""

    name = "cdpo"
    summary = "conservative DPO: labels are wrong with probability label_smoothing"

    class Config(PairwiseRecipe):
        """DPO's settings and the noise of the labels."""

        label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="probability that a pair's labels are swapped")

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Config) -> Tensor:
        """(1 - e) L(delta) + e L(-delta), L being DPO (Mitchell 2023, "A note on DPO with noisy preferences")."""
        from torch.nn.functional import logsigmoid

        scaled = config.beta * _delta(policy, reference)
        return -(1 - config.label_smoothing) * logsigmoid(scaled) - config.label_smoothing * logsigmoid(-scaled)


class Ipo(PairwiseLoss["Ipo.Config"]):
    """Identity preference optimisation."""

    name = "ipo"
    summary = "identity preference optimisation (arXiv 2310.12036), per token or summed"

    class Config(PairwiseRecipe):
        """DPO's settings; beta is the paper's tau."""

        per_token: bool = Field(
            True,
            description="average log-ratios over tokens (TRL's convention) instead of summing (the paper's eq. 17)",
        )

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Config) -> Tensor:
        """(h_chosen - h_rejected - 1 / (2 tau))^2 (Azar et al. 2023, eq. 17)."""
        assert reference is not None
        chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
        if config.per_token:
            chosen, rejected = chosen / policy.chosen_tokens, rejected / policy.rejected_tokens
        return (chosen - rejected - 1 / (2 * config.beta)) ** 2


class Orpo(PairwiseLoss["Orpo.Config"]):
    """Odds-ratio preference optimisation: SFT on the chosen answer and a preference, without a reference."""

    name = "orpo"
    summary = "odds-ratio preference optimisation (arXiv 2403.07691), no reference"
    needs_reference = False

    class Config(PairwiseRecipe):
        """DPO's settings; beta is the paper's lambda."""

        beta: float = Field(0.1, gt=0, description="weight lambda of the odds-ratio term (no unit)")

    def loss(self, policy: PairLogps, reference: PairLogps | None, config: Config) -> Tensor:
        """-log p_c - lambda log sigmoid(log(odds_c / odds_r)), odds = p / (1 - p) (Hong et al. 2024, eq. 4, 6 and 7).

        log p is the mean over tokens (eq. 3). In TRL the first term covers the prompt too and weighs tokens alike.
        """
        from torch.nn.functional import logsigmoid

        chosen, rejected = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
        log_odds_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return -chosen - config.beta * logsigmoid(log_odds_ratio)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0; finite even where a probability has rounded to 1."""
    import torch

    return torch.log(-torch.expm1(x.clamp(max=-1e-6)))


def _delta(policy: PairLogps, reference: PairLogps | None) -> Tensor:
    """h_chosen - h_rejected, (B,): how much more than the reference the policy prefers the chosen answer."""
    assert reference is not None
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
