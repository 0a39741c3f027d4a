"""mergekit's YAML: what becomes of each key, and the words for what is not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from harness.core.config import Located
from harness.core.errors import UserError
from harness.core.specs import MergeInput, MergeSpec, ModelSpec
from harness.merging.mergekit.config import merge_spec, parse_merge_config, read_merge_config

CLASSIC = """\
slices:
- sources:
  - model: models/a
    layer_range: [0, 32]
  - model: models/b
    layer_range: [0, 32]
merge_method: slerp
base_model: models/b
parameters:
  t:
  - filter: self_attn
    value: [0, 0.5, 0.3, 0.7, 1]
  - value: 0.5
dtype: bfloat16
tokenizer_source: base
"""
TIES = """\
models:
- model: base
- model: a
  parameters:
    density: 0.53
    weight: 0.4
- model: b@main
  parameters:
    density: [0.1, 1e-1]
    weight: 6e-1
merge_method: dare_ties
base_model: base
parameters:
  int8_mask: true
  normalize: [false, true]
dtype: float16
out_dtype: float32
"""


def read(tmp_path: Path, text: str, **more: Any) -> MergeSpec:
    file = tmp_path / "merge.yaml"
    file.write_text(text, encoding="utf-8")
    return read_merge_config(file, **more)


def test_the_classic_slerp(tmp_path: Path) -> None:
    spec = read(tmp_path, CLASSIC, seed=3)
    assert (spec.method, spec.seed, spec.dtype) == ("slerp", 3, "bfloat16")
    assert spec.base == ModelSpec(model="models/b")
    # The base of slerp is one of the two; relative paths stay as they are.
    assert spec.inputs == (MergeInput(ref="models/a"), MergeInput(ref="models/b"))
    assert spec.config == yaml.safe_load(CLASSIC)


def test_the_base_of_deltas_is_no_input(tmp_path: Path) -> None:
    spec = read(tmp_path, TIES)
    assert spec.base == ModelSpec(model="base")
    assert spec.inputs == (MergeInput(ref="a"), MergeInput(ref="b", revision="main"))
    assert spec.dtype == "float32"


def test_models_with_adapters(tmp_path: Path) -> None:
    text = """\
