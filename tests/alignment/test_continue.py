"""--from: the adapter continued from stays frozen and active, and what is exported is one adapter, exactly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from harness.alignment.run import Alignment
from harness.core.errors import UserError
from harness.core.specs import ModelSpec
from harness.models.inspect import inspect_adapter, inspect_model
from harness.models.lineage import concatenate, refuse_unless_plain
from harness.testing import tiny_model

Align = Callable[..., Alignment]
IDS = torch.tensor([[0, 5, 60, 7, 80, 9, 200, 31]])


def logits(model: Any) -> torch.Tensor:
    """Logits of a fixed prompt, (1, T, V)."""
    with torch.no_grad():
        return model.eval()(IDS).logits


def open_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_adapter(base: Path, out: Path, seed: int, **config: Any) -> Path:
    """A LoRA adapter whose B is not zero, saved by peft."""
    torch.manual_seed(seed)
    model = get_peft_model(open_base(base), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}, {"r": 4, "target_modules": ["q_proj"]}),
        ({"r": 2, "target_modules": ["q_proj", "down_proj"]}, {"r": 8, "target_modules": ["k_proj", "down_proj"]}),
        (
            {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj"]},
            {"r": 2, "target_modules": ["q_proj"]},
        ),
        (
            {
                "r": 4,
                "rank_pattern": {"layers.1.self_attn.q_proj": 2},
                "alpha_pattern": {"v_proj": 3},
                "target_modules": ["q_proj", "v_proj"],
            },
            {"r": 2, "target_modules": ["o_proj"]},
        ),
        (
            {"r": 4, "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2}, "target_modules": ["q_proj"]},
            {"r": 2, "target_modules": ["q_proj"]},
        ),
        (
            {"r": 4, "layers_to_transform": [0], "target_modules": ["q_proj"]},
            {"r": 2, "layers_to_transform": [1], "target_modules": ["v_proj"]},
        ),
    ],
    ids=["same modules", "other modules", "rslora", "patterns", "regular expressions", "some layers"],
)
def test_concatenation_is_exact(tiny: Path, tmp_path: Path, one: dict[str, Any], two: dict[str, Any]) -> None:
    """Peer: peft with both adapters active."""
    first, second = (random_adapter(tiny, tmp_path / str(n), n, **c) for n, c in enumerate((one, two)))
    concatenate(first, second, tmp_path / "sum")
    both = PeftModel.from_pretrained(open_base(tiny), first, adapter_name="a")
    both.load_adapter(second, adapter_name="b")
    both.base_model.set_adapter(["a", "b"])
    whole = PeftModel.from_pretrained(open_base(tiny), tmp_path / "sum")
    alone = PeftModel.from_pretrained(open_base(tiny), first)
    expected = logits(both)
    assert (logits(whole) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (logits(alone) - expected).abs().max() > 1e-2
    assert "default" in whole.peft_config
    # The file holds just the tensors that its configuration asks for.
    inspect_adapter(str(tmp_path / "sum"), inspect_model(ModelSpec(model=str(tiny))))


@pytest.fixture
def sft(align: Align) -> Path:
    """An SFT adapter of rank 4 on q_proj and v_proj, with rslora and dropout."""
    align("sft", "sft", lora={"rank": 4, "targets": ["q_proj", "v_proj"], "rslora": True, "dropout": 0.3})
    return Path("sft")


def test_sft_then_dpo(align: Align, tiny: Path, sft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A is frozen and active, the reference is base + A, and one adapter comes out that is the sum."""
    before = {path.name: path.read_bytes() for path in sft.iterdir() if path.is_file()}
    two: list[torch.Tensor] = []
    from harness.alignment.stage import StageTraining

    leave = StageTraining.leave

    def watch(training: Any, job: Any, model: Any) -> None:
        two.append(logits(model))
        frozen = {n: p for n, p in model.named_parameters() if ".start." in n}
        stored = load_file(sft / "adapter_model.safetensors")
        assert len(frozen) == len(stored)
        assert all(torch.equal(p, stored[n.replace(".start", "")]) for n, p in frozen.items())
        assert model.active_adapters == ["start", "default"]
        leave(training, job, model)

    monkeypatch.setattr(StageTraining, "leave", watch)
    made = align("dpo", "dpo", start="sft", lora={"rank": 2, "targets": ["q_proj", "down_proj"], "dropout": 0.1})
    # -log sigmoid(0): policy and reference are the same before the first step, the dropout of A included.
    assert made.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert made.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert {path.name: path.read_bytes() for path in sft.iterdir() if path.is_file()} == before
    exported = PeftModel.from_pretrained(open_base(tiny), "dpo")
    assert exported.peft_config["default"].r == 4 + 2
    assert (logits(exported) - two[0]).abs().max() < 1e-5 * two[0].abs().max()
    only_sft = PeftModel.from_pretrained(open_base(tiny), "sft")
    assert (logits(only_sft) - two[0]).abs().max() > 1e-3


