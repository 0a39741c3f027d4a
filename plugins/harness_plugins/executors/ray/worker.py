"""What runs in Ray's own processes: an order, the comparison of a node with the driver's, and the driver's mailbox."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    Event,
    Order,
    UserError,
    carry_out_order,
    code_versions,
    load_plugins,
    stopping_at_signals,
    torch_device,
)

PATIENCE = 60.0
"""Longest wait (seconds) for a step's folder that a worker holds which was cut off, or whose driver was killed."""
SILENCE = 60.0
"""Longest time (seconds) that a worker tries to reach the driver."""
VISIBLE = 15.0
"""Longest time (seconds) until a shared folder shows on one node what another has written."""

Message = tuple[str, int, int, str, int, dict[str, Any]]
"""Order, attempt, number of the event in this attempt, node, process on it, event."""


class Mailbox:
    """What workers say, until the driver takes it.

    ``ray.util.queue.Queue`` hands over one item per call, and under a timeout can lose one.
    """

    def __init__(self) -> None:
        self._said: list[Message] = []
        self._any = asyncio.Event()

    async def put(self, message: Message) -> None:
        """Keep a message."""
        self._said.append(message)
        self._any.set()

    async def take(self, seconds: float) -> list[Message]:
        """All messages, in their order; waits so long for the first."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._any.wait(), seconds)
        said, self._said = self._said, []
        self._any.clear()
        return said


@dataclass(frozen=True)
class Expected:
    """What a node must be like to carry out orders of a run."""

    plugins: tuple[str, ...]
    folder: str
    """Working folder."""
    versions: Mapping[str, str]
    token: str = ""
    """File that the driver has written into the run folder; empty: there is none any more."""
    secret: str = ""
    """What stands in it."""


def versions_here(plugins: tuple[str, ...]) -> dict[str, str]:
    """What carries out orders here, and on what kind of device."""
    return {**code_versions(load_plugins(plugins)), "device": torch_device()}


def differences(expected: Expected) -> list[str]:
    """In what this node is not as the driver's; each in words."""
    found = []
    if expected.token and not _sees(Path(expected.token), expected.secret):
        found.append(f"the run folder {Path(expected.token).parent} is not the one that the driver sees")
    if expected.folder and not Path(expected.folder).is_dir():
        found.append(f"there is no folder {expected.folder}, which this command was started in")
    if missing := [file for file in expected.plugins if not Path(file).is_file()]:
        return [*found, f"there is no plugin file {missing[0]}"]
    try:
        here = versions_here(expected.plugins)
    except UserError as error:
        return [*found, f"its plugins do not load: {error.where}: {error.what}"]
    names = sorted(expected.versions.keys() | here.keys())
    for name in names:
        there, ours = here.get(name, "missing"), expected.versions.get(name, "missing")
        if there != ours:
            found.append(f"{name} is {there}, and {ours} where the driver is")
    return found


def _sees(token: Path, secret: str) -> bool:
    end = time.monotonic() + VISIBLE
    while True:
        with contextlib.suppress(OSError):
            if token.read_text(encoding="utf-8") == secret:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def carry_out(text: str, mailbox: Any, secrets: Mapping[str, str], checked: frozenset[str], expected: Expected) -> None:
    """Carry out an order in this process, and tell the driver what becomes of it."""
    import ray

    order = Order.model_validate_json(text)
    # Ray shows the driver what is printed here as its own output, which may be a table or JSON.
    os.dup2(2, 1)
    os.environ.update(secrets)
    node = ray.get_runtime_context().get_node_id()
    tell = Telling(order, mailbox, node)
    with stopping_at_signals():
        # One that joined when the others had been compared.
        if node not in checked and (found := differences(expected)):
            tell(Event(order=order.id, kind="started"))
            tell(Event(order=order.id, kind="ended", outcome="failed", failure=_refused(node, found)))
            return
        carry_out_order(order, tell, patience=PATIENCE)


def _refused(node: str, found: list[str]) -> Any:
    from harness import Failure

    where, what, fix = refusal(f"node {node[:8]}", found)
    return Failure(kind="user", parts=(where, what, fix), text=what)


def refusal(node: str, found: list[str]) -> tuple[str, str, str]:
    """Where, what and remedy of a node that is not as the driver's."""
    more = f" (and {len(found) - 3} differences more)" if len(found) > 3 else ""
    folder = any("folder" in one for one in found)
    fix = (
        "Give --out a path that all nodes share (NFS, Lustre, ...), and run the command in such a folder: nothing is "
        "copied between nodes."
        if folder
        else "Install the same versions and plugins on every node, best one environment on a path that they share."
    )
    return f"executor ray, {node}", "; ".join(found[:3]) + more, fix


class Telling:
    """Sends events to the driver, one after another; without a driver the process ends."""

    def __init__(self, order: Order, mailbox: Any, node: str) -> None:
        self._order, self._mailbox, self._node, self._count = order, mailbox, node, 0
        # A signal's handler may speak in the middle of it.
        self._lock = threading.RLock()

    def __call__(self, event: Event) -> None:
        """Send an event, and wait until it is there: whatever ends this process afterwards, it has been told."""
        with self._lock:
            self._count += 1
            data = event.model_dump(mode="json", exclude_defaults=True)
            self._send((self._order.id, self._order.attempt, self._count, self._node, os.getpid(), data))

    def _send(self, message: Message) -> None:
        from ray import get
        from ray.exceptions import ActorUnavailableError, RayError

        end = time.monotonic() + SILENCE
        while True:
            try:
                get(self._mailbox.put.remote(message))
                return
            except ActorUnavailableError:
                # It may have arrived all the same: the driver tells by the number.
                if time.monotonic() > end:
                    os._exit(1)
                time.sleep(1)
            except RayError:
                # Nobody waits for this order any more. Whoever gives it again finds no failure that was none.
                os._exit(1)
