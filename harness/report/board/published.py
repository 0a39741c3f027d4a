"""Published numbers beside ours: a file of them, and which belong to an arm of a board by its factors.

A published number stands beside a row only where all of the row's factors are those that the file gives, and of a merge
those of its inputs too. The names of factors are the study's own, which are taken at their word.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from harness.core.config import Config, load_yaml, parse
from harness.core.errors import UserError, unknown
from harness.core.text import number, visible
from harness.report.board.model import Board, BoardRow, Column
from harness.report.board.text import shown_columns
from harness.report.text import escape_markdown, markdown_table

Value = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class PublishedNumber(Config):
    """Numbers of one arm in one table."""

    table: str = Field(description="where it is printed")
    arm: dict[str, str] = Field(min_length=1, description="factors of the arm, all but its seed; base and method first")
    inputs: tuple[dict[str, str], ...] = Field((), description="of a merge: the factors of the arms that it is made of")
    values: dict[str, Value] = Field(min_length=1, description="task -> number, as it is printed")


class Published(Config):
    """A file of published numbers."""

    source: str = Field(description="who published them, and where")
    url: str = ""
    units: dict[str, Literal["proportion", "percent", "logit", "score"]] = Field(
        description="task -> unit of its numbers; a name without @ stands for every variant"
    )
    notes: tuple[str, ...] = ()
    numbers: tuple[PublishedNumber, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Beside:
    """One published number and the cell that it belongs to."""

    row: BoardRow
    column: Column
    value: float
    """In the unit of the column."""
    table: str


@dataclass(frozen=True)
class Matched:
    """All of a file's numbers that have an arm on a board."""

    published: Published
    found: tuple[Beside, ...]
    without: int
    """Numbers that have none."""

    def value(self, row: BoardRow, column: Column) -> float | None:
        """The published number of a cell."""
        return next((one.value for one in self.found if (one.row.key, one.column.key) == (row.key, column.key)), None)


