"""An adapter must hold what the attached adapter expects of its base: those of peft do, damaged ones do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import harness
from harness.core import regex_guard
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import ModelSpec
from harness.models import adapter_keys
from harness.models.adapter_keys import PREFIX
from harness.models.inspect import adapter_modules, inspect_adapter, inspect_model
from harness.testing import tiny_adapter

ONE = "model.layers.1.self_attn.q_proj"
GOOD: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "regex": {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|k)_proj"},
    "patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 8, r"layers\.\d+\.self_attn\.k_proj": 2},
        "alpha_pattern": {"q_proj": 3},
    },
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1\..*v_proj"},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "all linear": {"target_modules": "all-linear", "lora_bias": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "by name": {"target_modules": [ONE]},
}


@pytest.fixture(scope="module")
def model(tiny: Path) -> ModelInfo:
    """What is known of the tiny model."""
    return inspect_model(ModelSpec(model=str(tiny)))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The tiny model with its head tied to the embeddings, and biases in its attention."""
    return _llama(tmp_path_factory.mktemp("tied") / "tied", tiny, tie_word_embeddings=True, attention_bias=True)


def _llama(folder: Path, like: Path, **settings: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like, **settings)).save_pretrained(folder)
    return folder


def saved(base: Path, folder: Path, config: Any) -> Path:
    """An adapter as peft writes it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)


def attached(base: Path, folder: Path) -> Any:
    """The adapter on the model in memory."""
    from transformers import AutoModelForCausalLM

    info = AdapterInfo(ref=str(folder), path=str(folder), name=folder.name, digest="d", rank=4)
    return harness.attach_adapter(AutoModelForCausalLM.from_pretrained(base), info, "adapter_0", "--adapter it")


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")


def rename(folder: Path, how: Callable[[str], str | None]) -> None:
    """Give tensors other names, or leave them out."""
    file = folder / "adapter_model.safetensors"
    save_file({new: tensor for name, tensor in load_file(file).items() if (new := how(name))}, file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", GOOD)
def test_what_peft_writes_is_taken(kind: str, tiny: Path, model: ModelInfo, tmp_path: Path) -> None:
    folder = saved(tiny, tmp_path / "adapter", lora(**GOOD[kind]))
    inspect_adapter(str(folder), model)
    attached(tiny, folder)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vera": ("VeraConfig", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "vera without its matrices": ("VeraConfig", {"r": 3, "target_modules": ["q_proj"], "save_projection": False}),
    "ia3": ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ia3 by pattern": ("IA3Config", {"target_modules": r".*\.(q|down)_proj", "feedforward_modules": r".*\.down_proj"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
def test_half_of_another_kind_is_refused_as_half_of_a_lora_is(
    kind: str, tiny: Path, model: ModelInfo, tmp_path: Path
) -> None:
    """peft would fill in vectors that change nothing."""
    import peft

    name, settings = OTHERS[kind]
    folder = saved(tiny, tmp_path / "adapter", getattr(peft, name)(task_type="CAUSAL_LM", **settings))
    inspect_adapter(str(folder), model)
    attached(tiny, folder)
    rename(folder, lambda name: None if ".1." in name else name)
    with pytest.raises(UserError) as caught:
        inspect_adapter(str(folder), model)
    layers = 2 if "down_proj" in str(settings) else 1
    part, each = ("ia3_l", 1) if name == "IA3Config" else ("vera_lambda_b", 2)
    first = "model.layers.1.mlp.down_proj" if layers == 2 else ONE
    assert f"missing tensors: {layers * each} ({first}.{part}" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_what_peft_writes_for_a_tied_head_is_taken(settings: dict[str, Any], tied: Path, tmp_path: Path) -> None:
    folder = saved(tied, tmp_path / "adapter", lora(**settings))
    inspect_adapter(str(folder), inspect_model(ModelSpec(model=str(tied))))
    attached(tied, folder)


@pytest.mark.filterwarnings("ignore")
def test_files_may_leave_the_prefix_of_the_inner_model_out(tmp_path: Path) -> None:
    """As GPT-2 lies on the hub; its layers are stored as (in, out)."""
    from transformers import AutoModelForCausalLM, GPT2Config

    base = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    folder = saved(base, tmp_path / "adapter", lora(target_modules=["c_attn", "wte"], fan_in_fan_out=True, bias="all"))
    info = inspect_model(ModelSpec(model=str(base)))
    inspect_adapter(str(folder), info)
    tensors = load_file(base / "model.safetensors")
    save_file({n.removeprefix("transformer."): t for n, t in tensors.items()}, base / "model.safetensors")
    inspect_adapter(str(folder), inspect_model(ModelSpec(model=str(base))))
    attached(base, folder)


def test_one_whose_names_transformers_changes_is_left_to_the_attached_adapter(
    tiny: Path, model: ModelInfo, tmp_path: Path
) -> None:
    """Mixtures of experts are stored one by one and held together in memory."""
    shapes = {f"{PREFIX}{ONE}.lora_A.weight": np.zeros((2, 64), np.float32)}
    assert adapter_keys.Base.of({}, {"model_type": "qwen3_moe"}).renamed
    assert adapter_keys.Base.of({}, {"text_config": {}}).renamed
    assert not adapter_keys.Base.of({}, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).renamed
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}
    adapter_keys.check_keys("it", config, shapes, adapter_keys.Base.of({}, {"text_config": {}}))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensors": (lambda folder: rename(folder, lambda name: None), "holds no tensors"),
    "half of them": (
        lambda folder: rename(folder, lambda name: name if ".0." in name else None),
        f"missing tensors: 2 ({ONE}.lora_A.weight, {ONE}.lora_B.weight)",
    ),
    "renamed": (
        lambda folder: rename(folder, lambda name: name.replace("q_proj", "wq")),
        "missing tensors: 4 (model.layers.0.self_attn.q_proj.lora_A.weight, model.layers.0.self_attn.q_proj.lora_B."
        f"weight, {ONE}.lora_A.weight, ...); tensors that would be ignored: 4 (model.layers.0.self_attn.wq.lora_A",
    ),
    "another kind": (
        lambda folder: change(folder, peft_type="IA3", feedforward_modules=[]),
        "is of peft_type IA3, and none of its 4 tensors is (model.layers.0.self_attn.q_proj.lora_A.weight, ...)",
    ),
    "one layer": (
        lambda folder: change(folder, layers_to_transform=[0]),
        f"tensors that would be ignored: 2 ({ONE}.lora_A.weight, {ONE}.lora_B.weight)",
    ),
    "another rank": (
        lambda folder: change(folder, r=3),
        "layers.0.self_attn.q_proj.lora_A.weight has shape [2, 64], and on this base it has to have [3, 64]",
    ),
    "no number": (
        lambda folder: change(folder, lora_alpha=float("nan")),
        "adapter_config.json, key lora_alpha: nan is no finite number",
    ),
    "a word": (
        lambda folder: change(folder, r="2"),
        "adapter_config.json, key r: should be a valid integer, found '2'",
    ),
    "nobody": (lambda folder: change(folder, target_modules=["wq"]), "its target_modules are no modules of the base"),
    "no pattern": (
        lambda folder: change(folder, target_modules="(q"),
        "target_modules in adapter_config.json: '(q' is no regular expression: missing ), unterminated subpattern",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_refused_wherever_it_is_given(
    kind: str, tiny: Path, model: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_adapter(tmp_path / "adapter", tiny)
    inspect_adapter(str(folder), model)
    damage, said = DAMAGE[kind]
    damage(folder)
    with pytest.raises(UserError) as caught:
        inspect_adapter(str(folder), model)
    assert said in str(caught.value)
    for command in (
        lambda: harness.merge("linear", [(folder, 1)], base=tiny, out=tmp_path / "out"),
        lambda: _fold(folder, tiny, tmp_path / "out"),
        lambda: _continue_from(folder, tiny),
    ):
        with pytest.raises(UserError) as caught:
            command()
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def _fold(adapter: Path, base: Path, out: Path) -> None:
    from harness.merging.fold.run import fold

    fold(str(adapter), str(base), out=out, probe_prompts=0)


def _continue_from(adapter: Path, base: Path) -> None:
    from harness.alignment.checks import find_start
    from harness.core.specs import AlignSpec

    spec = AlignSpec(method="dpo", dataset="d", model=ModelSpec(model=str(base)), start=str(adapter))
    find_start(spec, inspect_model(spec.model), None, {})


@pytest.mark.filterwarnings("ignore")
def test_the_attached_adapter_must_have_got_the_whole_file(tiny: Path, tmp_path: Path) -> None:
    folder = tiny_adapter(tmp_path / "adapter", tiny)
    attached(tiny, folder)
    rename(folder, lambda name: name.replace(".1.", ".7."))
    with pytest.raises(UserError) as caught:
        attached(tiny, folder)
    assert str(caught.value).startswith("--adapter it: does not fit its base or its adapter_config.json: missing")
    assert f"missing tensors: 2 ({PREFIX}{ONE}.lora_A.adapter_0.weight, " in str(caught.value)
    assert (
        f"tensors that would be ignored: 2 ({PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight" in caught.value.what
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"(\w+.?)+!"},
        {"rank_pattern": {r"(\w+.?)+!": 2}},
        {"exclude_modules": r"(.*)*!"},
        {"modules_to_save": [r"(.*)*!"]},
        {"layers_to_transform": [0], "layers_pattern": [r"(.*)*!"]},
    ],
    ids=str,
)
def test_a_regular_expression_that_does_not_end_is_refused(
    settings: dict[str, Any], tiny: Path, model: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regex_guard, "SECONDS", 2)
    folder = tiny_adapter(tmp_path / "adapter", tiny)
    change(folder, **settings)
    with pytest.raises(UserError, match=r"in adapter_config.json: '.*!' does not end within 2 s on the names of"):
        inspect_adapter(str(folder), model)


def test_the_modules_of_a_file(tiny: Path, model: ModelInfo, tmp_path: Path) -> None:
    adapter = inspect_adapter(str(tiny_adapter(tmp_path / "adapter", tiny)), model)
    assert adapter_modules(adapter) == ["model.layers.0.self_attn.q_proj", ONE]
