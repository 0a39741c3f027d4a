"""A loose plugin: writes down every step that begins, and brings a method that fails until it is mended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness import PairwiseLoss, hookimpl


@hookimpl
def step_started(step: Any) -> None:
    """One line for each step, in the file that ``WATCHED`` names."""
    if watched := os.environ.get("WATCHED"):
        with Path(watched).open("a", encoding="utf-8") as stream:
            stream.write(f"{step.kind} {step.arm}\n")


class Broken(PairwiseLoss):
    """A preference loss that raises unless ``MENDED`` is set."""

    name = "broken"
    summary = "fails"
    needs_reference = False

    def loss(self, policy: Any, reference: Any, config: Any) -> Any:
        """As a method that has a mistake in it."""
        if "MENDED" not in os.environ:
            raise RuntimeError("no such preference")
        return -(policy.chosen - policy.rejected)


@hookimpl
def register_aligners() -> Any:
    """The method that fails."""
    yield Broken()
