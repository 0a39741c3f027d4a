"""One alignment on several devices: a child process per device, joined by accelerate's data-parallel training.

The parent plans, prepares rows, holds the folder and tells how far things are; the children train. Of them the first
alone writes (and each keeps its own random state in the checkpoints). Children end with their parent, however it ends.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from harness.contracts.registry import Origin
from harness.core.errors import StepError, UserError
from harness.core.progress import Reporter, stored
from harness.steps.folder import StepFolder

OPTION = "--processes"
_ORDER = ("user", "memory", "step", "stopped", "bug")
"""Which of several children's endings is the cause: a peer of a failed child fails too, for want of its peer."""


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
        self._reporter = reporter
        self._bars: dict[int, Callable[[int], None]] = {}
        self.endings: list[dict[str, Any]] = []
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(count),
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        }
        # Otherwise each takes all cores, and they take turns.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        self._processes = [_start(environment, payload, number) for number in range(count)]
        self._readers = [threading.Thread(target=self._listen, args=(child,), daemon=True) for child in self._processes]
        for reader in self._readers:
            reader.start()

    @property
    def stop(self) -> int | None:
        """The signal that was handed on."""
        return None

    @stop.setter
    def stop(self, number: int | None) -> None:
        if number is not None:
            for child in self._processes:
                child.send_signal(number)

    def wait(self) -> None:
        """Wait for all; the first that fails takes the others with it."""
        waiting = list(zip(self._processes, self._readers, strict=True))
        while waiting:
            for child, reader in waiting:
                with suppress(subprocess.TimeoutExpired):
                    code = child.wait(timeout=0.1)
                    reader.join()
                    # Stopped by a signal, all of them end by themselves, each saving its part.
                    if code and not any(ending["kind"] == "stopped" for ending in self.endings):
                        self.kill()
                    waiting.remove((child, reader))
                    break

    @property
    def codes(self) -> list[int | None]:
        """How each ended."""
        return [child.returncode for child in self._processes]

    def kill(self) -> None:
        """End them all at once."""
        for child in self._processes:
            child.kill()

    def _listen(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            said = json.loads(line)
            if "note" in said:
                self._reporter.note(said["note"])
            elif "start" in said:
                self._bars[said["bar"]] = self._reporter.start(*said["start"])
            elif "advance" in said:
                self._bars[said["bar"]](said["advance"])
            elif "stored" in said:
                stored(self._bars[said["bar"]], said["stored"])
            else:
                self.endings.append(said)


def train_apart(
    payload: dict[str, Any], count: int, reporter: Reporter, started: Callable[[Children], None]
) -> dict[str, Any] | None:
    """Train in ``count`` processes, and say how that ended.

    Args:
        payload: for :mod:`harness.alignment.rank_child`: ``spec``, ``plugins``, ``folder``, ``out``, ``id``, ``micro``.
        count: processes.
        reporter: hears what the first child says.
        started: is given the children, to hand signals on.

    Returns:
        None when they came to their end; else the ending that caused the others: its ``kind`` is memory or stopped.

    Raises:
        UserError, StepError: as a child met them.
    """
    children = Children(payload, count, reporter)
    try:
        started(children)
        children.wait()
    finally:
        children.kill()
    codes = children.codes
    if not any(codes):
        return None
    silent = {"kind": "bug", "text": f"a process ended with {next(filter(None, codes))} and said nothing"}
    cause = min(children.endings or [silent], key=lambda ending: _ORDER.index(ending["kind"]))
    if cause["kind"] == "user":
        raise UserError(*cause["parts"])
    if cause["kind"] == "step":
        raise StepError(*cause["parts"])
    if cause["kind"] == "bug":
        raise RuntimeError(f"one of {count} processes failed:\n{cause['text']}")
    return cause


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(environment: dict[str, str], payload: dict[str, Any], number: int) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "harness.alignment.rank_child"],
        env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A Ctrl-C of the terminal goes to the parent alone, which hands it on once.
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(payload) + "\n")
    child.stdin.flush()
    return child


def plugin_files(origins: Sequence[Origin]) -> list[str]:
    """Loose files among where plugins come from."""
    return [str(origin.loose) for origin in origins if origin.loose is not None]
