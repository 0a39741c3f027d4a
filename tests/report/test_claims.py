"""Claims: how sides are matched, what decides them, and how often they are decided rightly where the truth is known."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from harness.core.errors import UserError
from harness.core.stats import Design
from harness.report.board.build import build_board
from harness.report.board.cells import Folded
from harness.report.board.model import BoardRow, ClaimResult, Column
from harness.report.claims import ClaimSpec, claim_warnings, evaluate_claims, read_claims

_generator = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "board.py"))
SyntheticStudy, Family = _generator["SyntheticStudy"], _generator["Family"]

COLUMN = Column(
    key="k",
    label="quiz:raw",
    task="quiz",
    variant="raw",
    metric="acc",
    scorer="match",
    unit="proportion",
    higher_is_better=True,
    primary=True,
    resolution=0.005,
)


def claim(name: str = "c", **fields: Any) -> ClaimSpec:
    told = {"a": {"method": "dpo"}, "b": {"method": "sft"}, "task": "quiz", **fields}
    return ClaimSpec.model_validate({"name": name, **told})


def row(name: str, base: str = "llama", **factors: Any) -> BoardRow:
    return BoardRow(key=name, name=name, kind="align", base_name=base, factors={"base": base, **factors})


def decide(claims: list[ClaimSpec], arms: dict[str, tuple[BoardRow, np.ndarray[Any, Any]]]) -> dict[str, ClaimResult]:
    """Rows with scores (seeds x samples), without any folder."""
    cells = {}
    for name, (one, scores) in arms.items():
        scored: Any = [SimpleNamespace(values=values, row=SimpleNamespace(withheld=None)) for values in scores]
        cells[name] = Folded([name] * len(scores), scored, one.factors.get("method") != "base", len(scores))
    n = next(iter(arms.values()))[1].shape[1]
    rows = [one for one, _ in arms.values()]
    found = evaluate_claims(claims, rows, [COLUMN], {"k": cells}, {"k": Design(None, None, n)})
    return {one.name: one for one in found}


def answers(
    rng: np.random.Generator, level: float, questions: np.ndarray[Any, Any], seeds: int = 5, spread: float = 0.1
) -> np.ndarray[Any, Any]:
    shifts = rng.normal(0, spread, (seeds, 1))
    return (rng.normal(0, 1.0, (seeds, len(questions))) < level + shifts + questions).astype(float)


def test_known_truth_is_decided_at_the_stated_rate() -> None:
    """300 studies of five seeds: two claims are true by a wide margin, one is false by it, two hold by chance alone.

    The last two are tested with the others, so Holm's level for them is 5 % at most: of 300 studies at most 15 are
    expected to decide either, and 26 is three standard errors above that. The true effect is PHI(0.9/1.42) less
    PHI(0.3/1.42), 0.15 as a share, several standard errors wide, so at least 95 % are found.
    """
    rng = np.random.default_rng(21)
    true = claim("true", a={"method": "dpo"}, b={"method": "sft"})
    contrary = claim("contrary", a={"method": "sft"}, b={"method": "dpo"})
    same = claim("same", a={"method": "ipo"}, b={"method": "sft"}, direction="same", margin=0.2)
    nothing = [claim(f"null-{n}", a={"method": name}, b={"method": "sft"}) for n, name in enumerate(("ipo", "orpo"))]
    found = {"true": 0, "contrary": 0, "same": 0, "null": 0}
    wrong = 0
    for _ in range(300):
        questions = rng.normal(0, 1.0, 200)
        levels = {"dpo": 0.9, "sft": 0.3, "ipo": 0.3, "orpo": 0.3}
        arms = {name: (row(name, method=name), answers(rng, level, questions)) for name, level in levels.items()}
        told = decide([true, contrary, same, *nothing], arms)
        found["true"] += told["true"].status == "supported"
        found["contrary"] += told["contrary"].status == "contradicted"
        found["same"] += told["same"].status == "supported"
        wrong += told["true"].status == "contradicted" or told["contrary"].status == "supported"
        wrong += told["same"].status == "contradicted"
        found["null"] += any(told[f"null-{n}"].status != "undecided" for n in (0, 1))
    assert wrong == 0
    assert found["null"] <= 26
    assert min(found["true"], found["contrary"], found["same"]) >= 285


def test_like_is_compared_with_like() -> None:
    """On base a, dpo and sft have both data sets; base b has dpo alone and is left out, though it is far better."""
    one, zero = np.ones((3, 40)), np.zeros((3, 40))
    half = np.tile([0.0, 1.0], (3, 20))
    arms = {
        "dpo-x-a": (row("dpo-x-a", "a", method="dpo", data="x"), one),
        "sft-x-a": (row("sft-x-a", "a", method="sft", data="x"), half),
        "dpo-y-a": (row("dpo-y-a", "a", method="dpo", data="y"), half),
        "sft-y-a": (row("sft-y-a", "a", method="sft", data="y"), half),
        "dpo-x-b": (row("dpo-x-b", "b", method="dpo", data="x"), zero),
    }
    told = decide([claim()], arms)["c"]
    # (1 - 1/2) on x and nothing on y; each group once.
    assert told.effect == pytest.approx(0.25)
    assert (told.rows_a, told.rows_b) == (("dpo-x-a", "dpo-y-a"), ("sft-x-a", "sft-y-a"))
    by_data = decide([claim(a={"method": "dpo", "data": "x"}, b={"method": "dpo", "data": "y"})], arms)["c"]
    assert by_data.effect == pytest.approx(0.5)
    patterns = decide([claim(a="dpo-*-a", b=["sft-x-*", "sft-y-*"])], arms)["c"]
    assert patterns.effect == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"a": {"method": "kto"}}, "side a has no row with numbers"),
        ({"task": "other"}, "no column has this task and metric"),
        ({"metric": "f1"}, "no column has this task and metric"),
        ({"a": {"method": "few"}}, "a row has under 3 seeds: training noise not estimated"),
        ({"b": ["dpo", "sft"], "a": "dpo"}, "dpo is on both sides"),
        ({"a": {"method": "far"}}, "no row of side a has a counterpart in b"),
        ({"a": {"method": "tiny"}}, "significant, but below 0.005, the smallest difference worth naming"),
        ({"a": {"method": "same"}}, "Holm-adjusted p 1.000 is not below 0.05"),
    ],
)
def test_what_cannot_be_decided_says_why(fields: dict[str, Any], why: str) -> None:
    sft = np.tile(np.linspace(0.2, 0.8, 50), (3, 1))
    arms = {
        "dpo": (row("dpo", method="dpo"), sft + 0.1),
        "sft": (row("sft", method="sft"), sft),
        "few": (row("few", method="few"), sft[:2] + 0.1),
        "far": (row("far", "other", method="far"), sft + 0.1),
        "tiny": (row("tiny", method="tiny"), sft + 0.004 + np.tile([-1e-4, 1e-4], 25)),
        "same": (row("same", method="same"), sft),
    }
    told = decide([claim(**fields)], arms)["c"]
    assert (told.status, told.why) == ("undecided", why)


def test_a_task_is_named_with_or_without_its_judge() -> None:
    """A study asks `red`; the column of its scores is called after who judged them."""
    rows = [row("dpo", method="dpo"), row("sft", method="sft")]
    scores = np.tile(np.linspace(0.2, 0.8, 50), (3, 1))
    scored: Any = [SimpleNamespace(values=values, row=SimpleNamespace(withheld=None)) for values in scores]
    cells = {one.name: Folded([one.name] * 3, scored, True, 3) for one in rows}

    def told(task: str, *judges: str) -> ClaimResult:
        columns = [COLUMN.model_copy(update={"key": judge, "task": f"red@{judge}"}) for judge in judges]
        every = dict.fromkeys(judges, cells)
        return evaluate_claims([claim(task=task)], rows, columns, every, dict.fromkeys(judges, Design(None, None, 50)))[
            0
        ]

    assert [told(task, "gpt").effect for task in ("red", "red:raw", "red@gpt", "red@gpt:raw")] == [0.0] * 4
    assert told("red", "gpt", "llama").why == "2 tasks are called so: write red@gpt or red@llama"
    assert told("red@llama", "gpt", "llama").effect == 0.0
    for wrong in ("re", "red@other", "red:chat"):
        assert told(wrong, "gpt").why == "no column has this task and metric"


def test_a_claim_of_a_study_is_decided_on_its_board(tmp_path: Path) -> None:
    claims = [
        {"name": "gains", "a": {"method": "dpo"}, "b": {"method": "base"}, "task": "quiz:raw", "metric": "acc"},
        {"name": "worse", "a": {"method": "dpo"}, "b": {"method": "sft"}, "task": "quiz", "direction": "worse"},
    ]
    families = [
        Family("llama", {"method": name, "data": "d"}, [effect]) for name, effect in (("dpo", 1.0), ("sft", 0.0))
    ]
    run = SyntheticStudy(tmp_path / "run", claims=claims).write(families)
    board = build_board([run])
    assert [(one.name, one.status) for one in board.claims] == [("gains", "supported"), ("worse", "contradicted")]
    assert all(0 < (one.detectable or 0) < abs(one.effect or 0) for one in board.claims)
    assert [one.rows_b for one in board.claims] == [("llama",), ("sft-d-llama",)]


def test_a_plan_warns_of_what_cannot_be_decided() -> None:
    arms = [
        (name, {"method": name, "base": "llama", "seed": seed})
        for name, seeds in (("dpo", range(3)), ("sft", range(3)), ("ipo", range(1)))
        for seed in seeds
    ]
    arms += [("llama", {"method": "base", "base": "llama"}), ("far", {"method": "far", "base": "other", "seed": 0})]
    good = [claim("good"), claim("base", b={"method": "base"})]
    assert claim_warnings(good, arms, ["quiz"]) == []
    assert claim_warnings([claim(task="quiz@judge")], arms, ["quiz"]) == []
    bad = [
        (claim("none", a={"method": "kto"}), "side a has no arm ({'method': 'kto'})"),
        (claim("one", a="ip*"), "side a has arms of 1 seed: training noise is not estimated under 3"),
        (claim("apart", a={"method": "far"}), "no arm of side a has a counterpart on side b"),
        (claim("asked", task="other:raw"), "no arm is asked other:raw (asked are: quiz)"),
    ]
    for one, why in bad:
        assert claim_warnings([one], arms, ["quiz"]) == [f"claim {one.name} cannot be decided: {why}"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "x"}, "claims, number 1: a: Field required"),
        ({"name": "x", "a": "*", "b": "*", "task": "t", "level": 5}, "level: Input should be less than 1 (seen: 5)"),
        ({"name": "x", "a": "*", "b": "*", "task": "t", "direction": "same"}, "needs a `margin`"),
        ({"name": "x", "a": "*", "b": "*", "task": "t", "margin": 0.1}, "needs a `margin`"),
    ],
)
def test_a_claim_that_is_none_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_claims([given], "claims")
    assert message in str(caught.value)
