"""Why a step is to be done: what of it, or of what it is made from, is not as it was in the records of its arm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.steps.files import read_json, slug
from harness.steps.folder import STATUS, STEP
from harness.steps.step import Step, unequal
from harness.study.folder import read_index
from harness.study.plan import STEP as PROMISED, StudyPlan


def explain(plan: StudyPlan, key: str, root: Path) -> dict[str, Any]:
    """What a step is made of, whether it has been done, and in what the records of its arm differ from it.

    Args:
        plan: of the study.
        key: of the step, or its beginning.
        root: the run folder.

    Raises:
        UserError: no step, or several, have such a key.
    """
    found = [step for step in plan.graph if step.id.startswith(key)]
    if len(found) != 1:
        fix = "Give one from `harness study steps FILE`."
        raise UserError(f"--why {key}", f"{len(found)} steps have such a key", fix)
    step, ids = found[0], read_index(root)
    done = any(_done(folder) for folder in _folders(root, step) if _is(folder, step, ids))
    return {
        "kind": step.kind,
        "arm": step.arm,
        "key": step.id,
        "done": done,
        "identity": step.identity,
        "differs_from": {folder.name: lines for folder, lines in _differences(plan, step, root, ids)},
        "made_from": _ancestors(plan, step, root, ids),
    }


def _is(folder: Path, step: Step, ids: Mapping[str, str]) -> bool:
    return folder.name.endswith(ids.get(step.id, step.id)[:12])


def _folders(root: Path, step: Step) -> list[Path]:
    """Records of this kind and arm, whatever their ids."""
    start = f"{step.kind}-{slug(step.arm)}-"
    return [
        path
        for path in sorted((root / "steps").glob(f"{start}*"))
        if "-" not in path.name.removeprefix(start) and (path / STEP).is_file()
    ]


def _done(folder: Path) -> bool:
    with contextlib.suppress(OSError, CorruptionError, AttributeError):
        return bool(read_json(folder / STATUS).get("status") == "done")
    return False


def _differences(plan: StudyPlan, step: Step, root: Path, ids: Mapping[str, str]) -> Iterator[tuple[Path, list[str]]]:
    """Each other record of the arm, and what of the step differs from it."""
    for folder in _folders(root, step):
        if _is(folder, step, ids):
            continue
        try:
            record = read_json(folder / STEP)
            before = record["identity"] or {}
        except (OSError, CorruptionError, KeyError, TypeError):
            yield folder, ["its record is damaged"]
            continue
        if step.kind == "merge":
            yield folder, _of_merge(plan, step, folder, record)
            continue
        now = {name: value for name, value in step.identity.items() if name in before}
        lines = unequal({name: before[name] for name in now}, now)
        added = [f"{name} was not said, is {value!r}" for name, value in step.identity.items() if name not in before]
        # What an input will be is known by its own step alone, which `made_from` tells of.
        yield folder, [line for line in [*lines, *added] if f"is '{PROMISED}" not in line]


def _of_merge(plan: StudyPlan, step: Step, folder: Path, record: Mapping[str, Any]) -> list[str]:
    """What of a merge differs: planned, it is known by its inputs' steps, and recorded, by the tensors it has made."""
    promise = next(one for one in plan.promises.values() if one.step is not None and one.step.id == step.id)
    merge, before = promise.arm.merge, dict(record["identity"])
    assert merge is not None
    names = ("method", "seed", "dtype", "form", "rank", "code", "base")
    was: dict[str, Any] = {name: before.get(name) for name in names}
    now: dict[str, Any] = {name: step.identity.get(name) for name in names}
    was["inputs"], now["inputs"] = record.get("factors", {}).get("inputs"), step.factors.get("inputs")
    with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError):
        made = read_json(folder / "artifact" / "merge.json")
        was |= {"options": made["options"], "weights": [one["weight"] for one in made["inputs"]]}
        weights = [one.weight if one.weight is not None else 1 / len(merge.inputs) for one in merge.inputs]
        now |= {"options": step.identity["options"], "weights": weights}
    lines = unequal(was, now)
    return lines or ["nothing that it says itself: what it is made from has changed (made_from)"]


def _ancestors(plan: StudyPlan, step: Step, root: Path, ids: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Steps that this one is made from, directly or not, that are not done as they stand, and why."""
    found: dict[str, dict[str, Any]] = {}
    waiting = list(step.parents)
    while waiting:
        parent = plan.graph.steps[waiting.pop(0)]
        name = f"{parent.kind} {parent.arm}"
        if name in found:
            continue
        waiting += parent.parents
        if not any(_done(folder) for folder in _folders(root, parent) if _is(folder, parent, ids)):
            told = {folder.name: lines for folder, lines in _differences(plan, parent, root, ids)}
            found[name] = {"key": parent.id, "done": False, "differs_from": told}
    return found
