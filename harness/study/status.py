"""How far a study is, from its records alone: no plugin is loaded, and no process is asked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.report.study import INDEX
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
    """Of one that has begun: seconds since its log or its artifact last changed."""


def states_of(root: Path) -> list[StepState]:
    """Every step of a study in its plan's order.

    Raises:
        UserError: the folder holds no study, or its plan.json is damaged.
    """
    file = RunStore(root).plan_file
    try:
        plan = read_json(file) if file.is_file() else {}
    except CorruptionError:
        fix = "`harness study run` of the same file writes it again; what has ended is kept."
        raise UserError(str(file), "is damaged", fix) from None
    if not isinstance(plan, dict) or "study" not in plan:
        raise UserError(str(root), "holds no study", "Give the folder that `harness study run --out` wrote.")
    ids = _index(root)
    folders = {
        (path.name.partition("-")[0], path.name.rpartition("-")[2]): path for path in (root / "steps").glob("*-*")
    }
    return list(_states(plan["steps"], ids, folders))


def _states(
    steps: list[Mapping[str, Any]], ids: Mapping[str, str], folders: Mapping[tuple[str, str], Path]
) -> Iterator[StepState]:
    places = dict(_found(steps, ids, folders))
    ended = {key: record for key, folder in places.items() if (record := _record(folder)) is not None}
    done = {key for key, record in ended.items() if record.status == "done"} | _unneeded(steps, ended)
    for step in steps:
        key, kind, arm = str(step["key"]), str(step["kind"]), str(step["arm"])
        folder, record = places.get(key), ended.get(key)
        if record is None and key in done:
            yield StepState(key, kind, arm, "done")
        elif record is not None:
            took = sum(record.seconds.values())
            yield StepState(key, kind, arm, record.status, folder.name if folder else None, record.error, took)
        elif folder is not None and (folder / STEP).is_file():
            yield StepState(key, kind, arm, "begun", folder.name, silent=_silent(folder))
        else:
            ready = all(parent in done for parent in step["parents"])
            yield StepState(key, kind, arm, "ready" if ready else "waiting")


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
    places = [folder / LOG, folder / "artifact", *(folder / "artifact").glob("*")]
    return max(0.0, time.time() - max(place.stat().st_mtime for place in places if place.exists()))


def _index(root: Path) -> dict[str, str]:
    try:
        return dict(read_json(root / INDEX)["ids"])
    except (OSError, CorruptionError, KeyError, TypeError):
        return {}


def summary(states: list[StepState]) -> list[dict[str, Any]]:
    """For each kind of step: how many there are in each state, and the seconds that those that ended took."""
    rows = []
    for kind in dict.fromkeys(one.kind for one in states):
        some = [one for one in states if one.kind == kind]
        counts = Counter(one.state for one in some)
        took = sum(one.seconds for one in some)
        rows.append({"kind": kind, "steps": len(some), **{s: counts[s] for s in STATES}, "seconds": round(took, 1)})
    return rows
