"""Recipes that a study searches: each cell of a grid is an alignment of one seed, and one is chosen for all seeds.

A study with searches is planned in rounds: before a choice the arms that wait for it are not known. A choice stands
once it is made (``search.json`` of the run folder), as long as its cells are those that are planned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.alignment.heldout import ACCURACY, HELDOUT, LOSS, summaries
from harness.alignment.plan import AlignPlan
from harness.core.errors import CorruptionError, StepError
from harness.core.progress import Reporter
from harness.core.stats import Comparison, Summary, compare_paired, holm
from harness.steps.files import read_json, write_bytes, write_json
from harness.steps.folder import StepFolder
from harness.steps.journal import read_rows
from harness.study.cells import Searched
from harness.study.folder import read_index
from harness.study.plan import StudyPlan
from harness.study.search_text import table

FILE, TABLE = "search.json", "search.md"
ALPHA = 0.05
"""Two cells differ when the Holm-adjusted p-value is below this."""
Choices = dict[str, dict[str, Any]]
"""Search -> ``values`` that were chosen, and ``cells``: keys of the steps that they were chosen among."""


@dataclass
class Cell:
    """One point of the grid, and what became of it."""

    values: dict[str, Any]
    """Key (``adapter.rank``, ``learning_rate``) -> value."""
    folder: Path
    plan: AlignPlan
    heldout: dict[str, Summary] = field(default_factory=dict)
    """Figures on held-out rows; empty until the cell has run."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Values per held-out row."""
    error: str | None = None
    """Why the cell failed, if it did."""
    against: Comparison | None = None
    """This cell minus the best, paired by held-out row."""
    p_adjusted: float | None = None
    """Of that comparison, Holm-adjusted over all cells."""

    @property
    def name(self) -> str:
        """As in tables: ``rank 8, alpha 16``."""
        return ", ".join(f"{key.removeprefix('adapter.')} {value}" for key, value in self.values.items())


@dataclass
class Choice:
    """The best of a search's cells, and how sure that is."""

    criterion: str
    """Figure that chooses: preference accuracy where there is one, else the loss."""
    best: Cell
    verdict: str
    """In plain words: whether the best can be told from the second."""


def read_choices(root: Path) -> Choices:
    """What the searches of a run folder have chosen; of a damaged record nothing: its cells are asked again."""
    found: Choices = {}
    with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError, AttributeError, StopIteration):
        for name, one in read_json(root / FILE)["searches"].items():
            best = next(cell for cell in one["cells"] if cell["folder"] == one["best"])
            found[name] = {"values": dict(best["values"]), "cells": [str(cell["key"]) for cell in one["cells"]]}
    return found


def with_failed_cells(root: Path) -> set[str]:
    """Searches of a run folder that have chosen while a cell of theirs had failed; of a damaged record none."""
    with contextlib.suppress(OSError, CorruptionError, KeyError, TypeError, AttributeError):
        searches = read_json(root / FILE)["searches"].items()
        return {str(name) for name, one in searches if any(cell["error"] for cell in one["cells"])}
    return set()


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
        try:
            found = choose(cells, seed=cells[0].plan.spec.seed)
        except StepError as error:
            reporter.note(f"{search.name}: {error.what}")
            continue
        record = _record_of(cells, found)
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


def choose(cells: Sequence[Cell], *, seed: int) -> Choice:
    """The best cell by held-out rows, and how sure that is.

    Highest preference accuracy, where the method has one; ties, and methods without, by lowest loss; then by the order
    of the grid. Every other cell is compared with the best paired by row (exact McNemar test for accuracy, bootstrap
    for loss), Holm-adjusted over the cells.

    Raises:
        StepError: no cell has figures on held-out rows.
    """
    done = [cell for cell in cells if cell.rows and (s := cell.heldout.get(LOSS)) is not None and s.mean is not None]
    if not done:
        why = "; ".join(f"{cell.name}: {cell.error}" for cell in cells if cell.error)
        raise StepError(
            "search", f"no cell has held-out figures{': ' + why if why else ''}", "See each cell's step/log.jsonl."
        )
    criterion = ACCURACY if all(ACCURACY in cell.heldout for cell in done) else LOSS
    ranked = sorted(done, key=lambda cell: _rank(cell, criterion))
    best, others = ranked[0], ranked[1:]
    for cell in others:
        mine, its = ({row["id"]: row[criterion] for row in one.rows} for one in (cell, best))
        cell.against = compare_paired(mine, its, seed=seed)
    for cell, p in zip(others, holm([c.against.p_value for c in others if c.against]), strict=True):
        cell.p_adjusted = p
    return Choice(criterion, best, _verdict(criterion, best, others))


def _rank(cell: Cell, criterion: str) -> tuple[float, float]:
    loss = cell.heldout[LOSS].mean
    assert loss is not None
    accuracy = cell.heldout[ACCURACY].mean if criterion == ACCURACY else None
    return (-accuracy if accuracy is not None else 0.0, loss)


def _verdict(criterion: str, best: Cell, others: Sequence[Cell]) -> str:
    n = best.heldout[criterion].n
    figure = "preference accuracy" if criterion == ACCURACY else "loss"
    caution = "Its own figure is optimistic: the rows that chose it measured it."
    if not others:
        return f"Nothing to compare with on {n} held-out rows. {caution}"
    alike = [cell for cell in others if cell.p_adjusted is None or cell.p_adjusted >= ALPHA]
    second = others[0]
    p = "unknown" if second.p_adjusted is None else f"{second.p_adjusted:.3g}"
    told = "NOT distinguishable" if second in alike else "distinguishable"
    return (
        f"On {n} held-out rows it is {told} by {figure} from the second, {second.name} (paired, Holm-adjusted p {p}); "
        f"{len(alike)} of {len(others)} other cells cannot be told from it. {caution}"
    )


def _record_of(cells: Sequence[Cell], choice: Choice) -> dict[str, Any]:
    """What search.json says of one search: every cell with its figures, and the choice."""
    spec = cells[0].plan.spec
    return {
        "method": spec.method,
        "dataset": cells[0].plan.dataset,
        "model": cells[0].plan.model.name,
        "adapter": spec.adapter,
        "seed": spec.seed,
        "varied": list(cells[0].values),
        "cells": [_described(cell) for cell in cells],
        "best": choice.best.folder.name,
        "verdict": choice.verdict,
    }


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {key: value for key, value in asdict(comparison).items() if key != "at"}


def _described(cell: Cell) -> dict[str, Any]:
    return {
        "values": cell.values,
        "name": cell.name,
        "folder": cell.folder.name,
        "id": cell.plan.id,
        "heldout": {name: asdict(summary) for name, summary in cell.heldout.items()},
        "error": cell.error,
        "against_best": _plain(cell.against) if cell.against is not None else None,
        "p_adjusted": cell.p_adjusted,
    }
