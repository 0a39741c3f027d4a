"""The executor that runs everything here, in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness_plugins.executors.local import LocalExecutor


def test_groups_run_once_each_in_order_and_as_they_become_ready() -> None:
    log: list[str] = []

    def groups() -> Iterator[str]:
        for name in "abc":
            log.append(f"ready {name}")
            yield name

    executor = LocalExecutor()
    executor.carry_out(groups(), lambda group: log.append(f"work {group}"), executor.Config())
    assert log == ["ready a", "work a", "ready b", "work b", "ready c", "work c"]


def test_what_the_work_raises_ends_the_run_there() -> None:
    seen: list[int] = []

    def work(group: int) -> None:
        seen.append(group)
        if group == 2:
            raise RuntimeError("two")

    executor = LocalExecutor()
    with pytest.raises(RuntimeError, match="two"):
        executor.carry_out([1, 2, 3], work, executor.Config())
    assert seen == [1, 2]
