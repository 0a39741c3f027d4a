"""What reports and comparisons hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from harness.core.config import Config
from harness.core.records import SCHEMA_VERSION, Metric, Row
from harness.core.text import task_label, visible


class TaskReport(Config):
    """What a report says about one task besides its numbers."""

    task: str
    variant: str = "raw"
    arm: str | None = Field(None, description="its arm, where the run has several")
    version: int | None = None
    source: str = ""
    licence: str = "unknown"
    notes: tuple[str, ...] = ()
    dropped: dict[str, int] = Field(default_factory=dict, description="rows of the data set left out, by reason")
    limit: int | None = Field(None, description="samples per leaf task; None: all")
    asks: Literal["generate", "loglikelihood"] | None = Field(None, description="kind of request; None: not recorded")
    decoding: dict[str, Any] | None = Field(
        None, description="how answers are drawn; None: not at all, or not recorded"
    )
    scorers: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = ()
    steps: tuple[str, ...] = Field((), description="ids of its steps, answers first")
    status: str = Field("done", description="done, failed or unfinished")


class Report(Config):
    """``report.json``: every number of a run, and what it takes to believe it."""

    schema_version: int = SCHEMA_VERSION
    harness: str = Field(description="version of the harness that wrote the report")
    model: dict[str, Any] = Field(default_factory=dict)
    adapter: dict[str, Any] | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    spec: dict[str, Any] = Field(default_factory=dict, description="what was asked, every default filled in")
    rows: tuple[Row, ...] = Field((), description="one per task and metric")
    leaves: tuple[Row, ...] = Field((), description="one per leaf task and metric")
    tasks: tuple[TaskReport, ...] = ()
    arms: tuple[dict[str, Any], ...] = Field((), description="arms, where there are several: adapter, folded or not")
    differences: tuple[Difference, ...] = Field((), description="every arm minus the base, paired, Holm over all")
    parity: dict[str, Any] | None = Field(None, description="what a second engine answered (`--parity`)")
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """Model and adapter, in one line."""
        name = str(self.model.get("name") or self.model.get("ref") or "model")
        if self.adapter:
            name += f" + {self.adapter.get('name') or self.adapter.get('ref') or 'adapter'}"
        if self.arms:
            beside = [arm for arm in self.arms if arm.get("label") is not None]
            name += f" and {len(beside)} {'adapters' if all(arm.get('adapter') for arm in beside) else 'arms'}"
        return visible(name)

    def to_pandas(self, *, leaves: bool = False) -> Any:
        """The rows (and those of the leaf tasks) as a data frame."""
        import pandas as pd

        rows = self.rows + (self.leaves if leaves else ())
        return pd.DataFrame([row.model_dump() for row in rows], columns=list(Row.model_fields))


Verdict = Literal["better", "worse", "no difference of size", "no difference shown", "not comparable"]


class Difference(Config):
    """One metric of one task: run B against run A, on the samples that both scored."""

    arm: str | None = Field(None, description="arm of B, where there are several")
    task: str
    variant_a: str
    variant_b: str
    metric: str
    unit: str
    higher_is_better: bool | None
    primary: bool
    n: int = Field(0, description="samples scored in both runs")
    n_only_a: int = Field(0, description="samples that only run A has")
    n_only_b: int = Field(0, description="samples that only run B has")
    n_unscored: int = Field(0, description="samples of both runs without a score in at least one")
    mean_a: float | None = Field(None, description="over the paired samples, not the whole run")
    mean_b: float | None = None
    difference: float | None = Field(None, description="mean of B minus A, in the metric's unit")
    ci95: tuple[float, float] | None = None
    p_value: float | None = Field(None, description="two-sided, as it stands")
    p_adjusted: float | None = Field(None, description="Holm over the primary metrics (others: over the others)")
    ci_adjusted: tuple[float, float] | None = Field(None, description="interval that goes with p_adjusted")
    level_adjusted: float | None = Field(
        None, description="its level: 1 - alpha / metrics tested at its step of Holm's"
    )
    resolution: float | None = Field(None, description="smallest difference worth naming, in the metric's unit")
    detectable: float | None = Field(
        None, description="smallest true difference found with 80 % power at that level, in the metric's unit"
    )
    prompts_differ: str | None = Field(None, description="how A and B were asked differently")
    test: str = "none"
    n_better: int = Field(0, description="samples with the better score in B (the higher one if neither is better)")
    n_worse: int = 0
    n_same: int = 0
    verdict: Verdict
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Task with its variant, or both variants where they differ; after its arm, where there are several."""
        arm = "" if self.arm is None else f"{visible(self.arm)}, "
        if self.variant_a == self.variant_b:
            return arm + task_label(self.task, self.variant_a)
        return arm + visible(f"{self.task} ({self.variant_a} → {self.variant_b})")


