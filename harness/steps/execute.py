"""Hands orders to an executor's pool as they become ready, shows what they say, and holds the pool to its contract."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.contracts.executor import Event, Executor, ExecutorContext, Observers, Order, Pool, WorkerContext
from harness.contracts.registry import Registry
from harness.core.config import parse_options
from harness.core.errors import StepError, UserError
from harness.core.machine import memory_bytes, usable_cores, visible_devices
from harness.core.progress import Reporter
from harness.steps.children import said_of
from harness.steps.folder import StepFolder
from harness.steps.orders import Display, InProcessPool, error_of
from harness.steps.runner import Runner
from harness.steps.step import Step


@dataclass(frozen=True)
class Execution:
    """How a run is carried out. It is no part of what is asked for, and enters no id."""

    executor: str = "local"
    options: Mapping[str, Any] = field(default_factory=dict)
    """The executor's own."""
    in_process: bool = False
    """Everything in this process, whatever the executor: for a debugger."""


@dataclass(frozen=True)
class Job:
    """An order, and the orders that must have ended before it begins."""

    order: Order
    after: frozenset[str] = frozenset()


def open_pool(
    execution: Execution,
    registry: Registry,
    reporter: Reporter,
    here: Callable[[Order, WorkerContext], Mapping[str, Any] | None] | None = None,
) -> Pool:
    """Open the pool that an execution asks for.

    Args:
        execution: which executor, with its options.
        registry: where executors are registered; its observers hear of every step.
        reporter: shows what is going on.
        here: carries out an order with the objects that are open in this process.

    Raises:
        UserError: an unknown executor, or options that it cannot take here.
    """
    executor, config = executor_of(execution, registry)
    context = ExecutorContext(
        reporter, registry, dict(os.environ), visible_devices(), usable_cores(), memory_bytes()[0], here
    )
    return InProcessPool(context) if execution.in_process else executor.open(config, context)


def executor_of(execution: Execution, registry: Registry) -> tuple[Executor, Any]:
    """The executor that an execution names, and its options.

    Raises:
        UserError: it is unknown, cannot be used here, or options are none of its.
    """
    executor = registry.find(Executor, execution.executor, "--executor")
    available = executor.availability()
    if not available.usable and not execution.in_process:
        fix = available.install or "See `harness doctor`."
        raise UserError("--executor", f"{executor.name} cannot be used here: {available.reason}", fix)
    given: object = execution.options
    if not isinstance(given, Mapping):
        fix = f"Write --executor {given} to choose one, --set executor.KEY=VALUE for its options."
        raise UserError("--set executor", f"{given!r} is a value, not a group of options", fix)
    return executor, parse_options(executor.Config, given, "--set executor")


class Execute:
    """Carries out jobs through one open pool."""

    def __init__(
        self,
        pool: Pool,
        runner: Runner,
        observers: Observers | None,
        unfinished: Callable[[Order], Iterable[tuple[Step, StepFolder]]],
    ) -> None:
        """Prepare.

        Args:
            pool: open; whoever opened it closes it.
            runner: records what a failed order leaves unfinished.
            observers: hear of the steps of workers elsewhere.
            unfinished: the steps of an order that have not ended.
        """
        self._pool, self._runner, self._unfinished = pool, runner, unfinished
        self._display = Display(runner.reporter, observers)
        self._waiting: dict[str, Job] = {}
        self._under_way: dict[str, Order] = {}
        self.results: dict[str, dict[str, Any]] = {}
        """What came back of the orders that are done."""
        self.finished: set[str] = set()
        """Ids of the steps that workers elsewhere said have ended."""

    def carry_out(self, jobs: Sequence[Job]) -> None:
        """Carry out all of them; what fails of one leaves the others theirs.

        Raises:
            UserError, CorruptionError: what a worker met and the others would meet too.
            StepError: the executor lost an order, or ended one twice.
        """
        self._waiting = {job.order.id: job for job in jobs}
        while self._waiting:
            self._submit()
            if not self._under_way:
                raise self._fault(f"takes no order, and {len(self._waiting)} wait")
            for event in self._pool.events():
                self._take(event)
            if self._under_way:
                raise self._fault(f"never ended {', '.join(self._under_way)}")

    def _submit(self) -> None:
        """Submit what is ready, as far as there is room."""
        open_ends = self._waiting.keys() | self._under_way.keys()
        ready = [job for job in self._waiting.values() if not job.after & open_ends]
        for job in ready[: max(0, self._pool.capacity())]:
            self._under_way[job.order.id] = self._waiting.pop(job.order.id).order
            self._pool.submit(job.order)

    def _take(self, event: Event) -> None:
        if event.order not in self._under_way:
            known = "ended twice" if event.kind == "ended" else "speaks of"
            raise self._fault(f"{known}: {event.order}, which is not under way")
        self._display.show(event)
        if event.hook == "step_finished":
            self.finished.add(str(event.arguments["record"]["id"]))
        if event.kind == "ended":
            self._ended(self._under_way.pop(event.order), event)
            self._submit()

    def _ended(self, order: Order, event: Event) -> None:
        if event.outcome == "done":
            self.results[order.id] = dict(event.result)
            return
        if event.outcome == "failed" and isinstance(event.cause, BaseException):
            raise event.cause
        failure = event.failure
        if event.outcome == "failed" and failure is not None and failure.kind in ("user", "damage"):
            raise error_of(failure)
        what = f"its worker {_reason(event)}"
        steps = list(self._unfinished(order))
        for step, folder in steps:
            # Should that worker live on somewhere, it must not end what is recorded here.
            folder.supersede()
            self._runner.fail(step, folder, StepError(folder.name, what, "The same command goes on."))
        if not order.keys:
            self._runner.failures[order.id] = f"{order.id}: {what}"
        if not steps:
            ended = "; its steps had ended" if order.keys else ""
            self._runner.reporter.note(f"failed: {order.id}: {what}{ended}")

    def _fault(self, what: str) -> StepError:
        fix = "A fault of the executor: harness.testing.check_executor finds such."
        return StepError(f"executor {type(self._pool).__name__}", what, fix)


def _reason(event: Event) -> str:
    if event.failure is not None:
        return f"failed: {event.failure.text}"
    return "was stopped by a signal" if event.outcome == "stopped" else said_of(event.code)


def refuse_unplanned(order: Order, planned: Iterable[str]) -> None:
    """Stop a worker that plans other steps than those it was asked for.

    Raises:
        UserError: other plugins, data or weights lie where it is.
    """
    known = set(planned)
    if strange := [key for key in order.keys if key not in known]:
        raise UserError(
            f"executor, order {order.id}",
            f"{len(strange)} of its {len(order.keys)} steps are not what is planned where it is carried out "
            f"({strange[0][:12]}): other plugins, data or weights are there",
            "Install the same versions there; give plugins as files (--plugin) or installed, not as objects; or "
            "--in-process.",
        )
