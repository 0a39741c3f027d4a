"""How far a study is, from its records alone: no plugin is loaded, and no process is asked."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.core.costs import Costs
from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.report.study import INDEX
from harness.steps.costs import HEARTBEAT_SECONDS, read_heartbeat
from harness.steps.files import read_json
from harness.steps.folder import LOG, STATUS, STEP
from harness.steps.store import RunStore

STATES = ("done", "failed", "begun", "ready", "waiting")
"""Ended well; ended badly; begun and not ended (running, or killed); could begin; waits for another step."""


@dataclass(frozen=True)
class StepState:
    """One step of a study, and how far it is."""

    key: str
    kind: str
    arm: str
    state: str
    folder: str | None = None
    error: str | None = None
    seconds: float = 0.0
    """What it took, as its record says."""
    silent: float | None = None
    """Of one that has begun: seconds since it was last heard of: its heartbeat, its log, its artifact."""
    like: str = ""
    """Of which kind of work it is: what steps in the same place of other arms take, it takes too."""
    costs: Costs | None = None
    """What it took, or has taken so far."""
    progress: float | None = None
    """Of one that has begun: how much of it is done (proportion), as its last heartbeat says."""
    pid: int | None = None
    """Of one that has begun: the process that it was last heard of."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**self.__dict__, "costs": self.costs.model_dump(mode="json") if self.costs is not None else None}


def read_plan(root: Path) -> dict[str, Any]:
    """plan.json of a study's run folder.

    Raises:
        UserError: the folder holds no study, or its plan.json is damaged.
    """
    file = RunStore(root).plan_file
    try:
        plan = read_json(file) if file.is_file() else {}
        if plan and "study" in plan and not isinstance(plan["steps"], list):
            raise TypeError("its steps are no list")
    except (CorruptionError, KeyError, TypeError) as error:
        what = f"is damaged ({str(error).removeprefix(f'{file}: damaged (').partition(');')[0]})"
        fix = "The same `harness study run` writes it again; what has been done is found by its own records."
        raise UserError(str(file), what, fix) from None
    if not isinstance(plan, dict) or "study" not in plan:
        raise UserError(str(root), "holds no study", "Give the folder that `harness study run --out` wrote.")
    return plan


def states_of(root: Path) -> list[StepState]:
    """Every step of a study in its plan's order.

    Raises:
        UserError: the folder holds no study, or its plan.json is damaged.
    """
    plan = read_plan(root)
    ids = _index(root)
    folders = {
        (path.name.partition("-")[0], path.name.rpartition("-")[2]): path for path in (root / "steps").glob("*-*")
    }
    return list(_states(plan["steps"], ids, folders, _alike(plan)))


def _alike(plan: Mapping[str, Any]) -> dict[str, str]:
    """Key of a step -> what it has in common with those that take as long."""
    found: dict[str, str] = {}
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        for arm in plan["arms"]:
            names = ("method", "base", "data", "adapter", "samples", "inputs")
            found[str(arm["made_by"])] = " ".join(str(arm["factors"].get(name, "")) for name in names)
        for evaluation in plan["evaluations"]:
            for task in evaluation["tasks"]:
                asked = f"{evaluation['model']['name']} {task['task']} {task['variant']}"
                found[str(task["answers"])] = asked
                found |= {str(scores): f"{asked} {number}" for number, scores in enumerate(task["scores"])}
    return found


def _states(
    steps: list[Mapping[str, Any]],
    ids: Mapping[str, str],
    folders: Mapping[tuple[str, str], Path],
    alike: Mapping[str, str],
) -> Iterator[StepState]:
    places = dict(_found(steps, ids, folders))
    ended = {key: record for key, folder in places.items() if (record := _record(folder)) is not None}
    done = {key for key, record in ended.items() if record.status == "done"} | _unneeded(steps, ended)
    for step in steps:
        key, kind, arm = str(step["key"]), str(step["kind"]), str(step["arm"])
        like = f"{kind} {alike.get(key, arm)}"
        folder, record = places.get(key), ended.get(key)
        if record is None and key in done:
            yield StepState(key, kind, arm, "done", like=like)
        elif record is not None:
            took = record.costs.all_seconds if record.costs is not None else sum(record.seconds.values())
            name = folder.name if folder else None
            yield StepState(key, kind, arm, record.status, name, record.error, took, like=like, costs=record.costs)
        elif folder is not None and (folder / STEP).is_file():
            yield _under_way(StepState(key, kind, arm, "begun", folder.name, like=like), folder)
        else:
            ready = all(parent in done for parent in step["parents"])
            yield StepState(key, kind, arm, "ready" if ready else "waiting", like=like)


