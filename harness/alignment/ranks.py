"""One alignment on several devices: a child process per device, joined by accelerate's data-parallel training.

The parent plans, prepares rows, holds the folder and tells how far things are; the children train. Of them the first
alone writes (and each keeps its own random state in the checkpoints). Children end with their parent, however it ends.
"""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.contracts.executor import Event, Order
from harness.core.progress import Reporter
from harness.steps.children import WorkerProcess, said_of
from harness.steps.folder import StepFolder
from harness.steps.orders import Display, error_of

OPTION = "--processes"
_ORDER = ("user", "memory", "damage", "step", "bug")
"""Which of several children's failures is the cause: a peer of a failed child fails too, for want of its peer."""


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this one is."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.number == 0


ALONE = Rank()


class MuteStep(StepFolder):
    """A step's folder as those see it who do not write."""

    def log(self, event: str, **fields: Any) -> None:
        """Nothing."""


class Children:
    """The processes of one training; setting ``stop`` hands a signal on to them."""

    def __init__(self, payload: dict[str, Any], count: int, reporter: Reporter) -> None:
        self._display = Display(reporter)
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.endings: list[Event] = []
        """How they ended, those first that ended first."""
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(count),
        }
        # Otherwise each takes all cores, and they take turns.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        self._workers = [
            WorkerProcess(self._said.put, {**environment, "RANK": str(number), "LOCAL_RANK": str(number)})
            for number in range(count)
        ]
        for number, worker in enumerate(self._workers):
            worker.submit(Order(id=f"rank {number}", worker="harness.alignment.rank_child", spec=payload))

    @property
    def stop(self) -> int | None:
        """The signal that was handed on."""
        return None

    @stop.setter
    def stop(self, number: int | None) -> None:
        if number is not None:
            for worker in self._workers:
                worker.signal(number)

    def wait(self) -> None:
        """Wait for all; the first that fails takes the others with it."""
        while len(self.endings) < len(self._workers):
            event = self._said.get()
            self._display.show(event)
            if event.kind == "ended":
                self.endings.append(event)
                # Stopped by a signal, all of them end by themselves, each saving its part.
                if event.outcome != "done" and not any(end.outcome == "stopped" for end in self.endings):
                    self.kill()

    def kill(self) -> None:
        """End them all at once."""
        for worker in self._workers:
            worker.kill()


def train_apart(
    payload: dict[str, Any], count: int, reporter: Reporter, started: Callable[[Children], None]
) -> Event | None:
    """Train in ``count`` processes, and say how that ended.

    Args:
        payload: for :mod:`harness.alignment.rank_child`: ``spec``, ``plugins``, ``folder``, ``out``, ``id``, ``micro``.
        count: processes.
        reporter: hears what the first child says.
        started: is given the children, to hand signals on.

    Returns:
        None when they came to their end, or the ending of one that was stopped.

    Raises:
        UserError, StepError, MemoryError: as a child met them.
    """
    children = Children(payload, count, reporter)
    try:
        started(children)
        children.wait()
    finally:
        children.kill()
    failures = [end.failure for end in children.endings if end.failure is not None]
    stopped = [end for end in children.endings if end.outcome == "stopped"]
    cause = min(failures, key=lambda failure: _ORDER.index(failure.kind)) if failures else None
    if cause is not None and (cause.kind != "bug" or not stopped):
        raise RuntimeError(_told(count, cause.text)) if cause.kind == "bug" else error_of(cause)
    if stopped:
        return stopped[0]
    # One that was killed because another had ended says nothing that helps.
    crashed = [end for end in children.endings if end.outcome == "crashed"]
    if crashed:
        raise RuntimeError(_told(count, f"a process {said_of(crashed[0].code)}"))
    return None


def _told(count: int, why: str) -> str:
    return f"one of {count} processes failed:\n{why}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
