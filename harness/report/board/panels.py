"""Judges and wordings beside each other: how far the numbers of a board depend on who judged, and in which words.

The first judge in the first wording is the one whose numbers stand on the board. What the others say is shown as a
spread beside its interval, and in how far they put the rows in another order. A judge whose record is missing or stale
is named, and then there is no spread: a range over fewer judges than were asked for would look like agreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from harness.core.stats import cohen_kappa
from harness.core.text import visible
from harness.report.board.judged import Name, Of, Panel, label_of
from harness.report.board.model import Asker, BoardRow, Cell, Column, JudgePanel, JudgesAgree, Spread

if TYPE_CHECKING:
    from harness.report.board.cells import Folded

ENOUGH = 20
"""Fewest answers with both verdicts from which agreement below chance is remarked on."""


def judge_panels(
    panels: Iterable[Panel],
    columns: Mapping[Of, Column],
    rows: Sequence[BoardRow],
    cells: Mapping[str, Mapping[str, Folded]],
    arms: Mapping[str, Sequence[str]],
    ids: Mapping[str, Sequence[str]],
) -> list[JudgePanel]:
    """What every panel says; the spread is put into the rows' cells.

    Args:
        panels: of all runs.
        columns: by how they were asked, the templates and the metric.
        rows: of the board, with their cells.
        cells: column -> row -> scores.
        arms: row -> keys of its arms.
        ids: digest of how it was asked and scored -> samples, in the order of the scores.
    """
    found = []
    for panel in panels:
        ways: dict[tuple[tuple[str | None, ...], str], dict[Name, tuple[Column, str]]] = {}
        for name, digests in panel.columns.items():
            for of, column in columns.items():
                if of[0] in digests:
                    ways.setdefault(of[1:], {}).setdefault(name, (column, of[0]))
        for of_panel in ways.values():
            if any(column.aggregate == "mean" for column, _ in of_panel.values()):
                found.append(_Asked(panel, of_panel, rows, cells, arms, ids).result())
    return found


class _Asked:
    """One metric of one panel."""

    def __init__(
        self,
        panel: Panel,
        columns: Mapping[Name, tuple[Column, str]],
        rows: Sequence[BoardRow],
        cells: Mapping[str, Mapping[str, Folded]],
        arms: Mapping[str, Sequence[str]],
        ids: Mapping[str, Sequence[str]],
    ) -> None:
        self._panel, self._names = panel, list(panel.columns)
        self._columns = {name: column for name, (column, _) in columns.items()}
        self._ids = {name: ids[digest] for name, (_, digest) in columns.items()}
        self._cells, self._arms = cells, arms
        keys = {column.key for column in self._columns.values()}
        self._rows = [row for row in rows if not keys.isdisjoint(row.cells)]

    def result(self) -> JudgePanel:
        """Who was asked, the spread of every row, and how far the judges agree."""
        reference = self._columns.get(self._names[0])
        lacking = []
        for row in self._rows:
            why = self._lacks(row)
            lacking += [f"{row.name}: {one}" for one in why]
            if reference is None or reference.key not in row.cells:
                continue
            cell = row.cells[reference.key]
            row.cells[reference.key] = cell.model_copy(
                update={"spread": None if why else self._spread(row), "spread_note": visible("; ".join(why)) or None}
            )
        one = next(iter(self._columns.values()))
        return JudgePanel(
            task=visible(self._panel.task),
            metric=one.metric,
            column=reference.key if reference is not None else None,
            askers=tuple(
                Asker(
                    name=label_of(name),
                    judge=visible(name[0]),
                    wording=None if name[1] is None else visible(name[1]),
                    column=self._columns[name].key if name in self._columns else None,
                )
                for name in self._names
            ),
            agreement=tuple(self._agree(*pair) for pair in combinations(self._names, 2)),
            missing=tuple(visible(one) for one in lacking),
            remarks=tuple(self._remarks()),
        )

    def _cell(self, row: BoardRow, name: Name) -> Cell | None:
        column = self._columns.get(name)
        return None if column is None else row.cells.get(column.key)

    def _lacks(self, row: BoardRow) -> list[str]:
        """Why there is no number of a member for a row, or not of all of its seeds."""
        found = []
        most = max((cell.n_seeds for name in self._names if (cell := self._cell(row, name)) is not None), default=0)
        for name in self._names:
            told = [why for arm in self._arms[row.key] if (why := self._panel.missing.get((name, arm))) is not None]
            cell = self._cell(row, name)
            if told:
                found.append(f"{label_of(name)}: {told[0]}")
            elif cell is None:
                found.append(f"{label_of(name)}: was not asked")
            elif cell.withheld is not None:
                found.append(f"{label_of(name)}: withheld: {cell.withheld}")
            elif cell.mean is None:
                found.append(f"{label_of(name)}: has no mean")
            elif cell.n_seeds < most:
                found.append(f"{label_of(name)}: has {cell.n_seeds} of {most} seeds")
        return found

    def _spread(self, row: BoardRow) -> Spread:
        means, verdicts = {}, {}
        for name in self._names:
            cell = self._cell(row, name)
            assert cell is not None and cell.mean is not None  # else it lacks something
            means[label_of(name)] = cell.mean
            if cell.difference is not None:
                verdicts[label_of(name)] = cell.difference.verdict
        low, high = (pick(means, key=means.__getitem__) for pick in (min, max))
        return Spread(
            low=means[low],
            high=means[high],
            n=len(means),
            low_of=low,
            high_of=high,
            verdicts=verdicts if len(set(verdicts.values())) > 1 else {},
        )

    def _agree(self, one: Name, other: Name) -> JudgesAgree:
        """Kendall's tau-b of the rows' means, and Cohen's kappa of the verdicts where scores are 0 or 1."""
        pairs = [
            (a.mean, b.mean)
            for row in self._rows
            if (a := self._cell(row, one)) is not None and (b := self._cell(row, other)) is not None
            if a.mean is not None and b.mean is not None
        ]
        kappa, n_answers = self._kappa(one, other)
        return JudgesAgree(
            a=label_of(one), b=label_of(other), tau=_tau(pairs), n_rows=len(pairs), kappa=kappa, n_answers=n_answers
        )

    def _kappa(self, one: Name, other: Name) -> tuple[float | None, int]:
        if one not in self._columns or other not in self._columns:
            return None, 0
        said: list[tuple[float, float]] = []
        left, right = (self._cells[self._columns[name].key] for name in (one, other))
        for row in self._rows:
            if row.key in left and row.key in right:
                said += self._both(one, left[row.key], other, right[row.key])
        if not said or any(value not in (0.0, 1.0) for pair in said for value in pair):
            return None, len(said)
        return cohen_kappa(*zip(*said, strict=True))[0], len(said)

    def _both(self, one: Name, a: Folded, other: Name, b: Folded) -> list[tuple[float, float]]:
        """What both say of each answer of one row, seed by seed and sample by sample."""
        at = dict(zip(b.names, b.scores, strict=True))
        place = {key: number for number, key in enumerate(self._ids[other])}
        found = []
        for arm, scored in zip(a.names, a.scores, strict=True):
            if arm not in at:
                continue
            for key, value in zip(self._ids[one], scored.values, strict=True):
                against = float(at[arm].values[place[key]]) if key in place else math.nan
                if not (math.isnan(value) or math.isnan(against)):
                    found.append((float(value), against))
        return found

    def _remarks(self) -> Iterable[str]:
        if self._names[0] not in self._columns:
            yield f"{label_of(self._names[0])}, who would count, has no numbers: those of the others are theirs alone"
        for one, other in combinations(self._names, 2):
            kappa, n = self._kappa(one, other)
            if kappa is not None and kappa < 0 and n >= ENOUGH:
                yield (
                    f"{label_of(one)} and {label_of(other)} agree less than chance would (kappa {kappa:.2f} over {n:,} "
                    "answers): look whether one of the two reads the verdicts the other way round"
                )


def _tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b; None for fewer than two rows, or where one side puts all rows in one place."""
    from scipy.stats import kendalltau

    if len(pairs) < 2 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    found = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return None if math.isnan(found) else found
