"""The run folder of a study: whether it holds this very one, and which ids its steps have."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.report.study import INDEX
from harness.steps.files import read_json, write_bytes, write_json
from harness.steps.store import RUN, RunStore
from harness.study.plan import StudyPlan


def check_study(out: Path, plan: StudyPlan) -> bool:
    """Whether the folder is empty or holds this very study, perhaps with fewer arms; writes nothing.

    Returns:
        whether it holds a plan; a damaged one is none, and is written again: every step is known by its own id.

    Raises:
        UserError: it holds something else; says what.
    """
    RUN.refuse(out)
    file = RunStore(out).plan_file
    held: dict[str, Any] = {}
    with contextlib.suppress(OSError, CorruptionError):
        held = read_json(file)
    if not held:
        return False
    if "study" not in held:
        raise UserError(RUN.where(out), "holds an evaluation, not a study", "Give another --out, or --fresh.")
    steps = {step.id for step in plan.graph}
    # Steps of arms that wait for a search are known once it has chosen, and are held against it then.
    ends = tuple(f"+{name}" for name in plan.waiting)
    lost = [
        step
        for step in held["steps"]
        if step["key"] not in steps and step["arm"] not in plan.waiting and not str(step["arm"]).endswith(ends)
    ]
    if lost:
        arms = ", ".join(dict.fromkeys(step["arm"] for step in lost[:200]))
        arms = arms if len(arms) < 120 else arms[:117] + "..."
        what = f"holds a study whose steps this one does not have: {len(lost)} of {len(held['steps'])} ({arms})"
        raise UserError(RUN.where(out), what, "Give another --out, or --fresh to start over.")
    return True


def write_plan(store: RunStore, plan: StudyPlan) -> None:
    """Write plan.json, every default filled in, and study.yaml, the bytes that were read (paths in them included).

    A plan in which arms wait for a search takes the place of no plan that has all its steps: that one knows theirs.
    """
    if plan.waiting:
        with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError):
            if plan.graph.steps.keys() <= {str(step["key"]) for step in read_json(store.plan_file)["steps"]}:
                return
    write_json(store.plan_file, plan.to_json())
    write_bytes(store.root / "study.yaml", plan.read.bytes)


def read_index(root: Path) -> dict[str, str]:
    """Key -> id of the steps of a study, as far as they are known; a damaged index is made again as steps are met."""
    with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError, ValueError):
        return {str(key): str(value) for key, value in read_json(root / INDEX)["ids"].items()}
    return {}


def write_index(
    root: Path,
    ids: Mapping[str, str],
    left_out: Mapping[str, str],
    forget: Collection[str] = (),
    *,
    among: Collection[str] | None = None,
) -> None:
    """Add to index.json; several processes may carry out steps of one study.

    Args:
        root: run folder.
        ids: key -> id of steps.
        left_out: arm -> why it is not there.
        forget: keys of steps whose ids are not known any more, as what they build on is made again.
        among: arms that ``left_out`` speaks of; others stay as they were. None: all.
    """
    with (root / f".{INDEX}.0.tmp").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before: dict[str, Any] = {}
        with contextlib.suppress(OSError, CorruptionError):
            before = read_json(root / INDEX)
        whole = {key: one for key, one in {**read_index(root), **ids}.items() if key not in forget}
        kept = before.get("left_out", {}) if among is not None else {}
        gone = {**{name: why for name, why in kept.items() if name not in (among or ())}, **left_out}
        write_json(root / INDEX, {"ids": whole, "left_out": gone})
