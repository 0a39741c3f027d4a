"""The arithmetic of one column of a board: means over seeds, differences from the base, ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from harness.core.stats import (
    MIN_SEEDS,
    NOTE_FEW_SEEDS,
    CrossedDifference,
    Design,
    Interval,
    Seeds,
    crossed_difference,
    crossed_mean,
    holm,
    holm_levels,
    holm_rejects,
    pairwise,
    rank_by_significance,
)
from harness.report.board.model import BaseDifference, Cell, Column, SeedCell
from harness.report.model import Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from harness.report.board.gather import Scored

POWER = 0.8
ENOUGH_SHARED = 0.5
"""Least share of a column's samples that all rows must have scored for it to be ranked."""


@dataclass(frozen=True)
class Folded:
    """One row of one column: the scores of its seeds."""

    names: list[str]
    scores: list[Scored]
    trained: bool
    n_arms: int
    """Seeds that the row has, with numbers in this column or not."""

    @cached_property
    def seeds(self) -> Seeds:
        """The scores, seeds x samples."""
        import numpy as np

        return Seeds(np.stack([one.values for one in self.scores]), trained=self.trained)

    @property
    def withheld(self) -> str | None:
        """Why the mean is not shown: a seed's own reason."""
        return next((one.row.withheld for one in self.scores if one.row.withheld is not None), None)


def whole_of(column: Column) -> float:
    """What a share counts as the whole."""
    return 100.0 if column.unit == "percent" else 1.0


def fold(one: Folded, column: Column, design: Design) -> Cell:
    """The cell of a row: as its step recorded it where there is one seed, over all seeds otherwise."""
    rows = [scored.row for scored in one.scores]
    few = one.trained and len(rows) < MIN_SEEDS
    missing = one.n_arms - len(rows)
    notes = [NOTE_FEW_SEEDS] if few else []
    notes += [f"{missing} of {one.n_arms} seeds have no numbers here"] if missing else []
    cell = Cell(
        n=max(row.n for row in rows),
        n_unscored=sum(row.n_unscored for row in rows),
        n_truncated=sum(row.n_truncated for row in rows),
        n_seeds=len(rows),
        withheld=one.withheld,
        template=rows[0].template,
        steps=tuple(scored.step.id for scored in one.scores),
        note="; ".join(notes) or None,
    )
    if one.withheld is not None:
        return cell
    if len(rows) == 1:
        found = {"mean": rows[0].mean, "stderr": rows[0].stderr, "ci95": rows[0].ci95}
        return cell.model_copy(update={**found, "method": "recorded" if rows[0].ci95 is not None else None})
    if column.aggregate == "corpus":
        return cell.model_copy(update=_corpus(one))
    told = crossed_mean(one.seeds, design, whole=whole_of(column), share=column.unit in ("proportion", "percent"))
    ends = None if told.interval is None else (told.interval.low, told.interval.high)
    method = None if told.interval is None else told.interval.method
    return cell.model_copy(
        update={"mean": told.mean, "stderr": told.stderr, "ci95": ends, "method": method, "n": told.n_samples}
    )


def _corpus(one: Folded) -> dict[str, object]:
    """A corpus metric over seeds: the seeds' own values, and the sampling noise of each as its bootstrap has it."""
    from harness.core.stats.intervals import t_quantile

    means = [scored.row.mean for scored in one.scores if scored.row.mean is not None]
    if not means:
        return {}
    centre, count = math.fsum(means) / len(means), len(means)
    errors = [scored.row.stderr for scored in one.scores if scored.row.stderr is not None]
    if count < MIN_SEEDS or len(errors) < count:
        return {"mean": centre}
    spread = math.fsum((value - centre) ** 2 for value in means) / (count - 1) / count
    # The samples are the same for every seed: their noise does not average out.
    stderr = math.sqrt(spread + math.fsum(error * error for error in errors) / count)
    half = t_quantile(0.95, count - 1) * stderr
    return {"mean": centre, "stderr": stderr, "ci95": (centre - half, centre + half), "method": "corpus_t"}


def seed_cells(one: Folded) -> dict[str, SeedCell]:
    """Arm -> its own number, as its step recorded it."""
    return {
        name: SeedCell(
            mean=scored.row.mean,
            ci95=scored.row.ci95,
            n=scored.row.n,
            n_unscored=scored.row.n_unscored,
            n_truncated=scored.row.n_truncated,
            withheld=scored.row.withheld,
            step=scored.step.id,
        )
        for name, scored in zip(one.names, one.scores, strict=True)
    }


