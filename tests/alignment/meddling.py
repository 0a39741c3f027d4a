"""A loose plugin with a mistake that no loss shows: it writes to frozen weights of the base while it trains."""

from __future__ import annotations

from typing import Any

from harness import PairwiseLoss, hookimpl


class Meddling(PairwiseLoss):
    """Sums of log-probabilities, and a weight of the base that is a little other after every batch."""

    name = "meddling"
    summary = "changes the base"
    needs_reference = False

    def attach(self, model: Any, tokenizer: Any, config: Any) -> None:
        """Remember a frozen weight."""
        self._frozen = next(one for name, one in model.named_parameters() if "layers.0" in name and "lora" not in name)

    def loss(self, policy: Any, reference: Any, config: Any) -> Any:
        """As if somebody had forgotten a ``no_grad``, or an in-place operation."""
        self._frozen.data[0].mul_(1.5)
        return -(policy.chosen - policy.rejected)


@hookimpl
def register_aligners() -> Any:
    """The method."""
    yield Meddling()
