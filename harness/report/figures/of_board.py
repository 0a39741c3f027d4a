"""The figures of a board, by file name: what its numbers allow, and nothing where they do not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.report.board.model import Board, BoardRow, Cell, Column
from harness.report.figures.charts import Curve, Panel, Point, Value, curves, pareto, rows, scatter
from harness.report.figures.svg import Canvas

MOST_ROWS, MOST_PANELS = 60, 4
"""Most arms and benchmarks of a figure that is to be read."""
HELPFUL = ("mmlu", "mmlu_gen", "bbh", "bbh_cot", "alpaca_eval1", "alpaca_eval2", "alpaca_eval_paper")
HARMLESS = (
    *("real_toxicity", "dangerous_qa", "dangerous_qa_cot", "dangerous_qa_standard", "dangerous_qa_red_instruct"),
    *("harmful_qa", "categorical_harmful_qa", "categorical_harmful_qa_vi", "categorical_harmful_qa_zh"),
)
"""Tasks that measure one side of the trade-off, by name before `@` and `:`."""
MOST_PAIRS = 6
SIZES = {"samples": "training samples", "step": "optimiser step"}
"""Factors that a curve can run over."""


@dataclass(frozen=True)
class Figure:
    """One figure; ``said`` is its caption, in full sentences."""

    name: str
    said: str
    canvas: Canvas
    first: bool = True
    """Whether it is the first of its kind, which a page shows at once."""


def figures_of(board: Board, gpu_hours: Mapping[str, float] | None = None) -> list[Figure]:
    """Every figure that the numbers allow.

    Args:
        board: the numbers.
        gpu_hours: of making an arm, by key of its row, where the records say.
    """
    columns = [column for column in board.columns if column.primary] or list(board.columns)
    parts = [columns[start : start + MOST_PANELS] for start in range(0, len(columns), MOST_PANELS)]
    found = [one for number, part in enumerate(parts) for one in _by_row(board, part, number)]
    for factor in SIZES:
        found += _curves(board, columns, factor)
    found += _trade_offs(board, columns)
    return [*found, *_by_cost(board, columns, gpu_hours or {})]


def value_of(cell: Cell | None) -> Value | None:
    """The mean of a cell; None where there is none or it is withheld."""
    if cell is None or cell.mean is None or cell.withheld is not None:
        return None
    low, high = cell.ci95 or (None, None)
    return Value(cell.mean, low, high)


def _title(column: Column) -> str:
    return column.label + (f" ({column.differs[0].partition(' ')[0]})" if column.differs else "")


def _says(column: Column) -> str:
    better = {True: ", higher is better", False: ", lower is better", None: ""}[column.higher_is_better]
    return f"{column.metric}{better}"


def _group(row: BoardRow) -> str:
    return str(row.factors.get("method") or row.kind)


def _kinds(board: Board) -> list[str]:
    """All groups of a board: each has one colour in all figures."""
    return list(dict.fromkeys(map(_group, board.rows)))


def _chosen(rows_: Sequence[BoardRow], columns: Sequence[Column]) -> tuple[list[BoardRow], str]:
    """At most `MOST_ROWS` rows, those of the best ranks, in the board's order; and what to say of that."""
    if len(rows_) <= MOST_ROWS:
        return list(rows_), ""

    def standing(row: BoardRow) -> float:
        ranks = [row.cells[column.key].rank for column in columns if column.key in row.cells]
        known = [rank for rank in ranks if rank is not None]
        return sum(known) / len(known) if known else float(len(rows_))

    best = {row.key for row in sorted(rows_, key=lambda row: (standing(row), row.name))[:MOST_ROWS]}
    said = f" Of {len(rows_):,} arms the {MOST_ROWS} with the best mean rank."
    return [row for row in rows_ if row.key in best], said


def _by_row(board: Board, columns: Sequence[Column], number: int) -> Iterator[Figure]:
    """Bars with intervals, and the differences from the base, of some columns."""
    end = f"-{number + 1}" if number else ""
    some, left = _chosen([row for row in board.rows if _has(row, columns)], columns)
    if some:
        panels = [
            Panel(_title(column), _says(column), tuple(value_of(row.cells.get(column.key)) for row in some))
            for column in columns
        ]
        said = f"Mean of every arm with its 95 % interval.{left}"
        canvas = rows(said, [row.name for row in some], list(map(_group, some)), panels, bars=True, kinds=_kinds(board))
        yield Figure(f"bars{end}", said, canvas)
    compared = [row for row in board.rows if any(_difference(row, column) is not None for column in columns)]
    some, left = _chosen(compared, columns)
    if some:
        panels = [
            Panel(_title(column), _says(column), tuple(_difference(row, column) for row in some), marked=0.0)
            for column in columns
        ]
        said = f"Difference of every arm from its own base, with the interval that goes with its Holm-adjusted p.{left}"
        canvas = rows(
            said, [row.name for row in some], list(map(_group, some)), panels, bars=False, kinds=_kinds(board)
        )
        yield Figure(f"differences{end}", said, canvas)


def _has(row: BoardRow, columns: Sequence[Column]) -> bool:
    return any(value_of(row.cells.get(column.key)) is not None for column in columns)


def _difference(row: BoardRow, column: Column) -> Value | None:
    cell = row.cells.get(column.key)
    one = cell.difference if cell is not None else None
    if one is None or one.difference is None:
        return None
    low, high = one.ci_adjusted or (None, None)
    return Value(one.difference, low, high)


