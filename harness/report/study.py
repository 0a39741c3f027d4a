"""A study's records as runs: one for each base, with the base, its adapters and its merges as arms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, UserError
from harness.report.read import RunResult, StepFolders, open_run, run_of
from harness.steps.files import read_json

INDEX = "index.json"


def open_runs(root: Path) -> dict[str | None, RunResult]:
    """Read a run folder: base -> its run for a study, None -> the run for an evaluation.

    Steps of a study whose ids are not known yet, as what they build on is not there, count as unfinished.

    Raises:
        UserError: the folder is no run.
        CorruptionError: a file of it is damaged.
    """
    plan = read_json(root / "plan.json") if (root / "plan.json").is_file() else {}
    if not isinstance(plan, dict) or "study" not in plan:
        return {None: open_run(root)}
    try:
        index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
        found: dict[str | None, list[Mapping[str, Any]]] = {}
        for one in plan["evaluations"]:
            found.setdefault(str(one["model"]["name"]), []).append(one)
        folders = StepFolders(root)
        if not found:
            what = "nothing was asked in this study: it says `evaluation: none`"
            raise UserError(str(root), what, "Say in its file what is asked, and run it again.")
        return {base: run_of(root, _together(plans, index), folders) for base, plans in found.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{root / 'plan.json'}: no study ({error!r}); start over with --fresh") from None


def _together(plans: list[Mapping[str, Any]], index: Mapping[str, Any]) -> dict[str, Any]:
    """One plan of several evaluations on one base: the first opens the base itself."""
    ids, left_out = index.get("ids", {}), index.get("left_out", {})
    arms = [arm for plan in plans for arm in plan["arms"]]
    gone = {arm["name"]: left_out[arm["label"]] for arm in arms if arm["label"] in left_out}
    tasks = [
        {
            **task,
            "answers": ids.get(task["answers"], task["answers"]),
            "scores": [ids.get(key, key) for key in task["scores"]],
            **(
                {"judged": [{**one, "scores": ids.get(one["scores"], one["scores"])} for one in task["judged"]]}
                if "judged" in task
                else {}
            ),
        }
        for plan in plans
        for task in plan["tasks"]
        if task["arm"] not in gone
    ]
    arms = [arm for arm in arms if arm["name"] not in gone]
    # What is said of an adapter above all arms is said of a run's only one.
    return {
        **plans[0],
        "arm": plans[0]["model"]["name"],
        "adapter": None,
        "arms": arms,
        "tasks": tasks,
        "left_out": gone,
    }
