"""Model and adapter folders that somebody spoilt: one message that names the file, never a traceback, never a wait."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core import regex_guard
from harness.core.errors import UserError
from harness.core.records import AdapterInfo
from harness.core.specs import ModelSpec
from harness.merging.sources import open_checkpoint
from harness.models.chat_templates import read_chat_template
from harness.models.inspect import inspect_adapter, inspect_model
from harness.models.lineage import ancestry
from harness.testing import tiny_adapter

HOSTILE: tuple[Any, ...] = (
    None, True, 5, -1, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../x", "\ud800", "a\0b", "(.*)*!" , [], [1],
    ["x"], [None], [[]], {}, {"x": 1}, {"": None}, "y" * 5000,
)  # fmt: skip
KEYS = {
    "config.json": (
        "architectures", "auto_map", "text_config", "vocab_size", "hidden_size", "num_attention_heads", "dtype",
        "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings", "quantization_config", "model_type",
    ),
    "tokenizer_config.json": ("chat_template", "tokenizer_class", "bos_token", "model_max_length"),
    "adapter_config.json": (
        "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "bias",
        "alpha_pattern", "layers_to_transform", "layers_pattern", "use_dora", "init_lora_weights", "fan_in_fan_out",
        "trainable_token_indices", "base_model_name_or_path", "lora_bias", "use_rslora", "target_parameters",
    ),
    "lineage.json": ("base", "adapters", "quantization"),
    "model.safetensors.index.json": ("weight_map",),
}  # fmt: skip
TEXTS = (b"", b"[]", b"5", b"null", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": 1e999}', b"\xef\xbb\xbf{}", b'{"a": 1}x')
DEEP = b'{"a": ' * 5000 + b"1" + b"}" * 5000


@pytest.fixture
def folders(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model and an adapter of it, to be spoilt."""
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    adapter = tiny_adapter(tmp_path / "adapter", base)
    (adapter / "lineage.json").write_text("{}", encoding="utf-8")
    return base, adapter


def look(base: Path, adapter: Path) -> None:
    """Everything that is read of both before something is loaded."""
    model = inspect_model(ModelSpec(model=str(base)))
    model.identity()
    open_checkpoint(model, "base")
    ancestry(inspect_adapter(str(adapter), model))


def refused(base: Path, adapter: Path) -> str:
    """The message, for what must be refused."""
    with pytest.raises(UserError) as caught:
        look(base, adapter)
    error = caught.value
    assert error.where and error.what and error.fix
    return str(error)


def quietly(base: Path, adapter: Path) -> None:
    """Taken or refused, and nothing else."""
    try:
        look(base, adapter)
    except UserError as error:
        assert str(base) in error.where or str(adapter) in error.where or error.where.startswith("base")


@pytest.mark.parametrize("name", KEYS)
def test_no_value_of_any_key_is_a_traceback(
    name: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regex_guard, "SECONDS", 1)
    base, adapter = folders
    file = (adapter if name in ("adapter_config.json", "lineage.json") else base) / name
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key in KEYS[name]:
        for value in HOSTILE:
            file.write_text(json.dumps({**before, key: value}), encoding="utf-8")
            quietly(base, adapter)


