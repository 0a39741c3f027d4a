"""Signals that ask an alignment to stop: the step in hand is ended and saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

from harness.core.errors import Requeue


class Stoppable(Protocol):
    """A training that ends after its step in hand once ``stop`` is a signal's number."""

    stop: int | None


class Stopping:
    """Ctrl-C, SIGTERM and SIGUSR1 end the step in hand, save, and stop; a second Ctrl-C stops at once."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._training: Stoppable | None = None
        self.asked: int | None = None
        """The signal that has come."""

    def watch(self, training: Stoppable | None) -> None:
        """Hand signals to a training from now on, one that has come already included; None: there is none."""
        self._training = training
        if training is not None:
            training.stop = self.asked

    def stopped(self, number: int) -> BaseException:
        """What ends a training that was stopped by a signal."""
        self.asked = None
        return KeyboardInterrupt() if number == signal.SIGINT else Requeue(signal.Signals(number).name)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals within."""
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            # Outside the main thread signals belong to somebody else.
            with contextlib.suppress(ValueError):
                before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number != signal.SIGINT:
            # Schedulers repeat themselves; that must not cut the saving short.
            return
        if self._training is None or self.asked is not None:
            # No step is in hand (or the user insists): what is on disk is what is kept.
            raise KeyboardInterrupt if number == signal.SIGINT else Requeue(signal.Signals(number).name)
        self.asked = self._training.stop = number
        self._note("stopping after this step: what is done is saved")
