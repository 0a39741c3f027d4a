"""What a child process says reaches its parent whole, also when a signal's handler speaks in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import threading
from types import FrameType

from harness.alignment.rank_child import _Relay


def test_a_handler_may_speak_while_a_line_is_written() -> None:
    reading, writing = os.pipe()
    lines: list[str] = []
    with os.fdopen(reading) as heard, os.fdopen(writing, "w") as channel:
        reader = threading.Thread(target=lambda: lines.extend(heard))
        reader.start()
        relay, spoken = _Relay(channel), 0

        def handler(number: int, frame: FrameType | None) -> None:
            nonlocal spoken
            spoken += 1
            relay.note("from the handler")

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        try:
            # Until the handler has come in between often enough; a buffered file fails within a few.
            said = 0
            while spoken < 200:
                relay.send(advance=said, bar=0)
                said += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        channel.close()
        reader.join()
    found = [json.loads(line) for line in lines]
    assert [one["advance"] for one in found if "advance" in one] == list(range(said))
    assert sum("note" in one for one in found) == spoken