def judge(
    column: Column,
    design: Design,
    cells: Mapping[str, Folded],
    bases: Mapping[str, str | None],
    shown: Mapping[str, dict[str, Cell]],
    alpha: float,
) -> Column:
    """Hold every row of a column against its base; Holm over all of them.

    Args:
        column: the column.
        design: how its samples hang together.
        cells: row -> its scores.
        bases: row -> its base's row.
        shown: row -> its cells, into which the differences are put.
        alpha: level after correction.
    """
    found: dict[str, tuple[str, CrossedDifference | None, str | None]] = {}
    for key, one in cells.items():
        base = bases.get(key)
        if base is None:
            continue
        if base not in cells:
            found[key] = (base, None, "the base was not asked this in the same way")
        elif column.aggregate == "corpus":
            found[key] = (base, None, "a corpus metric is no mean over samples, so there is nothing to pair")
        elif (why := one.withheld or cells[base].withheld) is not None:
            found[key] = (base, None, f"withheld: {why}")
        else:
            found[key] = (base, crossed_difference(one.seeds, cells[base].seeds, design, whole=whole_of(column)), None)
    p_values = [told.p_value if told is not None else None for _, told, _ in found.values()]
    size = sum(p is not None for p in p_values)
    adjusted, levels = holm(p_values), holm_levels(p_values, alpha=alpha)
    for (key, (base, told, why)), p, level in zip(found.items(), adjusted, levels, strict=True):
        cell = shown[key][column.key]
        difference = _difference(column, base, told, why, (p, level), (alpha, size))
        shown[key][column.key] = cell.model_copy(update={"difference": difference})
    family = f"the {size} differences from a base in this column" if size else ""
    return column.model_copy(update={"family": family, "family_size": size})


def _difference(
    column: Column,
    base: str,
    told: CrossedDifference | None,
    why: str | None,
    holmed: tuple[float | None, float | None],
    family: tuple[float, int],
) -> BaseDifference:
    if told is None or told.difference is None:
        note = why or "no sample is scored in both"
        return BaseDifference(base=base, n=0, difference=None, verdict="not comparable", note=note)
    p_adjusted, level = holmed
    alpha, size = family
    verdict, said = verdict_of(told.difference, p_adjusted, alpha, column)
    notes = [one for one in (told.note, said) if one is not None]
    notes += [f"{told.n_dropped:,} samples are scored in one of the two only"] if told.n_dropped else []
    return BaseDifference(
        base=base,
        n=told.n,
        difference=told.difference,
        stderr=told.stderr,
        degrees=told.degrees,
        ci95=_ends(told.interval),
        p_value=told.p_value,
        p_adjusted=p_adjusted,
        ci_adjusted=None if level is None else _ends(told.at(level)),
        level_adjusted=level,
        test=told.test,
        verdict=verdict,
        detectable=told.detectable(0.95, POWER),
        detectable_adjusted=told.detectable(1 - alpha / size, POWER) if size else None,
        note="; ".join(notes) or None,
    )


def verdict_of(difference: float, p: float | None, alpha: float, column: Column) -> tuple[Verdict, str | None]:
    """What a difference is called, and why where that needs a word."""
    if p is None:
        return "not comparable", "one pair of samples shows nothing"
    if p >= alpha or difference == 0.0:
        return "no difference shown", None
    if abs(difference) < (column.resolution or 0.0):
        return (
            "no difference of size",
            f"significant, but below {column.resolution:g}, the smallest difference worth naming",
        )
    if column.higher_is_better is None:
        return "not comparable", "they differ, but this metric has no better direction"
    return ("better" if (difference > 0) is column.higher_is_better else "worse"), None


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (interval.low, interval.high)


def rank(
    column: Column, design: Design, cells: Mapping[str, Folded], shown: Mapping[str, dict[str, Cell]], alpha: float
) -> Column:
    """Rank the rows of a column: 1 + the rows that are better at Holm-adjusted p < alpha, over all pairs of rows."""
    import numpy as np

    ranked = [key for key, one in cells.items() if one.withheld is None and one.seeds.n_seeds]
    if column.aggregate == "corpus" or column.higher_is_better is None:
        why = "a corpus metric is not paired" if column.aggregate == "corpus" else "neither direction is better"
        return column.model_copy(update={"rank_note": f"no ranks: {why}"})
    if len(ranked) < 2:
        return column
    seeds = [cells[key].seeds for key in ranked]
    common: NDArray[np.bool_] = np.asarray(np.stack([one.met for one in seeds]).all(axis=0))
    n = int(common.sum())
    if n < 2 or n < ENOUGH_SHARED * column.n_samples:
        note = f"no ranks: only {n:,} of {column.n_samples:,} samples have a score of every row"
        return column.model_copy(update={"rank_note": note, "rank_n": n})
    kept = design.kept(common)
    if kept.degrees < 1:
        return column.model_copy(update={"rank_note": "no ranks: one cluster shows nothing", "rank_n": n})
    differences, p_values = pairwise([one.kept(common) for one in seeds], kept, whole=whole_of(column))
    upper = np.triu_indices(len(ranked), 1)
    rejected = np.zeros(differences.shape, dtype=bool)
    rejected[upper] = holm_rejects(p_values[upper], alpha=alpha)
    rejected |= rejected.T
    ahead = differences > 0 if column.higher_is_better else differences < 0
    better = rejected & ahead & (np.abs(differences) >= (column.resolution or 0.0))
    for key, place in zip(ranked, rank_by_significance(better), strict=True):
        shown[key][column.key] = shown[key][column.key].model_copy(update={"rank": place})
    pairs = len(ranked) * (len(ranked) - 1) // 2
    note = f"1 + the rows that are better at adjusted p < {alpha:g}; Holm over all {pairs:,} pairs of rows"
    return column.model_copy(update={"rank_n": n, "rank_note": note})


def few_seeds(cells: Sequence[Folded]) -> bool:
    """Whether a trained row among them has too few seeds for its training noise to be known."""
    return any(one.trained and one.seeds.n_seeds < MIN_SEEDS for one in cells)
