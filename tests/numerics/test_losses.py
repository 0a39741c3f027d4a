"""Preference losses against values derived by hand, and which way their gradients push."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness import PairLogps
from harness_plugins.aligners.preference import Cdpo, Dpo, Ipo, Orpo
from harness_plugins.aligners.sft import Sft


def logps(chosen: float, rejected: float, chosen_tokens: int = 5, rejected_tokens: int = 10) -> PairLogps:
    """One pair's log-probabilities (nats) in float64, with gradients."""
    import torch

    values = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (chosen, rejected)]
    counts = [torch.tensor([n]) for n in (chosen_tokens, rejected_tokens)]
    return PairLogps(values[0], values[1], counts[0], counts[1])


def loss(method: Any, policy: PairLogps, reference: PairLogps | None, **config: Any) -> float:
    found = method.loss(policy, reference, method.Config(**config))
    assert found.shape == (1,)
    return float(found.detach())


def slopes(method: Any, policy: PairLogps, reference: PairLogps | None, **config: Any) -> tuple[float, float]:
    """d loss / d log p(chosen), d loss / d log p(rejected)."""
    method.loss(policy, reference, method.Config(**config)).sum().backward()
    assert policy.chosen.grad is not None
    assert policy.rejected.grad is not None
    return float(policy.chosen.grad), float(policy.rejected.grad)


POLICY, REFERENCE = (-10.0, -20.0), (-12.0, -15.0)
"""Log-ratios h: chosen -10 + 12 = 2, rejected -20 + 15 = -5; their difference is 7."""


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_is_ln_2_where_policy_and_reference_agree(beta: float) -> None:
    """All log-ratios 0: -log sigmoid(0) = -log(1/2) = ln 2, for every beta."""
    assert loss(Dpo(), logps(-3.0, -7.0), logps(-3.0, -7.0), beta=beta) == pytest.approx(math.log(2), abs=1e-15)


def test_dpo_by_hand() -> None:
    """-log sigmoid(0.1 * 7) = log(1 + e^-0.7) = log(1 + 0.4965853) = log 1.4965853 = 0.403186."""
    assert loss(Dpo(), logps(*POLICY), logps(*REFERENCE), beta=0.1) == pytest.approx(0.403186, abs=5e-7)


def test_the_gradient_of_dpo_by_hand() -> None:
    """Rafailov et al., section 4: the weight of a pair is beta * sigmoid(-beta * delta).

    sigmoid(-0.7) = 1 / (1 + e^0.7) = 1 / 3.0137527 = 0.3318122; times 0.1, pushing the chosen answer up (the loss
    falls with it) and the rejected one down.
    """
    chosen, rejected = slopes(Dpo(), logps(*POLICY), logps(*REFERENCE), beta=0.1)
    assert chosen == pytest.approx(-0.03318122, abs=5e-9)
    assert rejected == pytest.approx(0.03318122, abs=5e-9)


def test_cdpo_by_hand() -> None:
    """With e = 0.1: 0.9 * 0.4031860 + 0.1 * log(1 + e^0.7).

    log(1 + e^0.7) = log 3.0137527 = 1.1031860 (that is 0.4031860 + 0.7); the sum is 0.3628674 + 0.1103186 = 0.4731860,
    which is 0.4031860 + 0.1 * 0.7.
    """
    value = loss(Cdpo(), logps(*POLICY), logps(*REFERENCE), beta=0.1, label_smoothing=0.1)
    assert value == pytest.approx(0.473186, abs=5e-7)
    unsmoothed = loss(Cdpo(), logps(*POLICY), logps(*REFERENCE), beta=0.1, label_smoothing=0.0)
    assert unsmoothed == loss(Dpo(), logps(*POLICY), logps(*REFERENCE), beta=0.1)


def test_cdpo_stops_pushing_where_the_noise_says_so() -> None:
    """The loss is least where sigmoid(beta * delta) = 1 - e: for e = 0.1 at beta * delta = log 9 = 2.1972246.

    Beyond it the gradient turns: the label is taken to be wrong with probability e.
    """
    turn = math.log(9) / 0.1
    at = slopes(Cdpo(), logps(turn, 0.0), logps(0.0, 0.0), beta=0.1, label_smoothing=0.1)
    assert at == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.0, abs=1e-12))
    beyond = slopes(Cdpo(), logps(turn + 10, 0.0), logps(0.0, 0.0), beta=0.1, label_smoothing=0.1)
    before = slopes(Cdpo(), logps(turn - 10, 0.0), logps(0.0, 0.0), beta=0.1, label_smoothing=0.1)
    assert beyond[0] > 0 > beyond[1]
    assert before[0] < 0 < before[1]


