"""From names of tensors to a recipe for each: gradients, filters, slices, and what does not fit together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import Merger
from harness.core.errors import UserError
from harness.core.specs import MergeInput, MergeSpec, ModelSpec
from harness.merging.mergekit.config import read_merge_config
from harness.merging.mergekit.methods import METHODS, setting_at
from harness.merging.names import Source
from harness.merging.plan import recipe_of
from harness.merging.tensor_plan import MergeRecipe
from harness_plugins.mergers.deltas import DareTies, TaskArithmetic, Ties
from harness_plugins.mergers.linear import Linear
from harness_plugins.mergers.spherical import Nuslerp, Slerp

MERGERS: dict[str, Merger] = {
    one.name: one for one in (Linear(), Slerp(), Nuslerp(), TaskArithmetic(), Ties(), DareTies())
}
T = METHODS["slerp"].parameters[0]
NORMALIZE = next(one for one in METHODS["ties"].parameters if one.name == "normalize")


def llama(layers: int, head: bool = True) -> list[str]:
    """Names of a small Llama's tensors, sorted as files have them."""
    inside = ("mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight")
    names = [f"model.layers.{layer}.{one}" for layer in range(layers) for one in inside]
    return sorted([*names, "model.embed_tokens.weight", "model.norm.weight", *(["lm_head.weight"] if head else [])])


def plain(
    method: str, inputs: Sequence[str | tuple[str, float]], base: str | None = "base", **options: Any
) -> MergeSpec:
    """What the command line makes of METHOD --inputs ... --base."""
    pairs = [(one, None) if isinstance(one, str) else one for one in inputs]
    return MergeSpec(
        method=method,
        base=None if base is None else ModelSpec(model=base),
        inputs=tuple(MergeInput(ref=ref, weight=weight) for ref, weight in pairs),
        options=options,
    )


def recipe(
    spec: MergeSpec, names: Sequence[str] | None = None, config: dict[str, Any] | None = None, **others: Sequence[str]
) -> MergeRecipe:
    """Its recipe, all models having these names but those given apart by their name."""
    common = llama(3) if names is None else names
    held = [others.get(one.ref, common) for one in spec.inputs]
    base = None if spec.base is None else others.get(spec.base.model, common)
    return recipe_of(spec, MERGERS[spec.method], held, config or {"num_hidden_layers": 3}, base)


def configured(tmp_path: Path, text: str, **more: Any) -> MergeRecipe:
    """The recipe of a file of mergekit's."""
    file = tmp_path / "merge.yaml"
    file.write_text(text, encoding="utf-8")
    return recipe(read_merge_config(file), **more)


def refusal(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("setting", "name", "depth", "expected"),
    [
        (0.25, "x", 0.7, 0.25),
        ("1e-2", "x", 0.7, 0.01),
        # Five points over the depth: 1/3 lies a third of the way from the second to the third.
        ([0, 0.5, 0.3, 0.7, 1], "x", 0.0, 0.0),
        ([0, 0.5, 0.3, 0.7, 1], "x", 1 / 3, 0.5 + (0.3 - 0.5) / 3),
        ([0, 0.5, 0.3, 0.7, 1], "x", 0.5, 0.3),
        ([0, 0.5, 0.3, 0.7, 1], "x", 1.0, 1.0),
        ([0.4], "x", 0.9, 0.4),
        # The first filter that is part of the name; `*` and none match all.
        ([{"filter": "mlp", "value": 1}, {"filter": "q_proj", "value": [2, 4]}, {"value": 3}], "a.q_proj.b", 0.5, 3.0),
        ([{"filter": "mlp", "value": 1}, {"value": 3}, {"filter": "q_proj", "value": 2}], "a.q_proj.b", 0.5, 3.0),
        ([{"filter": "*", "value": 5}], "anything", 0.0, 5.0),
        ({"filter": "mlp", "value": 1}, "q_proj", 0.0, None),
    ],
)
def test_a_number_for_one_tensor(setting: Any, name: str, depth: float, expected: float | None) -> None:
    found = setting_at(setting, name, depth, T)
    assert found == (expected if expected is None else pytest.approx(expected, abs=1e-12))


def test_a_switch_takes_the_value_below() -> None:
    assert [setting_at([True, False, 1], "x", depth, NORMALIZE) for depth in (0, 0.49, 0.5, 0.99, 1)] == [
        True,
        True,
        False,
        False,
        True,
    ]


# -------------------------------------------------------------------------------------------- from the command line


