"""Recipes that a study searches: each cell of a grid is an alignment of one seed, and one is chosen for all seeds.

A study with searches is planned in rounds: before a choice the arms that wait for it are not known. A choice stands
once it is made (``search.json`` of the run folder), as long as its cells are those that are planned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.alignment.heldout import HELDOUT, LOSS, summaries
from harness.core.errors import CorruptionError, StepError
from harness.core.progress import Reporter
from harness.steps.files import read_json, write_bytes, write_json
from harness.steps.folder import StepFolder
from harness.steps.journal import read_rows
from harness.study.cells import Searched
from harness.study.folder import read_index
from harness.study.plan import StudyPlan
from harness.study.search import FILE, TABLE, Cell, choose, record_of
from harness.study.search_text import table

Choices = dict[str, dict[str, Any]]
"""Search -> ``values`` that were chosen, and ``cells``: keys of the steps that they were chosen among."""


def read_choices(root: Path) -> Choices:
    """What the searches of a run folder have chosen; of a damaged record nothing: its cells are asked again."""
    found: Choices = {}
    with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError, AttributeError, StopIteration):
        for name, one in read_json(root / FILE)["searches"].items():
            best = next(cell for cell in one["cells"] if cell["folder"] == one["best"])
            found[name] = {"values": dict(best["values"]), "cells": [str(cell["key"]) for cell in one["cells"]]}
    return found


def choose_recipes(plan: StudyPlan, root: Path, reporter: Reporter) -> Choices:
    """Choose for every search whose cells have all ended, and write search.json; returns all choices.

    Raises:
        CorruptionError: figures of a cell that cannot be compared.
    """
    records: dict[str, Any] = {}
    with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError):
        records = {name: one for name, one in read_json(root / FILE)["searches"].items() if name in read_choices(root)}
    known = dict(records)
    for search in plan.searches.values():
        if search.values is not None or (cells := _cells_of(plan, search, root)) is None:
            continue
        spec = cells[0].plan.spec
        try:
            found = choose(root, cells, seed=spec.seed)
        except StepError as error:
            reporter.note(f"{search.name}: {error.what}")
            continue
        record = record_of(spec, cells, found.best, found.verdict)
        for described, name in zip(record["cells"], search.cells, strict=True):
            step = plan.promises[name].step
            assert step is not None
            described["key"] = step.id
        records[search.name] = record
        reporter.note(f"{search.name}: {found.best.name}. {found.verdict}")
    if records != known:
        write_json(root / FILE, {"searches": records})
        write_bytes(root / TABLE, "\n".join(table(one) for one in records.values()).encode())
    return read_choices(root)


def _cells_of(plan: StudyPlan, search: Searched, root: Path) -> list[Cell] | None:
    """The cells of a search with their figures; None while one has not ended."""
    ids, cells = read_index(root), []
    for name, values in search.cells.items():
        promise = plan.promises[name]
        assert promise.step is not None and promise.align is not None
        known = ids.get(promise.step.id, promise.step.id)
        path = next(iter(sorted((root / "steps").glob(f"align-*-{known[:12]}"))), None)
        status = StepFolder(path, known, "align", path / "artifact").status() if path is not None else None
        if path is None or status is None:
            return None
        cell = Cell(dict(values), path, promise.align)
        if status.status != "done":
            cell.error = status.error or status.status
        else:
            cell.rows = read_rows(path / HELDOUT)
            if strange := [row for row in cell.rows if not math.isfinite(row.get(LOSS, math.nan))]:
                what = f"the loss of held-out row {strange[0].get('id')} is no number"
                raise CorruptionError(f"{path / HELDOUT}: {what}; delete its step folder, and the same command goes on")
            cell.heldout = summaries(cell.rows)
        cells.append(cell)
    _refuse_other_rows(cells)
    return cells


def _refuse_other_rows(cells: Sequence[Cell]) -> None:
    """Means over other rows are no reason to choose.

    Raises:
        CorruptionError: a cell was measured on other rows than the first.
    """
    measured = [cell for cell in cells if cell.rows]
    for cell in measured[1:]:
        if [row["id"] for row in cell.rows] != [row["id"] for row in measured[0].rows]:
            what = f"{len(cell.rows)} held-out rows that are not the {len(measured[0].rows)} of {measured[0].name}"
            raise CorruptionError(f"{cell.folder / HELDOUT}: {what}; delete both step folders, and start again")
