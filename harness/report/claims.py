"""Claims: what a study is meant to show, said before it has run, and what its numbers say of it.

A claim contrasts two sides, each given by factors or by patterns of arm names. Rows of both sides are matched on every
factor that all have but those that set the sides apart (so on base, data, adapter, ...), so that a contrast of methods
compares like with like; what has no match on the other side is left out. Each matched group counts once.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from harness.core.config import Config
from harness.core.errors import UserError
from harness.core.stats import MIN_SEEDS, CrossedDifference, Design, crossed_contrast, holm
from harness.core.text import number, visible
from harness.report.board.cells import POWER, Folded, few_seeds, whole_of
from harness.report.board.model import BoardRow, ClaimResult, Column, JudgePanel

if TYPE_CHECKING:
    from collections.abc import Iterable

Factors = Mapping[str, Any]


def _sides(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Side = Annotated[tuple[str | dict[str, Any], ...], BeforeValidator(_sides)]


class ClaimSpec(Config):
    """One claim of a study: side ``a`` against side ``b`` on one metric."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.@+-]*$", description="short name")
    summary: str = Field("", description="the claim in a sentence")
    a: Side = Field(min_length=1, description="factors ({method: dpo}), or patterns of arm names without their seed")
    b: Side = Field(min_length=1, description="what side a is held against; {method: base} is the bases")
    task: str = Field(description="task name, with or without :raw or :chat")
    metric: str | None = Field(None, description="of the task; its first primary metric when absent")
    direction: Literal["better", "worse", "higher", "lower", "same"] = Field(
        "better", description="of a against b; better and worse follow the metric; same: within `margin`"
    )
    margin: float | None = Field(None, gt=0, description="with `same`: largest difference that counts as none")
    match: tuple[str, ...] | None = Field(
        None,
        description="factors that rows of both sides must share to be compared; when absent all that every row has and"
        " in which the sides, as given, do not differ; `base` where a side is given by patterns",
    )
    level: float = Field(0.05, gt=0, lt=1, description="of the test, after Holm's correction over the claims")

    @model_validator(mode="after")
    def _margin_fits(self) -> ClaimSpec:
        if (self.direction == "same") != (self.margin is not None):
            raise ValueError("`direction: same` needs a `margin`, in the metric's unit, and no other direction has one")
        return self


def read_claims(given: Sequence[Any], where: str) -> list[ClaimSpec]:
    """Claims as plan.json has them.

    Raises:
        UserError: one is none.
    """
    found = []
    for n, one in enumerate(given):
        try:
            found.append(one if isinstance(one, ClaimSpec) else ClaimSpec.model_validate(one))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            what = f"{key or 'claim'}: {first['msg']} (seen: {first['input']!r})"
            raise UserError(
                f"{where}, number {n + 1}", visible(what), "See docs/reading-the-numbers.md, Claims."
            ) from None
    return found


def claim_warnings(claims: Sequence[ClaimSpec], arms: Sequence[tuple[str, Factors]], tasks: Sequence[str]) -> list[str]:
    """Why claims cannot be decided by a study, before it has run; one line each.

    Args:
        claims: of the study.
        arms: name, without its seed, and factors, with its seed, of every arm.
        tasks: names of what the arms are asked; none: not known.
    """
    lines = []
    for claim in claims:
        problems = []
        asked = claim.task.partition(":")[0]
        # The claim may name the judge, which a study's task does not.
        if tasks and not any(f"{asked}@".startswith(f"{task.partition(':')[0]}@") for task in tasks):
            problems.append(f"no arm is asked {claim.task} (asked are: {', '.join(tasks)})")
        chosen = [[one for one in arms if _is_meant(side, *one)] for side in (claim.a, claim.b)]
        for word, side, some in zip("ab", (claim.a, claim.b), chosen, strict=True):
            if not some:
                problems.append(f"side {word} has no arm ({_said(side)})")
        if all(chosen) and not (groups := _matched(claim, *chosen)):
            problems.append("no arm of side a has a counterpart on side b")
        elif all(chosen):
            for word, index in (("a", 0), ("b", 1)):
                few = _fewest_seeds([arm for group in groups.values() for arm in group[index]])
                if few < MIN_SEEDS:
                    told = f"side {word} has arms of {few} seed{'' if few == 1 else 's'}"
                    problems.append(f"{told}: training noise is not estimated under {MIN_SEEDS}")
        lines += [f"claim {claim.name} cannot be decided: {'; '.join(problems)}"] if problems else []
    return lines