def test_every_value_is_filled_in() -> None:
    found = recipe(plain("ties", ["a", "b", "c", "d"], density=[0.1, 0.2, 0.3, 0.4]))
    assert [one.name for one in found.tensors] == llama(3)
    for one in found.tensors:
        assert one.sources == tuple(Source(index, one.name) for index in range(4))
        assert one.base == Source(-1, one.name)
        assert one.weights == (0.25,) * 4
        assert one.options == Ties.Config(density=(0.1, 0.2, 0.3, 0.4))
    assert (found.method, found.config_changes, found.notes) == ("ties", {}, ())


def test_weights_of_slerp_become_its_place() -> None:
    found = recipe(plain("slerp", [("a", 0.3), ("b", 0.9)], base=None)).tensors[0]
    assert (found.base, found.options.t, found.weights) == (None, 0.75, (0.25, 0.75))
    assert recipe(plain("slerp", ["a", "b"])).tensors[0].options.t == 0.5
    assert recipe(plain("slerp", ["a", "b"], t=0.1)).tensors[0].weights == (0.9, 0.1)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            plain("slerp", [("a", 0.3), ("b", 0.7)], t=0.2),
            "--set t: both weights and t are given\n  Weights w1, w2 mean t = w2 / (w1 + w2): give one.",
        ),
        (plain("slerp", ["a"]), "--inputs: slerp merges 2 models, found 1\n  Give as many inputs."),
        (plain("slerp", ["a", "b", "c"]), "--inputs: slerp merges 2 models, found 3\n  Give as many inputs."),
        (
            plain("slerp", [("a", -0.3), ("b", 0.7)]),
            "--inputs: slerp takes no weight below 0, found -0.3, 0.7\n  Give weights from 0 on.",
        ),
        (
            plain("linear", [("a", 1), ("b", -1)]),
            "--inputs: the weights sum to 0\n  Give others, or `normalize: false`.",
        ),
        (
            plain("linear", [("a", 1), "b", "c"]),
            "--inputs: no weight for b, c, but for others\n  Write INPUT:WEIGHT for all of them, or for none.",
        ),
        (plain("linear", [("a", float("inf"))]), "--inputs: a weight is inf\n  Give finite weights."),
        (
            plain("ties", ["a"], base=None),
            "--base: ties merges differences from a base, and there is none\n"
            "  Give the model that the inputs were trained from.",
        ),
        (
            plain("ties", ["a", "b"], density=[0.1, 0.2, 0.3]),
            "--set density: 3 values for 2 models\n  Give one value, or one for each model in their order.",
        ),
        (
            plain("dare_ties", ["a", "b"], densty=0.1),
            "--set, densty: unknown key 'densty'\n"
            "  Did you mean 'density'? Allowed keys: normalize, scale, density, rescale.",
        ),
    ],
)
def test_what_does_not_fit_together(spec: MergeSpec, expected: str) -> None:
    assert refusal(lambda: recipe(spec)) == expected


def test_how_many_models() -> None:
    class Few(Linear):
        name = "few"
        models = (2, 3)

    class Many(Linear):
        name = "many"
        models = (2, None)

    spec = plain("linear", ["a"])
    names = [llama(1)]
    assert "few merges 2 to 3 models, found 1" in refusal(lambda: recipe_of(spec, Few(), names, {}, names[0]))
    assert "many merges 2 or more models, found 1" in refusal(lambda: recipe_of(spec, Many(), names, {}, names[0]))


ONE_ARCHITECTURE = "Merge models of one architecture; all inputs must have the same tensors."


def test_tensors_that_a_model_lacks_or_has_too_many() -> None:
    spec = plain("ties", ["a", "b"])
    gone = "model.layers.2.mlp.up_proj.weight"
    lacking = [name for name in llama(3) if name != gone]
    assert refusal(lambda: recipe(spec, b=lacking)) == (
        f"b: has no tensor {gone}, needed for {gone} (of 2 inputs and the base 2 have it)\n  {ONE_ARCHITECTURE}"
    )
    assert refusal(lambda: recipe(plain("linear", ["a", "b"], base=None), b=lacking)) == (
        f"b: has no tensor {gone}, needed for {gone} (of 2 inputs 1 have it)\n  {ONE_ARCHITECTURE}"
    )
    more = [*llama(3), "model.layers.0.self_attn.q_proj.bias", "score.weight"]
    assert refusal(lambda: recipe(spec, a=more)) == (
        f"a: has a tensor model.layers.0.self_attn.q_proj.bias (and 1 more) that base has not\n  {ONE_ARCHITECTURE}"
    )


