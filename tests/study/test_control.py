"""Arms under values of their conditioning: planned with the file's line, answered beside each other, contrasted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from harness import UserError
from harness.contracts.registry import load_plugins
from harness.core.specs import EvalSpec, ModelSpec
from harness.evaluation.plan import plan_eval
from harness.models.conditioning import soft_prompt
from harness.models.inspect import inspect_adapter, inspect_model
from harness.study.plan import plan_study
from harness.tasks.catalog import load_catalog
from tests.conditioned import written
from tests.study.conftest import Write, records

STEERED = Path(__file__).parents[1] / "alignment" / "steered.py"
MEET = {"tokens": 2, "control_steps": 2, "control_rate": 0.5}


@pytest.fixture
def study(small: dict[str, Any], tiny: Path, alone: Path) -> dict[str, Any]:
    """MEET beside SFT under both values, and an adapter made elsewhere under its default."""
    found = copy.deepcopy(small)
    (grid,) = found["grid"]
    meet = {**grid["set"], **MEET, "checkpoint_every": 4, "steps": 4}
    found["grid"] = [
        {"method": "meet", "data": "pairs", "set": meet},
        {"method": "sft", "data": "pairs", "set": grid["set"]},
    ]
    found["arms"] = [{"name": "given", "base": "tiny", "adapter": str(written(alone / "given", tiny)), "control": []}]
    found["merges"] = []
    found["evaluation"]["control"] = ["good", "bad"]
    return found


MEETS = {"meet-pairs-lora-tiny-s0@good", "meet-pairs-lora-tiny-s0@bad"}


def asked(plan: Any) -> set[str]:
    return {row.label for one in plan.evaluations for row in one.arms if row.label is not None}


def test_values_are_arms_before_anything_is_trained(study: dict[str, Any], write: Write) -> None:
    """Each of what is trained under values; what is not, or says [] itself, is asked as it was."""
    plan = plan_study(write(study))
    assert asked(plan) == {*MEETS, "sft-pairs-lora-tiny-s0", "given"}
    good = plan.promises["meet-pairs-lora-tiny-s0@good"].arm
    assert (good.kind, good.factors["control"], good.parents) == ("control", "good", ("meet-pairs-lora-tiny-s0",))
    assert {one["name"] for one in plan.to_json()["arms"]} > MEETS
    keys = {row.label: row.tasks[0].answers.id for one in plan.evaluations for row in one.arms}
    assert len(set(keys.values())) == len(keys) == 5
    # All is both; a value of its own takes the place of the evaluation's.
    study["evaluation"]["control"] = "all"
    study["arms"][0]["control"] = "bad"
    assert asked(plan_study(write(study))) == {*MEETS, "sft-pairs-lora-tiny-s0", "given@bad"}
    study["grid"][0]["control"] = "bad"
    assert asked(plan_study(write(study))) == {"meet-pairs-lora-tiny-s0@bad", "sft-pairs-lora-tiny-s0", "given@bad"}
    # Without the key: as before there was one.
    del study["evaluation"]["control"], study["grid"][0]["control"], study["arms"][0]["control"]
    assert asked(plan_study(write(study))) == {"meet-pairs-lora-tiny-s0", "sft-pairs-lora-tiny-s0", "given"}


def test_several_preferences(study: dict[str, Any], write: Write) -> None:
    """What is left out of a value is at its default, the first; all is every combination."""
    study["grid"][0]["set"]["preferences"] = {"helpful": ["good", "bad"], "harmless": ["good", "bad"]}
    study["grid"][0]["control"] = "helpful=bad"
    study["evaluation"]["control"] = []
    meet = "meet-pairs-lora-tiny-s0"
    assert f"{meet}@harmless=good,helpful=bad" in asked(plan_study(write(study)))
    study["grid"][0]["control"] = "all"
    assert sum(name.startswith(f"{meet}@") for name in asked(plan_study(write(study)))) == 4


def change(study: dict[str, Any], path: str, value: Any) -> None:
    *keys, last = path.split(".")
    for key in keys:
        study = study[int(key) if key.isdigit() else key]  # type: ignore[call-overload]
    study[last] = value


@pytest.mark.parametrize(
    ("path", "value", "where", "marked", "what", "fix"),
    [
        (
            "evaluation.control",
            ["good", "god"],
            "evaluation.control.1 (meet-pairs-lora-tiny-s0)",
            '"god"',
            "no value 'god' was trained",
            "Did you mean 'good'? Trained: good, bad; or all.",
        ),
        (
            "arms.0.control",
            "rude",
            "arms.0.control (given)",
            '"control": "rude"',
            "no value 'rude' was trained",
            "Trained: good, bad",
        ),
        (
            "grid.1.control",
            "good",
            "grid.1.control",
            '"control": "good"',
            "good given, and no arm that it is of is trained under values",
            "Leave it out, or train with a method such as meet.",
        ),
        (
            "merges",
            [{"method": "linear", "inputs": [{"method": "sft", "control": "good"}]}],
            "merges.0.inputs.0, control",
            "{",
            "'good' given, but sft-pairs-lora-tiny-s0 is trained under no values",
            "Leave control out.",
        ),
        (
            "merges",
            [{"method": "linear", "inputs": ["meet-*@god", "sft-*"]}],
            "merges.0.inputs.0",
            '"meet-*@god"',
            "no value 'god' was trained",
            "Trained: good, bad",
        ),
        (
            "merges",
            [{"method": "linear", "inputs": [{"method": "sft", "control": True}]}],
            "merges.0.inputs.0.control",
            '"control": true',
            "True is no value",
            "Name one value",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(
    study: dict[str, Any], write: Write, path: str, value: Any, where: str, marked: str, what: str, fix: str
) -> None:
    change(study, path, value)
    file = write(study)
    with pytest.raises(UserError) as caught:
        plan_study(file)
    place, _, key = caught.value.where.partition(", ")
    assert key == where
    line = file.read_text().splitlines()[int(place.removeprefix(f"{file}:")) - 1]
    assert marked in line
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_control_that_steers_nothing(study: dict[str, Any], write: Write) -> None:
    study["grid"], study["arms"] = study["grid"][1:], []
    with pytest.raises(UserError, match=r"evaluation.control: good, bad given, and no arm that it is of is trained"):
        plan_study(write(study))


def test_one_engine_answers_all_values(
    study: dict[str, Any], write: Write, cli: Any, tiny: Path, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are those of `harness eval --control`; the value is a factor of the board, which a claim contrasts; a merge
    of one value has its weights and carries its vectors."""
    from harness_plugins.engines.transformers.engine import TransformersEngine

    opened: list[int] = []
    real = TransformersEngine.open

    def watched(self: Any, model: Any, adapters: Any, options: Any) -> Any:
        opened.append(len(adapters))
        return real(self, model, adapters, options)

    monkeypatch.setattr(TransformersEngine, "open", watched)
    del study["grid"][1], study["arms"]
    study["claims"] = [{"name": "steers", "a": {"control": "good"}, "b": {"control": "bad"}, "task": "sums"}]
    study["merges"] = [
        {"name": "one", "method": "linear", "inputs": [{"method": "meet", "control": "bad"}], "as": "adapter"}
    ]
    ran = cli("study", "run", str(write(study)), "--out", "run")
    assert ran.code == 0, ran.err
    # The base, MEET's adapter once for both values, and the merge.
    assert opened == [2]
    meet, merged = (next(Path("run").glob(f"steps/{kind}/artifact")) for kind in ("align-meet-*", "merge-one-*"))
    base = inspect_model(ModelSpec(model=str(tiny)))
    trained, result = (inspect_adapter(str(one), base, conditioned=True) for one in (meet, merged))
    assert result.conditioning is not None and list(result.conditioning.values) == ["bad"]
    assert (soft_prompt(result, "bad") == soft_prompt(trained, "bad")).all()
    board = json.loads(Path("run/report/board.json").read_text())
    rows = {row["name"]: row for row in board["rows"]}
    assert {name: row["factors"].get("control") for name, row in rows.items() if "@" in name} == {
        "meet-pairs-lora-tiny@good": "good",
        "meet-pairs-lora-tiny@bad": "bad",
    }
    assert "meet-pairs-lora-tiny" not in rows
    (claim,) = board["claims"]
    assert "no arm" not in claim["why"]
    spec = EvalSpec(
        model=ModelSpec(model=str(tiny)),
        adapters=(str(meet),),
        control=("all",),
        with_base=False,
        tasks=("sums",),
        task_folders=(str(material / "tasks"),),
        engine="transformers",
    )
    registry = load_plugins()
    alone = plan_eval(spec, registry, load_catalog(registry, spec.task_folders))
    ids = {step_id for step_id, _ in records(Path("run")).values()}
    assert {task.answers_id for task in alone.tasks} <= ids
    # Without a value it is the same as under the default.
    default = plan_eval(spec.model_copy(update={"control": ()}), registry, load_catalog(registry, spec.task_folders))
    assert {task.answers_id for task in default.tasks} < {task.answers_id for task in alone.tasks}


def test_values_that_only_training_says(study: dict[str, Any], write: Write, cli: Any) -> None:
    """A stranger's method that says none: what is asked for is checked once it has been trained, before any answer."""
    study["grid"] = [{"method": "steered", "data": "pairs", "set": {**study["grid"][1]["set"]}}]
    study["plugins"], study["arms"] = str(STEERED), []
    study["evaluation"]["control"] = ["all"]
    with pytest.raises(UserError, match=r"control.0: 'all', and only the training of steered-.* says which values"):
        plan_study(write(study))
    study["evaluation"]["control"] = ["bad", "god"]
    ran = cli("study", "run", str(write(study)), "--out", "run")
    assert ran.code == 3, ran.err
    assert "no value 'god' was trained" in ran.err
    assert "evaluation.control: no value 'god' was trained. Did you mean 'good'? Trained: bad, good;" in ran.err
    names = [name for name in records(Path("run")) if name.startswith("answers-")]
    assert sum("@bad" in name for name in names) == 1
    assert not any("@god" in name for name in names)
