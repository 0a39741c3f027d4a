"""Forks processes of ``harness`` that are past the imports; reads one JSON job per line from standard input.

``{"run": [arguments], "env": {}, "log": path, "patch": python}`` answers with a process id; ``{"wait": pid}`` with the
exit code, negative for a signal. ``patch`` runs in the child before the command does, and is where it hurts itself.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, NoReturn


def _child(job: dict[str, Any]) -> NoReturn:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = ["harness", *job["run"]]
    code: Any = 1
    try:
        exec(job.get("patch", ""), {})
        from harness.cli.app import main

        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code or 0))


def main() -> None:
    """Serve until standard input ends."""
    import torch

    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401

    from harness.contracts.registry import load_plugins

    load_plugins()
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(job)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
