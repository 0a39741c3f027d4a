"""The contract of executors: who carries out orders, and where.

The harness decides what may run when, and keeps the records; a pool has processes, on this machine or others. An order
is plain data, so that it can be sent anywhere; a worker module carries it out there and leaves everything on disk. What
is said on the way comes back as events.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pydantic import Field

from harness.contracts.engine import Availability
from harness.contracts.plugin import C, Plugin
from harness.core.config import Config
from harness.core.progress import Reporter


class Needs(Config):
    """What an order takes of the place where it is carried out."""

    devices: int = Field(0, ge=0, description="accelerators")
    cores: int = Field(1, ge=1, description="processor cores")
    memory: int = Field(0, ge=0, description="memory that is known to be needed (bytes)")


class Order(Config):
    """What one worker is to do in one go; all of it is JSON."""

    id: str = Field(min_length=1, description="unique in its run")
    worker: str = Field(description="module whose function `carry_out(order, context)` carries it out")
    run: str = Field("", description="folder in which everything is left")
    keys: tuple[str, ...] = Field((), description="ids of the steps that it is about")
    plugins: tuple[str, ...] = Field((), description="loose plugin files to load")
    spec: dict[str, Any] = Field(default_factory=dict, description="what the worker plans from")
    folder: str = Field("", description="working folder that relative paths start from")
    needs: Needs = Field(default_factory=lambda: Needs(), description="what it takes")
    attempt: int = Field(1, ge=1, description="how often it has been ordered")
    opens: str = Field("", description="what its worker keeps open afterwards: it is best given to one that has that")
    imports: tuple[str, ...] = Field((), description="modules that it needs, to be imported once for many workers")


class Failure(Config):
    """An error as data: what kind, its parts or its text."""

    kind: Literal["user", "step", "damage", "memory", "bug"] = Field(description="what is to be done about it")
    parts: tuple[str, ...] = Field((), description="where, what and fix of a user's mistake; step, what and fix")
    text: str = Field("", description="the message; of a bug the traceback")


class Event(Config):
    """Something that became of an order, or that its worker said. The last of an order is ``ended``, and only one."""

    order: str = Field(description="id of the order")
    kind: Literal["started", "note", "bar", "step", "ended"] = Field(description="which of the fields below say more")
    text: str = Field("", description="the note, or a new bar's title")
    bar: int | None = Field(None, description="number of a bar, counted per order")
    total: int | None = Field(None, description="items of a bar that begins; absent: it goes on")
    more: int = Field(0, description="items that are done, since the last event of this bar")
    stored: bool = Field(False, description="whether those were done by an earlier run")
    hook: str = Field("", description="what observers are told of a step: step_started or step_finished")
    arguments: dict[str, Any] = Field(default_factory=dict, description="of the hook")
    outcome: Literal["done", "failed", "stopped", "crashed"] | None = Field(None, description="how the order ended")
    result: dict[str, Any] = Field(default_factory=dict, description="what the worker's function returned")
    failure: Failure | None = Field(None, description="of an order that failed")
    signal: int | None = Field(None, description="the signal that stopped it")
    code: int | None = Field(
        None, description="exit code of a process that ended in the middle of the order; absent where nobody can know"
    )
    cause: Any = Field(None, exclude=True, repr=False, description="the exception, where it was raised in this process")


class Observers(Protocol):
    """Whoever is told of steps: a registry, or what relays it to one."""

    warnings: list[str]

    def announce(self, hook: str, **arguments: Any) -> None:
        """Tell of a step."""


@dataclass(frozen=True)
class WorkerContext:
    """What a worker's function is given beside its order."""

    reporter: Reporter
    observers: Observers


@dataclass(frozen=True)
class ExecutorContext:
    """What a pool may use."""

    reporter: Reporter
    observers: Observers
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of this process's environment, for processes to be started."""
    devices: tuple[str, ...] = ()
    """Accelerators that are free for workers, as ``CUDA_VISIBLE_DEVICES`` names them."""
    cores: int = 1
    """Processor cores that there are."""
    memory: int = 0
    """Memory that there is (bytes); 0: the system does not say."""
    here: Callable[[Order, WorkerContext], Mapping[str, Any] | None] | None = None
    """Carries out an order in this process, with the objects that are open here; None: only its worker module can."""


class Pool(ABC):
    """Carries out orders until it is closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def submit(self, order: Order) -> None:
        """Take an order; returns at once. More than ``capacity`` may be given: they wait here.

        Raises:
            UserError: no worker of this pool can ever have what it needs.
        """

    @abstractmethod
    def events(self) -> Iterator[Event]:
        """What becomes of the orders, as it happens: blocks until there is an event, ends when nothing is under way.

        Events of one order come in order. It may be called again, and orders may be submitted between two events.
        """

    @abstractmethod
    def cancel(self, order: str) -> None:
        """End an order, by its id; it ends as ``stopped``, or as it would have if that comes too late."""

    @abstractmethod
    def capacity(self) -> int:
        """Orders that would be carried out at once if they were submitted now."""

    @abstractmethod
    def close(self) -> None:
        """End whatever is under way, giving it a chance to save, and every process; may be called again."""


class Executor(Plugin[C]):
    """Opens pools."""

    kind = "executor"

    def availability(self) -> Availability:
        """Whether it can be used here at all; asked before anything is written, and imports nothing heavy."""
        return Availability(True)

    @abstractmethod
    def open(self, config: C, context: ExecutorContext) -> Pool:
        """Open a pool; processes may be started here or with the first order.

        Raises:
            UserError: this machine or cluster has not what ``config`` asks for.
        """
