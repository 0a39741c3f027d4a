"""Stands between `harness serve` and the server it starts: whatever ends first, nothing of the server remains.

Started in a process group of its own as ``python -m harness.serving.child SCRATCH GRACE MODULE ARGUMENTS``. It starts
the server in that group and waits: for the server to end, for a line from its parent, or for the end of its standard
input, which comes however the parent ends, kill -9 included. Then it ends the server, and with it the whole group.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

ENDED = "ended.json"
"""In SCRATCH: how the server ended, for a parent that is still there."""


def main() -> None:
    """Start the server, wait, end all."""
    scratch, grace, module, *arguments = sys.argv[1:]
    stop = threading.Event()
    orphaned = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    # Without -P a file of the working folder could stand in for a module of the server's.
    server = subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], stdin=subprocess.DEVNULL)

    def watch() -> None:
        if not os.read(0, 1):
            orphaned.set()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    while server.poll() is None and not stop.wait(0.1):
        pass
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(float(grace))
    if orphaned.is_set():
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            Path(scratch, ENDED).write_text(json.dumps({"code": server.poll()}), encoding="utf-8")
    # Also what the server has left behind; in a group of somebody else's, nothing but the server.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    server.kill()


if __name__ == "__main__":
    main()