def test_a_chain_of_three(align: Align, tiny: Path, sft: Path) -> None:
    """Base and adapters in order; each adapter knows all it stands on."""
    align("dpo", "two", start="sft")
    made = align("ipo", "three", start="two")
    base = inspect_model(ModelSpec(model=str(tiny)))
    lineage = json.loads(Path("three/lineage.json").read_text())
    assert lineage["base"]["weights"] == base.weights_digest
    digests = [inspect_adapter(name, base).digest for name in ("sft", "two")]
    assert [(one["name"], one["digest"]) for one in lineage["adapters"]] == list(
        zip(("sft", "two"), digests, strict=True)
    )
    assert (made.folder / "README.md").read_text().count("then adapter") == 2
    # (0 - 1 / (2 beta))^2 with beta 0.1.
    assert made.history[0]["loss"] == pytest.approx(25, abs=1e-4)


def test_another_base_of_the_same_name_is_refused(align: Align, sft: Path, tiny: Path, tmp_path: Path) -> None:
    """Names prove nothing: the weights' digest does."""
    other = tiny_model(tmp_path / "elsewhere" / tiny.name, seed=5)
    with pytest.raises(UserError, match="was trained on a base with weights"):
        inspect_adapter("sft", inspect_model(ModelSpec(model=str(other))))
    with pytest.raises(UserError, match="--from sft: was trained on a base with weights"):
        align("dpo", "dpo", start="sft", model=other)
    assert not Path("dpo").exists()


def test_kept_checkpoints_are_sums_too(align: Align, tiny: Path, sft: Path) -> None:
    """Every step asked for, the last one included, opens in peft; the first steps are not the last."""
    align("dpo", "dpo", start="sft", checkpoints=(2, 4, 6), checkpoint_every=3)
    found = {s: logits(PeftModel.from_pretrained(open_base(tiny), f"dpo/step-{s}")) for s in (2, 4, 6)}
    last = logits(PeftModel.from_pretrained(open_base(tiny), "dpo"))
    assert torch.equal(found[6], last)
    assert not torch.equal(found[2], last)
    assert not torch.equal(found[2], found[4])
    two_steps = align("dpo", "two", start="sft", steps=2, schedule="constant")
    assert two_steps.history[-1]["step"] == 2


def test_a_checkpoint_is_what_a_shorter_run_makes(align: Align) -> None:
    """With a constant schedule: the paper evaluates one run at several steps."""
    align("dpo", "long", checkpoints=(2,), schedule="constant")
    align("dpo", "short", steps=2, schedule="constant")
    long, short = (load_file(f"{name}/adapter_model.safetensors") for name in ("long/step-2", "short"))
    assert long.keys() == short.keys()
    # The batch plan of a shorter run is a prefix of the longer one's.
    assert all(torch.equal(long[name], short[name]) for name in long)


def test_with_qlora(align: Align, tiny: Path, sft: Path) -> None:
    """The start adapter over a 4-bit base; the export is fp32 factors of both."""
    made = align("dpo", "dpo", start="sft", adapter="qlora", lora={"rank": 2})
    assert made.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    lineage = json.loads(Path("dpo/lineage.json").read_text())
    assert lineage["quantization"]["bnb_4bit_quant_type"] == "nf4"
    tensors = load_file("dpo/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    start = load_file("sft/adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(tensors[name][:4], start[name])
    assert tensors[name].shape[0] == 4 + 2


def test_the_start_speaks(align: Align, tmp_path: Path) -> None:
    """A base without a template: what goes on from an adapter uses the adapter's."""
    bare = tiny_model(tmp_path / "bare", chat_template=False)
    align("sft", "sft", model=bare, template="vicuna")
    align("dpo", "dpo", model=bare, start="sft")
    assert Path("dpo/chat_template.jinja").read_bytes() == Path("sft/chat_template.jinja").read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"target_modules": ["embed_tokens"]}, "an adapter on embed_tokens"),
    ],
)
def test_what_cannot_be_added_is_refused(align: Align, sft: Path, change: dict[str, Any], reason: str) -> None:
    """Before anything runs, with the reason."""
    shutil.copytree(sft, "odd", ignore=shutil.ignore_patterns("checksums.json"))
    config = json.loads(Path("odd/adapter_config.json").read_text())
    Path("odd/adapter_config.json").write_text(json.dumps({**config, **change}))
    # As it stands its file has not the tensors for that, which is found first.
    with pytest.raises(UserError, match="--from odd: "):
        align("dpo", "dpo", start="odd")
    with pytest.raises(UserError) as refused:
        refuse_unless_plain({**config, **change}, "--from odd")
    assert str(refused.value).startswith("--from odd: cannot be continued exactly")
    assert reason in refused.value.what
    assert not Path("dpo").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"adapter": "none"}, "--adapter none"), ({"lora": {"dora": True}}, "--set adapter.dora=true")],
)
def test_what_cannot_continue_is_refused(align: Align, sft: Path, settings: dict[str, Any], words: str) -> None:
    """The new weights must be plain LoRA, too."""
    with pytest.raises(UserError, match=f"--from sft: cannot be continued with {words}"):
        align("dpo", "dpo", start="sft", **settings)