merge_method: task_arithmetic
base_model: base
models:
- model: base+arms/one
- model: other+arms/two@v2
- model: {model: {path: base}, lora: {path: arms/three, revision: main}}
parameters: {weight: 1}
"""
    assert read(tmp_path, text).inputs == (
        MergeInput(ref="arms/one"),
        MergeInput(ref="arms/two", base="other", revision="v2"),
        MergeInput(ref="arms/three", revision="main"),
    )
    spec = read(tmp_path, text.replace("base_model: base", "base_model: base+arms/zero"))
    assert spec.base == ModelSpec(model="base", adapter="arms/zero")
    assert spec.inputs[0] == MergeInput(ref="arms/one", base="base")


def test_mergekit_counts_the_base_of_linear_as_a_model(tmp_path: Path) -> None:
    text = "merge_method: linear\nbase_model: base\nmodels: [{model: a}]\nparameters: {weight: 0.5}\n"
    assert [one.ref for one in read(tmp_path, text).inputs] == ["a", "base"]


def test_a_base_may_stand_in_the_slices_alone(tmp_path: Path) -> None:
    text = CLASSIC.replace("base_model: models/b\n", "").replace("- sources:", "- base_model: models/b\n  sources:")
    assert read(tmp_path, text.replace("tokenizer_source: base\n", "")).base == ModelSpec(model="models/b")


SUPPORTED = "Supported of mergekit's: linear, slerp, nuslerp, task_arithmetic, ties, dare_linear, dare_ties."
KEYS = "merge_method, base_model, models, slices, parameters, dtype, out_dtype, tokenizer_source, tokenizer"
ONE_VOCABULARY = (
    "Write `tokenizer_source: base` and a `base_model`, or leave it out; all models must have one vocabulary."
)
WEIGHT = "weight is a number, a list of such over the layers, or entries with `filter` and `value`."
T = WEIGHT.replace("weight", "t")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "merge_method: slerp",
            "merge_method: passthrough",
            f"7, merge_method: merge method 'passthrough' is not supported\n  {SUPPORTED}",
        ),
        (
            "merge_method: slerp",
            "merge_method: dare_tie",
            f"7, merge_method: merge method 'dare_tie' is not supported\n  Did you mean 'dare_ties'? {SUPPORTED}",
        ),
        ("merge_method: slerp\n", "", f", merge_method: required key 'merge_method' is missing\n  {SUPPORTED}"),
        (
            "dtype:",
            "dtypes:",
            f"14, dtypes: key 'dtypes' is not supported\n  Did you mean 'dtype'? Supported here: {KEYS}.",
        ),
        (
            "dtype: bfloat16",
            "dtype: float64",
            "14, dtype: dtype 'float64' is not supported\n  One of: float32, bfloat16, float16.",
        ),
        (
            "dtype: bfloat16",
            "modules: {}",
            "14, modules: key 'modules' is not supported\n"
            "  Write `models` or `slices`: merging several modules apart is not supported.",
        ),
        (
            "dtype: bfloat16",
            "chat_template: auto",
            "14, chat_template: key 'chat_template' is not supported\n  Delete it: the base's template is kept.",
        ),
        (
            "tokenizer_source: base",
            "tokenizer_source: union",
            f"15, tokenizer_source: tokenizer source 'union' is not supported\n  {ONE_VOCABULARY}",
        ),
        (
            "tokenizer_source: base",
            "tokenizer: {source: union}",
            f"15, tokenizer.source: tokenizer source 'union' is not supported\n  {ONE_VOCABULARY}",
        ),
        (
            "tokenizer_source: base",
            "tokenizer: {source: base, pad_to_multiple_of: 8}",
            "15, tokenizer.pad_to_multiple_of: key 'pad_to_multiple_of' is not supported\n  Supported here: source.",
        ),
        (
            "base_model: models/b\n",
            "",
            f"14, tokenizer_source: tokenizer source 'base' is not supported\n  {ONE_VOCABULARY}",
        ),
        (
            "base_model: models/b",
            "base_model: models/c",
            "2, slices.0: the base model models/c is none of the sources\n"
            "  Add it with its layer_range: mergekit takes the base of a slice from its sources.",
        ),
        (
            "model: models/b\n",
            "model: models/b+x+y\n",
            "5, slices.0.sources.1.model: no model: 'models/b+x+y'\n  Write MODEL, MODEL@REVISION or MODEL+ADAPTER.",
        ),
        (
            "model: models/b\n",
            "model: 7\n",
            "5, slices.0.sources.1.model: no model: 7\n  Write MODEL, MODEL@REVISION or MODEL+ADAPTER.",
        ),
        (
            "model: models/b\n",
            "modell: models/b\n",
            "5, slices.0.sources.1.modell: key 'modell' is not supported\n"
            "  Did you mean 'model'? Supported here: model, layer_range, parameters, control.",
        ),
        (
            "model: models/b\n    layer_range: [0, 32]",
            "model: models/b\n    layer_range: [0, 31]",
            "2, slices.0: ranges of 31 and 32 layers\n  All sources of a slice have the same number of layers.",
        ),
        (
            "model: models/b\n    layer_range: [0, 32]",
            "model: models/b\n    layer_range: [32, 0]",
            "6, slices.0.sources.1.layer_range: no range of layers: [32, 0]\n"
            "  Write [first, after the last], counted from 0, such as [0, 32].",
        ),
        (
            "model: models/a\n",
            "model: models/b\n",
            "5, slices.0.sources.1: models/b is given twice\n  Name each model once.",
        ),
        (
            "- sources:\n  - model: models/a\n    layer_range: [0, 32]",
            "- sources:",
            "2, slices.0: slerp merges 2 models, found 1\n  Found: models/b.",
        ),
        (
            "- sources:",
            "- residual_weight: 1\n  sources:",
            "2, slices.0.residual_weight: key 'residual_weight' is not supported\n"
            "  Delete it: mergekit reads it nowhere.",
        ),
        ("  t:\n", "  tt:\n", "10, parameters.tt: key 'tt' is not supported\n  Did you mean 't'? Supported here: t."),
        (
            "layer_range: [0, 32]\nmerge",
            "layer_range: [0, 32]\n    parameters: {t: 0.5}\nmerge",
            "7, slices.0.sources.1.parameters.t: 't' belongs to the merge, not to one model\n"
            "  Write it under the top-level `parameters`: mergekit reads 't' only there and in a slice.",
        ),
        ("value: 0.5", "value: half", f"13, parameters.t.1.value: not a number: 'half'\n  {T}"),
        ("value: 0.5", "value: true", f"13, parameters.t.1.value: not a number: True\n  {T}"),
        ("value: 0.5", "value: .nan", f"13, parameters.t.1.value: not a number: nan\n  {T}"),
        ("value: 0.5", "value: []", f"13, parameters.t.1.value: an empty list\n  {T}"),
        (
            "value: 0.5",
            "valu: 0.5",
            "13, parameters.t.1.valu: key 'valu' is not supported\n"
            "  Did you mean 'value'? Supported here: filter, value.",
        ),
        ("value: 0.5", "filter: mlp", f"13, parameters.t.1.value: not a number: None\n  {T}"),
        (
            "filter: self_attn",
            "filter: 3",
            "11, parameters.t.0: not a filter with its value: {'filter': 3, 'value': [0, 0.5, 0.3, 0.7, 1]}\n  " + T,
        ),
        (
            "value: 0.5",
            "value: [{value: 1}]",
            "13, parameters.t.1: a filter within a filter: {'value': [{'value': 1}]}\n  " + T,
        ),
        ("  t:\n", "  t: 0.5\n  u:\n", "11, parameters.u: key 'u' is not supported\n  Supported here: t."),
        (
            "parameters:\n",
            "models: [{model: a}]\nparameters:\n",
            ": both `models` and `slices` are given\n  Give one of the two.",
        ),
    ],
)
def test_a_mistake_in_slices(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in CLASSIC
    with pytest.raises(UserError) as caught:
        read(tmp_path, CLASSIC.replace(old, new, 1))
    place = str(caught.value).replace(str(tmp_path / "merge.yaml"), "FILE")
    assert place == (f"FILE:{expected}" if expected[0].isdigit() else place)
    assert place.endswith(expected)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "merge_method: dare_ties\nbase_model: base\n",
            "merge_method: ties\n",
            "1: ties needs a `base_model`\n  Name the model under all others.",
        ),
        (
            "    weight: 0.4\n",
            "",
            "3, models.1: dare_ties without 'weight' for a\n"
            "  Give 'weight' there or under the top-level `parameters`; mergekit demands it too.",
        ),
        (
            "weight: 0.4",
            "weight: {filter: mlp}",
            f"6, models.1.parameters.weight.value: not a number: None\n  {WEIGHT}",
        ),
        (
            "int8_mask: true",
            "int8_mask: 8",
            "14, parameters.int8_mask: not true or false: 8\n"
            "  int8_mask is true or false, a list of such over the layers, or entries with `filter` and `value`.",
        ),
        (
            "int8_mask: true",
            "epsilon: 0.1",
            "14, parameters.epsilon: key 'epsilon' is not supported\n"
            "  Supported here: weight, density, normalize, lambda, rescale, int8_mask.",
        ),
        (
            "merge_method: dare_ties",
            "merge_method: nuslerp",
            "14, parameters.int8_mask: key 'int8_mask' is not supported\n"
            "  Supported here: weight, nuslerp_flatten, nuslerp_row_wise.",
        ),
        (
            "- model: base\n",
            "- base\n",
            "2, models.0: expected a mapping, found 'base'\n  Allowed keys: model, parameters, control.",
        ),
        (
            "- model: base\n",
            "- parameters: {}\n",
            "2, models.0: required key 'model' is missing\n  Allowed keys: model, parameters, control.",
        ),
        (
            "base_model: base\nparameters:",
            "base_model: c+lora@v1\nparameters:\n  weight: 1",
            "12, base_model: a revision of the adapter under the base: c+lora@v1\n  Give the adapter as a folder.",
        ),
        (
            "- model: a\n",
            "- model: x@v1+a\n",
            "1: a revision of the model under an adapter: x@v1+a\n  Give that model as a folder.",
        ),
    ],
)
def test_a_mistake_in_models(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in TIES
    with pytest.raises(UserError) as caught:
        read(tmp_path, TIES.replace(old, new, 1))
    assert str(caught.value).replace(str(tmp_path / "merge.yaml"), "FILE") == f"FILE:{expected}"


def test_a_mistake_in_the_number_of_models(tmp_path: Path) -> None:
    text = "merge_method: nuslerp\nbase_model: base\nmodels: [{model: a}, {model: base}]\nparameters: {weight: 1}\n"
    with pytest.raises(UserError, match="models: nuslerp merges 2 models besides the base, found 1\n  Found: a, base"):
        read(tmp_path, text)
    for empty in ("[]", "{}", "null"):
        with pytest.raises(UserError, match="neither `models` nor `slices` is given\n  Give one of the two"):
            read(tmp_path, f"merge_method: linear\nmodels: {empty}\n")
    with pytest.raises(UserError, match="models: expected a list, found 'a'\n  Write a list"):
        read(tmp_path, "merge_method: linear\nmodels: a\n")
    with pytest.raises(UserError, match="there is no model besides the base\n  Name the models to merge"):
        read(tmp_path, "merge_method: ties\nbase_model: a\nmodels: [{model: a}]\n")
    with pytest.raises(UserError, match="expected a mapping, found None\n  Allowed keys: merge_method, base_model"):
        read(tmp_path, "")


def test_a_base_for_one_slice_is_for_slerp_alone(tmp_path: Path) -> None:
    entry = "{model: MODEL, layer_range: [0, 2]}"
    sources = ", ".join(entry.replace("MODEL", name) for name in "ab")
    text = f"slices:\n- {{sources: [{sources}]}}\n- {{base_model: b, sources: [{sources}]}}\nbase_model: a\n"
    assert read(tmp_path, f"{text}merge_method: slerp\nparameters: {{t: 0.1}}\n").base == ModelSpec(model="a")
    with pytest.raises(UserError) as caught:
        read(tmp_path, f"{text}merge_method: ties\nparameters: {{weight: 1}}\n")
    assert str(caught.value).endswith(
        "merge.yaml:3, slices.1: ties with a base of its own for a slice\n  Give one `base_model`, at the top."
    )


WORDS = st.sampled_from(["a", "b+c", "d@v", "", "slerp", "ties", "base", "union", "1e-3", "*", "mlp"])
LEAVES = st.none() | st.booleans() | st.integers(-2, 40) | st.floats() | WORDS
KEYS_SEEN = ("model", "parameters", "layer_range", "sources", "base_model", "weight", "t", "filter", "value", "path")
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS_SEEN), inner, max_size=3),
    max_leaves=8,
)


@settings(derandomize=True, max_examples=400, deadline=None)
@given(
    changes=st.dictionaries(
        st.sampled_from(["models", "slices", "base_model", "parameters", "dtype", "tokenizer_source", "tokenizer"]),
        TREES,
        min_size=1,
        max_size=3,
    ),
    classic=st.booleans(),
)
def test_whatever_is_in_the_file_is_read_or_refused(changes: dict[str, Any], classic: bool) -> None:
    """Never a traceback: data of any shape in any place ends in a merge or in a UserError."""
    data = {**yaml.safe_load(CLASSIC if classic else TIES), **changes}
    located = Located(data, "merge.yaml", {})
    try:
        spec = merge_spec(parse_merge_config(located), data)
    except UserError as error:
        assert error.where.startswith("merge.yaml") and error.what and error.fix
    else:
        assert spec.inputs
