"""A worker's process: carries out the orders that come in, one after another, and tells what becomes of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading

from harness.contracts.executor import Event, Order
from harness.steps.orders import carry_out_order, stopping_at_signals


class Channel:
    """Tells events to the parent, a line each."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._lock = threading.RLock()

    def tell(self, event: Event) -> None:
        """Send an event."""
        # Not through a file's buffer: it refuses a signal's handler that speaks in the middle of a write. The lock
        # lets such a handler in, and other threads wait.
        line = (json.dumps(event.model_dump(exclude_defaults=True)) + "\n").encode()
        if event.kind == "ended":
            # What a signal may have cut short before costs only itself.
            line = b"\n" + line
        with self._lock:
            while line:
                line = line[os.write(self._number, line) :]


def main() -> None:
    """Carry out orders until the parent is gone, or a signal asks to stop."""
    channel = Channel(os.dup(1))
    # Whatever a library prints must not get between the lines for the parent.
    os.dup2(2, 1)
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    with stopping_at_signals():
        while True:
            carry_out_order(Order.model_validate(json.loads(orders.get())), channel.tell)


def _read(orders: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        orders.put(line)
    # The pipe ends when the parent does; so does whatever was started here.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
