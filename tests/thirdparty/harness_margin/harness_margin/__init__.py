"""How far each arm of a board is from the best one, on its first column that has a direction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field

import harness
from harness import Mark, ReportSection, SectionBlock, SectionColumn, SectionFigure, SectionTable, SectionText, hookimpl

WIDTH, ROW = 400.0, 24.0


class Margin(ReportSection["Margin.Config"]):
    """A paragraph, a table, a figure, and a column."""

    name = "margin"
    heading = "Distance from the best"
    summary = "how far each arm is from the best one"

    class Config(harness.Config):
        most: int = Field(20, ge=1, description="rows that are shown")

    def blocks(self, board: Mapping[str, Any], config: Config) -> Iterator[SectionBlock]:
        column, found = self.found(board)
        if column is None or not found:
            return
        names = {row["key"]: row["name"] for row in board["rows"]}
        shown = sorted(found.items(), key=lambda one: (one[1], names[one[0]]))[: config.most]
        yield SectionText(f"{column['label']} {column['metric']}: the mean of each arm less the best arm's.")
        yield SectionTable(("arm", "distance"), [(names[key], distance) for key, distance in shown])
        greatest = max(found.values()) or 1.0
        marks = []
        for place, (key, distance) in enumerate(shown):
            y = ROW * (place + 0.5)
            marks.append(Mark("bar", 150, y - 6, 150 + 0.6 * WIDTH * distance / greatest, y + 6))
            marks.append(Mark("words", 0, y + 4, text=names[key][:22]))
        yield SectionFigure("Distance of each arm from the best.", WIDTH, ROW * len(shown), marks)

    def columns(self, board: Mapping[str, Any], config: Config) -> Iterator[SectionColumn]:
        column, found = self.found(board)
        if column is not None:
            yield SectionColumn("from the best", found, f"{column['label']}, {column['unit']}", higher_is_better=False)

    def found(self, board: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, dict[str, float]]:
        """The column, and the distance of each row by its key."""
        directed = [column for column in board["columns"] if column["higher_is_better"] is not None]
        if not directed:
            return None, {}
        column = directed[0]
        cells = {row["key"]: row["cells"].get(column["key"]) for row in board["rows"]}
        means = {key: cell["mean"] for key, cell in cells.items() if cell is not None and cell["mean"] is not None}
        best = (max if column["higher_is_better"] else min)(means.values(), default=0.0)
        return column, {key: abs(mean - best) for key, mean in means.items()}


@hookimpl
def register_report_sections() -> Iterator[ReportSection]:
    yield Margin()
