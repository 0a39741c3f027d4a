"""Carries out orders on this machine: in this process, or in worker processes, one for each slot."""

from __future__ import annotations

import queue
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pydantic import Field

import harness
from harness import (
    Event,
    Executor,
    ExecutorContext,
    InProcessPool,
    Order,
    Pool,
    UserError,
    WarmParent,
    WorkerProcess,
)

GIB = 1024**3


class LocalExecutor(Executor["LocalExecutor.Config"]):
    """Needs nothing but this machine.

    Without ``workers`` everything is done in this process. Most evaluations are one model on one device: a process more
    would pay for starting Python, torch and the plugins again (seconds, where a small task takes one) and plan twice,
    to no gain. Workers are for what can go on side by side: several accelerators, many cores, or answers of one arm
    while another's are scored; a crash then costs the steps in hand alone.
    """

    name = "local"
    summary = "in this process, or in worker processes of this machine, one for each slot"

    class Config(harness.Config):
        workers: int | None = Field(
            None, ge=1, le=256, description="worker processes side by side; absent: none, all in this process (count)"
        )
        gpus: tuple[int | str, ...] | None = Field(
            None,
            description="GPUs that workers share out evenly; all visible ones when absent; one that is named twice is "
            "shared by two workers",
        )
        cores: int | None = Field(
            None, ge=1, description="processor cores that workers share out evenly; all when absent (count)"
        )
        memory: float | None = Field(
            None, gt=0, description="memory that orders may take together; all of the machine's when absent (GiB)"
        )
        grace: float = Field(60.0, ge=0, description="time that a stopped worker has to save (seconds)")

    def open(self, config: Config, context: ExecutorContext) -> Pool:
        """Refuse what this machine has not; workers start with their first orders."""
        if config.workers is None:
            return InProcessPool(context)
        gpus = context.devices if config.gpus is None else tuple(str(gpu) for gpu in config.gpus)
        if gpus and len(gpus) < config.workers:
            raise UserError(
                "--set executor.workers",
                f"{config.workers} workers, and {len(gpus)} GPUs ({', '.join(gpus)}): every worker has one of its own",
                f"Take at most {len(gpus)} workers, or name a GPU twice for two workers to share it "
                f"(--set executor.gpus=[{', '.join([*gpus, gpus[0]])}]).",
            )
        cores = config.cores or context.cores
        share = max(1, cores // config.workers)
        slots = [
            _Slot(tuple(gpus[len(gpus) * n // config.workers : len(gpus) * (n + 1) // config.workers]), share)
            for n in range(config.workers)
        ]
        memory = context.memory if config.memory is None else int(config.memory * GIB)
        return _Workers(slots, memory, config.grace, context)


@dataclass
class _Slot:
    """Room for one worker, which is started when it is first needed and replaced when it has died."""

    gpus: tuple[str, ...]
    cores: int
    worker: WorkerProcess | None = None
    order: Order | None = None
    opened: str = ""
    """What the last order keeps open in the worker."""
    held: int = 0
    """Memory that it may take (bytes)."""

    def end(self) -> None:
        """End the worker, and let go what it holds."""
        if self.worker is not None:
            self.worker.close()
        self.worker, self.opened, self.held = None, "", 0


@dataclass
class _Workers(Pool):
    """Worker processes; an order waits until one is free that has what it needs."""

    slots: Sequence[_Slot]
    memory: int
    grace: float
    context: ExecutorContext
    _waiting: list[Order] = field(default_factory=list)
    _said: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    _under_way: set[str] = field(default_factory=set)
    _warm: WarmParent = field(default_factory=WarmParent)

    def submit(self, order: Order) -> None:
        """Take an order."""
        most = max(len(slot.gpus) for slot in self.slots)
        if order.needs.devices > most:
            raise UserError(
                f"executor local, order {order.id}",
                f"needs {order.needs.devices} GPUs at once, and a worker has {most}",
                "Take fewer workers (--set executor.workers=N), or more GPUs.",
            )
        if self.memory and order.needs.memory > self.memory:
            raise UserError(
                f"executor local, order {order.id}",
                f"needs {order.needs.memory / GIB:.1f} GiB of memory, and there are {self.memory / GIB:.1f}",
                "Raise --set executor.memory=GIB, or take a smaller model.",
            )
        self._under_way.add(order.id)
        self._waiting.append(order)
        self._start()

    def events(self) -> Iterator[Event]:
        """What workers say, as they say it."""
        while self._under_way:
            event = self._said.get()
            if event.kind == "ended":
                self._under_way.discard(event.order)
                self._free(event)
                self._start()
            yield event

    def cancel(self, order: str) -> None:
        """End an order that waits at once, and one that is under way with a signal."""
        for one in [one for one in self._waiting if one.id == order]:
            self._waiting.remove(one)
            self._said.put(Event(order=order, kind="ended", outcome="stopped", signal=signal.SIGTERM))
        for slot in self.slots:
            if slot.order is not None and slot.order.id == order and slot.worker is not None:
                slot.worker.signal()

    def capacity(self) -> int:
        """Slots that are free."""
        return max(0, sum(slot.order is None for slot in self.slots) - len(self._waiting))

    def close(self) -> None:
        """Let those that are busy save, all at once, and end every process."""
        self._waiting.clear()
        workers = [slot.worker for slot in self.slots if slot.worker is not None]
        try:
            for worker in workers:
                if worker.busy:
                    worker.signal()
            for worker in workers:
                worker.close(self.grace)
        finally:
            for worker in workers:
                worker.kill()
            self._warm.close()
        for slot in self.slots:
            slot.worker = slot.order = None

    def _start(self) -> None:
        """Hand waiting orders to free slots, in order, as far as devices and memory go."""
        for order in list(self._waiting):
            taken = sum(slot.order.needs.memory for slot in self.slots if slot.order is not None)
            if self.memory and taken + order.needs.memory > self.memory:
                continue
            free = [slot for slot in self.slots if slot.order is None and len(slot.gpus) >= order.needs.devices]
            if free:
                self._waiting.remove(order)
                # First one that has open what it needs; one that has started has imported what it needs.
                slot = min(free, key=lambda one: (one.opened != order.opens, one.worker is None))
                self._make_room(order, slot, taken)
                self._hand(order, slot)

    def _make_room(self, order: Order, slot: _Slot, taken: int) -> None:
        """End idle workers whose open models would be too much beside an order."""
        for other in self.slots:
            idle = [one for one in self.slots if one.order is None and one is not slot]
            held = sum(one.held for one in idle)
            if other in idle and other.held and self.memory and taken + order.needs.memory + held > self.memory:
                other.end()

    def _hand(self, order: Order, slot: _Slot) -> None:
        if slot.worker is None or not slot.worker.alive:
            slot.end()
            environment = self._environment(slot)
            slot.worker = WorkerProcess(self._said.put, environment, warm=self._warm, imports=order.imports)
        slot.order, slot.opened, slot.held = order, order.opens, order.needs.memory if order.opens else 0
        slot.worker.submit(order)

    def _environment(self, slot: _Slot) -> dict[str, str]:
        # Otherwise each takes all cores, and they take turns.
        environment = {"OMP_NUM_THREADS": str(slot.cores), **self.context.environment}
        return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)} if slot.gpus else environment

    def _free(self, event: Event) -> None:
        for slot in self.slots:
            if slot.order is not None and slot.order.id == event.order:
                slot.order = None
                if event.outcome != "done" and slot.worker is not None:
                    # What failed there may have broken it; what was stopped ends.
                    slot.end()