def test_ipo_by_hand_summed() -> None:
    """Azar et al., eq. 17 with tau = 0.1: the target is 1 / (2 tau) = 5; (7 - 5)^2 = 4.

    Its derivative in h_chosen is 2 (7 - 5) = 4: beyond the target the chosen answer is pushed down again.
    """
    assert loss(Ipo(), logps(*POLICY), logps(*REFERENCE), beta=0.1, per_token=False) == pytest.approx(4.0, abs=1e-12)
    found = slopes(Ipo(), logps(*POLICY), logps(*REFERENCE), beta=0.1, per_token=False)
    assert found == (pytest.approx(4.0), pytest.approx(-4.0))


def test_ipo_by_hand_per_token() -> None:
    """Log-ratios per token: 2 / 5 = 0.4 and -5 / 10 = -0.5; (0.4 + 0.5 - 5)^2 = 4.1^2 = 16.81.

    The derivative in the summed log p of the chosen answer is 2 * -4.1 / 5 = -1.64, of the rejected 8.2 / 10 = 0.82.
    """
    assert loss(Ipo(), logps(*POLICY), logps(*REFERENCE), beta=0.1) == pytest.approx(16.81, abs=1e-12)
    assert slopes(Ipo(), logps(*POLICY), logps(*REFERENCE), beta=0.1) == (pytest.approx(-1.64), pytest.approx(0.82))


def test_orpo_by_hand() -> None:
    """Mean log p: log(1/2) and log(1/5). Odds: (1/2) / (1/2) = 1 and (1/5) / (4/5) = 1/4; their ratio is 4.

    -log sigmoid(log 4) = log(1 + 1/4) = 0.2231436; with lambda 0.1 and the SFT term -log(1/2) = 0.6931472 the loss is
    0.6931472 + 0.0223144 = 0.7154615.
    """
    policy = logps(5 * math.log(1 / 2), 10 * math.log(1 / 5))
    assert loss(Orpo(), policy, None, beta=0.1) == pytest.approx(0.7154615, abs=5e-8)
    chosen, rejected = slopes(Orpo(), policy, None, beta=0.1)
    assert chosen < 0 < rejected


def test_orpo_is_finite_where_a_probability_rounds_to_one() -> None:
    assert math.isfinite(loss(Orpo(), logps(0.0, -9.0), None))


def test_the_odds_ratio_of_trl() -> None:
    """TRL's ORPO trainer takes mean log-probabilities and returns beta * log sigmoid(log odds ratio)."""
    import torch

    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = object.__new__(orpo.ORPOTrainer)
    trainer.beta = 0.25
    trainer.accelerator = type("Cpu", (), {"device": torch.device("cpu")})()
    policy = PairLogps(
        torch.tensor([-7.0, -30.0, -0.4]),
        torch.tensor([-9.0, -2.0, -40.0]),
        torch.tensor([5, 12, 3]),
        torch.tensor([4, 2, 9]),
    )
    chosen, rejected = policy.chosen / policy.chosen_tokens, policy.rejected / policy.rejected_tokens
    theirs = -chosen - trainer.odds_ratio_loss(chosen, rejected)[0]
    ours = Orpo().loss(policy, None, Orpo.Config(beta=0.25))
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=0)


def test_implicit_rewards_by_hand() -> None:
    """beta * h: 0.1 * 2 and 0.1 * -5; without a reference beta times the mean log p: 0.1 * -10 / 5, 0.1 * -20 / 10."""
    policy, reference = logps(*POLICY), logps(*REFERENCE)
    with_reference = [float(r) for r in Dpo().rewards(policy, reference, Dpo.Config(beta=0.1))]
    without = [float(r) for r in Orpo().rewards(policy, None, Orpo.Config(beta=0.1))]
    assert with_reference == [pytest.approx(0.2), pytest.approx(-0.5)]
    assert without == [pytest.approx(-0.2), pytest.approx(-0.2)]


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TABLE_6 = {
    "sft": (
        {"learning_rate": 2e-4, "max_grad_norm": 0.3, "weight_decay": 0.001, "schedule": "constant"},
        {"rank": 64, "alpha": 16, "dropout": 0.1, "targets": ["q_proj", "v_proj"]},
    ),
    "dpo": (
        {"learning_rate": 5e-5, "max_grad_norm": 1.0, "weight_decay": 0.0, "schedule": "cosine"},
        {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": SEVEN},
    ),
}
"""arXiv 2406.04879, Table 6, as far as its two columns differ."""
BOTH = {"batch_size": 16, "steps": 700, "adam_beta1": 0.9, "adam_beta2": 0.999}
OURS = {"warmup_steps": 0, "max_length": 1024, "loss_on": "last"}


@pytest.mark.parametrize("method", [Sft(), Dpo()], ids=lambda method: method.name)
def test_the_defaults_are_the_papers(method: Any) -> None:
    recipe, adapter = TABLE_6[method.name]
    config = method.Config()
    assert {key: getattr(config, key) for key in {**recipe, **BOTH, **OURS}} == {**recipe, **BOTH, **OURS}
    assert config.adapter_defaults == adapter
    if method.name == "dpo":
        assert config.beta == 0.1
