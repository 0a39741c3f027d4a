"""Writes a board's pages: report.html, a page for each arm, figures, and all samples where they are not too many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from harness.contracts.report_section import ReportSection
from harness.core.text import portable, visible
from harness.report.board.gather import ArmRun, Gathered
from harness.report.board.model import Board, BoardRow
from harness.report.facts import task_report
from harness.report.figures.of_board import figures_of
from harness.report.figures.png import png_drawer
from harness.report.figures.svg import Canvas
from harness.report.pages.arm import MadeSteps, render_arm
from harness.report.pages.board import Beside, render_board
from harness.report.pages.page import render_page, script_json
from harness.report.pages.samples import gather
from harness.report.pages.sections import added_by
from harness.report.pages.side_files import Pages, SideFiles
from harness.report.read import StepResult, TaskResult
from harness.report.text import task_facts
from harness.steps.files import slug, write_bytes

PAGE, SAMPLES = "report.html", "samples.html"
ARMS, FIGURES, SIDE = "arms", "figures", "samples"
MOST_SAMPLES = 100_000
"""Answers whose samples are written unless they are asked for: about 100 MB and half a minute."""


def write_pages(
    board: Board,
    found: Gathered,
    out: Path,
    *,
    samples: bool | None = None,
    sections: Sequence[ReportSection] = (),
    png: bool = False,
) -> Path:
    """Write the pages of a board into a folder; returns report.html.

    Args:
        board: the numbers.
        found: what they were made from.
        out: folder; pages, figures and samples of an earlier report in it are deleted, files of others never.
        samples: write all samples, or none; None: where there are at most `MOST_SAMPLES`.
        sections: what plugins add.
        png: write every figure as PNG, too.

    Raises:
        UserError: PNG is asked for, and what draws it is not there.
        CorruptionError: a record is damaged.
    """
    draw = png_drawer() if png else None
    files = Pages(out)
    names = _file_names(board.rows)
    hours = _write_arms(board, found, names, files)
    figures = figures_of(board, hours)
    for figure in figures:
        _write_figure(files, figure.name, figure.canvas, draw)
    added = added_by(sections, board)
    for one in added:
        for number, canvas in enumerate(one.figures, start=1):
            _write_figure(files, f"{slug(one.name)}-{number}", canvas, draw)
    told = _write_samples(board, found, files, samples)
    beside = Beside(
        date=_date(found),
        links={key: f"{ARMS}/{name}" for key, name in names.items()},
        samples=SAMPLES if told is None else "",
        no_samples=told or "",
        figures=[(figure.said, figure.canvas.inline()) for figure in figures if figure.first],
        more_figures=[(figure.said, figure.canvas.inline()) for figure in figures if not figure.first],
        added=added,
        tasks=_tasks(found.arms.values()),
        pedigree=_pedigree(found.arms.values()),
    )
    # Last, so that it is never there without what it links to.
    write_bytes(out / PAGE, render_board(board, beside).encode())
    files.finish()
    return out / PAGE


def _write_figure(files: Pages, name: str, canvas: Canvas, draw: Callable[[bytes], bytes] | None) -> None:
    svg = canvas.file()
    files.write(f"{FIGURES}/{name}.svg", svg)
    if draw is not None:
        files.write(f"{FIGURES}/{name}.png", draw(svg))


def _file_names(rows: Iterable[BoardRow]) -> dict[str, str]:
    """Key of a row -> file name of its page; names that meet get the start of the key."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for row in rows:
        # Some file systems tell no cases apart.
        name = slug(row.name) if slug(row.name).lower() not in taken else f"{slug(row.name)}-{row.key[:8]}"
        taken.add(name.lower())
        found[row.key] = f"{name}.html"
    return found


