"""The contract of an executor, tried on groups that leave a file behind."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from harness.contracts.executor import Executor
from harness.testing.common import check_plugin, demand, options_of


@dataclass(frozen=True)
class _Leave:
    """Work that can be sent to another process: it leaves one file per call."""

    folder: str
    failing: int | None = None

    def __call__(self, group: int) -> None:
        (Path(self.folder) / f"{group}-{uuid4().hex}").touch()
        if group == self.failing:
            raise RuntimeError(f"group {group} fails on purpose")


def check_executor(executor: Executor, *, options: Mapping[str, Any] | None = None, groups: int = 5) -> None:
    """Try an executor against its contract: every group once, and no failure in silence.

    Args:
        executor: the instance that the hook yields.
        options: for the executor's Config.
        groups: how many groups to carry out.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(executor, Executor)
    chosen = options_of(executor, options)
    for given in (list(range(groups)), (group for group in range(groups)), []):
        expected = Counter() if given == [] else Counter(range(groups))
        done, error = _carry_out(executor, given, chosen, None)
        demand(error is None, "`carry_out` returns when every group is done.", repr(error))
        rule = "`carry_out` calls `work` once for every group, of a list or a generator."
        demand(done == expected, rule, f"calls per group: {dict(sorted(done.items()))} of {groups} groups")
    _, error = _carry_out(executor, range(groups), chosen, groups - 1)
    demand(error is not None, "An exception of `work` is not swallowed.", "`carry_out` returned as if all went well")


def _carry_out(
    executor: Executor, groups: Iterable[int], options: Any, failing: int | None
) -> tuple[Counter[int], Exception | None]:
    """How often each group was worked on, and what came out as an exception."""
    with tempfile.TemporaryDirectory() as folder:
        error: Exception | None = None
        try:
            executor.carry_out(groups, _Leave(folder, failing), options)
        except Exception as raised:
            error = raised
        return Counter(int(path.name.partition("-")[0]) for path in Path(folder).iterdir()), error
