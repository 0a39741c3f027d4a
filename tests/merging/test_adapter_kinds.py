"""VeRA and IA3 adapters: merge, fold and eval make of them what peft makes; other kinds all three refuse alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.contracts.registry import Origin, Registered, Registry, load_plugins
from harness.core.errors import UserError
from harness.core.specs import ModelSpec
from harness.merging.adapters.kinds import open_adapter
from harness.merging.fold.run import fold
from harness.models.inspect import inspect_adapter, inspect_model
from harness.models.tensors import TensorFolder
from harness.steps.journal import read_rows
from tests.merging.conftest import peft_state, weights

pytestmark = pytest.mark.filterwarnings("ignore")

Write = Callable[..., Path]
LAYERS = ["q_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "vera": {"kind": "VeraConfig", "r": 6, "target_modules": LAYERS},
    "vera without its matrices": {
        "kind": "VeraConfig", "r": 6, "target_modules": LAYERS, "save_projection": False, "projection_prng_key": 7,
    },
    "vera with whole modules": {
        "kind": "VeraConfig", "r": 6, "target_modules": ["q_proj"], "modules_to_save": ["norm"],
    },
    "ia3": {"kind": "IA3Config", "target_modules": LAYERS, "feedforward_modules": ["down_proj"]},
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a random adapter: ``write(base, "name", "VeraConfig", r=6, ...)``."""

    def written(base: Path, name: str, kind: str, **config: Any) -> Path:
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        adapted.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return written


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], before: dict[str, Any]) -> None:
    """Equal up to a few roundings of fp32 (6e-8); and changed, or the comparison would prove nothing."""
    assert ours.keys() == before.keys()
    for name, tensor in ours.items():
        far, size = (tensor.double() - theirs[name].double()).abs().max(), theirs[name].double().abs().max()
        assert float(far) <= 1e-6 * float(size), f"{name}: {far} of {size}"
    assert any(not ours[name].equal(tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_is_what_peft_makes(kind: str, made: Path, tmp_path: Path, write: Write) -> None:
    base = made / "base"
    adapter = write(base, "adapter", **KINDS[kind])
    fold(str(adapter), str(base), out=tmp_path / "out", probe_prompts=0)
    assert_equal(weights(tmp_path / "out"), peft_state(base, adapter), weights(base))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("VeraConfig", {"r": 6, "bias": "vera_only", "target_modules": ["c_attn", "c_fc"]}),
        ("IA3Config", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    ],
)
def test_biases_and_layers_stored_the_other_way_round(
    kind: str, config: dict[str, Any], tmp_path: Path, write: Write
) -> None:
    """GPT-2 keeps (in, out) and has biases, which IA3 multiplies where it multiplies a layer's outputs."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "gpt2"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=120, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(base)
    adapter = write(base, "adapter", kind, fan_in_fan_out=True, **config)
    fold(str(adapter), str(base), out=tmp_path / "out", probe_prompts=0)
    ours, before = weights(tmp_path / "out"), weights(base)
    assert_equal(ours, peft_state(base, adapter), before)
    bias = "transformer.h.0.attn.c_attn.bias"
    assert not ours[bias].equal(before[bias])


def test_a_merge_of_all_kinds_is_the_mean_of_what_peft_makes(made: Path, tmp_path: Path, write: Write) -> None:
    base = made / "base"
    arms = [made / "a0", write(base, "vera", **KINDS["vera"]), write(base, "ia3", **KINDS["ia3"])]
    harness.merge("task_arithmetic", [(arm, 0.5) for arm in arms], base=base, out=tmp_path / "out")
    before, states = weights(base), [peft_state(base, arm) for arm in arms]
    expected = {name: w + 0.5 * sum((state[name] - w) for state in states) for name, w in before.items()}
    assert_equal(weights(tmp_path / "out"), expected, before)


def test_a_vera_is_an_adapter_of_its_rank_and_an_ia3_has_none(made: Path, tmp_path: Path, write: Write) -> None:
    base = made / "base"
    vera, ia3 = (write(base, kind, **KINDS[kind]) for kind in ("vera", "ia3"))
    found = harness.merge("task_arithmetic", [(vera, 1.0)], base=base, out=tmp_path / "out", form="adapter")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 6
    assert found.record["form"] == "adapter"
    assert_equal(peft_state_of(base, tmp_path / "out"), peft_state(base, vera), weights(base))
    with pytest.raises(UserError) as caught:
        harness.merge("task_arithmetic", [(ia3, 1.0)], base=base, out=tmp_path / "none", form="adapter")
    assert str(caught.value) == "--rank: ia3 is of peft_type IA3: its change has no rank of its own\n  Add --rank R."


def peft_state_of(base: Path, adapter: Path) -> dict[str, Any]:
    """What peft makes of an adapter, by the names of the base's files."""
    state = peft_state(base, adapter)
    return {name: state[name] for name in weights(base)}


# ------------------------------------------------------------------------------------------------------ as eval sees


def folding() -> Registry:
    """An engine that serves no adapter beside its base."""
    from harness_plugins.engines.transformers.engine import TransformersEngine

    class Folds(TransformersEngine):
        name = "folds"

        def adapter_problem(self, model: Any, adapter: Any, options: Any) -> str | None:
            return "it would rather not"

    registry = load_plugins()
    origin = Origin("x", "x", "1", loose=Path(__file__))
    registry.entries["engine", "folds"] = Registered("engine", "folds", Folds(), origin)
    return registry


def evaluated(base: Path, adapter: Path, sums: Path, engine: str) -> Any:
    return harness.evaluate(
        str(base),
        adapter=str(adapter),
        tasks=["sums"],
        task_folders=[sums],
        limit=3,
        engine=engine,
        registry=folding(),
        out=Path(f"run-{engine}-{adapter.name}"),
    )


@pytest.mark.parametrize("kind", ["vera", "ia3"])
def test_eval_answers_alike_live_and_folded(kind: str, made: Path, sums: Path, write: Write) -> None:
    adapter = write(made / "base", kind, **KINDS[kind])
    texts = []
    for engine in ("transformers", "folds"):
        (journal,) = evaluated(made / "base", adapter, sums, engine).root.glob("steps/answers-*/artifact/*.jsonl.gz")
        texts.append([row["output"]["text"] for row in read_rows(journal)])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3


def test_another_kind_is_refused_in_the_same_words(made: Path, tmp_path: Path, sums: Path, write: Write) -> None:
    base = made / "base"
    adapter = write(base, "loha", "LoHaConfig", r=2, target_modules=["q_proj"])
    said = (
        "cannot be written as changed weights: peft_type LOHA\n"
        "  LoRA (rsLoRA, DoRA), VeRA and IA3 adapters can, with whole modules and biases saved beside them."
    )
    with pytest.raises(UserError) as merging:
        harness.merge("linear", [(adapter, 1.0)], base=base, out=tmp_path / "out")
    assert str(merging.value) == f"--inputs [1] loha: {said}"
    with pytest.raises(UserError) as folded:
        fold(str(adapter), str(base), out=tmp_path / "out", probe_prompts=0)
    assert str(folded.value) == f"ADAPTER loha: {said}"
    with pytest.raises(UserError) as evaluating:
        evaluated(base, adapter, sums, "folds")
    assert str(evaluating.value) == f"--adapter loha: {said}"
    # Beside its base it can be served.
    assert not evaluated(base, adapter, sums, "transformers").failures


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ELSE = "Give the base that the adapter was trained on."
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "a vector is missing": (
        "vera",
        lambda tensors: tensors.pop(f"{Q}.vera_lambda_d"),
        f"x, {Q}.vera_lambda_b: one of the two vectors is missing\n  Save the adapter again.",
    ),
    "a matrix is missing": (
        "vera",
        lambda tensors: tensors.pop("base_model.vera_B"),
        "x, base_model.vera_B: is missing\n  Save the adapter again.",
    ),
    "a matrix is too narrow": (
        "vera",
        lambda tensors: tensors.update({"base_model.vera_A": tensors["base_model.vera_A"][:, :100].contiguous()}),
        # down_proj has 128 inputs and 64 outputs; B has as many rows as up_proj has outputs.
        "x, base_model.model.model.layers.0.mlp.down_proj.vera_lambda_b: a vector of 6 with shared matrices of shapes "
        f"[6, 100] and [128, 6], for a layer of 128 inputs and 64 outputs\n  {ELSE}",
    ),
    "a vector of another base": (
        "vera",
        lambda tensors: tensors.update({f"{Q}.vera_lambda_b": tensors[f"{Q}.vera_lambda_b"][:9].contiguous()}),
        f"x, {Q}.vera_lambda_b: has shape [9] and [6], and model.layers.0.self_attn.q_proj.weight of the base has "
        f"[64, 64]\n  {ELSE}",
    ),
    "a scale of another base": (
        "ia3",
        lambda tensors: tensors.update({f"{Q}.ia3_l": tensors[f"{Q}.ia3_l"][:9].contiguous()}),
        f"x, {Q}.ia3_l: has shape [9, 1], and model.layers.0.self_attn.q_proj.weight of the base has [64, 64]\n"
        f"  {ELSE}",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_named(damage: str, made: Path, tmp_path: Path, write: Write) -> None:
    """Without the look at adapter_config.json that comes before: it is left out where transformers renames modules."""
    from safetensors.torch import load_file, save_file

    kind, change, said = DAMAGE[damage]
    folder = write(made / "base", kind, **KINDS[kind])
    info = inspect_adapter(str(folder), inspect_model(ModelSpec(model=str(made / "base"))))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        open_adapter(info, TensorFolder([made / "base" / "model.safetensors"], "base"), "x")
    assert str(caught.value) == said