def _write_arms(board: Board, found: Gathered, names: Mapping[str, str], files: Pages) -> dict[str, float]:
    """Write the page of every row; returns GPU-hours by key of a row, where all its seeds say."""
    hours = {}
    made = MadeSteps(found.roots)
    scores = {scored.step.id: scored.step for arm in found.arms.values() for scored in arm.scores.values()}
    links = {row.name: names[row.key] for row in board.rows}
    for row in board.rows:
        steps = made.of(row)
        spent = [one.gpu_seconds for one in steps]
        known = [seconds for seconds in spent if seconds is not None]
        if known and len(known) == len(row.seeds):
            hours[row.key] = sum(known) / len(known) / 3600
        files.write(f"{ARMS}/{names[row.key]}", render_arm(board, row, steps, links, scores).encode())
    return hours


def _tasks_of(arm: ArmRun) -> list[TaskResult]:
    """Tasks of an arm, each once."""
    return list({id(scored.task): scored.task for scored in arm.scores.values()}.values())


def _write_samples(board: Board, found: Gathered, pages: Pages, wanted: bool | None) -> str | None:
    """Write the page of samples; or returns why there is none."""
    arms = [(arm.name, _tasks_of(arm)) for arm in found.arms.values()]
    # As their rows say: a large board's samples are not read to be counted.
    counts = {
        scored.step.id: scored.row.n + scored.row.n_unscored
        for arm in found.arms.values()
        for scored in arm.scores.values()
    }
    count = sum(counts.values())
    if wanted is False or (wanted is None and count > MOST_SAMPLES) or not count:
        SideFiles(pages.out / SIDE).sweep()
        return f"The {count:,} samples are not written here: `harness report RUN --samples` does." if count else ""
    files = SideFiles(pages.out / SIDE)
    told = gather(arms, files)
    files.sweep()
    page = render_page(
        "samples.html.j2",
        styles=["samples.css"],
        scripts=["samples.js"],
        side_files=True,
        kicker="Samples",
        title=board.title,
        lede=[f"{count:,} scored samples"],
        several=False,
        differences=[],
        remarks=[],
        data=Markup(script_json({"folder": SIDE, "arms": told, "a": 0, "b": 1 if len(arms) > 1 else -1})),
    )
    pages.write(SAMPLES, page.encode())
    return None


# -------------------------------------------------------------------------------------------------------- what is said


def _tasks(arms: Iterable[ArmRun]) -> list[tuple[str, Sequence[tuple[str, str]]]]:
    """Each way in which a task was asked, once, as its first arm tells it."""
    found: dict[tuple[Any, ...], tuple[str, Sequence[tuple[str, str]]]] = {}
    for arm in arms:
        for where, scored in arm.scores.items():
            key = (where.digest,)
            if key not in found:
                facts = [fact for fact in task_facts(task_report(scored.task, False)) if fact[0] != "steps"]
                found[key] = (f"{scored.row.task} {scored.task.variant}", facts)
    return list(found.values())


def _pedigree(arms: Iterable[ArmRun]) -> list[tuple[str, str]]:
    """Versions and machines that gave the numbers; where steps differ, every value."""
    found: dict[str, dict[str, None]] = {}
    seen: set[bytes] = set()
    for step in _steps(arms):
        file = step.artifact.parent / "provenance.json"
        text = file.read_bytes() if file.is_file() else b""
        if text in seen:  # of thousands of records few differ
            continue
        seen.add(text)
        source = portable(step.provenance)
        for name, value in {"harness": source.get("harness"), **source.get("libraries", {})}.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
        for name, value in source.items():
            if name not in ("schema_version", "harness", "libraries", "checksum"):
                said = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
                found.setdefault(name, {})[said] = None
    return [(visible(name), visible(" and ".join(values))) for name, values in found.items()]


def _steps(arms: Iterable[ArmRun]) -> Iterable[StepResult]:
    for arm in arms:
        for task in _tasks_of(arm):
            yield from (step for step in task.steps if step.done)


def _date(found: Gathered) -> str:
    """Day on which the newest scores began, as their logs say (UTC)."""
    newest = 0.0
    for arm in found.arms.values():
        for scored in arm.scores.values():
            file = scored.step.artifact.parent / "log.jsonl"
            lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
            for line in lines:
                try:
                    newest = max(newest, float(json.loads(line).get("time") or 0.0))
                except (ValueError, AttributeError, TypeError):
                    continue  # cut short by a kill
    return datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%d") if newest else ""