class AtEqualLength(Config):
    """A win rate that length has no part in; or why it is withheld."""

    n: int = Field(description="pairs that it is of")
    share: float | None = None
    ci95: tuple[float, float] | None = None
    withheld: str | None = None


class WinRate(Config):
    """How often B has the better reward for one prompt, a tie being half a win, and how long the answers are."""

    arm: str | None = Field(None, description="arm of B, where there are several")
    task: str
    variant: str
    metric: str
    primary: bool = True
    n: int = Field(description="prompts whose answers have a reward in both runs")
    n_unscored: int = Field(0, description="prompts of both runs without a reward in at least one")
    wins: int = Field(description="of B")
    ties: int
    losses: int
    share: float
    ci95: tuple[float, float] | None = None
    method: str = Field("none", description="of the interval: wilson, or wilson_effective where prompts hang together")
    length_a: float | None = Field(None, description="mean length of the paired answers (characters)")
    length_b: float | None = None
    n_truncated_a: int = Field(0, description="paired answers that spent their token budget: as long as was scored")
    n_truncated_b: int = 0
    matched: AtEqualLength = Field(description="of the pairs whose lengths differ by 10 % of the longer, or less")
    fitted: AtEqualLength = Field(description="of a logistic regression on the difference of length, where it is 0")

    @property
    def label(self) -> str:
        """Task with its variant, after its arm, where there are several."""
        return ("" if self.arm is None else f"{visible(self.arm)}, ") + task_label(self.task, self.variant)


class ComparisonReport(Config):
    """Every comparison of two runs."""

    schema_version: int = SCHEMA_VERSION
    name_a: str
    name_b: str
    alpha: float
    seed: int
    differences: tuple[Difference, ...] = ()
    win_rates: tuple[WinRate, ...] = Field((), description="of metrics that are a reward model's")
    only_a: tuple[str, ...] = Field((), description="tasks that only run A has")
    only_b: tuple[str, ...] = ()
    failed: tuple[str, ...] = Field((), description="tasks with a step that failed in either run: not compared")
    notes: tuple[str, ...] = ()

    @property
    def regressions(self) -> tuple[Difference, ...]:
        """Primary metrics that are significantly worse in run B: what `--fail-if-worse` acts on."""
        return tuple(one for one in self.differences if one.primary and one.verdict == "worse")

    @property
    def asked_differently(self) -> tuple[Difference, ...]:
        """Primary metrics that were not compared because A and B were asked in different ways."""
        return tuple(
            one for one in self.differences if one.primary and one.prompts_differ and one.verdict == "not comparable"
        )

    def shown(self, *, everything: bool = False) -> tuple[Difference, ...]:
        """The primary metrics, or all."""
        return tuple(one for one in self.differences if one.primary or everything)

    def shown_wins(self, *, everything: bool = False) -> tuple[WinRate, ...]:
        """Win rates by the primary metrics, or by all."""
        return tuple(one for one in self.win_rates if one.primary or everything)

    def to_dict(self) -> dict[str, Any]:
        """JSON: all fields, and the regressions by name."""
        named = [
            {**({"arm": one.arm} if one.arm is not None else {}), "task": one.task, "metric": one.metric}
            for one in self.regressions
        ]
        return {**self.model_dump(mode="json"), "regressions": named}


@dataclass(frozen=True)
class ChangedSample:
    """One sample whose score changed. All texts are neutralised and shortened; None: not in the folder."""

    arm: str | None
    """Arm of the side that has several; None: each side has one."""
    task: str
    metric: str
    id: str
    leaf: str | None
    value_a: float
    value_b: float
    worse: bool | None
    prompt: str | None
    target: str | None
    answer_a: str | None
    answer_b: str | None