def _fewest_seeds(arms: Iterable[tuple[str, Factors]]) -> int:
    seeds: dict[str, set[Any]] = {}
    for name, factors in arms:
        if factors.get("method") != "base":
            seeds.setdefault(name, set()).add(factors.get("seed"))
    return min((len(some) for some in seeds.values()), default=MIN_SEEDS)


def _is_meant(side: Sequence[str | Factors], name: str, factors: Factors) -> bool:
    for one in side:
        if isinstance(one, str):
            if fnmatch.fnmatchcase(name, one):
                return True
        elif all(factors.get(key) == value for key, value in one.items()) and ("step" in one or "step" not in factors):
            return True
    return False


def _said(side: Sequence[str | Factors]) -> str:
    return " or ".join(one if isinstance(one, str) else str(dict(one)) for one in side)


_Arm = tuple[str, Factors]


def _matched(
    claim: ClaimSpec, a: Sequence[_Arm], b: Sequence[_Arm]
) -> dict[tuple[Any, ...], tuple[list[_Arm], list[_Arm]]]:
    """Arms of both sides by the factors that both must share; groups of one side alone are left out."""
    keys = claim.match
    if keys is None and any(isinstance(one, str) for one in (*claim.a, *claim.b)):
        keys = ("base",)
    if keys is None:
        everywhere = [set(factors) for _, factors in (*a, *b)]
        keys = tuple(sorted(set.intersection(*everywhere) - _contrasted(claim) - {"seed"}))
    groups: dict[tuple[Any, ...], tuple[list[_Arm], list[_Arm]]] = {}
    for index, some in enumerate((a, b)):
        for arm in some:
            key = tuple(str(arm[1].get(one)) for one in keys)
            groups.setdefault(key, ([], []))[index].append(arm)
    return {key: group for key, group in groups.items() if group[0] and group[1]}


def _contrasted(claim: ClaimSpec) -> set[str]:
    """Factors that the two sides, as given, name with other values: what the claim is about."""
    values: tuple[dict[str, set[str]], dict[str, set[str]]] = ({}, {})
    for found, side in zip(values, (claim.a, claim.b), strict=True):
        for one in side:
            for key, value in one.items() if not isinstance(one, str) else ():
                found.setdefault(key, set()).add(str(value))
    return {key for key in {*values[0], *values[1]} if values[0].get(key) != values[1].get(key)}


def evaluate_claims(
    claims: Sequence[ClaimSpec],
    rows: Sequence[BoardRow],
    columns: Sequence[Column],
    cells: Mapping[str, Mapping[str, Folded]],
    designs: Mapping[str, Design],
    panels: Sequence[JudgePanel] = (),
) -> list[ClaimResult]:
    """Decide claims over the rows of a board, with Holm's correction over those that can be tested.

    Where a task has several judges or wordings, a claim is decided under each of them, the others in its family as they
    are. One that is not decided alike under all is "undecided (judge)"; so is one that cannot be held against a judge
    who was to be asked. A claim that names a judge (`dangerous_qa@JUDGE`) is about that judge alone.

    Args:
        claims: of its studies.
        rows: of the board.
        columns: of the board.
        cells: column -> row -> scores.
        designs: column -> how its samples hang together.
        panels: judges and wordings.
    """
    others = {one.column for panel in panels for one in panel.askers} - {one.column for one in panels}
    shown = [one for one in columns if one.key not in others]

    def test(claim: ClaimSpec, column: Column | None = None) -> _Tested:
        some = (column,) if column is not None else columns if "@" in claim.task else shown
        return _Tested(claim, rows, some, cells, designs, chosen=column)

    tested = [test(claim) for claim in claims]
    results = _decided(tested)
    by_key = {column.key: column for column in columns}
    for place, one in enumerate(tested):
        if "@" in one.claim.task:
            continue
        if one.column is None:
            headless = next((some for some in panels if some.column is None and _is_about(one.claim, some)), None)
            if headless is not None:
                told = {"status": "undecided (judge)", "why": "; ".join(headless.remarks)}
                results[place] = results[place].model_copy(update=told)
            continue
        panel = next((some for some in panels if some.column == one.column.key), None)
        if panel is None:
            continue
        under: dict[str, str] = {}
        for asker in panel.askers:
            if asker.column == panel.column:
                under[asker.name] = results[place].status
            elif asker.column is None:
                under[asker.name] = "no numbers"
            else:
                other = test(one.claim, by_key[asker.column])
                alike = other.made_of == one.made_of
                family = [*tested[:place], other, *tested[place + 1 :]]
                under[asker.name] = _decided(family)[place].status if alike else "not all numbers"
        results[place] = _under_judges(results[place], under)
    return results


