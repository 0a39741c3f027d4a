"""One process of an alignment on several devices; :mod:`harness.alignment.ranks` starts it and hears what it says."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from harness.alignment.ranks import OPTION, MuteStep, Rank
from harness.core.errors import StepError, UserError
from harness.core.progress import Reporter
from harness.core.records import AdapterInfo
from harness.core.specs import AlignSpec
from harness.steps.folder import StepFolder


class _Relay(Reporter):
    """Tells the parent."""

    def __init__(self, channel: IO[str]) -> None:
        self._channel, self._count = channel, 0

    def send(self, **said: Any) -> None:
        # Not through the file's buffer: it refuses a signal's handler that speaks in the middle of a write. A line is
        # short enough for the pipe to take it in one piece.
        line = (json.dumps(said) + "\n").encode()
        while line:
            line = line[os.write(self._channel.fileno(), line) :]

    def note(self, text: str) -> None:
        self.send(note=text)

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        bar = self._count
        self._count += 1
        self.send(start=[title, total, done], bar=bar)
        return _RelayedBar(self, bar)


class _RelayedBar:
    """One task of the parent's display."""

    def __init__(self, relay: _Relay, number: int) -> None:
        self._relay, self._number = relay, number

    def __call__(self, items: int) -> None:
        self._relay.send(advance=items, bar=self._number)

    def stored(self, items: int) -> None:
        self._relay.send(stored=items, bar=self._number)


def _end_with_parent() -> None:
    def watch() -> None:
        # Nothing comes: the pipe ends when the parent does.
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """One child: train as the parent's payload says, and tell it how that ended."""
    channel = os.fdopen(os.dup(1), "w")
    # Whatever a library prints must not get between the lines for the parent.
    os.dup2(2, 1)
    relay = _Relay(channel)
    payload = json.loads(sys.stdin.readline())
    _end_with_parent()
    try:
        _train(payload, relay)
    except BaseException as error:
        relay.send(**_ending(error))
        return 1
    return 0


def _ending(error: BaseException) -> dict[str, Any]:
    import traceback

    from harness.alignment.driver import StoppedError, out_of_memory

    if isinstance(error, StoppedError):
        return {"kind": "stopped", "number": error.number}
    if isinstance(error, UserError):
        return {"kind": "user", "parts": [error.where, error.what, error.fix]}
    if isinstance(error, StepError):
        return {"kind": "step", "parts": [error.step, error.what, error.fix]}
    problem = out_of_memory(error) if isinstance(error, Exception) else None
    if problem is not None:
        return {"kind": "memory", "text": problem}
    return {"kind": "bug", "text": "".join(traceback.format_exception(error))}


def _train(payload: dict[str, Any], relay: _Relay) -> None:
    from harness.alignment.plan import plan_align
    from harness.alignment.stage import RankShare, train_in_rank
    from harness.contracts.registry import load_plugins

    rank = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    registry = load_plugins(payload["plugins"])
    spec, start = AlignSpec.model_validate(payload["spec"]), payload["start"]
    made = {str(spec.start): AdapterInfo.model_validate(start)} if start is not None else {}
    plan = plan_align(spec, registry, made=made)
    if plan.id != payload["id"]:
        raise UserError(
            OPTION,
            "another process sees other plugins or data than this one",
            "Plugins must be installed or given as files (--plugin).",
        )
    kind = StepFolder if rank.first else MuteStep
    work = kind(Path(payload["folder"]), plan.id, "align", Path(payload["out"]))
    share = RankShare(rank, payload["stage"], payload["earlier"] and Path(payload["earlier"]), payload["micro"])
    train_in_rank(plan, registry, relay if rank.first else Reporter(), work, share)
    import torch.distributed

    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    # Not this module as __main__, but as everybody else imports it.
    from harness.alignment.rank_child import main as run

    raise SystemExit(run())
