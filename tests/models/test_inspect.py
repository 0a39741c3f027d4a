"""What is found out about models and adapters without loading them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.core.specs import ModelSpec
from harness.models.chat_templates import read_chat_template
from harness.models.inspect import inspect_adapter, inspect_model, open_tokenizer
from harness.testing import tiny_adapter, tiny_model


def look(folder: Path, **trust: bool) -> ModelInfo:
    return inspect_model(ModelSpec.model_validate({"model": str(folder), **trust}))


def change(file: Path, **fields: Any) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    data.update(fields)
    file.write_text(json.dumps(data), encoding="utf-8")


def test_what_a_folder_says(tiny: Path) -> None:
    before = set(sys.modules)
    info = look(tiny)
    assert not {"torch", "transformers"} & (set(sys.modules) - before)
    assert (info.architecture, info.max_length, info.name) == ("LlamaForCausalLM", 512, tiny.name)
    assert (info.dtype, info.pickled, info.remote_code) == ("float32", False, False)
    assert info.size_bytes == (tiny / "model.safetensors").stat().st_size
    assert info.vocab_size == json.loads((tiny / "config.json").read_text(encoding="utf-8"))["vocab_size"]


def test_identity_is_content(tiny: Path, tmp_path: Path) -> None:
    """A copy under another name is the same model; whatever may move a number makes another one."""
    copy = tmp_path / "another-name"
    shutil.copytree(tiny, copy)
    first = look(tiny).identity()
    assert look(copy).identity() == first
    (copy / "README.md").write_text("about it", encoding="utf-8")
    assert look(copy).identity() == first

    def differs(*keys: str) -> None:
        now = look(copy).identity()
        assert {key for key in now if now[key] != first[key]} == set(keys)
        shutil.rmtree(copy)
        shutil.copytree(tiny, copy)

    change(copy / "config.json", rope_theta=5000.0)
    differs("config")
    change(copy / "config.json", max_position_embeddings=256)
    differs("config", "max_length")
    (copy / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    differs("tokenizer", "template")
    change(copy / "tokenizer_config.json", add_prefix_space=True)
    differs("tokenizer")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    differs("weights")


def test_weights_in_shards(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sharded"
    shutil.copytree(tiny, copy)
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}), encoding="utf-8")
    assert look(copy).size_bytes == (tiny / "model.safetensors").stat().st_size
    index.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.json: not a JSON object"):
        look(copy)
    index.write_text(json.dumps({"weight_map": ["a"]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"key weight_map: should be a valid dictionary, found \['a'\]"):
        look(copy)
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="has no `weight_map` that names the shards"):
        look(copy)


def test_leave_for_pickles_and_code(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "old"
    shutil.copytree(tiny, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        look(copy)
    assert look(copy, allow_pickle=True).pickled
    change(copy / "config.json", auto_map={"AutoModel": "modeling.Mine"})
    with pytest.raises(UserError, match=r"asks to run code that comes with the model \(modeling.Mine\)"):
        look(copy, allow_pickle=True)
    assert look(copy, allow_pickle=True, trust_remote_code=True).remote_code


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_torn_headers(tiny: Path, tmp_path: Path, size: int) -> None:
    copy = tmp_path / "torn"
    shutil.copytree(tiny, copy)
    os.truncate(copy / "model.safetensors", size)
    with pytest.raises(UserError, match="not a whole safetensors file: its header is cut off"):
        look(copy)


def test_chat_templates_wherever_they_stand(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "chat"
    shutil.copytree(tiny, copy)
    settings = copy / "tokenizer_config.json"
    change(settings, chat_template="one")
    assert read_chat_template(copy) == "one"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}]
    change(settings, chat_template=named)
    assert read_chat_template(copy) == "two"
    change(settings, chat_template=named[:1])
    assert read_chat_template(copy) is None
    (copy / "chat_template.jinja").write_text("three", encoding="utf-8")
    assert read_chat_template(copy) == "three"
    assert look(copy).chat_template == "three"


def test_adapters(tiny: Path, tmp_path: Path) -> None:
    model = look(tiny)
    folder = tiny_adapter(tmp_path / "adapter", tiny, rank=2)
    first = inspect_adapter(str(folder), model)
    assert (first.name, first.rank) == ("adapter", 2)
    change(folder / "adapter_config.json", rank_pattern={"layers.5.self_attn.q_proj": 8})
    second = inspect_adapter(str(folder), model)
    assert second.rank == 8
    assert second.digest != first.digest
    # The same base in another folder.
    copy = tmp_path / "copy-of-it"
    shutil.copytree(tiny, copy)
    change(folder / "adapter_config.json", base_model_name_or_path=str(copy))
    inspect_adapter(str(folder), model)
    change(folder / "adapter_config.json", base_model_name_or_path=str(tiny_model(tmp_path / "else", seed=5)))
    with pytest.raises(UserError, match=r"its base is '.*else', not "):
        inspect_adapter(str(folder), model)
    # The lineage that the harness wrote knows better than a name.
    lineage = {"base": {"weights": model.weights_digest}}
    (folder / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    inspect_adapter(str(folder), model)
    (folder / "lineage.json").write_text(json.dumps({"base": {"weights": "0" * 64}}), encoding="utf-8")
    ours = model.weights_digest[:12]
    with pytest.raises(UserError, match=f"base with weights 000000000000, and .* has {ours}"):
        inspect_adapter(str(folder), model)


def test_the_template_of_training_is_the_template_of_evaluation(tiny: Path, tmp_path: Path) -> None:
    model = look(tiny)
    folder = tiny_adapter(tmp_path / "adapter", tiny)
    assert model.chat_template is not None
    (folder / "chat_template.jinja").write_text(model.chat_template, encoding="utf-8")
    inspect_adapter(str(folder), model)
    (folder / "chat_template.jinja").write_text("another", encoding="utf-8")
    with pytest.raises(UserError, match=r"was trained with chat template .* pass --allow-template-mismatch"):
        try:
            inspect_adapter(str(folder), model)
        except UserError as error:
            raise UserError(error.where, error.what + " " + error.fix, "") from None
    inspect_adapter(str(folder), model, allow_template_mismatch=True)


def test_an_endpoint_has_no_folder() -> None:
    info = inspect_model(ModelSpec(model="http://localhost:8000/v1"))
    assert (info.path, info.name, info.architecture) == ("", "localhost:8000/v1", "endpoint")
    other = inspect_model(ModelSpec(model="http://localhost:8001/v1"))
    assert info.weights_digest != other.weights_digest


def test_a_tokenizer_that_cannot_be_opened(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "odd"
    shutil.copytree(tiny, copy)
    (copy / "tokenizer.json").write_text('{"model": 3}', encoding="utf-8")
    with pytest.raises(UserError, match="its tokenizer cannot be opened: "):
        open_tokenizer(look(copy))


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "a/../../b.safetensors", "\x1b[31m/../x"]
)
def test_an_index_that_leads_out_of_the_folder(tiny: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny, tmp_path / "other")
    folder = shutil.copytree(tiny, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        look(folder)
    shown = name.replace("\x1b", "⟨U+001B⟩")
    assert f"index.json: names a shard outside its folder: {shown}\n" in str(caught.value)
