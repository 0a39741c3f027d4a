"""What the orders of :func:`harness.testing.check_executor` do: speak, leave a file, fail, crash or wait."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from harness.contracts.executor import Order, WorkerContext
from harness.core.errors import UserError

NOTES = ("first", "second", "third")
ITEMS = 5
MISTAKE = ("the kit's order", "is wrong on purpose", "Nothing is to be done.")
EXIT_CODE = 7


def process() -> list[Any]:
    """Which process this is, over all machines."""
    return [socket.gethostname(), os.getpid()]


def left_by(folder: Path, order: str) -> list[Path]:
    """The files that an order has left, one for every time that it was carried out."""
    return sorted(folder.glob(f"{order}.*"))


def carry_out(order: Order, context: WorkerContext) -> dict[str, Any]:
    """Carry out one order of the kit."""
    folder, does = Path(order.run), order.spec.get("does", "leaves")
    missing = [name for name in order.spec.get("after", ()) if not left_by(folder, name)]
    if missing:
        raise RuntimeError(f"{order.id} was begun before {', '.join(missing)} had ended")
    bar = context.reporter.start(order.id, ITEMS)
    for done, note in enumerate(NOTES, start=1):
        context.reporter.note(f"{order.id}: {note}")
        bar(ITEMS // len(NOTES) if done < len(NOTES) else ITEMS - ITEMS // len(NOTES) * (len(NOTES) - 1))
    if does == "raises":
        raise RuntimeError("fails on purpose")
    if does == "mistakes":
        raise UserError(*MISTAKE)
    if does == "crashes":
        os._exit(EXIT_CODE)
    (folder / f"{order.id}.{uuid4().hex}").touch()
    # Longest that it waits for another, or to be cancelled.
    end = time.monotonic() + order.spec["seconds"]
    while does == "meets" and not left_by(folder, order.spec["other"]):
        if time.monotonic() > end:
            raise RuntimeError(f"{order.spec['other']} was not carried out beside {order.id}")
        time.sleep(0.01)
    while does == "waits" and time.monotonic() < end:
        time.sleep(0.01)
    return {"order": order.model_dump(mode="json"), "process": process()}
