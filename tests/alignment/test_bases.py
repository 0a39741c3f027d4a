"""A base stays open from one alignment to the next: nothing shows it in what they leave, and none is kept changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.alignment import bases as module
from harness.alignment.bases import Bases, Tree, fingerprint
from harness.alignment.plan import AlignPlan, plan_align
from harness.alignment.run import carry_out_align
from harness.contracts.registry import load_plugins
from harness.core.errors import StepError
from harness.core.progress import Reporter
from harness.core.specs import AlignSpec, ModelSpec
from harness.steps.folder import StepFolder
from harness.steps.runner import Runner
from tests.alignment.processes import TINY_STEPS, log_of

MEDDLER = Path(__file__).parent / "meddling.py"
STEERED = Path(__file__).parent / "steered.py"


@pytest.fixture
def run(alone: Path, tiny: Path, pairs: Path) -> Callable[..., Path]:
    """``run(bases, "dpo", "folder", adapter="qlora", start=folder)``: the folder of what was aligned."""
    registry = load_plugins([str(MEDDLER), str(STEERED)])

    def carry_out(bases: Bases | None, method: str, out: str, **given: Any) -> Path:
        options = {**TINY_STEPS, "gradient_checkpointing": True, **given.pop("options", {})}
        spec = AlignSpec(
            method=method, model=ModelSpec(model=str(tiny)), dataset=f"jsonl:{pairs}", options=options, **given
        )
        plan: AlignPlan = plan_align(spec, registry)
        work = StepFolder.within(alone / out, plan.id, "align")
        carry_out_align(plan, registry, Runner(None, Reporter()), work, bases=bases)
        return alone / out

    return carry_out


def left(folder: Path) -> dict[str, bytes]:
    """What an alignment has left for others, byte for byte: adapters, held-out values, batches."""
    names = ("*.safetensors", "step/heldout.jsonl.gz", "step/batches.jsonl.gz", "adapter_config.json", "model/*")
    return {str(file.relative_to(folder)): file.read_bytes() for name in names for file in folder.rglob(name)}


def kept(folder: Path) -> list[bool]:
    """For each time that a base was needed, whether it was open."""
    return [line["kept"] for line in log_of(folder, "base")]


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_sft_dpo_sft_and_going_on_are_as_in_fresh_processes(run: Any, adapter: str) -> None:
    fresh = [
        run(None, "sft", "sft", adapter=adapter),
        run(None, "dpo", "dpo", adapter=adapter),
        run(None, "sft", "again", adapter=adapter, seed=1),
        run(None, "dpo", "on", adapter=adapter, start="sft"),
    ]
    bases = Bases(keep=True)
    same = [
        run(bases, "sft", "kept-sft", adapter=adapter),
        run(bases, "dpo", "kept-dpo", adapter=adapter),
        run(bases, "sft", "kept-again", adapter=adapter, seed=1),
        run(bases, "dpo", "kept-on", adapter=adapter, start="sft"),
    ]
    assert [kept(folder) for folder in fresh] == [[False]] * 4
    assert [kept(folder) for folder in same] == [[False], [True], [True], [True]]
    for one, other in zip(fresh, same, strict=True):
        # Or it would prove little.
        assert len(left(one)) >= 3
        assert left(one) == left(other)
    assert len({left(folder)["adapter_model.safetensors"] for folder in same}) == 4


def test_another_base_dtype_or_quantisation_is_opened_anew_and_one_alone_is_open(
    run: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, opened = Bases(keep=True), []
    real = module.open_base
    # What was open is gone before the next one is.
    monkeypatch.setattr(module, "open_base", lambda *a: opened.append(bases._open) or real(*a))
    run(bases, "sft", "one")
    run(bases, "sft", "two", adapter="qlora")
    run(bases, "sft", "three", adapter="qlora", seed=1)
    run(bases, "sft", "four")
    assert opened == [None, None, None]
    bases.release()
    run(bases, "sft", "five", seed=2)
    assert len(opened) == 4


def test_a_method_that_trains_all_weights_leaves_no_base(run: Any) -> None:
    bases = Bases(keep=True)
    run(bases, "sft", "one")
    assert kept(run(bases, "sft", "whole", adapter="none")) == [True]
    assert kept(run(bases, "sft", "two", seed=1)) == [False]
    assert left(run(None, "sft", "fresh", seed=1)) == left(Path("two"))


def test_modules_of_a_methods_own_go(run: Any) -> None:
    bases = Bases(keep=True)
    # Two stages: the second finds the base as the first did.
    options = {"control_steps": 2}
    assert kept(run(bases, "steered", "one", options=options)) == [True]
    assert kept(run(bases, "sft", "two")) == [True]
    assert left(run(None, "sft", "fresh")) == left(Path("two"))
    assert left(run(None, "steered", "again", options=options)) == left(Path("one"))


@pytest.mark.parametrize("keep", [True, False])
def test_a_method_that_changes_frozen_weights_is_found_out(run: Any, keep: bool) -> None:
    """Also where no base is kept: its adapter would be for a base that nobody has."""
    bases = Bases(keep=keep)
    run(bases, "sft", "one")
    with pytest.raises(StepError) as failed:
        run(bases, "meddling", "two")
    said = str(failed.value)
    assert "meddling with lora has changed frozen weights of the base: model.layers.0." in said
    assert "Its adapter fits no base there is" in said and "--adapter none" in said
    record = StepFolder.within(Path("two"), "", "align").status()
    assert record is not None and record.status == "failed"
    # The next one does not see them.
    assert kept(run(bases, "sft", "three", seed=1)) == [False]
    assert left(run(None, "sft", "fresh", seed=1)) == left(Path("three"))


def test_a_failed_alignment_leaves_no_base(run: Any) -> None:
    bases = Bases(keep=True)
    run(bases, "sft", "one")
    with pytest.raises(StepError, match="the loss is"):
        run(bases, "sft", "two", options={"learning_rate": 1e30, "max_grad_norm": 1e30})
    assert kept(run(bases, "sft", "three")) == [False]


# ------------------------------------------------------------------------------------------------------------ the tree


def described(model: Any) -> tuple[Any, ...]:
    """All that anybody could see of a model."""
    modules = [(name, id(one), type(one), sorted(vars(one)), one.training) for name, one in model.named_modules()]
    hooks = [key for one in model.modules() for name, value in vars(one).items() if "hooks" in name for key in value]
    weights = [(name, id(one), one.requires_grad, one.grad) for name, one in model.named_parameters()]
    return str(model), modules, hooks, weights, model.config.to_dict(), model.generation_config.to_dict()


def test_everything_is_put_back(tiny: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(tiny)
    before, tree = described(model), Tree(model)
    for _ in range(2):
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        peft.enable_input_require_grads()
        peft.gradient_checkpointing_enable()
        peft(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        model.config.use_cache = not model.config.use_cache
        model.generation_config.max_length = 7
        model.lm_head.register_forward_hook(lambda *_: None)
        model.forward = lambda *_: None
        model.extra = torch.nn.Linear(2, 2)
        model.__class__ = type("Other", (type(model),), {})
        assert described(model) != before
        assert tree.changed() == set()
        tree.restore()
        assert described(model) == before
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_any_change_of_a_tensor_shows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several pieces, the last of them odd.
    monkeypatch.setattr(module, "WORDS", 16)
    tensor = torch.arange(1, 1004).to(dtype)
    same = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == same
    # The same values that begin elsewhere in their storage.
    assert fingerprint(torch.cat([tensor[:1], tensor])[1:]) == same
    changes = {
        "one value": lambda t: t[77].fill_(t[78].item()),
        "two that change places": lambda t: t.index_copy_(0, torch.tensor([3, 9]), t[[9, 3]]),
        "all signs, an even number": lambda t: t[:1000].neg_(),
        "the last": lambda t: t[-1].neg_(),
    }
    for name, change in changes.items():
        other = tensor.clone()
        change(other)
        assert fingerprint(other) != same, name
    assert fingerprint(tensor.reshape(17, 59)) != same
    assert fingerprint(tensor.to(torch.float64)) != same
