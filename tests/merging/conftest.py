"""Small models and adapters to merge, made with transformers and peft, and what they hold as plain tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fp32 checkpoints `base` and `other`, and adapters `a0` to `a3` on `base`."""
    from harness.testing import tiny_adapter, tiny_model

    root = tmp_path_factory.mktemp("merge-models")
    tiny_model(root / "base", seed=0)
    tiny_model(root / "other", seed=5)
    for number in range(4):
        tiny_adapter(root / f"a{number}", root / "base", seed=10 + number, rank=2 + number % 2)
    return root


@pytest.fixture(scope="session")
def bf16(made: Path) -> Path:
    """The base in bf16, in several files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = made / "bf16" / "base"
    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(made / "base").save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def peft_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Write a random adapter of any of peft's kinds: ``peft_adapter(base, "name", r=4, use_dora=True, ...)``."""

    def write(base: Path, name: str, **config: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_pretrained(base)
        given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(model, LoraConfig(**{**given, **config}))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        adapted.save_pretrained(str(tmp_path / name))
        return tmp_path / name

    return write


def weights(folder: Path) -> dict[str, Any]:
    """All tensors of a folder's weight files, by safetensors' own reader."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """The same as bytes."""
    import torch

    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in weights(folder).items()}


def changed_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def peft_state(base: Path, adapter: Path) -> dict[str, Any]:
    """What peft makes of base and adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    merged: dict[str, Any] = model.merge_and_unload().state_dict()
    return merged
