"""Adapters with a conditioning in merges and folds: under a control that is named, or its default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import harness
from harness import MergeInput, UserError
from harness.core.specs import ModelSpec
from harness.merging.fold.run import fold
from harness.merging.plan import parse_input
from harness.models.inspect import inspect_adapter, inspect_model
from harness.testing import tiny_adapter
from tests.conditioned import describe, lora, soft, written

Q = "model.layers.0.self_attn.q_proj"


def product(folder: Path) -> Any:
    """B A of one layer of an adapter whose scale is 1."""
    factors = load_file(folder / "adapter_model.safetensors")
    stem = f"base_model.model.{Q}"
    return factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]


def merged(base: Path, out: Path, *inputs: MergeInput, **more: Any) -> Any:
    settings = {"options": {"normalize": False}, "form": "adapter", **more}
    return harness.merge("linear", inputs, base=base, out=out, **settings)


def test_an_adapter_that_stands_for_a_control_is_summed_in(tiny: Path, tmp_path: Path) -> None:
    """B A of the result is that of both, half of each input; the record says which control, and that it was default."""
    one, other = lora(tmp_path / "one", tiny), tiny_adapter(tmp_path / "other", tiny, seed=9)
    made = {}
    for control in (None, "bad"):
        inputs = MergeInput(ref=str(one), weight=0.5, control=control), MergeInput(ref=str(other), weight=0.5)
        made[control] = merged(tiny, tmp_path / str(control), *inputs)
        value = control or "good"
        expected = 0.5 * (product(one) + product(one / "conditioning" / value)) + 0.5 * product(other)
        assert abs(product(made[control].folder) - expected).max() < 1e-4
        assert made[control].record["inputs"][0]["control"] == value
        assert "control" not in made[control].record["inputs"][1]
        assert not list(made[control].folder.glob("conditioning*"))
    assert "one is taken under control good, the default of its conditioning" in made[None].record["notes"][0]
    assert made[None].id != made["bad"].id


@pytest.mark.parametrize("kind", [soft, written])
def test_what_stands_beside_is_carried_where_it_is_the_same(kind: Any, tiny: Path, tmp_path: Path) -> None:
    one, other = kind(tmp_path / "one", tiny), kind(tmp_path / "other", tiny)
    tiny_adapter(other, tiny, seed=9)
    made = merged(tiny, tmp_path / "out", MergeInput(ref=str(one)), MergeInput(ref=str(other)))
    base = inspect_model(ModelSpec(model=str(tiny)))
    result = inspect_adapter(str(made.folder), base, conditioned=True).conditioning
    before = inspect_adapter(str(one), base, conditioned=True).conditioning
    assert result is not None
    assert before is not None
    assert (list(result.values), result.default, result.position) == (["good"], "good", "after_bos")
    if kind is soft:
        files = (one / "conditioning.safetensors", made.folder / "conditioning" / "embeddings.safetensors")
        vectors = [load_file(file)["good"] for file in files]
        assert (vectors[0] == vectors[1]).all()
    else:
        assert result.values["good"] == before.values["good"]


def test_what_differs_is_refused(tiny: Path, tmp_path: Path) -> None:
    one, other = soft(tmp_path / "one", tiny), soft(tmp_path / "other", tiny)
    tiny_adapter(other, tiny, seed=9)
    plain, text = tiny_adapter(tmp_path / "plain", tiny, seed=3), written(tmp_path / "text", tiny)
    for second, what in (
        (MergeInput(ref=str(other), control="bad"), "has the virtual tokens of bad, and .* the virtual tokens of good"),
        (MergeInput(ref=str(plain)), "has no conditioning, and .* has the virtual tokens of good"),
        (MergeInput(ref=str(text)), "has the text of good"),
    ):
        with pytest.raises(UserError, match=what):
            merged(tiny, tmp_path / "out", MergeInput(ref=str(one)), second)
    described = json.loads((other / "conditioning.json").read_text())
    describe(other, described["values"], position="before_answer")
    with pytest.raises(UserError, match=r"has its control before_answer, and .* after_bos"):
        merged(tiny, tmp_path / "out", MergeInput(ref=str(one)), MergeInput(ref=str(other)))
    with pytest.raises(UserError, match=r"no value 'god' was trained\n  Did you mean 'good'"):
        merged(tiny, tmp_path / "out", MergeInput(ref=str(one), control="god"))
    with pytest.raises(UserError, match=r"'good' given, but plain has no conditioning.json"):
        merged(tiny, tmp_path / "out", MergeInput(ref=str(plain), control="good"))
    assert not (tmp_path / "out").exists()


def test_fold(tiny: Path, tmp_path: Path) -> None:
    """Of an adapter control the weights are those of both; virtual tokens stand beside the folded model."""
    one = lora(tmp_path / "one", tiny)
    made = fold(str(one), str(tiny), out=tmp_path / "out", control="bad", probe_prompts=0)
    name = f"{Q}.weight"
    expected = load_file(tiny / "model.safetensors")[name] + product(one) + product(one / "conditioning" / "bad")
    assert abs(load_file(made.folder / "model.safetensors")[name] - expected).max() < 1e-4
    assert made.record["adapter"]["control"] == "bad"
    folded = fold(str(soft(tmp_path / "two", tiny)), str(tiny), out=tmp_path / "soft", probe_prompts=0).folder
    info = inspect_model(ModelSpec(model=str(folded)), conditioned=True)
    assert info.conditioning is not None
    assert info.conditioning.controls == ("good",)


def test_how_a_control_is_written(tiny: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "arm", tiny)
    assert parse_input(f"{folder}@good:0.5") == MergeInput(ref=str(folder), weight=0.5, control="good")
    assert parse_input(f"{folder}@good") == MergeInput(ref=str(folder), control="good")
    assert parse_input("owner/name@2:1") == MergeInput(ref="owner/name@2", weight=1.0)


def test_mergekits_yaml_takes_a_control(tiny: Path, tmp_path: Path) -> None:
    """The weights are those of adapter and value; without the key those of the default."""
    from harness.merging.mergekit.config import read_merge_config

    one, other = lora(tmp_path / "one", tiny), tiny_adapter(tmp_path / "other", tiny, seed=9)
    name = f"{Q}.weight"
    base = load_file(tiny / "model.safetensors")[name]
    file = tmp_path / "merge.yaml"
    ids = set()
    for control in (None, "bad"):
        line = f"\n    control: {control}" if control is not None else ""
        file.write_text(
            f"merge_method: task_arithmetic\nbase_model: {tiny}\nmodels:\n  - model: {tiny}+{one}{line}\n"
            f"    parameters: {{weight: 0.5}}\n  - model: {tiny}+{other}\n    parameters: {{weight: 0.25}}\n"
        )
        made = harness.merge(read_merge_config(file), out=tmp_path / str(control))
        value = control or "good"
        expected = base + 0.5 * (product(one) + product(one / "conditioning" / value)) + 0.25 * product(other)
        assert abs(load_file(made.folder / "model.safetensors")[name] - expected).max() < 1e-4
        assert made.record["inputs"][0]["control"] == value
        ids.add(made.id)
    assert len(ids) == 2
    for line, what in (
        ("    control: 7", r":5, models.0.control: 7 is no value of a conditioning\n  Name one value"),
        ("    control: god", r"inputs \[1\].*control: no value 'god' was trained\n  Did you mean 'good'\?"),
    ):
        file.write_text(
            f"merge_method: task_arithmetic\nbase_model: {tiny}\nmodels:\n  - model: {tiny}+{one}\n{line}\n"
            "    parameters: {weight: 1}\n"
        )
        with pytest.raises(UserError, match=what):
            harness.merge(read_merge_config(file), out=tmp_path / "wrong")
