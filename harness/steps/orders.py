"""Carrying out one order where one is, telling it as events, and showing events where somebody looks."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from harness.contracts.executor import Event, ExecutorContext, Failure, Observers, Order, Pool, WorkerContext
from harness.core.config import Config
from harness.core.errors import CorruptionError, HarnessError, Requeue, StepError, UserError
from harness.core.machine import hush_libraries
from harness.core.progress import Reporter, stored
from harness.core.records import StepInfo, StepRecord
from harness.steps.files import is_disk_full, refusal
from harness.steps.lock import patient

Work = Callable[[Order, WorkerContext], Mapping[str, Any] | None]
Tell = Callable[[Event], None]


def carry_out_order(order: Order, tell: Tell, *, patience: float = 0.0) -> None:
    """Carry out an order in this process, as its worker module does, and tell everything as events.

    What the worker's function raises is told, not raised, so that the next order can come. A signal that asks to stop
    (as ``Requeue`` or ``KeyboardInterrupt``) is told and goes on.

    Args:
        order: to be carried out.
        tell: is given every event.
        patience: longest wait (seconds) for a folder that another process holds, which may be one that is cut off.
    """
    hush_libraries()
    relay = RelayReporter(order.id, tell)
    with patient(patience):
        _carry_out(order, WorkerContext(relay, RelayObservers(order.id, tell)), tell, _worker_of)


@contextlib.contextmanager
def stopping_at_signals() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and SIGUSR1 stop an order; what stopped it ends here, since it has been told."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def stop(number: int, frame: FrameType | None) -> None:
        # Schedulers repeat themselves; a second signal must not cut the first one's saving short.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Requeue(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, stop)
        yield
    except (KeyboardInterrupt, Requeue):
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _worker_of(order: Order, context: WorkerContext) -> Mapping[str, Any] | None:
    if order.folder and Path(order.folder) != Path.cwd():
        os.chdir(order.folder)
    found: Mapping[str, Any] | None = importlib.import_module(order.worker).carry_out(order, context)
    return found


def _carry_out(order: Order, context: WorkerContext, tell: Tell, work: Work) -> None:
    tell(Event(order=order.id, kind="started"))
    try:
        result = dict(work(order, context) or {})
    except (KeyboardInterrupt, Requeue) as stop:
        tell(Event(order=order.id, kind="ended", outcome="stopped", signal=_signal_of(stop)))
        raise
    except BaseException as error:
        failure = failure_of(error)
        tell(Event(order=order.id, kind="ended", outcome="failed", failure=failure, cause=error))
    else:
        tell(Event(order=order.id, kind="ended", outcome="done", result=result))


def _signal_of(stop: BaseException) -> int:
    if isinstance(stop, KeyboardInterrupt):
        return signal.SIGINT
    named = str(stop)
    return signal.Signals[named] if named in signal.Signals.__members__ else signal.SIGTERM


# ---------------------------------------------------------------------------------------------------- errors as data


def failure_of(error: BaseException) -> Failure:
    """An error as data."""
    text = _sendable(str(error))
    refused = refusal(error) if isinstance(error, OSError) and is_disk_full(error) else None
    if isinstance(error, UserError):
        return Failure(kind="user", parts=tuple(map(_sendable, (error.where, error.what, error.fix))), text=text)
    if isinstance(error, StepError):
        return Failure(kind="step", parts=tuple(map(_sendable, (error.step, error.what, error.fix))), text=text)
    if isinstance(error, CorruptionError):
        return Failure(kind="damage", text=text)
    if isinstance(error, OSError) and refused is not None:
        return Failure(kind="user", parts=(str(error.filename or "a file"), *refused), text=text)
    if isinstance(error, MemoryError):
        return Failure(kind="memory", text=text)
    return Failure(kind="bug", text=_sendable("".join(traceback.format_exception(error))))


def error_of(failure: Failure) -> Exception:
    """The error that a failure stands for."""
    if failure.kind == "user":
        return UserError(*failure.parts)
    if failure.kind == "step":
        return StepError(*failure.parts)
    if failure.kind == "damage":
        return CorruptionError(failure.text)
    return MemoryError(failure.text) if failure.kind == "memory" else HarnessError(failure.text)


def _sendable(text: str) -> str:
    """Text without halves of characters, as names of files may hold: JSON has none."""
    return text.encode("utf-8", "replace").decode()


# ------------------------------------------------------------------------------------------------- telling and showing


class RelayReporter(Reporter):
    """Tells as events what a display would show."""

    def __init__(self, order: str, tell: Tell) -> None:
        self._order, self._tell, self._bars = order, tell, 0

    def note(self, text: str) -> None:
        self._tell(Event(order=self._order, kind="note", text=_sendable(text)))

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        bar = self._bars
        self._bars += 1
        self._tell(Event(order=self._order, kind="bar", bar=bar, text=_sendable(title), total=total, more=done))
        return _RelayedBar(self._order, self._tell, bar)


class _RelayedBar:
    """One task of the display at the other end."""

    def __init__(self, order: str, tell: Tell, bar: int) -> None:
        self._order, self._tell, self._bar = order, tell, bar

    def __call__(self, items: int) -> None:
        self._tell(Event(order=self._order, kind="bar", bar=self._bar, more=items))

    def stored(self, items: int) -> None:
        self._tell(Event(order=self._order, kind="bar", bar=self._bar, more=items, stored=True))


class RelayObservers:
    """Tells as events what observers are to hear: they are where the run is, one of each."""

    def __init__(self, order: str, tell: Tell) -> None:
        self._order, self._tell = order, tell
        self.warnings: list[str] = []

    def announce(self, hook: str, **arguments: Any) -> None:
        """Tell of a step."""
        plain = {name: value.model_dump(mode="json") for name, value in arguments.items()}
        self._tell(Event(order=self._order, kind="step", hook=hook, arguments=plain))


class Display:
    """Shows events to the reporter and the observers of this process."""

    def __init__(self, reporter: Reporter, observers: Observers | None = None) -> None:
        self._reporter, self._observers = reporter, observers
        self._bars: dict[tuple[str, int], Callable[[int], None]] = {}

    def show(self, event: Event) -> None:
        """Show one event; those that only say what became of an order show nothing."""
        if event.kind == "note":
            self._reporter.note(event.text)
        elif event.kind == "bar" and event.bar is not None:
            self._advance(event, (event.order, event.bar))
        elif event.kind == "step" and self._observers is not None:
            announce(self._observers, self._reporter, event.hook, **_arguments(event))
        elif event.kind == "ended":
            self._bars = {key: bar for key, bar in self._bars.items() if key[0] != event.order}

    def _advance(self, event: Event, key: tuple[str, int]) -> None:
        if event.total is not None:
            self._bars[key] = self._reporter.start(event.text, event.total, event.more)
        elif key in self._bars:
            stored(self._bars[key], event.more) if event.stored else self._bars[key](event.more)


def _arguments(event: Event) -> dict[str, Any]:
    kinds: dict[str, type[Config]] = {"step": StepInfo, "record": StepRecord}
    return {name: kinds[name].model_validate(value) for name, value in event.arguments.items()}


def announce(observers: Observers, reporter: Reporter, hook: str, **arguments: Any) -> None:
    """Tell observers of a step, and the user of an observer that raised."""
    observers.announce(hook, **arguments)
    for warning in observers.warnings:
        reporter.note(f"warning: {warning}")
    observers.warnings.clear()


# ------------------------------------------------------------------------------------------------------ in this process


class InProcessPool(Pool):
    """One order after another, in this process: nothing is started and a debugger can step into it.

    Notes, bars and steps go straight to where they are shown; what stops the process goes through :meth:`events`.
    """

    def __init__(self, context: ExecutorContext) -> None:
        self._context = context
        self._waiting: deque[Order] = deque()
        self._said: deque[Event] = deque()

    def submit(self, order: Order) -> None:
        """Take an order; it is carried out when events are asked for."""
        self._waiting.append(order)

    def events(self) -> Iterator[Event]:
        """Carry out what waits, and tell how each began and ended."""
        context = WorkerContext(self._context.reporter, self._context.observers)
        while self._said or self._waiting:
            if not self._said:
                _carry_out(self._waiting.popleft(), context, self._said.append, self._context.here or _worker_of)
            while self._said:
                yield self._said.popleft()

    def cancel(self, order: str) -> None:
        """End an order that waits."""
        for one in [one for one in self._waiting if one.id == order]:
            self._waiting.remove(one)
            self._said.append(Event(order=order, kind="ended", outcome="stopped", signal=signal.SIGTERM))

    def capacity(self) -> int:
        """One, where none waits."""
        return 0 if self._waiting else 1

    def close(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._said.clear()
