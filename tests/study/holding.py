"""A loose plugin whose method and engine wait, in the middle of their work, as long as a file lies beside this one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Aligner, Engine, PairwiseLoss, hookimpl
from harness_plugins.engines.transformers.engine import TransformersEngine

STEP = 3
CALLS: list[str] = []


def wait(what: str) -> None:
    """Leave this process's number in ``held-WHAT`` while there is a file ``hold-WHAT``."""
    folder = Path(__file__).parent
    if (folder / f"hold-{what}").exists():
        (folder / f"held-{what}.tmp").write_text(str(os.getpid()), encoding="utf-8")
        (folder / f"held-{what}.tmp").replace(folder / f"held-{what}")
    while (folder / f"hold-{what}").exists():
        time.sleep(0.05)


class Held(PairwiseLoss):
    """A preference loss that waits in its third step."""

    name = "held"
    summary = "waits for a file to go"
    needs_reference = False

    def loss(self, policy: Any, reference: Any, config: Any) -> Any:
        """Difference of log-probabilities."""
        CALLS.append("loss")
        # Two batches a step.
        if len(CALLS) == 2 * STEP:
            wait("align")
        return -(policy.chosen - policy.rejected)


class HeldEngine(TransformersEngine):
    """transformers, waiting before its second batch."""

    name = "held"

    def open(self, *given: Any) -> Any:
        """Open it."""
        session = super().open(*given)
        run = session.run

        def waits(requests: Any) -> Any:
            CALLS.append("run")
            if CALLS.count("run") == 2:
                wait("answers")
            return run(requests)

        session.run = waits  # type: ignore[method-assign]
        return session


@hookimpl
def register_aligners() -> Iterator[Aligner]:
    """The method."""
    yield Held()


@hookimpl
def register_engines() -> Iterator[Engine]:
    """The engine."""
    yield HeldEngine()
