"""A parent of workers that has the imports behind it: each worker is forked from it, and imports nothing again.

``python -m harness.steps.warm`` imports what it is asked to and forks a worker for every request on its socket; it
carries out nothing itself, so it has no thread of Python's and no CUDA. Not multiprocessing's forkserver: that imports
the caller's main module in every worker, takes modules from the working folder, and has one environment for all.

Where a fork is not safe (an import has begun a thread, or touched CUDA; no pidfd) nothing is forked, and
:class:`harness.WorkerProcess` starts a Python of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

VARYING = frozenset({"CUDA_VISIBLE_DEVICES"})
"""Variables that a worker may have otherwise than its parent: they are read when a device is first used."""
_CODE = struct.Struct("i")
_SIZE = struct.Struct("Q")


def can_fork() -> bool:
    """Whether this system has what a warmed parent needs."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")


class WarmParent:
    """The process that workers are forked from, started with the first of them."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._environment: dict[str, str] = {}
        self._imported: tuple[str, ...] = ()
        self._safe = can_fork()

    def start(
        self, environment: Mapping[str, str], imports: Sequence[str] = (), stderr: int = 2
    ) -> ForkedWorker | None:
        """Fork a worker; None where that is not safe, or it is to have another environment than those before it.

        Args:
            environment: of the worker.
            imports: modules that it needs; those that have not been imported yet are, once for all workers.
            stderr: descriptor of its standard error.
        """
        fixed = {name: value for name, value in environment.items() if name not in VARYING}
        if not self._safe or (self._process is not None and fixed != self._environment):
            return None
        try:
            if self._process is None:
                self._begin(environment, fixed)
            if more := [name for name in imports if name not in self._imported]:
                self._safe = bool(self._ask({"import": more})["safe"])
                self._imported += tuple(more)
            return self._fork(environment, stderr) if self._safe else None
        except (OSError, ValueError, EOFError):
            # It is gone, as when memory ran out.
            self._safe = False
            return None

    def close(self) -> None:
        """End it; its workers live on until their own parent ends them."""
        if self._process is not None and self._socket is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
        self._process = self._socket = None
        self._imported = ()

    def _begin(self, environment: Mapping[str, str], fixed: dict[str, str]) -> None:
        mine, its = socket.socketpair()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with its:
            self._process = subprocess.Popen(
                # Without -P a file of the working folder could stand in for a module.
                [sys.executable, "-P", "-m", "harness.steps.warm", str(its.fileno())],
                # Whether there is CUDA is asked without a touch that a fork would not survive.
                env={"PYTORCH_NVML_BASED_CUDA_CHECK": "1", **environment, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        self._socket, self._environment = mine, fixed

    def _fork(self, environment: Mapping[str, str], stderr: int) -> ForkedWorker:
        orders, send = os.pipe()
        hear, events = os.pipe()
        ending, status = os.pipe()
        theirs = [orders, events, stderr, status]
        try:
            told = self._ask({"fork": dict(environment), "path": [entry for entry in sys.path if entry]}, theirs)
        except BaseException:
            for one in (send, hear, ending):
                os.close(one)
            raise
        finally:
            for one in (orders, events, status):
                os.close(one)
        return ForkedWorker(int(told["pid"]), send, hear, ending, self._reap)

    def _reap(self, pid: int) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError, EOFError):
                self._ask({"reap": pid})

    def _ask(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        assert self._socket is not None
        body = json.dumps(request).encode()
        socket.send_fds(self._socket, [_SIZE.pack(len(body))], list(descriptors))
        self._socket.sendall(body)
        return _received(self._socket)[0]


class ForkedWorker:
    """A worker that somebody else is the parent of, as ``subprocess.Popen`` shows one."""

    def __init__(self, pid: int, orders: int, events: int, ending: int, reap: Callable[[int], None]) -> None:
        """Prepare.

        Args:
            pid: of the process.
            orders: end of a pipe that it reads.
            events: end of a pipe that it writes.
            ending: end of a pipe that says how it ended.
            reap: has its parent forget it.
        """
        self._reap = reap
        self.pid, self.returncode = pid, None
        self.stdin: TextIO = os.fdopen(orders, "w")
        self.stdout: TextIO = os.fdopen(events)
        self._ending = ending
        self._lock = threading.Lock()

    returncode: int | None
    """Exit code once it has ended; negative where a signal ended it."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        with self._lock:
            if self.returncode is None and select.select([self._ending], [], [], 0)[0]:
                said = os.read(self._ending, _CODE.size)
                # Nothing is said where the parent of both is gone; then so is whoever could know.
                self.returncode = _CODE.unpack(said)[0] if len(said) == _CODE.size else 255
                os.close(self._ending)
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it has not ended by then.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            # Another thread may read the end meanwhile.
            with contextlib.suppress(OSError, ValueError):
                select.select([self._ending], [], [], min(0.2, left) if left is not None else 0.2)
        return code

    def reap(self) -> None:
        """Give its number back, once it has ended and whatever it started has been killed."""
        self.wait()
        self._reap(self.pid)

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


