"""How a run says what it is doing: rich bars on a terminal, plain lines elsewhere, nothing from Python."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from harness.core.text import visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 10.0
"""Least time between two plain lines about one task."""


class Reporter:
    """Says nothing; the base of the other two."""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def note(self, text: str) -> None:
        """One line for the user."""

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        """Announce ``total`` items, of which ``done`` are there already; returns ``advance(items)``."""
        return lambda items: None

    def close(self) -> None:
        """End the display."""


def stored(advance: Callable[[int], None], items: int) -> None:
    """Tell a display that so many items were there before: they are done, but no part of this process's speed."""
    getattr(advance, "stored", advance)(items)


class Bar:
    """Progress that is full at the end, however much of it was announced on the way."""

    def __init__(self, advance: Callable[[int], None], total: int) -> None:
        self._advance, self._left = advance, total

    def advance(self, more: int) -> None:
        """So many more items are done."""
        more = self._taken(more)
        if more > 0:
            self._advance(more)

    def stored(self, more: int) -> None:
        """So many more items were done by an earlier run."""
        stored(self._advance, self._taken(more))

    def fill(self) -> None:
        """All items are done."""
        self.advance(self._left)

    def _taken(self, more: int) -> int:
        more = max(0, min(more, self._left))
        self._left -= more
        return more


class _Pace:
    """How fast one task gets on: what was stored before does not count, nor the time until that was known."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.count = total, done
        self._stored, self._begun = done, time.monotonic()

    def stored(self, items: int) -> None:
        if self.count == self._stored:
            self._begun = time.monotonic()
        self.count += items
        self._stored += items

    def rate(self) -> float:
        """Items per second."""
        return (self.count - self._stored) / max(time.monotonic() - self._begun, 1e-9)


class PlainReporter(Reporter):
    """Lines on standard error, for logs and pipes."""

    def note(self, text: str) -> None:
        print(visible(text, lines=True), file=sys.stderr, flush=True)

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        return _Lines(visible(title), _Pace(total, done))


class _Lines:
    """One task in plain lines."""

    def __init__(self, title: str, pace: _Pace) -> None:
        self._title, self._pace, self._last = title, pace, time.monotonic()
        self._say("")

    def __call__(self, items: int) -> None:
        pace = self._pace
        pace.count += items
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS and pace.count < pace.total:
            return
        self._last = now
        rate = pace.rate()
        left = f", {(pace.total - pace.count) / rate:.0f} s left" if pace.count < pace.total and rate > 0 else ""
        self._say(f", {rate:.1f} items/s{left}")

    def stored(self, items: int) -> None:
        self._pace.stored(items)
        if items:
            self._say(", stored before")

    def _say(self, more: str) -> None:
        print(f"{self._title}: {self._pace.count}/{self._pace.total}{more}", file=sys.stderr, flush=True)


class RichReporter(Reporter):
    """A bar per task with items/s and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._progress: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._progress.start()

    def note(self, text: str) -> None:
        self._console.print(visible(text, lines=True), markup=False, highlight=False)

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        task = self._progress.add_task(visible(title), total=total, completed=done, rate="")
        return _Filling(self._progress, task, _Pace(total, done))

    def close(self) -> None:
        self._progress.stop()


class _Filling:
    """One task as a bar."""

    def __init__(self, progress: Progress, task: TaskID, pace: _Pace) -> None:
        self._progress, self._task, self._pace = progress, task, pace

    def __call__(self, items: int) -> None:
        self._pace.count += items
        self._progress.update(self._task, advance=items, rate=f"{self._pace.rate():.1f} items/s")

    def stored(self, items: int) -> None:
        self._pace.stored(items)
        # Begun anew, as rich takes whatever is added later for speed.
        self._progress.reset(self._task, completed=self._pace.count)


def for_terminal() -> Reporter:
    """The reporter that suits standard error."""
    return RichReporter() if sys.stderr.isatty() else PlainReporter()
