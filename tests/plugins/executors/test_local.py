"""The executor of this machine: in this process, or in worker processes with their shares of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from harness import Execution, ExecutorContext, InProcessPool, Needs, Order, UserError
from harness.contracts.registry import Registry, load_plugins
from harness.core.progress import Reporter
from harness.steps.execute import open_pool
from harness.testing import check_executor
from harness_plugins.executors.local import GIB, LocalExecutor


def context(**more: Any) -> ExecutorContext:
    return ExecutorContext(Reporter(), Registry(), dict(os.environ), **more)


@pytest.mark.parametrize("options", [{}, {"workers": 1}, {"workers": 2}])
def test_it_holds_the_contract(options: dict[str, Any]) -> None:
    check_executor(LocalExecutor(), options=options)


def test_without_workers_nothing_is_started() -> None:
    local = LocalExecutor()
    assert isinstance(local.open(local.Config(), context()), InProcessPool)
    sure = open_pool(Execution("local", {"workers": 2}, in_process=True), load_plugins(), Reporter())
    assert isinstance(sure, InProcessPool)


def test_workers_share_out_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    local = LocalExecutor()

    def shares(workers: int) -> list[tuple[str, str]]:
        with local.open(local.Config(workers=workers), context(devices=("0", "1", "2"), cores=9)) as pool:
            found = [pool._environment(slot) for slot in pool.slots]  # type: ignore[attr-defined]
            return [(one["CUDA_VISIBLE_DEVICES"], one["OMP_NUM_THREADS"]) for one in found]

    assert shares(1) == [("0,1,2", "9")]
    assert shares(2) == [("0", "4"), ("1,2", "4")]
    assert shares(3) == [("0", "3"), ("1", "3"), ("2", "3")]


def test_what_this_machine_has_not_is_refused() -> None:
    local = LocalExecutor()
    with pytest.raises(UserError) as caught:
        local.open(local.Config(workers=2), context(devices=("0",)))
    assert str(caught.value) == (
        "--set executor.workers: 2 workers, and 1 GPUs (0): every worker has one of its own\n"
        "  Take at most 1 workers, or name a GPU twice for two workers to share it (--set executor.gpus=[0, 0])."
    )
    local.open(local.Config(workers=2, gpus=(0, 0)), context(devices=("0",))).close()

    def order(**needs: int) -> Order:
        return Order(id="big", worker="harness.testing.order_worker", needs=Needs(**needs))

    with local.open(local.Config(workers=2), context(devices=("0", "1", "2"), memory=4 * GIB)) as pool:
        with pytest.raises(UserError) as caught:
            pool.submit(order(devices=3))
        assert str(caught.value) == (
            "executor local, order big: needs 3 GPUs at once, and a worker has 2\n"
            "  Take fewer workers (--set executor.workers=N), or more GPUs."
        )
        with pytest.raises(UserError) as caught:
            pool.submit(order(memory=5 * GIB))
        assert str(caught.value) == (
            "executor local, order big: needs 5.0 GiB of memory, and there are 4.0\n"
            "  Raise --set executor.memory=GIB, or take a smaller model."
        )


def test_options_are_checked_before_anything_runs() -> None:
    with pytest.raises(UserError) as caught:
        open_pool(Execution("locla"), load_plugins(), Reporter())
    assert str(caught.value) == (
        "--executor: unknown executor 'locla'\n  Did you mean 'local'? All: `harness plugins`."
    )
    with pytest.raises(UserError) as caught:
        open_pool(Execution(options={"worker": 2}), load_plugins(), Reporter())
    assert "--set executor, worker: unknown key 'worker'\n  Did you mean 'workers'?" in str(caught.value)
    with pytest.raises(UserError) as caught:
        open_pool(Execution(options="local"), load_plugins(), Reporter())  # type: ignore[arg-type]
    assert str(caught.value) == (
        "--set executor: 'local' is a value, not a group of options\n"
        "  Write --executor local to choose one, --set executor.KEY=VALUE for its options."
    )


def test_memory_lets_orders_wait(tmp_path: Path) -> None:
    """Two that take more together than there is go one after the other, although two workers are free."""
    local = LocalExecutor()
    with local.open(local.Config(workers=2, memory=3), context()) as pool:
        for name in ("one", "two"):
            spec = {"does": "leaves", "seconds": 1}
            needs = Needs(memory=2 * GIB)
            worker = "harness.testing.order_worker"
            pool.submit(Order(id=name, worker=worker, run=str(tmp_path), spec=spec, needs=needs))
        ends = [(event.order, event.kind) for event in pool.events() if event.kind in ("started", "ended")]
    assert ends == [("one", "started"), ("one", "ended"), ("two", "started"), ("two", "ended")]
