"""What a plan says a study takes: by hand from shapes, and from records; and what cannot fit is stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.costs import Costs, JudgeCosts
from harness.core.errors import UserError
from harness.core.records import StepRecord
from harness.core.specs import TaskSpec
from harness.steps.step import make_step
from harness.study.card import CARDS, GIB, UTILISATION, Card, card_named, card_of, is_like, parse_memory
from harness.study.costs import Records, refuse_what_cannot_fit, study_costs
from harness.study.estimate import Sized, sized
from harness.study.plan import StudyPlan, plan_study
from harness.study.sizes import NF4_BYTES, ModelSize, measure
from harness.study.status import StepState
from harness_plugins.scorers.attack.together import Attack
from tests.study.conftest import Write

ASKED = {"name": "t", "size": 200, "dataset": {"name": "jsonl"}, "scorers": [{"name": "attack"}]}

# Two layers of width 4: a query of 4 x 4 and a gate of 4 x 8 in each; a vocabulary of 10 on both sides; 20 in vectors.
SMALL = ModelSize(
    parameters=2 * (16 + 32) + 40 + 40 + 20,
    matrices=96,
    head=40,
    layers=2,
    width=4,
    key_values=8,
    vocabulary=10,
    modules=(("q_proj", 4, 4), ("gate", 8, 4)) * 2,
)


def test_operations_of_a_token() -> None:
    # 2 x (96 + 40), and 4 layers' x width x context: 4 x 2 x 4 x 5.
    assert SMALL.forward(5) == 272 + 160
    # 6 N + 12 L d s.
    assert SMALL.training(5, None, recomputed=False) == 6 * 136 + 12 * 2 * 4 * 5
    # 4 N + 12 L d s, and 6 for each weight of the adapter.
    assert SMALL.training(5, 7, recomputed=False) == 4 * 136 + 12 * 2 * 4 * 5 + 6 * 7
    assert SMALL.training(5, 7, recomputed=True) - SMALL.training(5, 7, recomputed=False) == SMALL.forward(5)


def test_bytes_of_weights() -> None:
    assert SMALL.weight_bytes("float32") == 4 * 196
    # 4 bits, one byte for 64, and four for 64 x 256: QLoRA's 0.516 bytes.
    assert NF4_BYTES == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256) / 1, abs=1e-9) == pytest.approx(0.516, abs=1e-3)
    assert SMALL.weight_bytes("bfloat16", nf4=True) == round(96 * NF4_BYTES) + 2 * 100
    # Rank 3 beside both queries: 3 x (4 + 4) x 2.
    assert SMALL.adapter(["q_proj"], 3) == 48


def test_sizes_are_those_of_the_files(tiny: Path) -> None:
    from safetensors import safe_open

    from harness.core.specs import ModelSpec
    from harness.models.inspect import inspect_model

    size = measure(inspect_model(ModelSpec(model=str(tiny))))
    with safe_open(tiny / "model.safetensors", "np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    assert size is not None
    counts = {name: shape[0] * (shape[1] if len(shape) > 1 else 1) for name, shape in shapes.items()}
    assert size.parameters == sum(counts.values())
    assert size.matrices == sum(count for name, count in counts.items() if "proj" in name)
    config = json.loads((tiny / "config.json").read_text())
    assert size.key_values == 2 * config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]


@pytest.fixture
def planned(small: dict[str, Any], write: Write) -> StudyPlan:
    small = json.loads(json.dumps(small))
    small["grid"][0]["seed"] = [0, 1]
    small["grid"][0]["set"]["adapter.targets"] = ["q_proj", "v_proj"]
    return plan_study(write(small))


def step_of(plan: StudyPlan, kind: str, arm: str) -> Any:
    return next(step for step in plan.graph if (step.kind, step.arm) == (kind, arm))


def state(step: Any, costs: Costs | None, state: str = "done") -> StepState:
    return StepState(step.id, step.kind, step.arm, state, costs=costs)


def test_steps_are_estimated_by_their_size(planned: StudyPlan) -> None:
    card = Card("X-1GB", GIB, 2.0)
    step = step_of(planned, "align", "sft-pairs-lora-tiny-s0")
    align = planned.promises[step.arm].align
    assert align is not None
    size = measure(align.model)
    assert size is not None
    recipe = align.recipe
    adapter = size.adapter(["q_proj", "v_proj"], 4)
    tokens = recipe.steps * recipe.batch_size * recipe.max_length
    per_token = size.training(recipe.max_length, adapter, recomputed=False)
    seconds = tokens * per_token / (2.0e12 * UTILISATION["training"])
    found = sized(planned, card).estimate(step)
    assert (found.source, found.disk_bytes) == ("size", 4 * adapter)
    assert found.seconds == found.gpu_seconds == pytest.approx(seconds)
    assert found.assumed == (f"at most: every row has max_length={recipe.max_length} tokens",)
    # Pairs are two sequences, read once more for the reference.
    dpo = sized(planned, card).estimate(step_of(planned, "align", "dpo-pairs-lora-tiny-s0"))
    twice = 2 * tokens * (per_token + size.forward(recipe.max_length)) / (2.0e12 * UTILISATION["training"])
    assert dpo.seconds == pytest.approx(twice)
    assert sized(planned).estimate(step).seconds is None, "of no card nothing is known"


def test_records_of_like_steps_say_what_others_take(planned: StudyPlan) -> None:
    done = step_of(planned, "align", "sft-pairs-lora-tiny-s0")
    took = Costs(seconds=30, earlier_seconds=6, devices=1, gpu_seconds=36, device="NVIDIA A100-SXM4-40GB", disk_bytes=9)
    costs = study_costs(planned, [state(done, took)]).to_json()
    (align,) = [line for line in costs["lines"] if line["kind"] == "align"]
    # Of four, one is done; the other seed of it is like it; dpo is another method.
    assert (align["steps"], align["done"], align["to_do"]) == (4, 1, 3)
    assert align["from"] == {"records": 1, "nothing": 2}
    assert align["gpu_hours"] == pytest.approx(36 / 3600)
    assert align["devices"] == ["NVIDIA A100-SXM4-40GB"]
    assert costs["gpu_hours"] is None, "a sum that lacks something is none"
    # What another card took says nothing of this one.
    other = study_costs(planned, [state(done, took)], card=CARDS["H100-80GB"]).to_json()
    assert [line["from"] for line in other["lines"] if line["kind"] == "align"] == [{"size": 3}]


def test_answers_taken_from_elsewhere_are_no_measure() -> None:
    records = Records()
    identity = {"task": {"name": "t"}, "variant": "raw", "limit": 3, "engine": {}, "dtype": "float32", "adapter": None}
    asked = {**identity, "model": {"config": "c"}}
    records.add("answers", asked, {}, None, Costs(seconds=0.1, reused=5))
    assert records.found == {}
    records.add("answers", asked, {}, None, Costs(seconds=0.1, reused=5, earlier_seconds=50))
    keys = records.keys("answers", asked, {}, None)
    assert [one.all_seconds for one in records.like(keys, None)] == [50.1]
    changed = records.keys("answers", {**asked, "limit": 4}, {}, None)
    assert records.like(changed, None) == []


def test_money_without_prices_is_not_nothing(planned: StudyPlan) -> None:
    done = step_of(planned, "scores", "tiny")
    paid = study_costs(planned, [state(done, Costs(seconds=1, judge=JudgeCosts(calls=6, usd=0.5)))]).to_json()
    (scores,) = [line for line in paid["lines"] if line["kind"] == "scores"]
    assert scores["judge_usd"] == pytest.approx(0.5 * scores["to_do"])
    assert scores["judge_calls"] == 6 * scores["to_do"]
    unknown = study_costs(planned, [state(done, Costs(seconds=1, judge=JudgeCosts(calls=6, usd=None)))]).to_json()
    assert unknown["judge_usd"] is None


def test_each_judge_and_wording_is_counted(planned: StudyPlan) -> None:
    """200 samples each: 200 calls of a judge, at 0.01 USD for the most that its reply may be, and none of the rules."""
    task: Any = SimpleNamespace(name="t", chosen=SimpleNamespace(spec=TaskSpec.model_validate(ASKED), limit=None))

    def told(judge: str, **options: Any) -> tuple[int | None, float | None]:
        config = Attack.Config.model_validate({"judges": [judge], judge: options})
        step = make_step("scores", {"judge": judge}, arm="a")
        scores: Any = SimpleNamespace(scorer=SimpleNamespace(config=config), ref=SimpleNamespace(name="attack"))
        found = Sized(planned, None, scored={step.id: (scores, task)}).estimate(step)
        return found.calls, found.usd

    assert told("llm", model="http://j/v1", max_new_tokens=100, price_output=100.0) == (200, pytest.approx(200 * 0.01))
    assert told("llm", model="http://j/v1") == (200, None)
    assert told("refusal") == (0, 0.0)


def test_merged_checkpoints_at_their_peak(planned: StudyPlan, tiny: Path) -> None:
    size = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    costs = study_costs(planned, [])
    # One for each seed, as large as the base but for the file's header; each goes before the next.
    assert costs.merged_peak_bytes == pytest.approx(size, rel=0.05)
    first, second = (step_of(planned, "merge", f"merged-tiny-s{seed}") for seed in (0, 1))
    assert study_costs(planned, [state(first, None)]).merged_peak_bytes == costs.merged_peak_bytes
    assert study_costs(planned, [state(first, None), state(second, None)]).merged_peak_bytes == 0


@pytest.mark.parametrize(("keep", "models"), [([], 2), (["merge"], 4)])
def test_a_merge_that_another_is_made_from_stays(
    small: dict[str, Any], write: Write, tiny: Path, keep: list[str], models: int
) -> None:
    """Of three seeds and one of two of these; linear over the first and the third, with the second in between."""
    study = json.loads(json.dumps(small))
    study["grid"][0]["seed"] = [0, 1, 2]
    inputs = ["merged-tiny-s2", "sft-pairs-lora-tiny-s0"]
    study["merges"].append({"name": "again", "method": "linear", "inputs": inputs, "join": "base"})
    size = sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    costs = study_costs(plan_study(write({**study, "keep": keep})), [])
    assert costs.merged_peak_bytes == pytest.approx(models * size, rel=0.05)


def test_what_cannot_fit_is_stopped_before_anything_runs(planned: StudyPlan) -> None:
    whole = sized(planned, Card("small", 1, None))
    peaks = {step.kind: whole.peak(step) for step in planned.graph}
    align = peaks["align"]
    assert align is not None and peaks["merge"] is None and peaks["scores"] is None
    size = measure(planned.promises["tiny"].model)
    assert size is not None
    # As a GPU would have it: bfloat16 weights; rank 4 in float32, and its gradients.
    assert align.certain == 2 * size.parameters + 2 * 4 * size.adapter(["q_proj", "v_proj"], 4)
    assert align.likely > align.certain
    refuse_what_cannot_fit(planned, (), Card("just", max(p.certain for p in peaks.values() if p), None))
    with pytest.raises(UserError) as error:
        refuse_what_cannot_fit(planned, (), Card("just not", align.certain - 1, None))
    assert "study small, just not" in error.value.where
    assert "align sft-pairs-lora-tiny-s0 on tiny needs" in error.value.what
    assert "GB of weights (bfloat16)" in error.value.what
    assert "adapter: qlora" in error.value.fix
    # Nothing is said of what has been done.
    refuse_what_cannot_fit(planned, {step.id for step in planned.graph}, Card("tiny", 1, None))
    tight = study_costs(planned, [], card=Card("tight", align.likely - 1, None)).warnings
    assert any("align on tiny may take" in text for text in tight)


@pytest.mark.parametrize(("text", "size"), [("40GB", 40 * GIB), ("1.5 gib", 1.5 * GIB), ("80G", 80 * GIB)])
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_memory(text, "--memory") == size


def test_cards() -> None:
    with pytest.raises(UserError, match=r"--memory: '40' is no size of memory\n  Write for example 40GB"):
        card_of(None, "40")
    with pytest.raises(UserError, match=r"--card: unknown card 'A100'\n  Did you mean"):
        card_of("A100", None)
    assert card_of("a100-40gb", None) == CARDS["A100-40GB"]
    found = card_of(None, "12GB")
    assert found is not None and (found.memory, found.tflops) == (12 * GIB, None)
    assert card_of(None, None) is None
    assert card_named(["NVIDIA A100-SXM4-80GB"]) == CARDS["A100-80GB"]
    assert card_named(["NVIDIA GeForce RTX 4090"]) == CARDS["RTX-4090-24GB"]
    assert is_like(CARDS["H100-80GB"], "NVIDIA H100 80GB HBM3")
    assert not is_like(CARDS["A10-24GB"], "NVIDIA A100-SXM4-40GB")
    assert card_named(["Quadro"]) is None


def test_figures_of_the_commands(planned: StudyPlan, small: dict[str, Any], write: Write, cli: Any) -> None:
    ran = cli("study", "plan", str(write(small)), "--card", "A100-40GB")
    assert ran.code == 0, ran.err
    assert "model-FLOP utilisation of 312 TFLOP/s: training 0.35" in ran.out
    assert "assumed: at most: every row has max_length=" in ran.out
    ran = cli("study", "run", str(write(small)), "--memory", "0.0001GB")
    assert ran.code == 2
    assert "are less than its steps need" in ran.err
    assert not Path("runs").exists(), "nothing was begun"


def test_a_record_is_what_a_plan_reads(small_run: Path) -> None:
    for file in small_run.glob("steps/*/status.json"):
        costs = StepRecord.model_validate(json.loads(file.read_text())).costs
        assert costs is not None and costs.seconds > 0 and costs.rss_bytes and costs.disk_bytes, file
        assert (costs.trained_tokens is not None) == (file.parent.name.startswith("align-"))
        assert (costs.completion_tokens is not None) == (file.parent.name.startswith("answers-"))
    assert not list(small_run.rglob(".heartbeat.json"))
