"""Processes of our own that carry out orders: started, listened to, handed signals, and ended in one way.

A worker is ``python -m harness.steps.child``: it reads orders from its standard input, a line of JSON each, and tells
events on its standard output. It is the first of a process group of its own: a Ctrl-C of the terminal reaches the
parent alone, which hands it on once, and whatever the worker has started ends with it. It ends with its parent, however
that ends: then its standard input does. It may also be forked from a parent that has imported what it needs
(:mod:`harness.steps.warm`), and is then the same in all of this.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from harness.contracts.executor import Event, Order
from harness.steps.warm import ForkedWorker, WarmParent


class WorkerProcess:
    """One process that carries out orders, one at a time."""

    def __init__(
        self,
        tell: Callable[[Event], None],
        environment: Mapping[str, str] | None = None,
        *,
        stderr: IO[Any] | None = None,
        pass_fds: Sequence[int] = (),
        warm: WarmParent | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        """Start it.

        Args:
            tell: is given every event, in a thread of its own: a queue's ``put``, say.
            environment: of the process; that of this one by default. What can be imported here can be there.
            stderr: where its standard error (and whatever a library prints) goes; to this process's by default.
            pass_fds: open files that it keeps; a process that keeps some is never forked.
            warm: forks it, where that is safe.
            imports: modules that it will need, which ``warm`` imports once for all.
        """
        self._tell = tell
        self._order: Order | None = None
        self._heard_all = self._gone = False
        self._lock = threading.Lock()
        environment = os.environ if environment is None else environment
        forked = None
        if warm is not None and not pass_fds:
            forked = warm.start(environment, imports, stderr.fileno() if stderr is not None else 2)
        self._child = forked or _started(environment, stderr, pass_fds)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._child.pid

    @property
    def busy(self) -> bool:
        """Whether an order is under way."""
        return self._order is not None

    @property
    def alive(self) -> bool:
        """Whether it can take another order."""
        return not self._heard_all and self._child.poll() is None

    def submit(self, order: Order) -> None:
        """Send an order; a process that has died meanwhile crashes it."""
        assert self._order is None, "one order at a time"
        with self._lock:
            self._order = order
            if self._heard_all:
                self._crashed()
                return
        assert self._child.stdin is not None
        # A process that is gone is heard of by the listener.
        with contextlib.suppress(OSError):
            self._child.stdin.write(json.dumps(order.model_dump()) + "\n")
            self._child.stdin.flush()

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Hand a signal on to the process; what it does is saved, and its order ends as stopped."""
        self._child.send_signal(number)

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for its end; returns the exit code, None where that took longer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._child.wait(seconds)
            self._listener.join()
            return code
        return None

    def close(self, grace: float = 0.0) -> None:
        """End it: at once where no order is under way, else when it has saved, or after ``grace`` seconds."""
        try:
            if self.busy and grace > 0 and self._child.poll() is None:
                self.signal()
                self.wait(grace)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, and all that it started, at once."""
        if self._gone:
            return
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # All have ended; or it is so young that it has no group of its own yet.
            self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        self._gone = True
        if isinstance(self._child, ForkedWorker):
            self._child.reap()
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()

    def _listen(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            # A signal may cut a line short; the next one begins anew.
            with contextlib.suppress(ValueError):
                event = Event.model_validate(json.loads(line))
                if event.kind == "ended":
                    self._order = None
                self._tell(event)
        self._child.wait()
        with self._lock:
            self._heard_all = True
            if self._order is not None:
                self._crashed()

    def _crashed(self) -> None:
        assert self._order is not None
        order, self._order = self._order, None
        self._tell(Event(order=order.id, kind="ended", outcome="crashed", code=self._child.returncode))


def _started(environment: Mapping[str, str], stderr: IO[Any] | None, pass_fds: Sequence[int]) -> subprocess.Popen[str]:
    """A Python of its own."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        # Without -P a file of the working folder could stand in for a module.
        [sys.executable, "-P", "-m", "harness.steps.child"],
        env={**environment, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def said_of(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        return f"was killed by {name}" + (", as when memory runs out" if -code == signal.SIGKILL else "")
    return f"ended{'' if code is None else f' with code {code}'} and said nothing"