def _curves(board: Board, columns: Sequence[Column], factor: str) -> Iterator[Figure]:
    """Score against a size, and in per cent of the score at the greatest, for arms that differ in that size alone."""
    families: dict[tuple[Any, ...], dict[float, BoardRow]] = {}
    for row in board.rows:
        size = row.factors.get(factor)
        if isinstance(size, int | float) and not isinstance(size, bool):
            others = sorted((name, str(value)) for name, value in row.factors.items() if name not in SIZES)
            other_sizes = sorted((name, str(row.factors.get(name))) for name in SIZES if name != factor)
            key = (row.base_name, *others, *(other_sizes if factor == "samples" else ()))
            families.setdefault(key, {})[float(size)] = row
    lines = {key: dict(sorted(some.items())) for key, some in families.items() if len(some) > 1}
    if not lines:
        return
    names = _names(list(lines))
    panels, shares = [], []
    for column in columns:
        drawn = [Curve(name, _along(some, column)) for name, some in zip(names, lines.values(), strict=True)]
        drawn = [curve for curve in drawn if len(curve.points) > 1]
        if drawn:
            panels.append((f"{_title(column)}, {_says(column)}", drawn))
        # A share of a score says nothing where 0 is no absence of what is measured.
        if column.unit in ("proportion", "percent"):
            whole = [_of_last(curve) for curve in drawn if curve.points[-1][1].mean > 0]
            if whole:
                shares.append((f"{_title(column)}, {_says(column)}", whole))
    if panels:
        said = f"Score against {SIZES[factor]}, with 95 % intervals."
        yield Figure(f"by-{factor}", said, curves(said, (SIZES[factor], "score"), panels))
    if shares:
        said = (
            f"Score in per cent of the same arm's at the greatest number of {SIZES[factor]}s, intervals scaled alike "
            "(that score taken as known)."
        ).replace("sampless", "samples")
        yield Figure(f"by-{factor}-percent", said, curves(said, (SIZES[factor], "% of the greatest"), shares))


def _along(some: Mapping[float, BoardRow], column: Column) -> tuple[tuple[float, Value], ...]:
    found = [(size, value_of(row.cells.get(column.key))) for size, row in some.items()]
    return tuple((size, value) for size, value in found if value is not None)


def _names(keys: Sequence[tuple[Any, ...]]) -> list[str]:
    """Names of curves: the factors that tell them apart."""
    told = [{"base": key[0], **dict(key[1:])} for key in keys]
    differing = [name for name in dict.fromkeys(itertools.chain(*told)) if len({one.get(name) for one in told}) > 1]
    return [" ".join(str(one[name]) for name in differing if one.get(name)) or "score" for one in told]


def _of_last(curve: Curve) -> Curve:
    whole = curve.points[-1][1].mean / 100
    return Curve(
        curve.name,
        tuple(
            (size, Value(one.mean / whole, *(None if end is None else end / whole for end in (one.low, one.high))))
            for size, one in curve.points
        ),
    )


def _is(column: Column, names: Sequence[str]) -> bool:
    return column.task.partition(":")[0].partition("@")[0] in names and column.higher_is_better is not None


def _trade_offs(board: Board, columns: Sequence[Column]) -> Iterator[Figure]:
    """Helpfulness against harmlessness, with the arms that no other beats on both."""
    helpful = [column for column in columns if _is(column, HELPFUL)]
    harmless = [column for column in columns if _is(column, HARMLESS)]
    for number, (x, y) in enumerate(list(itertools.product(helpful, harmless))[:MOST_PAIRS]):
        points = _points(board, x, y)
        if len(points) > 1:
            front = pareto(points, bool(x.higher_is_better), bool(y.higher_is_better))
            said = (
                f"Helpfulness ({_title(x)}) against harmlessness ({_title(y)}), means with 95 % intervals; the dashed "
                "line joins the arms that no other is as good as on both."
            )
            canvas = scatter(
                said, (f"{_title(x)}: {_says(x)}", f"{_title(y)}: {_says(y)}"), points, front, kinds=_kinds(board)
            )
            yield Figure(f"trade-off{f'-{number + 1}' if number else ''}", said, canvas, first=number == 0)


def _points(board: Board, x: Column, y: Column) -> list[Point]:
    found = []
    for row in board.rows:
        across, up = value_of(row.cells.get(x.key)), value_of(row.cells.get(y.key))
        if across is not None and up is not None:
            found.append(Point(row.name, _group(row), across, up))
    return found


def _by_cost(board: Board, columns: Sequence[Column], gpu_hours: Mapping[str, float]) -> Iterator[Figure]:
    for number, column in enumerate(columns):
        points = [
            Point(row.name, _group(row), Value(gpu_hours[row.key]), value)
            for row in board.rows
            if gpu_hours.get(row.key) and (value := value_of(row.cells.get(column.key))) is not None
        ]
        if len(points) > 1:
            said = f"{_title(column)} against the GPU-hours that it took to make the arm, as its records say."
            canvas = scatter(
                said, ("GPU-hours (mean over seeds)", f"{_title(column)}: {_says(column)}"), points, kinds=_kinds(board)
            )
            yield Figure(f"by-gpu-hour{f'-{number + 1}' if number else ''}", said, canvas, first=number == 0)
