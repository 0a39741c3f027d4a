"""Carries out the groups one after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from harness import Executor


class LocalExecutor(Executor):
    """The executor that needs nothing: no other process, no scheduler, a debugger can step into it."""

    name = "local"
    summary = "one group after another, in this process"

    def carry_out(self, groups: Iterable[Any], work: Callable[[Any], None], options: Executor.Config) -> None:
        """Call ``work`` for each group in turn; what it raises ends the run at that group."""
        for group in groups:
            work(group)
