"""The page of `harness compare --html`: the differences, and below them all samples of the arms side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from markupsafe import Markup

from harness.core.text import MINUS, task_label, visible
from harness.report.compare_text import ends_text, means_text, metric_text, p_text, remarks, signed, verdict_text
from harness.report.pages.page import render_page, script_json
from harness.report.pages.samples import gather
from harness.report.pages.side_files import SideFiles
from harness.report.read import RunResult
from harness.report.winrate_text import HEADER, wins_cells, wins_remarks
from harness.steps.files import write_bytes

if TYPE_CHECKING:
    from harness.report.model import ComparisonReport, Difference

PAGE, SAMPLES = "compare.html", "samples"
BASE = "base"


def write_comparison(
    report: ComparisonReport, a: RunResult, b: RunResult | None, folder: Path, *, everything: bool = False
) -> Path:
    """Write the page of a comparison and its side files into a folder; returns the page.

    Args:
        report: what `compare_runs` said of the same runs.
        a, b: the runs; without ``b`` the arms of ``a`` against its base.
        folder: where they go; side files of an earlier page are deleted.
        everything: also metrics that are not primary.

    Raises:
        CorruptionError: a record is damaged.
    """
    files = SideFiles(folder / SAMPLES)
    arms = _arms(a, b)
    data = {"folder": SAMPLES, "arms": gather([(name, arm.tasks) for name, _, arm in arms], files)}
    files.sweep()
    starts = _starts(arms, b)
    wins = report.shown_wins(everything=everything)
    page = render_page(
        "samples.html.j2",
        styles=["samples.css"],
        scripts=["samples.js"],
        side_files=True,
        kicker="Comparison",
        title=f"{report.name_b} against {report.name_a}",
        lede=[f"A: {report.name_a}", f"B: {report.name_b}", f"harness {_version()}"],
        several=any(one.arm is not None for one in report.differences),
        differences=[_row(one, arms, starts) for one in report.shown(everything=everything)],
        remarks=[visible(line) for line in remarks(report, everything=everything)],
        wins_header=HEADER,
        wins=[{"task": one.label, "metric": visible(one.metric), "cells": wins_cells(one)} for one in wins],
        wins_remarks=[visible(line) for line in wins_remarks(wins)],
        data=Markup(script_json({**data, "a": starts[0], "b": starts[1]})),
    )
    write_bytes(folder / PAGE, page.encode())
    return folder / PAGE


def _version() -> str:
    from harness.core.version import __version__

    return __version__


_Arm = tuple[str, int, RunResult]
"""Name, which run (0: A, 1: B), and the arm."""


def _arms(a: RunResult, b: RunResult | None) -> list[_Arm]:
    """The arms of both runs; where names meet, they say which run is meant."""
    runs = [a] if b is None else [a, b]
    found = [(side, arm) for side, run in enumerate(runs) for arm in run.arms]
    names = [arm.label or arm.arm for _, arm in found]
    return [
        (f"{'AB'[side]}: {name}" if names.count(name) > 1 else name, side, arm)
        for name, (side, arm) in zip(names, found, strict=True)
    ]


def _starts(arms: Sequence[_Arm], b: RunResult | None) -> tuple[int, int]:
    """The two arms that the page opens with."""
    if b is not None:
        return 0, next(place for place, (_, side, _) in enumerate(arms) if side == 1)
    base = next((place for place, (_, _, arm) in enumerate(arms) if arm.label is None), 0)
    return base, next((place for place in range(len(arms)) if place != base), -1)


def _row(one: Difference, arms: Sequence[_Arm], starts: tuple[int, int]) -> dict[str, Any]:
    means = means_text(one)
    return {
        "task": task_label(one.task, one.variant_a),
        "metric": metric_text(one),
        "arm": one.arm or "",
        "link": _link(one, arms, starts),
        "a": means[0].replace("-", MINUS),
        "b": means[1].replace("-", MINUS),
        "difference": signed(one.difference).replace("-", MINUS),
        "interval": ends_text(one.ci_adjusted).replace("-", MINUS) or "–",
        "p": p_text(one.p_adjusted),
        "n": one.n,
        "counts": f"{one.n_better:,}, {one.n_worse:,}" if one.test != "none" else "–",
        "verdict": verdict_text(one),
        "kind": one.verdict if one.verdict in ("better", "worse") else "quiet",
    }


def _link(one: Difference, arms: Sequence[_Arm], starts: tuple[int, int]) -> str:
    """Where on the page the samples of this difference are."""
    places = list(starts)
    if one.arm is not None:
        for side in (0, 1):
            named = [
                place
                for place, (_, run, arm) in enumerate(arms)
                if run == min(side, max(run for _, run, _ in arms)) and (arm.label or BASE) == one.arm
            ]
            places[side] = named[0] if named else places[side]
        if max(run for _, run, _ in arms) == 0:  # within one run A is the base of every arm
            places[0] = starts[0]
    shown = "changed" if one.n_better or one.n_worse else "all"
    where = {"a": places[0], "b": places[1], "task": task_label(one.task, one.variant_a), "show": shown}
    return "#" + urlencode({**where, "order": "change"})
