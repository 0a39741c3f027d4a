"""Means of a seeded subset, made estimates of the whole set where the base was asked all of it.

Differences, verdicts and ranks stay those of the subset's samples; what changes is the mean that stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.records import digest_of
from harness.core.stats import Estimated, estimated_mean
from harness.report.board.cells import whole_of
from harness.report.board.judged import Of
from harness.report.board.model import BoardRow, Cell, Column, Part

if TYPE_CHECKING:
    from harness.report.board.cells import Folded
    from harness.report.board.gather import Gathered, Samples

SUBSET = "the base was not asked the whole set: the mean is that of a seeded subset alone"


def estimate_wholes(
    found: Gathered, columns: Mapping[Of, Column], rows: Sequence[BoardRow], cells: Mapping[str, Mapping[str, Folded]]
) -> None:
    """Put estimates of the whole set into cells of columns that were asked a seeded subset, or say that there are none.

    Args:
        found: what was read.
        columns: by how they were asked, the templates and the metric.
        rows: of the board, with their cells.
        cells: column -> row -> scores.
    """
    wholes: dict[tuple[str, str], list[tuple[Column, Samples]]] = {}
    for of, column in columns.items():
        how = found.asked[of[0]]
        if how.get("limit") is None:
            wholes.setdefault((_whole(how), of[2]), []).append((column, found.samples[of[0]]))
    for of, column in columns.items():
        how = found.asked[of[0]]
        if column.aggregate != "mean" or not _is_seeded(how):
            continue
        fitting = wholes.get((_whole(how), of[2]), [])
        for row in rows:
            cell = row.cells.get(column.key)
            if cell is not None and cell.withheld is None and cell.mean is not None:
                part = _Subset(column, found.samples[of[0]], fitting, cells, row)
                row.cells[column.key] = cell.model_copy(update=part.told(cell))


def _is_seeded(how: Mapping[str, Any]) -> bool:
    task = how.get("task")
    return how.get("limit") is not None and isinstance(task, dict) and task.get("subset") == "seeded"


def _whole(how: Mapping[str, Any]) -> str:
    """How it was asked and scored but for which samples were taken."""
    task = how.get("task")
    rest = {key: value for key, value in task.items() if key != "subset"} if isinstance(task, dict) else task
    return digest_of({**how, "task": rest, "limit": None, "samples": None})


class _Subset:
    """One row's scores on a subset, beside its base's on the whole."""

    def __init__(
        self,
        column: Column,
        samples: Samples,
        wholes: Sequence[tuple[Column, Samples]],
        cells: Mapping[str, Mapping[str, Folded]],
        row: BoardRow,
    ) -> None:
        self._column, self._samples, self._row = column, samples, row
        self._own = cells[column.key][row.key]
        self._base = row.base or (row.key if row.kind == "base" else None)
        template = self._own.scores[0].row.template
        self._whole = next(
            (
                (whole, of_whole, base)
                for whole, of_whole in wholes
                if self._base is not None
                and (base := cells[whole.key].get(self._base)) is not None
                and base.scores[0].row.template == template
            ),
            None,
        )

    def told(self, cell: Cell) -> dict[str, Any]:
        """What changes in the cell."""
        n = len(self._samples.ids)
        if self._whole is None:
            return {"part": Part(n=n, note=SUBSET)}
        whole, samples, base = self._whole
        n_whole = len(samples.ids)
        if self._row.key == self._base:
            shown = self._row.cells[whole.key]
            told = {name: getattr(shown, name) for name in ("mean", "stderr", "ci95", "method")}
            if shown.withheld is not None or shown.mean is None:
                return {"part": Part(n=n, n_whole=n_whole, note="its number of the whole set is withheld: subset mean")}
            return {**told, "part": Part(n=n, n_whole=n_whole, plain=cell.mean, whole=True)}
        found = self._estimate(samples, base)
        if isinstance(found, str):
            return {"part": Part(n=n, n_whole=n_whole, note=f"{found}: the mean is that of a seeded subset alone")}
        return {
            "mean": found.mean,
            "stderr": found.stderr,
            "ci95": (found.interval.low, found.interval.high),
            "method": found.interval.method,
            "part": Part(n=found.n, n_whole=found.n_whole, plain=found.plain),
        }

    def _estimate(self, samples: Samples, base: Folded) -> Estimated | str:
        if samples.clusters is not None:
            return "its samples hang together, which the estimate does not know of"
        place = {key: number for number, key in enumerate(samples.ids)}
        if any(key not in place for key in self._samples.ids):
            return "the subset holds samples that the whole set has not"
        values = base.seeds.means
        part = values[[place[key] for key in self._samples.ids]]
        strata = [self._samples.strata or [""] * len(self._samples.ids), samples.strata or [""] * len(samples.ids)]
        top = whole_of(self._column)
        ends = (0.0, top) if self._column.unit in ("proportion", "percent") else None
        found = estimated_mean(self._own.seeds, part, strata[0], values, strata[1], range_of=ends)
        return found if found is not None else "a sample is unscored, or a leaf task was not drawn from"
