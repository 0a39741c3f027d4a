"""How a run says what it is doing: rich bars on a terminal, plain lines elsewhere, nothing from Python."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from harness.text import visible

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


class Bar:
    """Progress that is full at the end, however much of it was announced on the way."""

    def __init__(self, advance: Callable[[int], None], total: int) -> None:
        self._advance, self._left = advance, total

    def advance(self, more: int) -> None:
        """So many more items are done."""
        more = min(more, self._left)
        if more > 0:
            self._left -= more
            self._advance(more)

    def fill(self) -> None:
        """All items are done."""
        self.advance(self._left)


class PlainReporter(Reporter):
    """Lines on standard error, for logs and pipes."""

    def note(self, text: str) -> None:
        print(visible(text, lines=True), file=sys.stderr, flush=True)

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        title = visible(title)
        begun = last = time.monotonic()
        count = done
        print(f"{title}: {done}/{total}", file=sys.stderr, flush=True)

        def advance(items: int) -> None:
            nonlocal count, last
            count += items
            now = time.monotonic()
            if now - last < PLAIN_SECONDS and count < total:
                return
            last = now
            rate = (count - done) / max(now - begun, 1e-9)
            left = (total - count) / rate if rate > 0 else 0.0
            print(
                f"{title}: {count}/{total}, {rate:.1f} items/s" + (f", {left:.0f} s left" if count < total else ""),
                file=sys.stderr,
                flush=True,
            )

        return advance


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
        task: TaskID = self._progress.add_task(visible(title), total=total, completed=done, rate="")
        begun = time.monotonic()
        count = 0

        def advance(items: int) -> None:
            nonlocal count
            count += items
            rate = count / max(time.monotonic() - begun, 1e-9)
            self._progress.update(task, advance=items, rate=f"{rate:.1f} items/s")

        return advance

    def close(self) -> None:
        self._progress.stop()


def for_terminal() -> Reporter:
    """The reporter that suits standard error."""
    return RichReporter() if sys.stderr.isatty() else PlainReporter()
