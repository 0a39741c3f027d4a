"""The contract of executors: who carries out ready groups of steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from harness.contracts.plugin import C, Plugin


class Executor(Plugin[C]):
    """Carries out ready groups of steps."""

    kind = "executor"

    @abstractmethod
    def carry_out(self, groups: Iterable[Any], work: Callable[[Any], None], options: C) -> None:
        """Call ``work`` once for every group; groups share nothing but the run directory."""