# --------------------------------------------------------------------------------------------------- in that process


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One message, and the descriptors that came with it.

    Raises:
        EOFError: the other end is closed.
    """
    head, descriptors, _, _ = socket.recv_fds(connection, _SIZE.size, 8)
    while len(head) < _SIZE.size:
        head += _some(connection, _SIZE.size - len(head))
    (size,) = _SIZE.unpack(head)
    body = b""
    while len(body) < size:
        body += _some(connection, size - len(body))
    found: dict[str, Any] = json.loads(body)
    return found, list(descriptors)


def _some(connection: socket.socket, size: int) -> bytes:
    if not (data := connection.recv(size)):
        raise EOFError("the other end is closed")
    return data


def serve(number: int) -> bool:
    """Import and fork as is asked on a socket, until that ends; returns whether this is a worker that was forked."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        # They are for the workers, which their own parent hands them on to.
        signal.signal(each, signal.SIG_IGN)
    # Python warns of any thread of a library; those have handlers of their own for a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    connection = socket.socket(fileno=number)
    # pid -> its pidfd, and where its end is told
    children: dict[int, tuple[int, int]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    pidfd, status = children.pop(key.data)
                    selector.unregister(pidfd)
                    _tell_end(pidfd, status)
                    continue
                try:
                    request, descriptors = _received(connection)
                except (EOFError, OSError):
                    return False
                answer: dict[str, Any]
                if "import" in request:
                    answer = {"safe": _imported(request["import"])}
                elif "reap" in request:
                    os.waitpid(request["reap"], 0)
                    answer = {}
                else:
                    pid = os.fork()
                    if pid == 0:
                        connection.close()
                        for other in (one for pair in children.values() for one in pair):
                            os.close(other)
                        _become_worker(request, descriptors)
                        return True
                    for one in descriptors[:3]:
                        os.close(one)
                    children[pid] = os.pidfd_open(pid), descriptors[3]
                    selector.register(children[pid][0], selectors.EVENT_READ, pid)
                    answer = {"pid": pid}
                body = json.dumps(answer).encode()
                connection.sendall(_SIZE.pack(len(body)) + body)


def _tell_end(pidfd: int, status: int) -> None:
    """Tell how a worker ended; its number stays taken until it is reaped, so that nobody else is killed under it."""
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    with contextlib.suppress(OSError):
        os.write(status, _CODE.pack(code))
    os.close(pidfd)
    os.close(status)


def _imported(modules: Sequence[str]) -> bool:
    """Import modules; whether it is safe to fork after that."""
    from harness.core.machine import hush_libraries

    hush_libraries()
    for name in modules:
        # Whoever needs it meets the error.
        with contextlib.suppress(Exception, SystemExit):
            importlib.import_module(name)
    return threading.active_count() == 1 and _cuda_survives()


def _cuda_survives() -> bool:
    """Whether a forked process could use CUDA, as one tells that tries; without CUDA there is nothing to survive."""
    torch = sys.modules.get("torch")
    if torch is None or torch.version.cuda is None:
        return True
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            torch.cuda.init()
        except Exception as error:
            code = int("fork" in str(error))
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def _become_worker(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """Be what ``python -m harness.steps.child`` is when it begins."""
    os.setsid()
    for target, one in enumerate(descriptors[:3]):
        os.dup2(one, target)
    for one in descriptors:
        if one > 2:
            os.close(one)
    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["fork"])
    sys.path[:] = request["path"]
    sys.stdin = os.fdopen(0, closefd=False)


def main() -> None:
    """Serve; in a worker, carry out its orders."""
    if serve(int(sys.argv[1])):
        from harness.steps.child import main as work

        work()


if __name__ == "__main__":
    main()
