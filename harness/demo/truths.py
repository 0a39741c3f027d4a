"""What is known of the demo's world by the way it was made, held against what its study has measured."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from harness.core.config import Config, load_yaml, parse
from harness.core.stats import CrossedSummary, crossed_bootstrap, holm
from harness.core.text import number
from harness.demo.world import ASSETS
from harness.report.pairing import Side, base_of, match_metrics, match_tasks, obstacle
from harness.report.read import RunResult
from harness.report.study import open_runs
from harness.steps.files import read_json

if TYPE_CHECKING:
    from rich.table import Table

BASE = "base"
ALPHA = 0.05
Verdict = Literal["supported", "contradicted", "undecided", "not measured"]


class Contrast(Config):
    """Arms against other arms, seed by seed, in one metric."""

    task: str
    metric: str
    arms: str = Field(description="pattern of arm names; {method} stands for each method in turn")
    than: str = Field(description="pattern of the other arms; `base`: the base")
    direction: Literal["higher", "lower"] = Field(alias="is", description="of the mean of `arms` minus that of `than`")


class Truth(Config):
    """One sentence, and the contrasts that must all hold for it to be supported."""

    says: str
    contrasts: tuple[Contrast, ...] = Field(min_length=1)


class Truths(Config):
    """All that is known of a world."""

    methods: tuple[str, ...] = Field(min_length=1, description="what {method} stands for")
    truths: tuple[Truth, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Measured:
    """A contrast as it was measured; without `summary`, why it was not."""

    contrast: Contrast
    summary: CrossedSummary | None = None
    resolution: float = 0.0
    """Smallest difference worth naming, in the metric's unit."""
    why_not: str | None = None
    p_adjusted: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Significant after Holm over all contrasts and of a size worth naming, and if so whether as it should be."""
        if self.summary is None or self.summary.mean is None or self.p_adjusted is None:
            return "not measured"
        if self.p_adjusted >= ALPHA or not self.summary.mean or abs(self.summary.mean) < self.resolution:
            return "undecided"
        return "supported" if (self.summary.mean > 0) == (self.contrast.direction == "higher") else "contradicted"

    def __str__(self) -> str:
        """Difference and interval, or why there is none."""
        one = self.summary
        if one is None or one.mean is None:
            return self.why_not or "no sample is scored in both"
        interval = f" [{number(one.interval.low)}, {number(one.interval.high)}]" if one.interval is not None else ""
        return f"{number(one.mean)}{interval}"


@dataclass(frozen=True)
class Finding:
    """A truth about one method, and what was measured of it."""

    method: str
    says: str
    measured: tuple[Measured, ...]

    @property
    def verdict(self) -> Verdict:
        """Supported if every contrast is; else the worst that is said of one."""
        found = {one.verdict for one in self.measured}
        order: tuple[Verdict, ...] = ("contradicted", "not measured", "undecided", "supported")
        return next(verdict for verdict in order if verdict in found)


def read_truths(file: Path = ASSETS / "truths.yaml") -> Truths:
    """Read the truths of a world.

    Raises:
        UserError: with file, line and key.
    """
    return parse(Truths, load_yaml(file))


def check_truths(root: Path, truths: Truths, *, seed: int = 0) -> list[Finding]:
    """Hold the numbers of a study's run folder against the truths of its world, each for every method.

    Raises:
        UserError: the folder is no run.
        CorruptionError: a record is damaged.
    """
    arms = _arms(root)
    findings = [
        Finding(method, one.says, tuple(_measure(_of(contrast, method), arms, seed) for contrast in one.contrasts))
        for one in truths.truths
        for method in truths.methods
    ]
    every = [one.summary.p_value if one.summary is not None else None for row in findings for one in row.measured]
    adjusted = iter(holm(every))
    return [
        replace(row, measured=tuple(replace(one, p_adjusted=next(adjusted)) for one in row.measured))
        for row in findings
    ]


def _of(contrast: Contrast, method: str) -> Contrast:
    filled = {key: getattr(contrast, key).replace("{method}", method) for key in ("arms", "than")}
    return contrast.model_copy(update=filled)


@dataclass(frozen=True)
class _Arm:
    run: RunResult
    base: RunResult
    seed: int | None


def _arms(root: Path) -> dict[str, _Arm]:
    seeds = {arm["name"]: arm["factors"].get("seed") for arm in read_json(root / "plan.json")["arms"]}
    found: dict[str, _Arm] = {}
    for run in open_runs(root).values():
        base, others = base_of(run)
        if base is not None:
            found |= {str(arm.label): _Arm(arm, base, seeds.get(str(arm.label))) for arm in others}
            found[BASE] = _Arm(base, base, None)
    return found


def _measure(contrast: Contrast, arms: Mapping[str, _Arm], seed: int) -> Measured:
    """One row for each seed that both sides have, of differences by sample; the base goes with every seed."""
    left, right = (
        {arm.seed: arm.run for name, arm in arms.items() if fnmatch.fnmatchcase(name, pattern)}
        for pattern in (contrast.arms, contrast.than)
    )
    if contrast.than == BASE:
        right = dict.fromkeys(left, arms[BASE].run) if BASE in arms else {}
    if not left or left.keys() != right.keys():
        said = " against ".join(f"seeds {sorted(map(str, side))}" if side else "no arm" for side in (left, right))
        return Measured(contrast, why_not=f"{contrast.arms} and {contrast.than}: {said}")
    rows: list[dict[str, float | None]] = []
    resolution = 0.0
    for key in sorted(left, key=str):
        sides = _sides(left[key], right[key], contrast)
        if isinstance(sides, str):
            return Measured(contrast, why_not=f"{left[key].label}: {sides}")
        resolution = sides[0].metric.resolution or 0.0
        rows.append(_differences(*(side.values for side in sides)))
    return Measured(contrast, _summary(rows, seed), resolution)


def _sides(a: RunResult, b: RunResult, contrast: Contrast) -> tuple[Side, Side] | str:
    """The two sides of a contrast for one seed; or why they cannot be told from each other."""
    for one, other in match_tasks(a, b)[0]:
        if one.name != contrast.task:
            continue
        if any(step.record is None or not step.done for step in (*one.steps, *other.steps)):
            return f"{contrast.task} failed or has not ended"
        for side, against in match_metrics(one, other):
            if side.metric.name == contrast.metric:
                return obstacle(side, against) or (side, against)
    return f"{contrast.task} has no {contrast.metric} in both arms"


def _differences(values: Mapping[str, float | None], others: Mapping[str, float | None]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in sorted(values.keys() | others.keys()):
        one, other = values.get(name), others.get(name)
        found[name] = None if one is None or other is None else one - other
    return found


def _summary(rows: Sequence[Mapping[str, float | None]], seed: int) -> CrossedSummary:
    import numpy as np

    names = sorted({name for row in rows for name in row})
    cells = [[np.nan if (value := row.get(name)) is None else value for name in names] for row in rows]
    return crossed_bootstrap(np.array(cells, dtype=float).reshape(len(rows), len(names)), seed=seed)


def truths_table(findings: Sequence[Finding]) -> Table:
    """Truths with what was measured and the verdict, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    styles = {"supported": "green", "contradicted": "bold red", "undecided": "yellow", "not measured": "bold red"}
    table = Table(title=Text("What must be true of this world", "bold"), title_justify="left", box=None)
    for name in ("method", "truth", "difference, 95 % interval", "verdict"):
        table.add_column(name, overflow="fold")
    for row in findings:
        shown = Text("\n".join(str(one) for one in row.measured))
        table.add_row(row.method, Text(row.says), shown, Text(row.verdict, styles[row.verdict]))
    return table


def truths_note(findings: Sequence[Finding]) -> str:
    """What the table's numbers are, and what they leave out."""
    measured = [one.summary for row in findings for one in row.measured if one.summary is not None]
    notes = " ".join(sorted({f"; {one.note}" for one in measured if one.note}))
    seeds = "-".join(sorted({str(one.n_seeds) for one in measured}))
    supported = sum(row.verdict == "supported" for row in findings)
    return (
        f"{supported} of {len(findings)} supported. Differences: paired by sample, averaged over {seeds or 0} seeds"
        f"{notes}; verdicts at p < {ALPHA} after Holm over all of them."
    )