def test_tied_embeddings() -> None:
    """A head that is the embeddings is left out unless all store it; where nothing is tied it is a tensor as any."""
    spec = plain("ties", ["a", "b"])
    tied = {"num_hidden_layers": 3, "tie_word_embeddings": True}
    for names in ({"base": llama(3, head=False)}, {"a": llama(3, head=False)}):
        found = recipe(spec, config=tied, **names)
        assert "lm_head.weight" not in [one.name for one in found.tensors]
        assert found.notes == ("lm_head.weight is left out: the embeddings are tied",)
    assert "lm_head.weight" in [one.name for one in recipe(spec, config=tied).tensors]
    assert "a: has no tensor lm_head.weight" in refusal(lambda: recipe(spec, a=llama(3, head=False)))


# ---------------------------------------------------------------------------------------------- mergekit's levels


def test_levels_filters_and_gradients(tmp_path: Path) -> None:
    """A model's own value counts before the common one, where a filter of it matches."""
    text = """\
merge_method: dare_ties
base_model: base
models:
- model: a
  parameters:
    weight: [{filter: mlp, value: [0, 1]}]
- model: base
- model: b
  parameters: {density: 0.25}
parameters:
  weight: 0.3
  density: [{filter: norm, value: 1.0}, {value: [0.5, 0.1]}]
  normalize: [true, false, false]
  lambda: 2
"""
    found = {one.name: one for one in configured(tmp_path, text).tensors}
    up = [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)]
    assert [one.weights for one in up] == [(0.0, 0.3), (0.5, 0.3), (1.0, 0.3)]
    assert [one.options.density for one in up] == [(0.5, 0.25), pytest.approx((0.3, 0.25)), (0.1, 0.25)]
    assert [one.options.normalize for one in up] == [True, False, False]
    assert {one.options.scale for one in up} == {2.0}
    assert {one.options.rescale for one in up} == {"l1"}
    assert up[1].sources == (Source(0, up[1].name), Source(1, up[1].name))
    assert up[1].base == Source(-1, up[1].name)
    # Outside the layers mergekit takes the beginning of a gradient, before them and after.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert (found[name].weights, found[name].options.density) == ((0.3, 0.3), (0.5, 0.25))
    assert found["model.norm.weight"].options.density == (1.0, 0.25)


def test_defaults_are_mergekits(tmp_path: Path) -> None:
    text = "merge_method: METHOD\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    for method, expected in (
        ("ties", Ties.Config(density=1.0, normalize=True, rescale="none")),
        ("dare_ties", DareTies.Config(density=1.0, normalize=False, rescale="l1")),
        ("task_arithmetic", TaskArithmetic.Config(normalize=False, scale=1.0)),
        ("nuslerp", Nuslerp.Config(flatten=True, row_wise=False)),
    ):
        assert {one.options for one in configured(tmp_path, text.replace("METHOD", method)).tensors} == {expected}
    off = text.replace("METHOD", "dare_ties").replace("weight: 1", "weight: 1, rescale: false")
    assert {one.options.rescale for one in configured(tmp_path, off).tensors} == {"none"}


def test_notes_say_what_differs(tmp_path: Path) -> None:
    text = "merge_method: METHOD\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    more = "parameters: {weight: 1, int8_mask: true, density: 0.5}\ndtype: bfloat16\n"
    assert configured(tmp_path, text.replace("METHOD", "dare_ties") + more).notes == (
        "int8_mask has no effect on the result of dare_ties",
        "computed in float32 and rounded once; mergekit rounds the inputs to bfloat16 first",
        "rescale: l1, as mergekit since 0.1 (`rescale: true` is l1)",
    )
    assert configured(tmp_path, text.replace("METHOD", "task_arithmetic") + more).notes[:2] == (
        "int8_mask has no effect on the result of task_arithmetic",
        "density has no effect on the result of task_arithmetic",
    )


def test_slerp_starts_at_the_base(tmp_path: Path) -> None:
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.2}\n"
    for one in configured(tmp_path, text).tensors:
        assert one.sources == (Source(1, one.name), Source(0, one.name))
        assert (one.weights, one.options.t) == ((0.8, 0.2), 0.2)


SLICES = """\
merge_method: ties
base_model: base
slices:
- sources:
  - {model: base, layer_range: [0, 1]}
  - {model: a, layer_range: [1, 2], parameters: {weight: 0.7}}
- sources:
  - {model: b, layer_range: [0, 2]}
  - {model: base, layer_range: [1, 3]}
  parameters: {weight: [{filter: layers.0, value: 0.9}, {value: [0.1, 0.5]}]}
- sources:
  - {model: base, layer_range: [2, 3]}
parameters: {weight: 0.4}
"""