@pytest.mark.parametrize("name", KEYS)
def test_no_text_of_any_file_is_a_traceback(name: str, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    file = (adapter if name in ("adapter_config.json", "lineage.json") else base) / name
    for text in (*TEXTS, DEEP):
        file.write_bytes(text)
        assert str(file) in refused(base, adapter)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"auto_map": None}, "key auto_map: should be a valid dictionary, found None"),
        ("config.json", {"architectures": 5}, "key architectures: should be a valid list, found 5"),
        ("config.json", {"text_config": "x"}, "key text_config: should be a valid dictionary, found 'x'"),
        ("config.json", {"a": {"b": [float("nan")]}}, "key a.b.0: nan is no finite number"),
        ("config.json", {"num_hidden_layers": 10**7}, "key num_hidden_layers: should be less than or equal to 10000"),
        ("config.json", {"text_config": {"n_layer": 10**7}}, "key text_config.n_layer: should be less than or equal"),
        ("adapter_config.json", {"r": "x"}, "key r: should be a valid integer, found 'x'"),
        ("adapter_config.json", {"target_modules": 3}, "key target_modules: should be a valid string or a valid list"),
        ("adapter_config.json", {"peft_type": None}, "key peft_type: should be a valid string, found None"),
        ("lineage.json", {"base": None}, "key base: should be a valid dictionary"),
        ("lineage.json", {"adapters": [{"name": 1}]}, "key adapters.0.name: should be a valid string, found 1"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "key chat_template"),
    ],
)
def test_the_message_names_the_key(name: str, change: dict[str, Any], said: str, folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    file = (adapter if name in ("adapter_config.json", "lineage.json") else base) / name
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    message = refused(base, adapter)
    assert str(file) in message and said in message


def test_an_infinity_that_transformers_writes_is_read(folders: tuple[Path, Path]) -> None:
    """Mamba-2 and its hybrids have one in `time_step_limit`."""
    file = folders[0] / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}), encoding="utf-8")
    look(*folders)
    assert inspect_model(ModelSpec(model=str(folders[0]))).config["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def tensor(**settings: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **settings}


HEADERS: tuple[Any, ...] = (
    [], 5, None, "x", {"a": 5}, {"a": {}}, {"a": tensor(dtype=None)}, {"a": tensor(shape=1)}, {"a": tensor(shape=[-1])},
    {"a": tensor(shape=["1"])}, {"a": tensor(shape=[2**70])}, {"a": tensor(shape=[True])}, {"a": tensor(shape=[2])},
    {"a": tensor(data_offsets=[4, 0])}, {"a": tensor(data_offsets=[0, 10**30])}, {"a": tensor(data_offsets=[0])},
    {"a": tensor(data_offsets=None)}, {"a": tensor(), "b": tensor()}, {"a": tensor(data_offsets=[-4, 0])}, {},
)  # fmt: skip


@pytest.mark.parametrize("which", [0, 1], ids=["model", "adapter"])
def test_headers_of_safetensors(which: int, folders: tuple[Path, Path]) -> None:
    file = folders[which] / ("adapter_model.safetensors" if which else "model.safetensors")
    texts = [json.dumps(header).encode() for header in HEADERS]
    for text in (*texts, b"\xff", DEEP, b"{", b"[" * 100_000):
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        message = refused(*folders)
        assert f"{file}: not a whole safetensors file: " in message
    file.write_bytes(b"\xff" * 8)
    assert "its header is cut off" in refused(*folders)


def _pipe(file: Path) -> None:
    os.mkfifo(file)


def _loop(file: Path) -> None:
    file.symlink_to(file.name)


def _device(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _loop, _device, Path.mkdir])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    make: Callable[[Path], None], folders: tuple[Path, Path]
) -> None:
    base, adapter = folders
    for file in [*base.iterdir(), *adapter.iterdir(), base / "model-2.safetensors", base / "chat_template.jinja"]:
        kept = file.read_bytes() if file.exists() else None
        file.unlink(missing_ok=True)
        make(file)
        if make is Path.mkdir:
            quietly(base, adapter)  # as if the file were not there
            file.rmdir()
        else:
            assert str(file) in refused(base, adapter)
            file.unlink()
        if kept is not None:
            file.write_bytes(kept)
    look(base, adapter)


def test_a_pipe_in_the_place_of_a_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: cannot be read: Not a directory"):
        inspect_model(ModelSpec(model=str(tmp_path / "pipe")))


def test_a_chat_template_that_is_no_text(folders: tuple[Path, Path]) -> None:
    (folders[0] / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: is not UTF-8 \(byte 0\)"):
        read_chat_template(folders[0])


def test_where_an_adapter_without_lineage_comes_from(tmp_path: Path) -> None:
    adapter = AdapterInfo(ref="a", path=str(tmp_path), name="a", digest="d", rank=1)
    assert ancestry(adapter) == [{"name": "a", "digest": "d"}]
