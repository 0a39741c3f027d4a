"""Whether a run folder holds this very evaluation, and whether its ended steps still hold what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.core.progress import Reporter
from harness.core.records import StepRecord
from harness.evaluation.plan import EvalPlan
from harness.steps.files import read_json, stays_inside, write_json
from harness.steps.folder import StepFolder
from harness.steps.journal import intact, read_members, rows_digest
from harness.steps.provenance import digest_of_bytes
from harness.steps.step import unequal
from harness.steps.store import RunStore

ANSWERS_FILE = "answers.jsonl.gz"
SAMPLES_FILE = "samples.jsonl.gz"
SCORES_FILE = "scores.json"


def check_folder(root: Path, plan: EvalPlan) -> bool:
    """Whether plan.json must be written. Writes nothing itself, so it can be asked before the folder is locked.

    A folder matches if it holds the same answers: what does not enter their ids (why an engine was taken, say, or its
    share of the memory) may differ from run to run, and another scorer never asks the model again.

    Raises:
        UserError: the folder holds something else; says what.
    """
    if not root.is_dir():
        return True
    where = f"--out {root}"
    before = _stored_plan(root)
    if before is None:
        strange = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
        if not strange or _holds_steps_of(root, plan):
            return True
        if RunStore(root).plan_file.exists():
            what, fix = "plan.json is damaged, and no step is this evaluation's", "Give another --out, or --fresh."
            raise UserError(where, what, fix)
        shown = ", ".join(strange[:5])
        raise UserError(where, f"holds files but no plan.json of a run ({shown})", "Give an empty or a new folder.")
    now = plan.to_json()
    held, asked = _answers(before), _answers(now)
    if held == asked:
        return _scores(before) != _scores(now) or before.get("arm") != now["arm"]
    # Arms may be added to a run, never left out: its reports would lose what they show.
    if held and all(arm in asked for arm in held):
        return True
    raise UserError(
        where, _what_differs(before, now), "Give another --out, or --fresh to delete what it holds and start over."
    )


def claim(store: RunStore, plan: EvalPlan, reporter: Reporter) -> None:
    """Write plan.json where it is missing, damaged, or asks for other scores of the same answers."""
    if check_folder(store.root, plan):
        if _stored_plan(store.root) is None and _holds_steps_of(store.root, plan):
            how = "damaged" if store.plan_file.exists() else "missing"
            reporter.note(f"plan.json is {how}; it is written again")
        write_json(store.plan_file, plan.to_json())


def _stored_plan(root: Path) -> dict[str, Any] | None:
    path = RunStore(root).plan_file
    try:
        plan = read_json(path) if path.is_file() else None
        _answers(plan or {}), _scores(plan or {})
    except (CorruptionError, AttributeError, KeyError, TypeError):
        return None
    return plan or None


def _answers(plan: dict[str, Any]) -> list[list[Any]]:
    """Per arm everything that decides what the model is asked, and under which names the answers lie.

    Not the arm's name: in company an adapter may go by another one than alone.
    """
    arms: dict[str, list[Any]] = {}
    for task in plan.get("tasks", []):
        arms.setdefault(task.get("arm", plan.get("arm")), []).append([task["task"], task["variant"], task["answers"]])
    return list(arms.values())


def _scores(plan: dict[str, Any]) -> list[list[Any]]:
    return [[task["scores"], task.get("judged")] for task in plan.get("tasks", [])]


def _holds_steps_of(root: Path, plan: EvalPlan) -> bool:
    steps = {folder.name.rpartition("-")[2] for folder in (root / "steps").glob("*-*")}
    return any(task.answers_id[:12] in steps for task in plan.tasks)


def _what_differs(before: dict[str, Any], now: dict[str, Any]) -> str:
    old, new = before.get("model") or {}, now["model"]
    if old.get("weights_digest") != new["weights_digest"]:
        held = f"holds a run of {old.get('name')} with weights {str(old.get('weights_digest'))[:12]}; "
        weights = new["weights_digest"][:12]
        same_name = old.get("name") == new["name"]
        return held + (f"its weights are now {weights}" if same_name else f"this is {new['name']} with {weights}")
    arms = [[task.get("arm", plan.get("arm")) for task in plan["tasks"]] for plan in (before, now)]
    gone = [name for name in dict.fromkeys(arms[0]) if name not in arms[1]]
    if len(set(arms[0])) > 1 and gone:
        return f"holds arms that are not asked for now: {', '.join(gone[:4])}" + (", ..." if len(gone) > 4 else "")
    names = [
        list(dict.fromkeys(f"{task['task']}:{task['variant']}" for task in plan["tasks"])) for plan in (before, now)
    ]
    if names[0] != names[1]:
        return f"holds an evaluation on {', '.join(names[0])}; this one is on {', '.join(names[1])}"
    found = _differences(before, now)
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return "holds another evaluation; different: " + "; ".join(found[:4]) + more


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys in which two plans of the same tasks differ, with both values; where none does, the tasks whose ids do."""
    parts = ("arm", "model", "adapter", "spec", "engine")
    ours = [{key: plan.get(key) for key in parts} for plan in (before, now)]
    ours = [{**plan, "engine": {**(plan["engine"] or {}), "reason": None}} for plan in ours]
    found = unequal(ours[0], ours[1])
    if found:
        return found
    pairs = list(zip(before["tasks"], now["tasks"], strict=False))
    for key in ("version", "limit"):
        found += [f"{n['task']}.{key} was {b.get(key)}, is {n[key]}" for b, n in pairs if b.get(key) != n[key]]
    changed = [n["task"] for b, n in pairs if b["answers"] != n["answers"]]
    return found or [f"the YAML, data or code of task {name}, or the engine's code, changed" for name in changed]


def damage(folder: StepFolder, status: StepRecord, store: RunStore) -> str | None:
    """What is wrong with an ended step's files; None if they hold what was recorded."""
    for name in ("step.json", "provenance.json"):
        problem = _unreadable(folder.path / name)
        if problem is not None:
            return problem
    described = read_json(folder.path / "step.json")
    if described.get("id") != folder.id:
        return "step.json is another step's"
    name = ANSWERS_FILE if folder.kind == "answers" else SAMPLES_FILE
    members, found = read_members(folder.artifact / name)
    if str(found):
        return f"{name} is damaged ({found})"
    rows = [row for _, batch in members for row in batch]
    if folder.kind == "answers":
        wanted = status.counts.get("requests", 0)
        if len({(row["item"], row["index"]) for row in rows}) < wanted:
            return f"{name} holds {len(rows)} of {wanted} answers"
        named = str(described.get("requests"))
        whole = stays_inside(named) and intact(store.root / "requests" / named)
        return None if whole else f"requests/{Path(named).name} is missing or damaged"
    if rows_digest(rows) != status.digest:
        return f"{name} is not what was recorded"
    return _changed_scores(folder, status)


def _changed_scores(folder: StepFolder, status: StepRecord) -> str | None:
    path = folder.artifact / SCORES_FILE
    if not path.is_file():
        return f"{SCORES_FILE} is missing"
    recorded = status.files.get(SCORES_FILE)
    if recorded is not None and digest_of_bytes(path.read_bytes()) != recorded:
        return f"{SCORES_FILE} is not what was recorded"
    return _unreadable(path)


def _unreadable(path: Path) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        return None if isinstance(read_json(path), dict) else f"{path.name} is not a JSON object"
    except CorruptionError:
        return f"{path.name} is damaged"