def test_slices_renumber_layers(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "none"]}
    found = configured(tmp_path, SLICES, config=config)
    by_name = {one.name: one for one in found.tensors}
    q = [by_name[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(4)]
    at = "model.layers.{}.self_attn.q_proj.weight".format
    assert [one.sources for one in q] == [(Source(0, at(1)),), (Source(1, at(0)),), (Source(1, at(1)),), ()]
    assert [one.base for one in q] == [Source(-1, at(0)), Source(-1, at(1)), Source(-1, at(2)), Source(-1, at(2))]
    # The filter sees the name of the input's tensor, and a gradient runs over its slice.
    assert [one.weights for one in q] == [(0.7,), (0.9,), (0.5,), ()]
    # Before the layers the first slice counts, after them the last, which has the base alone.
    assert by_name["model.embed_tokens.weight"].sources == (Source(0, "model.embed_tokens.weight"),)
    assert by_name["lm_head.weight"].sources == ()
    order = [one.name for one in found.tensors]
    assert order[0] == "model.embed_tokens.weight" and order[-2:] == ["lm_head.weight", "model.norm.weight"]
    # Two models' layers by their first source: base 0, b 0 and 1, base 2.
    assert found.config_changes == {"num_hidden_layers": 4, "layer_types": ["full", "full", "sliding", "none"]}


def test_the_same_number_of_layers_changes_nothing(tmp_path: Path) -> None:
    text = "merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [0, 3]}]\nparameters: {weight: 1}\n"
    assert configured(tmp_path, text, config={"num_hidden_layers": 3}).config_changes == {}
    assert configured(tmp_path, text, config={"n_layer": 12}).config_changes == {"n_layer": 3}


def test_slices_that_do_not_fit(tmp_path: Path) -> None:
    assert refusal(lambda: configured(tmp_path, SLICES.replace("[1, 3]", "[2, 4]"))) == (
        "merge config, slices.1.sources.1.layer_range: layers up to 4, but base has 3\n  Give a range within [0, 3]."
    )
    two = [*llama(3), "vision.layers.0.mlp.weight"]
    assert refusal(lambda: configured(tmp_path, SLICES, names=two)) == (
        "merge config, slices: slices need one stack of layers, found model.layers.N, vision.layers.N\n"
        "  Use `models` instead."
    )
    assert "found none" in refusal(lambda: configured(tmp_path, SLICES, names=["embed.weight"]))
    lacking = [name for name in llama(3) if name != "model.layers.1.mlp.up_proj.weight"]
    assert refusal(lambda: configured(tmp_path, SLICES, a=lacking)).startswith(
        "a: has no tensor model.layers.1.mlp.up_proj.weight, needed for model.layers.0.mlp.up_proj.weight (of"
    )


def test_a_stack_for_each_module(tmp_path: Path) -> None:
    """A gradient runs over each stack of layers by itself."""
    names = [f"text.layers.{i}.w" for i in range(3)] + [f"vision.blocks.{i}.w" for i in range(2)] + ["one.layers.0.w"]
    text = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [1, 3], normalize: false}\n"
    found = {one.name: one.weights[0] for one in configured(tmp_path, text, names=names).tensors}
    assert [found[f"text.layers.{i}.w"] for i in range(3)] == [1, 2, 3]
    assert [found[f"vision.blocks.{i}.w"] for i in range(2)] == [1, 3]
    assert found["one.layers.0.w"] == 3  # One layer is at the end, as in mergekit.


def test_values_that_no_filter_gives_or_that_are_out_of_range(tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: {filter: mlp, value: 1}}}]\n"
    assert refusal(lambda: configured(tmp_path, text)) == (
        "merge config, parameters of lm_head.weight: no filter of 'weight' for a matches\n"
        "  End the list of 'weight' with an entry without a filter."
    )
    text = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 1.5}\n"
    assert refusal(lambda: configured(tmp_path, text)) == (
        "merge config, parameters of lm_head.weight, t: Input should be less than or equal to 1, found 1.5\n"
        "  Give a value of that kind."
    )
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [0, 1]}\n"
    assert refusal(lambda: configured(tmp_path, text)) == (
        "merge config, parameters of lm_head.weight, weight: the weights sum to 0\n"
        "  Give others, or `normalize: false`."
    )


def test_a_recipe_needs_no_torch() -> None:
    code = "import sys, harness.merging.plan, harness.merging.mergekit.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
