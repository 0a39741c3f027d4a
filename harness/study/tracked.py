"""What a study tells its trackers: curves of its trainings as they are logged, and final scores of every arm once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from harness.core.errors import CorruptionError, HarnessError
from harness.core.progress import Reporter
from harness.core.records import digest_of
from harness.core.text import first_line, task_label
from harness.core.trackers import FOLDER, Tracking, open_run
from harness.report.board.gather import ArmRun, gather
from harness.steps.files import read_json, write_json
from harness.study.plan import StudyPlan

TOLD = "scores.json"
"""In the folder of the trackers: tracker -> arm -> digest of the scores that it was told."""


def tracking_in(root: Path, plan: StudyPlan) -> Tracking | None:
    """The trackers of a study, writing into its run folder; None: it has none."""
    spec = plan.read.spec
    names = tuple(dict.fromkeys(spec.trackers))
    return Tracking(names, (root / FOLDER).absolute(), spec.study) if names else None


def track_scores(root: Path, tracking: Tracking | None, reporter: Reporter) -> None:
    """Tell every tracker the scores of every arm that it has not been told yet; what fails is named.

    Args:
        root: run folder, whose steps have ended.
        tracking: None: nobody is told.
        reporter: hears of a tracker that fails.
    """
    if tracking is None:
        return
    file = tracking.folder / TOLD
    told: dict[str, dict[str, str]] = {}
    with contextlib.suppress(OSError, CorruptionError):
        told = {name: dict(arms) for name, arms in read_json(file)["told"].items()}
    try:
        arms = {arm.name: scores for arm in gather([root]).arms.values() if (scores := scores_of(arm))}
    except HarnessError as error:
        reporter.note(f"trackers are told no scores: {first_line(str(error))}")
        return
    for name in tracking.names:
        known = told.setdefault(name, {})
        for arm, scores in arms.items():
            if known.get(arm) == (digest := digest_of(scores)):
                continue
            try:
                run = open_run(name, tracking, arm, "scores")
                try:
                    run.log(scores)
                finally:
                    run.close()
            except Exception as error:
                why = first_line(str(error)) or type(error).__name__
                reporter.note(f"tracker {name}: scores of {arm}: {why}; it is told no more scores")
                break
            known[arm] = digest
            write_json(file, {"told": told})


def scores_of(arm: ArmRun) -> dict[str, Any]:
    """Means of whole tasks with ends of their intervals and n, by name; without what was withheld."""
    found: dict[str, Any] = {}
    for asked, scored in arm.scores.items():
        row = scored.row
        if row.mean is None or row.withheld is not None:
            continue
        name = f"scores/{task_label(row.task, row.variant)}/{row.metric}"
        if name in found:
            # Asked or scored in two ways: two numbers.
            name += f"/{asked.digest[:8]}"
        found |= {name: row.mean, f"{name}/n": row.n}
        if row.ci95 is not None:
            found |= {f"{name}/low": row.ci95[0], f"{name}/high": row.ci95[1]}
    return found