def shipped() -> dict[str, Path]:
    """Files of published numbers that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("assets").glob("*.yaml"))}


def match_published(file: Path, board: Board) -> Matched:
    """Read published numbers, and find the cells of a board that they belong to.

    Args:
        file: YAML, or the name of a shipped file.
        board: with its factors.

    Raises:
        UserError: with file and line: no such file, what is no number, a unit that is not the column's, two different
            numbers of one cell; or no number that has an arm on the board.
    """
    known = shipped()
    if not file.is_file() and str(file) not in known:
        if file.suffix in (".yaml", ".yml") or len(file.parts) > 1:
            raise UserError("--published", f"there is no file {file}", f"Give a file, or one of: {', '.join(known)}.")
        raise unknown("--published", "published file", str(file), known, "docs/publishing.md")
    located = load_yaml(known.get(str(file), file) if not file.is_file() else file)
    published = parse(Published, located)
    columns = _first_of_task(shown_columns(board))
    rows: dict[_Identity, list[BoardRow]] = {}
    for row in board.rows:
        rows.setdefault(_identity(row, board), []).append(row)
    found: dict[tuple[str, str], Beside] = {}
    without = 0
    for place, one in enumerate(published.numbers):
        same = rows.get(_wanted(one), [])
        for task, value in one.values.items():
            where = located.where(("numbers", place, "values", task))
            if task not in published.units:
                raise UserError(where, f"{task!r} has no unit", "Name it under `units`.")
            fitting = [column for column in columns if task in (column.task, column.task.partition("@")[0])]
            without += not (same and fitting)
            for row, column in itertools.product(same, fitting):
                mine = Beside(row, column, _in_unit(value, published.units[task], column, where), one.table)
                before = found.get((row.key, column.key))
                if before is not None and before.value != mine.value:
                    what = f"{row.name}, {column.label} is {mine.value:g} here and {before.value:g} in {before.table}"
                    raise UserError(where, what, "Keep the one that is right.")
                found.setdefault((row.key, column.key), mine)
    if not found:
        first = published.numbers[0].arm
        told = ", ".join(f"{key}: {value}" for key, value in first.items())
        what = f"none of its {without} numbers is of an arm and a task of this board (the first is of {{{told}}})"
        raise UserError(f"--published {file}", what, "Name bases and data in the study as the file does.")
    return Matched(published, tuple(found.values()), without)


def _first_of_task(columns: Sequence[Column]) -> list[Column]:
    """The first metric of each task and variant, of those that were asked in one way."""
    found: dict[tuple[str, str], Column] = {}
    for column in columns:
        if not column.differs:
            found.setdefault((column.task, column.variant), column)
    return list(found.values())


_Identity = tuple[frozenset[tuple[str, str]], frozenset[frozenset[tuple[str, str]]]]


def _factors(given: Mapping[str, object]) -> frozenset[tuple[str, str]]:
    return frozenset((key, str(value)) for key, value in given.items() if value is not None and key != "inputs")


def _identity(row: BoardRow, board: Board) -> _Identity:
    """What a row is, to be held against a published arm; a merge is what it was made of, however it is called."""
    named = {one.name: one for one in board.rows}
    own = {"base": row.base_name or row.name, **row.factors}
    parents = [named[name] for name in row.parents if name in named] if row.kind == "merge" else []
    lost = row.kind == "merge" and len(parents) != len(row.parents)
    inputs = frozenset(_factors({"base": one.base_name, **one.factors}) for one in parents)
    # Inputs that are not on the board are not known to be the same.
    return _factors({**own, "unknown inputs": row.key} if lost else own), inputs


def _wanted(one: PublishedNumber) -> _Identity:
    base = {key: value for key, value in one.arm.items() if key == "base"}
    return _factors(one.arm), frozenset(_factors({**base, **given}) for given in one.inputs)


def _in_unit(value: float, unit: str, column: Column, where: str) -> float:
    if unit == column.unit:
        return value
    if (unit, column.unit) == ("percent", "proportion"):
        return value / 100
    raise UserError(where, f"is in {unit}, and {column.shown} in {column.unit}", "Mend `units`.")


HEADS = ("arm", "task", "metric", "seeds", "n", "ours", "95 % interval", "published", "in the interval", "table")


def published_files(board: Board, matched: Matched) -> dict[str, str]:
    """`tables/published.md` and `.csv`: every published number that has an arm here, beside ours."""
    rows = [_row(one) for one in matched.found]
    told = matched.published
    lines = [f"# {escape_markdown(board.title)}: published numbers beside ours", ""]
    lines += [escape_markdown(f"Published: {told.source}" + (f", {told.url}" if told.url else "")), ""]
    lines += [*markdown_table([escape_markdown(head) for head in HEADS], [_shown(row) for row in rows], words=3), ""]
    notes = [
        f"{matched.without} published numbers have no arm or task here." if matched.without else "",
        "An arm is the same where base, data, method, adapter and all other factors but the seed are called the same; "
        "steps, learning rates and prompts are not compared.",
        "The interval is ours; a published number without one may be as uncertain.",
        *told.notes,
    ]
    lines += [f"* {escape_markdown(note)}" for note in notes if note]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADS)
    for row in rows:
        writer.writerow([visible(one) if isinstance(one, str) else one for one in row])
    return {"tables/published.md": "\n".join([*lines, ""]), "tables/published.csv": stream.getvalue()}


def _row(one: Beside) -> tuple[str | float | int | None, ...]:
    cell = one.row.cells.get(one.column.key)
    mean = cell.mean if cell is not None and cell.withheld is None else None
    ends = cell.ci95 if cell is not None and mean is not None else None
    inside = None if ends is None else "yes" if ends[0] <= one.value <= ends[1] else "no"
    seeds, n = (cell.n_seeds, cell.n) if cell is not None else (0, 0)
    text = None if ends is None else f"{number(ends[0])} to {number(ends[1])}"
    return (one.row.name, one.column.label, one.column.metric, seeds, n, mean, text, one.value, inside, one.table)


def _shown(row: Sequence[str | float | int | None]) -> tuple[str, ...]:
    return tuple("–" if one is None else number(one) if isinstance(one, float) else str(one) for one in row)