def _under_way(state: StepState, folder: Path) -> StepState:
    """A step that has begun, with what its heartbeat says."""
    beat, silent = read_heartbeat(folder), _silent(folder)
    if beat is None:
        return replace(state, silent=silent)
    costs = Costs.model_validate({key: value for key, value in beat.items() if key in Costs.model_fields})
    total = beat.get("total")
    return replace(
        state,
        silent=max(0.0, min(silent, time.time() - float(beat["time"]))),
        seconds=costs.all_seconds,
        costs=costs,
        progress=min(1.0, beat["done"] / total) if total else None,
        pid=beat.get("pid"),
    )


def _found(
    steps: list[Mapping[str, Any]], ids: Mapping[str, str], folders: Mapping[tuple[str, str], Path]
) -> Iterator[tuple[str, Path]]:
    for step in steps:
        key = str(step["key"])
        if key in ids and (folder := folders.get((str(step["kind"]), ids[key][:12]))) is not None:
            yield key, folder


def _unneeded(steps: list[Mapping[str, Any]], ended: Mapping[str, StepRecord]) -> set[str]:
    """Keys of what would be prepared for several alignments of which one is left at most: it prepares its own."""
    prepares = {str(step["key"]) for step in steps if step["kind"] == "prepare"} - set(ended)
    waiting = Counter(
        str(parent)
        for step in steps
        if (record := ended.get(str(step["key"]))) is None or record.status != "done"
        for parent in step["parents"]
    )
    return {key for key in prepares if waiting[key] < 2}


def _record(folder: Path) -> StepRecord | None:
    try:
        return StepRecord.model_validate(read_json(folder / STATUS))
    except (OSError, CorruptionError, ValueError):
        return None


def _silent(folder: Path) -> float:
    places = [folder / STEP, folder / LOG, folder / "artifact", *(folder / "artifact").glob("*")]
    return max(0.0, time.time() - max(place.stat().st_mtime for place in places if place.exists()))


def _index(root: Path) -> dict[str, str]:
    try:
        return dict(read_json(root / INDEX)["ids"])
    except (OSError, CorruptionError, KeyError, TypeError):
        return {}


LOST_AFTER = 6 * HEARTBEAT_SECONDS
"""Silence (seconds) after which a step that has begun is taken to be nobody's: its process was killed, or hangs."""


@dataclass(frozen=True)
class Left:
    """How long a study still takes."""

    seconds: float | None
    """None: no step like those that are left has ended."""
    at_once: int
    """Processes that are at it."""
    unknown: int
    """Steps left of which none like them has ended: their time is not in it."""


def time_left(states: Sequence[StepState]) -> Left:
    """How long a study still takes, by steps of this run that took as long as those that are left will take.

    The median of the same method, data and base, or of the same task of the same model; else of the kind. What is
    under way takes what its progress says. As many steps go on at once as processes are heard of.
    """
    took: dict[str, list[float]] = {}
    for one in states:
        if one.state == "done":
            for place in (one.like, one.kind):
                took.setdefault(place, []).append(one.seconds)
    owed, unknown, living = 0.0, 0, [one for one in states if is_alive(one)]
    for one in states:
        if one.state in ("done", "failed"):
            continue
        some = took.get(one.like) or took.get(one.kind)
        if one in living and one.progress and one.costs is not None:
            owed += one.costs.seconds * (1 - one.progress) / one.progress
        elif some is None:
            unknown += 1
        else:
            owed += max(0.0, statistics.median(some) - (one.seconds if one in living else 0.0))
    left = sum(one.state not in ("done", "failed") for one in states)
    at_once = max(1, len({one.pid for one in living if one.pid is not None}))
    return Left(owed / at_once if unknown < left or not left else None, at_once, unknown)


def is_alive(one: StepState) -> bool:
    """Whether a step has begun and was heard of lately."""
    return one.state == "begun" and one.silent is not None and one.silent < LOST_AFTER


def summary(states: list[StepState]) -> list[dict[str, Any]]:
    """For each kind of step: how many there are in each state, and what those that ended took, failed ones too."""
    rows = []
    for kind in dict.fromkeys(one.kind for one in states):
        some = [one for one in states if one.kind == kind]
        counts = Counter(one.state for one in some)
        costs = [one.costs for one in some if one.costs is not None and one.state in ("done", "failed")]
        rows.append(
            {
                "kind": kind,
                "steps": len(some),
                **{state: counts[state] for state in STATES},
                "seconds": round(sum(one.seconds for one in some), 1),
                "gpu_seconds": round(sum(one.gpu_seconds for one in costs), 1),
                "rss_bytes": max((one.rss_bytes or 0 for one in costs), default=0) or None,
                "device_bytes": max((one.device_bytes or 0 for one in costs), default=0) or None,
                "devices": sorted({one.device for one in costs if one.device is not None}),
            }
        )
    return rows