def _is_about(claim: ClaimSpec, panel: JudgePanel) -> bool:
    return claim.task.partition(":")[0] == panel.task and claim.metric in (None, panel.metric)


def _decided(tested: Sequence[_Tested]) -> list[ClaimResult]:
    adjusted = holm([one.p_value for one in tested])
    size = sum(one.p_value is not None for one in tested)
    return [one.result(p, size) for one, p in zip(tested, adjusted, strict=True)]


def _under_judges(one: ClaimResult, under: Mapping[str, str]) -> ClaimResult:
    """The claim as decided by all judges; undecided where they are not of one mind, or where one is not known."""
    told = one.model_copy(update={"by_judge": dict(under)})
    if len(set(under.values())) < 2 or not {"supported", "contradicted"} & set(under.values()):
        return told
    said = ", ".join(f"{status} under {name}" for name, status in under.items())
    return told.model_copy(update={"status": "undecided (judge)", "why": f"{said}; {one.why}"})


class _Tested:
    """One claim and the contrast that tests it."""

    def __init__(
        self,
        claim: ClaimSpec,
        rows: Sequence[BoardRow],
        columns: Sequence[Column],
        cells: Mapping[str, Mapping[str, Folded]],
        designs: Mapping[str, Design],
        chosen: Column | None = None,
    ) -> None:
        self.claim, self.why = claim, ""
        self.found: CrossedDifference | None = None
        self.column = chosen or self._column(columns)
        self.made_of: dict[str, list[str]] = {}
        """Rows that the contrast is made of, each with the names of its seeds."""
        self.sides: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self.resolved = True
        if self.column is None:
            return
        at = cells[self.column.key]
        keys = {row.name: row.key for row in rows if row.key in at}
        withheld = [row.name for row in rows if row.key in at and at[row.key].withheld is not None]
        arms: list[_Arm] = [(row.name, _factors(row)) for row in rows if row.key in at and row.name not in withheld]
        meant = [[one for one in arms if _is_meant(side, *one)] for side in (claim.a, claim.b)]
        empty = [word for word, some in zip("ab", meant, strict=True) if not some]
        groups = _matched(claim, *meant) if not empty else {}
        if not groups:
            sides = " and ".join(empty)
            self.why = f"side {sides} has no row with numbers" if empty else "no row of side a has a counterpart in b"
            self.why += f" (withheld: {', '.join(withheld[:3])})" if withheld else ""
            return
        weights: dict[str, float] = {}
        for group in groups.values():
            for some, sign in zip(group, (1.0, -1.0), strict=True):
                for name, _ in some:
                    weights[keys[name]] = weights.get(keys[name], 0.0) + sign / len(some) / len(groups)
        names = [tuple(dict.fromkeys(name for group in groups.values() for name, _ in group[k])) for k in (0, 1)]
        self.sides = names[0], names[1]
        if set(names[0]) & set(names[1]):
            self.why = f"{sorted(set(names[0]) & set(names[1]))[0]} is on both sides"
            return
        self.made_of = {key: at[key].names for key in weights}
        chosen_cells = [(at[key], weight) for key, weight in weights.items()]
        contrast = [(one.seeds, weight) for one, weight in chosen_cells]
        self.found = crossed_contrast(contrast, designs[self.column.key], whole=whole_of(self.column))
        if self.found.difference is None or self.found.stderr is None:
            self.why = "too few samples are scored in every row"
        elif few_seeds([one for one, _ in chosen_cells]):
            self.resolved = False
            self.why = f"a row has under {MIN_SEEDS} seeds: training noise not estimated"

    def _column(self, columns: Sequence[Column]) -> Column | None:
        task, _, variant = self.claim.task.partition(":")
        named = [one for one in columns if one.task in (task, self.claim.task)]
        if not named:
            # A study asks `dangerous_qa`; who judged the answers is in the column's name alone.
            named = [one for one in columns if one.task.startswith(f"{task}@")]
            names = sorted({one.task for one in named})
            if len(names) > 1:
                self.why = f"{len(names)} tasks are called so: write {' or '.join(names)}"
                return None
        fitting = [
            one
            for one in named
            if (not variant or one.variant == variant or one.task == self.claim.task)
            and (one.metric == self.claim.metric or (self.claim.metric is None and one.primary))
            and one.aggregate == "mean"
        ]
        first = [one for one in fitting if one.metric == fitting[0].metric and one.scorer == fitting[0].scorer]
        if len(first) == 1:
            return first[0]
        self.why = "no column has this task and metric" if not first else f"{len(first)} columns have this task"
        self.why += "" if not first else ", asked in different ways: say the variant, or leave a run out"
        return None

    @property
    def wanted(self) -> int:
        """Sign of the difference that is claimed; 0: none."""
        up = {"higher": True, "lower": False}.get(self.claim.direction)
        if self.claim.direction in ("better", "worse") and self.column is not None:
            higher = self.column.higher_is_better
            if higher is None:
                return 0
            up = higher is (self.claim.direction == "better")
        return 0 if up is None else 1 if up else -1

    @property
    def p_value(self) -> float | None:
        """Two-sided: twice the smaller of the p-values of the claim and of its contrary; None: nothing to test."""
        if self._ps() is None or not self.resolved:
            return None
        return min(1.0, 2 * min(self._ps() or (1.0, 1.0)))

    def _ps(self) -> tuple[float, float] | None:
        """One-sided p-values of what supports the claim and of what contradicts it."""
        from scipy.special import stdtr

        found = self.found
        if found is None or found.difference is None or found.stderr is None or found.degrees is None:
            return None
        if self.claim.direction != "same":
            if self.wanted == 0:
                self.why = "this metric has no better direction: claim `higher` or `lower`"
                return None
            half = (found.p_value or 0.0) / 2
            return (half, 1 - half) if found.difference * self.wanted > 0 else (1 - half, half)
        margin, error = self.claim.margin or 0.0, found.stderr
        if error == 0.0:
            return (0.0, 1.0) if abs(found.difference) < margin else (1.0, 0.0)
        # Two one-sided tests (Schuirmann 1987), and the test of the contrary: that the difference exceeds the margin.
        within = max(
            float(stdtr(found.degrees, (found.difference - margin) / error)),
            float(stdtr(found.degrees, -(found.difference + margin) / error)),
        )
        return within, float(stdtr(found.degrees, (margin - abs(found.difference)) / error))

    def result(self, p_adjusted: float | None, size: int) -> ClaimResult:
        """What is said of the claim, its p-value corrected over ``size`` claims."""
        claim, found, column = self.claim, self.found, self.column
        ps = self._ps()
        status, why = "undecided", self.why
        if ps is not None and p_adjusted is not None and found is not None and column is not None:
            status, why = self._status(ps, p_adjusted, column, found.difference or 0.0)
        known = found is not None and found.interval is not None
        interval = found.interval if found is not None else None
        detectable = found.detectable(1 - claim.level / max(1, size), POWER) if found is not None and known else None
        return ClaimResult(
            name=claim.name,
            summary=visible(claim.summary),
            task=claim.task if column is None else column.label,
            metric=(claim.metric or "") if column is None else column.metric,
            direction=claim.direction,
            margin=claim.margin,
            status=status,
            effect=found.difference if found is not None else None,
            ci95=(interval.low, interval.high) if interval is not None else None,
            p_value=self.p_value,
            p_adjusted=p_adjusted,
            level=claim.level,
            detectable=detectable,
            n=found.n if found is not None else 0,
            rows_a=self.sides[0],
            rows_b=self.sides[1],
            why=visible(why),
        )

    def _status(self, ps: tuple[float, float], p: float, column: Column, effect: float) -> tuple[str, str]:
        if p >= self.claim.level:
            return "undecided", f"Holm-adjusted p {p:.3f} is not below {self.claim.level:g}"
        small = column.resolution is not None and abs(effect) < column.resolution
        if self.claim.direction != "same" and small:
            least = number(column.resolution)
            return "undecided", f"significant, but below {least}, the smallest difference worth naming"
        status = "supported" if ps[0] < ps[1] else "contradicted"
        return status, f"Holm-adjusted p {p:.2g} < {self.claim.level:g}"


def _factors(row: BoardRow) -> dict[str, Any]:
    return {"base": row.base_name, **row.factors}
