"""What is prepared once before the seeds: the caches are full, and no arm has anything left to do but to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.alignment.plan import AlignPlan, plan_align
from harness.alignment.prepare import carry_out_prepare, prepare_step
from harness.alignment.run import run_align
from harness.contracts.registry import Registry, load_plugins
from harness.core.progress import Reporter
from harness.core.specs import AlignSpec, ModelSpec
from harness.steps.folder import StepFolder
from harness.steps.runner import Runner
from tests.alignment.processes import N_PAIRS, TINY_STEPS, log_of

Plan = Callable[..., AlignPlan]


@pytest.fixture
def registry() -> Registry:
    return load_plugins()


@pytest.fixture
def plan(alone: Path, tiny: Path, pairs: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """``plan("dpo", seed=1, adapter={"rank": 2})``, with caches of its own."""
    monkeypatch.setenv("HARNESS_CACHE", str(alone / "cache"))

    def make(method: str, seed: int = 0, **options: Any) -> AlignPlan:
        model, data = ModelSpec(model=str(tiny)), f"jsonl:{pairs}"
        spec = AlignSpec(method=method, model=model, dataset=data, seed=seed, options={**TINY_STEPS, **options})
        return plan_align(spec, registry)

    return make


def prepare(plan: AlignPlan, registry: Registry, folder: Path, **more: Any) -> Any:
    step = prepare_step(plan)
    work = StepFolder(folder, step.id, step.kind, folder)
    return carry_out_prepare(plan, registry, Runner(None, Reporter()), work, **more)


def test_what_is_the_same_step(plan: Plan) -> None:
    one = prepare_step(plan("dpo"))
    assert prepare_step(plan("dpo", seed=1)).id == one.id
    assert prepare_step(plan("dpo", learning_rate=1e-4, adapter={"rank": 2})).id == one.id
    assert prepare_step(plan("dpo", max_length=64)).id != one.id
    assert prepare_step(plan("sft")).id != one.id
    assert one.kind == "prepare"
    assert "seed" not in one.factors


def test_seeds_find_all_of_it(plan: Plan, registry: Registry, alone: Path) -> None:
    record = prepare(plan("dpo"), registry, alone / "prepared")
    assert (record.status, record.artifact, set(record.files)) == (
        "done",
        "rows",
        {"train/train", "train/heldout", "reference"},
    )
    assert record.counts["scored"] == record.counts["rows"] + TINY_STEPS["eval_rows"] <= N_PAIRS
    for seed in (0, 1):
        run_align(plan("dpo", seed), registry, alone / str(seed))
        assert [line["computed"] for line in log_of(alone / str(seed), "reference")] == [0]
        assert [(line["read"], line["tokenised"]) for line in log_of(alone / str(seed), "data")] == [(False, 0)]


def test_rows_that_no_seed_sees_are_not_scored(plan: Plan, registry: Registry, alone: Path) -> None:
    """One step of 4 rows and 5 held-out ones: 9 for one seed, more for two, whose first rows differ."""
    zero, first = plan("dpo", steps=1), plan("dpo", 1, steps=1)
    one = prepare(zero, registry, alone / "one", sharing=[zero])
    assert one.counts["scored"] == 4 + 5
    two = prepare(zero, registry, alone / "two", sharing=[zero, first])
    assert 4 + 5 < two.counts["scored"] <= 2 * 4 + 5
    for seed in (0, 1):
        run_align(plan("dpo", seed, steps=1), registry, alone / str(seed))
        assert [line["computed"] for line in log_of(alone / str(seed), "reference")] == [0]


def test_a_method_without_a_reference_loads_no_model(
    plan: Plan, registry: Registry, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.alignment.bases.open_base", lambda *_: pytest.fail("it opened the model"))
    record = prepare(plan("sft"), registry, alone / "prepared")
    assert (record.status, "reference" in record.files, "scored" in record.counts) == ("done", False, False)
