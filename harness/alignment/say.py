"""What an alignment says while it runs: counts of rows, and how far each step has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from harness.core.progress import Reporter, stored
from harness.data.token_cache import Prepared

_SHOWN = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "preference accuracy",
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "held-out accuracy",
    "eval_rewards/margins": "held-out margin",
    "grad_norm": "gradient norm",
}


def say_counts(reporter: Reporter, data: Prepared, template: str) -> None:
    """How many rows there are, what was dropped and why, and what a reader should know."""
    selection, train = data.selection, data.train
    for label, counts in selection.counts.items():
        reporter.note(f"{label}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for reason, count in {**selection.dropped, **train.rejected}.items():
        reporter.note(f"dropped {count:,}: {reason}")
    for note in [*selection.notes, *train.notes]:
        reporter.note(f"note: {note}")
    reporter.note(f"training on {len(train.rows):,} rows, template {template}")


def stepper(
    advance: Callable[[int], None], reporter: Reporter, tokens: Sequence[int]
) -> Callable[[int, dict[str, float]], None]:
    """Bars for steps, and a line with loss, reward margin and tokens/s whenever the trainer logs.

    Args:
        advance: of the bar.
        reporter: for the lines.
        tokens: how many each step reads, padding left out.
    """
    last, spoken, since = 0, 0, time.monotonic()

    def report(step: int, values: dict[str, float]) -> None:
        nonlocal last, spoken, since
        if step > last:
            # A resumed run starts in the middle: what was done before is not part of its speed.
            if last == 0 and step > 1:
                stored(advance, step - 1)
                spoken = last = step - 1
            advance(step - last)
            last = step
        shown = [f"{n} {values[k]:.4g}" for k, n in _SHOWN.items() if k in values]
        now = time.monotonic()
        if "loss" in values and step > spoken:
            shown.append(f"{sum(tokens[spoken:step]) / max(now - since, 1e-9):,.0f} tokens/s")
            spoken, since = step, now
        if shown:
            reporter.note(f"step {step}: " + ", ".join(shown))

    return report
