"""Records -> report.json -> terminal table, Markdown and HTML. Imports no heavy package.

A report holds nothing of its own: it can be deleted and is rebuilt from the records, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from harness.contracts.report_section import ReportSection
from harness.core.records import Row
from harness.core.text import clip, portable, task_label, visible
from harness.core.version import __version__
from harness.report.compare import compare_arms
from harness.report.engines import stored_parity
from harness.report.external.open import open_log
from harness.report.facts import provenance_of, task_report
from harness.report.leaderboard import markdown_lines, terminal_table
from harness.report.model import Difference, Report, TaskReport
from harness.report.pairing import base_of
from harness.report.read import RunResult, open_run
from harness.report.study import open_runs
from harness.report.text import markdown
from harness.steps.files import read_json, slug, write_bytes
from harness.steps.store import RunStore

__all__ = ["Report", "TaskReport", "build_report", "load_report", "terminal_table", "write_reports"]


def load_report(run: Path) -> Report:
    """Read the report.json of a run as it lies there.

    Raises:
        CorruptionError: the file is torn.
    """
    return Report.model_validate(read_json(RunStore(run).report / "report.json"))


def build_report(run: RunResult) -> Report:
    """Gather the numbers of a run. Steps that failed or have not ended are named in the notes."""
    plan = run.plan
    tasks, rows, leaves, notes = [], [], [], []
    several = len(run.arms) > 1
    for task in run.tasks:
        name = task_label(task.name, task.variant)
        if several:
            name = f"{visible(str(task.info.get('arm')))}, {name}"
        for step in task.failed():
            reason = (step.record.error if step.record is not None else None) or "no reason recorded"
            notes.append(f"{name}: {step.id[:12]} failed: {clip(reason, 400)}")
        if task.unfinished():
            notes.append(f"{name}: not finished; the same command continues it.")
        for step in task.scores:
            if step.done:
                rows += [row for row in step.rows if row.leaf is None]
                leaves += [row for row in step.rows if row.leaf is not None]
        for step in task.steps:
            notes += [f"{name}: {note}" for note in (step.record.notes if step.record is not None else ())]
        tasks.append(task_report(task, several))
    notes += [f"{visible(name)}: {why}" for name, why in plan.get("left_out", {}).items()]
    differences = _against_base(run)
    notes += [f"{one.label}: {one.notes[0]} (A: the base)" for one in differences if one.prompts_differ is not None]
    parity = stored_parity(run)
    notes += [parity.summary(), *parity.problems] if parity is not None else []
    notes += [f"{arm['name']}: folded into the base: {arm['folded']}" for arm in plan.get("arms", ()) if arm["folded"]]
    return Report(
        harness=__version__,
        model=portable(plan.get("model") or {}),
        adapter=portable(plan.get("adapter")) or None,
        engine=portable(plan.get("engine") or {}),
        spec=portable(plan.get("spec") or {}),
        rows=tuple(_portable_row(row) for row in rows),
        leaves=tuple(_portable_row(row) for row in leaves),
        tasks=tuple(tasks),
        arms=tuple(portable(plan.get("arms", ()))) if several else (),
        differences=differences,
        parity=parity.model_dump(mode="json") if parity is not None else None,
        notes=tuple(dict.fromkeys(portable(notes))),
        provenance=provenance_of(run),
    )


def _against_base(run: RunResult) -> tuple[Difference, ...]:
    """Every arm minus the base; nothing while a task has not ended, as Holm's correction is over all of them."""
    base, others = base_of(run)
    if base is None or not others or any(task.unfinished() for task in run.tasks):
        return ()
    return compare_arms(run).differences


def write_all(
    root: Path, out: Path | None = None, *, sections: Sequence[ReportSection] = (), page: bool = True
) -> dict[Path, Report]:
    """Write the reports of a run folder, for a study one for every base, and one page; returns them by their folders.

    Args:
        root: run folder, or another program's log.
        out: another place than the run folder's own; of a log ``reports/NAME`` by default, as its folder is not ours.
        sections: what plugins add to the page.
        page: write report.html and what goes with it, too.

    Raises:
        UserError: the folder is not a run.
        CorruptionError: a record is damaged.
    """
    log = open_log(root)
    folder = out or (RunStore(root).report if log is None else Path("reports") / slug(f"{root.stem}-{log.name}"))
    found = {}
    for base, run in ({None: log} if log is not None else open_runs(root)).items():
        place = folder if base is None else folder / slug(base)
        found[place] = _write(run, place)
    if page:
        _write_page(root, folder, sections)
    return found


def write_reports(store_root: Path, *, sections: Sequence[ReportSection] = ()) -> Report:
    """Write report.json, report.md and report.html of a run folder from its records.

    Raises:
        UserError: the folder is not a run.
        CorruptionError: a record is damaged.
    """
    report = _write(open_run(store_root), RunStore(store_root).report)
    _write_page(store_root, RunStore(store_root).report, sections)
    return report


def _write_page(root: Path, folder: Path, sections: Sequence[ReportSection]) -> None:
    from harness.report.board.build import board_of
    from harness.report.board.gather import gather
    from harness.report.pages.write import write_pages

    found = gather([root])
    write_pages(board_of(found), found, folder, sections=sections)


def _write(run: RunResult, folder: Path) -> Report:
    report = build_report(run)
    # ASCII, so that printing the file cannot steer a terminal.
    text = json.dumps(report.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=True, allow_nan=False)
    write_bytes(folder / "report.json", (text + "\n").encode())
    write_bytes(folder / "report.md", markdown(report, markdown_lines(report) if report.arms else ()).encode())
    return report


def _portable_row(row: Row) -> Row:
    return row.model_copy(update={"notes": tuple(portable(row.notes)), "withheld": portable(row.withheld)})
