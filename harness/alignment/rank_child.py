"""One process of an alignment on several devices; :mod:`harness.alignment.ranks` starts it and hears what it says."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from harness.alignment.ranks import OPTION, MuteStep, Rank
from harness.contracts.executor import Order, WorkerContext
from harness.core.errors import Requeue, UserError
from harness.core.progress import Reporter
from harness.core.records import AdapterInfo
from harness.core.specs import AlignSpec
from harness.core.trackers import tracking_of
from harness.steps.folder import StepFolder


def carry_out(order: Order, context: WorkerContext) -> None:
    """Train as the parent's order says.

    Raises:
        MemoryError: where memory ran out, in whatever words.
        KeyboardInterrupt, Requeue: a signal stopped it, and its part is saved.
    """
    from harness.alignment.driver import StoppedError, out_of_memory

    try:
        _train(order.spec, context.reporter)
    except StoppedError as stopped:
        if stopped.number == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise Requeue(signal.Signals(stopped.number).name) from None
    except Exception as error:
        problem = out_of_memory(error)
        if problem is None:
            raise
        raise MemoryError(problem) from error


def _train(payload: dict[str, Any], reporter: Reporter) -> None:
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
    tracking = tracking_of(payload["tracking"])
    earlier = Path(payload["earlier"]) if payload["earlier"] else None
    share = RankShare(rank, payload["stage"], earlier, payload["micro"], tracking)
    train_in_rank(plan, registry, reporter if rank.first else Reporter(), work, share)
    import torch.distributed

    torch.distributed.destroy_process_group()
