"""The contract of report sections: what a plugin adds to a board's page, as data that the page draws and escapes.

A section gives texts, tables, figures and columns, never markup: so it stands under the page's policy like everything
else, and no text of a model that it shows can become part of the page.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from harness.contracts.plugin import C, Plugin

SectionCell = str | int | float | None
"""A cell of a table: numbers are right-aligned and shown with three decimals (integers with none); None is a dash."""


@dataclass(frozen=True)
class SectionText:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class SectionTable:
    """A table; its first column names the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[SectionCell]]
    caption: str = ""


@dataclass(frozen=True)
class Mark:
    """One mark of a figure, in the figure's own units of length, y growing downwards."""

    shape: Literal["line", "bar", "point", "words"]
    x: float
    y: float
    to_x: float | None = None
    """Of a line, where it ends; of a bar, its right edge."""
    to_y: float | None = None
    text: str = ""
    """Of words, what they say; of a point, what a pointer finds out."""
    series: int = 0
    """Colour and shape, counted from 0."""


@dataclass(frozen=True)
class SectionFigure:
    """A drawing; ``title`` says in one sentence what it shows, for who cannot see it."""

    title: str
    width: float
    height: float
    marks: Sequence[Mark]


@dataclass(frozen=True)
class SectionColumn:
    """One more column of the board; ``values`` by key of a row, rows that it lacks stay empty."""

    title: str
    values: Mapping[str, SectionCell]
    says: str = ""
    """What it is and its unit, in a few words."""
    higher_is_better: bool | None = None


SectionBlock = SectionText | SectionTable | SectionFigure


class ReportSection(Plugin[C]):
    """Adds to the page of every board that `harness report` writes."""

    kind = "section"
    heading: ClassVar[str] = ""
    """Above the section; its name where it is empty."""

    @abstractmethod
    def blocks(self, board: Mapping[str, Any], config: C) -> Iterable[SectionBlock]:
        """What the section shows, in order; nothing: there is no section.

        Args:
            board: what board.json holds: ``columns``, ``rows`` (with ``cells`` by key of a column), ``claims``, ...;
                a copy, and without any text of a model or a data set.
            config: the plugin's own options.

        Equal boards must give equal blocks: a report is rebuilt byte for byte. What raises is named on the page, and
        the rest of the page stands.
        """

    def columns(self, board: Mapping[str, Any], config: C) -> Iterable[SectionColumn]:
        """Columns that stand behind the board's own, where there are any."""
        return ()
