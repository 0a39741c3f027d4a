"""What a board holds: arms as rows, a metric of a task as a column, and what each number is worth."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from harness.core.config import Config
from harness.core.records import SCHEMA_VERSION
from harness.core.text import ARROWS, MINUS, number
from harness.report.model import Verdict
from harness.report.notebook import ends_text, table_html


class Source(Config):
    """One run or study that a board was made from."""

    name: str = Field(description="its study, or model and adapter; never a folder")
    study: str | None = None
    summary: str = ""
    engine: str = ""
    versions: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="of harness and libraries, every one that a step of it was done with"
    )


class Column(Config):
    """One metric of one task, asked of every row in the same way."""

    key: str = Field(description="digest of how it was asked and scored")
    label: str = Field(description="task with its variant")
    task: str
    variant: str
    metric: str
    scorer: str
    unit: str
    higher_is_better: bool | None
    primary: bool
    aggregate: str = "mean"
    version: int | None = None
    resolution: float | None = Field(None, description="smallest difference worth naming, in the unit")
    chance: float | None = None
    templates: tuple[str, ...] = Field((), description="digests of chat templates; several: one for each base")
    n_samples: int = 0
    n_clusters: int = Field(0, description="independent groups of samples; as many as samples where each stands alone")
    n_strata: int = Field(1, description="leaf tasks, which another sample would have too")
    family: str = Field("", description="the tests that Holm's correction is taken over, in words")
    family_size: int = 0
    rank_n: int | None = Field(None, description="samples that every ranked row has a score of")
    rank_note: str | None = None
    differs: tuple[str, ...] = Field((), description="how it was asked or scored otherwise than columns of its label")

    @property
    def shown(self) -> str:
        """Label, metric and number of the column among those of its name."""
        return f"{self.label} {self.metric}"


class BaseDifference(Config):
    """A row less its base in one column, paired by sample, crossed over seeds."""

    base: str = Field(description="key of the base's row")
    n: int = Field(description="samples that both have a score of")
    difference: float | None
    stderr: float | None = None
    degrees: float | None = Field(None, description="of freedom, of the standard error")
    ci95: tuple[float, float] | None = None
    p_value: float | None = None
    p_adjusted: float | None = Field(None, description="Holm over the column's family")
    ci_adjusted: tuple[float, float] | None = Field(None, description="interval that goes with p_adjusted")
    level_adjusted: float | None = None
    test: str = "none"
    verdict: Verdict
    detectable: float | None = Field(None, description="smallest difference found with 80 % power, tested alone at 5 %")
    detectable_adjusted: float | None = Field(None, description="the same at 5 % over the size of the family")
    note: str | None = None


class Spread(Config):
    """What other judges, or other wordings of the question to them, make of the same answers."""

    low: float = Field(description="smallest mean over judges and wordings")
    high: float = Field(description="largest mean over judges and wordings")
    n: int = Field(description="judges x wordings")
    low_of: str
    high_of: str
    verdicts: dict[str, str] = Field(
        default_factory=dict, description="judge and wording -> verdict against the base; empty: all have the same"
    )


class Part(Config):
    """What a mean is of, where a seeded subset was asked: an estimate of the whole set, or the subset alone."""

    n: int = Field(description="samples of the subset")
    n_whole: int | None = Field(None, description="samples that the base was asked; None: no more than the subset")
    plain: float | None = Field(None, description="mean of the subset, where the cell's is an estimate of the whole")
    whole: bool = Field(False, description="whether the mean is of the whole set itself: the base's own")
    note: str | None = Field(None, description="why the mean is of the subset alone")


class Cell(Config):
    """One number of the board."""

    mean: float | None = None
    stderr: float | None = None
    ci95: tuple[float, float] | None = None
    method: str | None = Field(None, description="of the interval")
    n: int = Field(0, description="samples with a score of any seed")
    n_unscored: int = Field(0, description="samples without a score, over all seeds")
    n_truncated: int = Field(0, description="samples cut, over all seeds")
    n_seeds: int = 1
    withheld: str | None = None
    template: str | None = None
    rank: int | None = Field(None, description="1 + the rows of the column that are better at adjusted p < alpha")
    difference: BaseDifference | None = None
    part: Part | None = Field(None, description="where a seeded subset was asked; None: all that the column asks")
    spread: Spread | None = Field(None, description="over judges and wordings, where several were asked of all seeds")
    spread_note: str | None = Field(None, description="why there is none although several were to be asked")
    steps: tuple[str, ...] = Field((), description="ids of the scores steps, one for each seed")
    note: str | None = None


class SeedCell(Config):
    """The number of one seed."""

    mean: float | None = None
    ci95: tuple[float, float] | None = None
    n: int = 0
    n_unscored: int = 0
    n_truncated: int = 0
    withheld: str | None = None
    step: str = ""


class SeedRow(Config):
    """One arm as it was trained once."""

    name: str
    seed: int | None = None
    sources: tuple[int, ...] = Field((), description="places in the board's sources")
    made_by: str | None = Field(None, description="id of the step that made it")
    folder: str | None = Field(None, description="name of that step's folder in `steps/` of the first source")
    seconds: dict[str, float] = Field(default_factory=dict, description="of that step, by what they were spent on")
    counts: dict[str, int] = Field(default_factory=dict, description="of that step: rows, steps")
    factors: dict[str, Any] = Field(default_factory=dict)
    cells: dict[str, SeedCell] = Field(default_factory=dict)
    missing: tuple[str, ...] = Field((), description="tasks without numbers, and why")


class BoardRow(Config):
    """One arm, its seeds folded."""

    key: str
    name: str
    kind: str = Field(
        description="base, align, checkpoint, merge, adapter, as a study says; external: a log's; else arm"
    )
    base: str | None = Field(None, description="key of its base's row; None: it is one, or the base was not evaluated")
    base_name: str | None = None
    factors: dict[str, Any] = Field(default_factory=dict, description="without the seed")
    parents: tuple[str, ...] = Field((), description="names of the rows that it was made from")
    recipe: dict[str, Any] = Field(default_factory=dict, description="what its seeds share of how they were made")
    cells: dict[str, Cell] = Field(default_factory=dict, description="by key of the column")
    seeds: tuple[SeedRow, ...] = ()
    notes: tuple[str, ...] = ()


class ClaimResult(Config):
    """What the numbers say of one claim."""

    name: str
    summary: str = ""
    task: str
    metric: str
    direction: str
    margin: float | None = None
    status: str = Field(description="supported, contradicted, undecided, or undecided (judge)")
    effect: float | None = Field(None, description="side a less side b, in the metric's unit")
    ci95: tuple[float, float] | None = None
    p_value: float | None = None
    p_adjusted: float | None = Field(None, description="Holm over the claims of the board")
    level: float = 0.05
    detectable: float | None = Field(None, description="smallest effect found with 80 % power at the level over claims")
    n: int = 0
    rows_a: tuple[str, ...] = ()
    rows_b: tuple[str, ...] = ()
    by_judge: dict[str, str] = Field(default_factory=dict, description="judge and wording -> status under them")
    why: str = Field("", description="in words, what decided it or what is missing")


class Asker(Config):
    """One judge, asked in one wording."""

    name: str
    judge: str
    wording: str | None
    column: str | None = Field(None, description="key of the column with its numbers; None: there are none")


class JudgesAgree(Config):
    """How far two judges, or two wordings, agree."""

    a: str
    b: str
    tau: float | None = Field(None, description="Kendall's tau-b of the rows' means; None: not defined")
    n_rows: int = 0
    kappa: float | None = Field(None, description="Cohen's, of 0/1 verdicts on the same answers; None: not defined")
    n_answers: int = 0


class JudgePanel(Config):
    """One metric of a task under several judges and wordings; the first is the one that counts."""

    task: str
    metric: str
    column: str | None = Field(None, description="key of the first one's column; None: it has no numbers")
    askers: tuple[Asker, ...]
    agreement: tuple[JudgesAgree, ...] = ()
    missing: tuple[str, ...] = Field((), description="rows without numbers under a judge, and why")
    remarks: tuple[str, ...] = ()


class Board(Config):
    """``board.json``: every number of any number of runs and studies, side by side."""

    schema_version: int = SCHEMA_VERSION
    harness: str
    title: str
    finding: str = Field("", description="one sentence of what the differences from the bases come to")
    alpha: float = 0.05
    power: float = 0.8
    sources: tuple[Source, ...] = ()
    columns: tuple[Column, ...] = ()
    rows: tuple[BoardRow, ...] = ()
    claims: tuple[ClaimResult, ...] = ()
    judges: tuple[JudgePanel, ...] = ()
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """What a notebook shows: arms by primary metrics, each mean with its interval, n and verdict."""
        columns = [column for column in self.columns if column.primary] or list(self.columns)
        heads = ["arm", "seeds", *(f"{one.shown} {ARROWS[one.higher_is_better]}".rstrip() for one in columns)]
        rows = [
            [row.name, str(len(row.seeds)), *(_told(row.cells.get(column.key)) for column in columns)]
            for row in self.rows
        ]
        return table_html(self.title, heads, rows, [self.finding] if self.finding else [])

    def column(self, key: str) -> Column:
        """The column of a key."""
        return next(one for one in self.columns if one.key == key)


def _told(cell: Cell | None) -> str:
    """A cell in words, as a notebook shows it."""
    if cell is None:
        return "–"
    if cell.withheld is not None:
        return f"withheld (n {cell.n:,})"
    ends = f" [{ends_text(cell.ci95)}]" if cell.ci95 is not None else ""
    verdict = f", {cell.difference.verdict}" if cell.difference is not None else ""
    return f"{number(cell.mean, minus=MINUS)}{ends}, n {cell.n:,}{verdict}"
