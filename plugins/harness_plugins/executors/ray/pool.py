"""Orders as tasks of Ray Core: submitted, listened to, and given again where a node was lost."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness import Event, Failure, HarnessError, Order, Pool, UserError
from harness_plugins.executors.ray import worker
from harness_plugins.executors.ray.cluster import Cluster
from harness_plugins.executors.ray.nodes import Comparison
from harness_plugins.executors.ray.options import RayOptions

GIB = 1024**3
LISTEN = 0.3
"""Longest wait (seconds) for something to be said, before it is looked whether a task ended without a word."""
LOOK = 5.0
"""Seconds between looks at which nodes there are; so long, too, a node may outlive what ran on it."""
LEAVE = 30.0
"""Longest wait (seconds) for processes of this machine whose order has ended: Ray ends them a while after it."""


@dataclass
class _Given:
    """An order that has not ended."""

    order: Order
    task: Any
    """Ray's reference."""
    node: str = ""
    """Where it runs, once it has spoken."""
    heard: int = 0
    """Number of the last event of this attempt."""
    ended: bool = False


@dataclass
class RayPool(Pool):
    """Tasks of a cluster. Ray places them, and lets those wait that find no room."""

    cluster: Cluster
    config: RayOptions
    comparison: Comparison
    _given: dict[str, _Given] = field(default_factory=dict)
    _cancelled: set[str] = field(default_factory=set)
    _said: queue.SimpleQueue[Event | BaseException] = field(default_factory=queue.SimpleQueue)
    _open_ends: set[str] = field(default_factory=set)
    """Orders whose end has not been handed out by :meth:`events`."""
    _processes: set[int] = field(default_factory=set)
    """Workers of this machine."""
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _listener: threading.Thread | None = None
    _looked: float = 0.0
    _closing: bool = False
    _closed: bool = False

    def submit(self, order: Order) -> None:
        """Take an order; before the first, all nodes are compared with this one."""
        expected = self.comparison.expected(order)
        self._refuse_unfit(order)
        with self._lock:
            self._open_ends.add(order.id)
            self._give(order, expected)
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()

    def events(self) -> Iterator[Event]:
        """What workers say, as they say it."""
        while self._open_ends:
            said = self._said.get()
            if isinstance(said, BaseException):
                raise said
            if said.kind == "ended":
                self._open_ends.discard(said.order)
            yield said

    def cancel(self, order: str) -> None:
        """End an order that waits at once, and one that is under way as Ctrl-C would."""
        import ray

        with self._lock:
            given = self._given.get(order)
            if given is None:
                return
            self._cancelled.add(order)
        ray.cancel(given.task, recursive=False)

    def capacity(self) -> int:
        """As many as the processors of all nodes are enough for; those that need what is taken wait in Ray."""
        room = sum(int(node.resources.get("CPU", 0) // self.config.cores) for node in self.cluster.nodes())
        with self._lock:
            # At least one, so that it is heard why none can be carried out.
            return max(0 if self._given else 1, room - len(self._given))

    def close(self) -> None:
        """Let all that is under way save, and end it; end the connection."""
        if self._closed:
            return
        import ray

        try:
            self._closing = True
            with self._lock:
                tasks = [given.task for given in self._given.values()]
            # Where the connection is lost, why has been said, and Ray ends them.
            with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
                for task in tasks:
                    ray.cancel(task, recursive=False)
                for task in self._left(tasks, self.config.grace):
                    ray.cancel(task, force=True, recursive=False)
                end = time.monotonic() + LEAVE
                while self._running() and time.monotonic() < end:
                    time.sleep(0.05)
        finally:
            self._closed = True
            self.comparison.close()
            if self._listener is not None:
                self._listener.join(10)
            self.cluster.close()
            self._given.clear()

    def _left(self, tasks: list[Any], seconds: float) -> list[Any]:
        """Wait until tasks have ended; those that have not in time. Not in Ray's own wait: it swallows signals."""
        import ray

        end = time.monotonic() + seconds
        while tasks and time.monotonic() < end:
            _, tasks = ray.wait(tasks, num_returns=len(tasks), timeout=0)
            time.sleep(0.05)
        return tasks

    def _running(self) -> bool:
        """Whether a worker of this machine has not ended."""
        for pid in tuple(self._processes):
            try:
                os.kill(pid, 0)
            except (ProcessLookupError, PermissionError):
                # It has ended, or another user's has its number now.
                self._processes.discard(pid)
        return bool(self._processes)

    # ------------------------------------------------------------------------------------------------- before it runs

    def _give(self, order: Order, expected: worker.Expected) -> None:
        import ray

        wanted = self._wanted(order)
        resources = {name: wanted[name] for name in wanted if name.startswith("accelerator_type:")}
        # The process ends with its order, so that nothing of it stays behind on a GPU. A crash is not tried again: Ray
        # would not tell it from a node that was lost.
        task = ray.remote(max_calls=1, max_retries=0)(worker.carry_out).options(
            num_cpus=wanted["CPU"],
            num_gpus=wanted.get("GPU", 0),
            memory=wanted.get("memory"),
            resources=resources,
            name=order.id,
            runtime_env={"env_vars": dict(self.cluster.variables)},
        )
        checked = frozenset(self.comparison.checked)
        args = (order.model_dump_json(), self.cluster.mailbox, dict(self.cluster.secrets), checked, expected)
        self._given[order.id] = _Given(order, task.remote(*args))

    def _wanted(self, order: Order) -> dict[str, float]:
        """What an order takes, as Ray counts it."""
        wanted: dict[str, float] = {"CPU": max(self.config.cores, order.needs.cores)}
        if order.needs.memory:
            wanted["memory"] = order.needs.memory
        if order.needs.devices:
            wanted["GPU"] = order.needs.devices
            if self.config.accelerator_type is not None:
                # A task that wants a kind of GPU takes this much of it.
                wanted[f"accelerator_type:{self.config.accelerator_type}"] = 0.001
        return wanted

    def _refuse_unfit(self, order: Order) -> None:
        """Stop an order for which no node is large enough: Ray would let it wait for ever.

        Raises:
            UserError: what the largest nodes lack.
        """
        nodes = self.cluster.nodes()
        wanted = self._wanted(order)
        if any(not node.lacks(wanted) for node in nodes):
            return
        parts = {**wanted, "memory": wanted.get("memory", 0) / GIB}
        said = ", ".join(f"{amount:.4g} {_NAMES.get(name, name)}" for name, amount in parts.items() if amount)
        most = {name: max((node.resources.get(name, 0) for node in nodes), default=0) for name in wanted}
        most = {**most, "memory": most.get("memory", 0) / GIB}
        have = ", ".join(f"{most[name]:.4g} {_NAMES.get(name, name)}" for name in wanted)
        raise UserError(
            f"executor ray, order {order.id}",
            f"needs {said} on one node, and of {len(nodes)} nodes none has that (the most of each: {have})",
            "Add a node that has, or ask for less: --set executor.cores=N, executor.accelerator_type, a smaller model.",
        )

    # -------------------------------------------------------------------------------------------------- while it runs

    def _listen(self) -> None:
        """Hand on what workers say, and end orders whose task ended without a word, until the pool is closed."""
        try:
            while not self._closed:
                self._take(LISTEN)
                self._settle()
                if time.monotonic() - self._looked > LOOK:
                    self._looked = time.monotonic()
                    # Numbers are given again: those that are free are forgotten soon.
                    self._running()
                    self._end_unfit()
        except BaseException as error:
            if not self._closed:
                what = f"the connection to the cluster is lost: {' '.join(str(error).split())[:300]}"
                fix = "The same command goes on. If this comes again: harness plugins, ray status."
                lost = UserError("executor ray", what, fix) if _of_ray(error) else error
                self._said.put(lost)

    def _take(self, seconds: float) -> None:
        import ray

        for name, attempt, number, node, pid, data in ray.get(self.cluster.mailbox.take.remote(seconds)):
            if node == self.cluster.node:
                self._processes.add(pid)
            with self._lock:
                given = self._given.get(name)
                if given is None or attempt != given.order.attempt or number <= given.heard or given.ended:
                    # Of an attempt that was taken for lost, or said twice.
                    continue
                given.node, given.heard = node, number
                event = Event.model_validate(data)
                if event.kind != "ended":
                    self._said.put(event)
                elif event.outcome == "stopped" and name not in self._cancelled and not self._closing:
                    # By a signal of its node's scheduler.
                    self._lost(given, "was told to stop")
                else:
                    self._end(given, event)

    def _settle(self) -> None:
        """End orders whose task has ended without saying so."""
        import ray

        with self._lock:
            tasks = {given.task: given for given in self._given.values()}
        if not tasks:
            return
        done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        if done:
            # What was said before the task ended is there by now.
            self._take(0)
        for task in done:
            given = tasks[task]
            try:
                ray.get(task)
                error: BaseException = HarnessError("its task ended, and said nothing")
            except Exception as raised:
                error = raised
            gone = isinstance(error, ray.exceptions.WorkerCrashedError) and not self._outlives(given.node)
            with self._lock:
                if self._given.get(given.order.id) is given and not given.ended:
                    self._judge(given, error, gone)

    def _judge(self, given: _Given, error: BaseException, gone: bool) -> None:
        from ray import exceptions

        name = given.order.id
        if isinstance(error, exceptions.TaskCancelledError) and (name in self._cancelled or self._closing):
            self._end(given, Event(order=name, kind="ended", outcome="stopped", signal=signal.SIGTERM))
        elif gone or isinstance(error, exceptions.NodeDiedError | exceptions.TaskCancelledError):
            self._lost(given, "was lost")
        elif isinstance(error, exceptions.WorkerCrashedError):
            # Its exit code is known to its node alone, which does not tell.
            self._end(given, Event(order=name, kind="ended", outcome="crashed"))
        elif isinstance(error, exceptions.OutOfMemoryError):
            text = "Ray ended it, since its node was running out of memory"
            self._end(given, _failed(name, "memory", text))
        else:
            self._end(given, _failed(name, "bug", str(error)))

    def _outlives(self, node: str) -> bool:
        """Whether a node is still there a while after a process of it has ended; a lost one may end later than that."""
        end = time.monotonic() + LOOK
        while not node or node in {one.id for one in self.cluster.nodes()}:
            if not node or time.monotonic() > end:
                return True
            time.sleep(0.5)
        return False

    def _lost(self, given: _Given, what: str) -> None:
        """Give an order again whose node is no more: whatever it had saved is found by the next one."""
        order, node = given.order, given.node[:8] or "unknown"
        if order.attempt > self.config.retries or self._closing:
            text = f"its node {what} {order.attempt} times, the last one node {node}"
            end = Event(order=order.id, kind="ended", outcome="crashed", failure=Failure(kind="step", text=text))
            self._end(given, end)
            return
        again = order.model_copy(update={"attempt": order.attempt + 1})
        note = f"{order.id}: node {node} {what}; it is given again (attempt {again.attempt})"
        self._said.put(Event(order=order.id, kind="note", text=note))
        self._give(again, self.comparison.expected(again))

    def _end_unfit(self) -> None:
        """End what waits for a node that is no more."""
        with self._lock:
            waiting = [given for given in self._given.values() if not given.node]
        for given in waiting:
            try:
                self._refuse_unfit(given.order)
            except UserError as error:
                import ray

                ray.cancel(given.task, recursive=False)
                parts = (error.where, error.what, error.fix)
                failure = Failure(kind="user", parts=parts, text=str(error))
                with self._lock:
                    self._end(given, Event(order=given.order.id, kind="ended", outcome="failed", failure=failure))

    def _end(self, given: _Given, event: Event) -> None:
        given.ended = True
        self._given.pop(given.order.id, None)
        self._said.put(event)


_NAMES: Mapping[str, str] = {"CPU": "cores", "GPU": "GPUs", "memory": "GiB of memory"}


def _failed(order: str, kind: Any, text: str) -> Event:
    return Event(order=order, kind="ended", outcome="failed", failure=Failure(kind=kind, text=text))


def _of_ray(error: BaseException) -> bool:
    from ray.exceptions import RayError

    return isinstance(error, RayError | ConnectionError)
