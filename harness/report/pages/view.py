"""What the board's page shows, as plain values: made from the board's model, and drawn without asking for anything else.

Texts stand as they were recorded (the page escapes them); numbers are raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """One metric of one task."""

    task: str
    """Task with its variant."""
    metric: str
    unit: str = ""
    higher_is_better: bool | None = None
    chance: float | None = None
    resolution: float | None = None
    """Smallest difference worth naming, in the unit."""
    detectable: str = ""
    """Smallest difference that this many samples and seeds could have shown, as text with its unit."""
    n: str = ""
    """Samples behind a number, one figure or a range."""


@dataclass(frozen=True)
class Cell:
    """One arm on one metric; what is not known is None."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    withheld: str | None = None
    n: int = 0
    n_unscored: int = 0
    n_truncated: int = 0
    difference: float | None = None
    """From the row's own base, paired."""
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    """Holm-adjusted."""
    verdict: str | None = None
    rank: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """One row: an arm, its seeds folded."""

    name: str
    factors: Mapping[str, str] = field(default_factory=dict)
    cells: tuple[Cell | None, ...] = ()
    is_base: bool = False
    note: str = ""
    """What holds of the whole row, as that training noise was not estimated."""
    link: str = ""
    """Its own page, relative; empty: it has none."""
    seeds: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A claim of a study and what came of it."""

    text: str
    verdict: str
    effect: str = ""
    p: str = ""
    detectable: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BoardView:
    """The whole page."""

    title: str
    date: str = ""
    finding: str = ""
    columns: tuple[Column, ...] = ()
    lines: tuple[Line, ...] = ()
    claims: tuple[Claim, ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    """What holds of all rows, as pairs of word and text."""
    remarks: tuple[str, ...] = ()
    tasks: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    """Task and what is to be said about it."""
    pedigree: tuple[tuple[str, str], ...] = ()
    samples: str = ""
    """Page with the samples, relative; empty: there is none."""

    def base_of(self, line: Line) -> Line | None:
        """The row that a row is compared with: the base of its own factor `base`, or the only one."""
        bases = [one for one in self.lines if one.is_base]
        own = [one for one in bases if one.factors.get("base") == line.factors.get("base")]
        return (own or bases or [None])[0] if len(own) == 1 or len(bases) == 1 else None
