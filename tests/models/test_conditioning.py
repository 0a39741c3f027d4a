"""`conditioning.json` beside an adapter: what is taken, and what is refused with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import harness
from harness import Conditioning, ModelInfo, ModelSpec, UserError, control_place, insert_control, soft_prompt
from harness.alignment.export import FilesBeside
from harness.models.artifact import adapter_digest
from harness.models.conditioning import AdapterControl, write_conditioning
from harness.models.inspect import inspect_adapter, inspect_model
from harness.steps.checksums import record_files
from harness.testing import tiny_adapter
from tests.conditioned import SOFT, lora, not_a_number, soft, written


@pytest.fixture(scope="module")
def model(tiny: Path) -> ModelInfo:
    return inspect_model(ModelSpec(model=str(tiny)))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "conditioning.json"
    found = json.loads(file.read_text())
    edit(found)
    file.write_text(json.dumps(found))


def tensors(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    found = load_file(folder / SOFT)
    edit(found)
    save_file(found, folder / SOFT)


def sets(*path: str, to: Any) -> Callable[[Path], None]:
    """A change of one key of the file."""

    def edit(found: dict[str, Any]) -> None:
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = to

    return lambda folder: change(folder, edit)


def linked(folder: Path) -> None:
    """The file lies somewhere else."""
    away = (folder / SOFT).rename(folder.parent / "away.safetensors")
    (folder / SOFT).symlink_to(away)


def long(folder: Path) -> None:
    tensors(folder, lambda found: found.update(bad=found["bad"].repeat(256, axis=0)))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no JSON": (lambda folder: (folder / "conditioning.json").write_text("{"), "not readable JSON"),
    "an unknown key": (sets("code", to="x"), r"unknown key 'code'\n  Allowed keys: values, default, position"),
    "no such default": (sets("default", to="god"), "`default` is 'god', and there are: good, bad"),
    "two things at once": (sets("values", "bad", "text", to="x"), "a value is one of .* here are text and embeddings"),
    "nothing at all": (sets("values", "bad", to={}), "a value is one of .* here are none"),
    "an unknown position": (sets("position", to="last"), r"position: Input should be 'after_bos' or 'before_answer'"),
    "a reserved name": (sets("values", to={"all": {"text": "x"}}), "'all' is no name"),
    "a strange name": (sets("values", to={"a/b": {"text": "x"}}), "'a/b' is no name"),
    "preferences apart": (sets("preferences", to={"kind": ["good"]}), "do not name the same"),
    "above": (sets("values", "bad", "embeddings", to="../conditioning.safetensors"), "is outside of its folder"),
    "absolute": (sets("values", "bad", "embeddings", to="/etc/passwd"), "'/etc/passwd' is outside of its folder"),
    "of another name": (sets("values", "bad", "embeddings", to="soft.safetensors"), "or is not called conditioning"),
    "a name too long": (
        sets("values", "bad", "embeddings", to="conditioning" + "x" * 300),
        "values.bad.embeddings: String should have at most 200 characters",
    ),
    "a folder for a file": (
        lambda folder: (folder / SOFT).unlink() or (folder / SOFT).mkdir(),
        "is no regular file",
    ),
    "a link out": (linked, f"{SOFT} is a link that leads out of its folder"),
    "a file that is missing": (lambda folder: (folder / SOFT).unlink(), f"{SOFT} is missing"),
    "no such tensor": (lambda folder: tensors(folder, lambda found: found.pop("bad")), "has no tensor 'bad'"),
    "numbers that are none": (not_a_number, "tensor 'bad' holds numbers that are not finite"),
    "another width": (
        lambda folder: tensors(folder, lambda found: found.update(bad=found["bad"][:, :32].copy())),
        "its virtual tokens have 32 numbers each, and those of the base 64",
    ),
    "another shape": (
        lambda folder: tensors(folder, lambda found: found.update(bad=found["bad"][0].copy())),
        r"tensor 'bad' is F32 of shape \[64\]",
    ),
    "longer than the context": (long, "bad: takes 512 tokens, and the model's context is 512"),
    "tensors alone": (
        lambda folder: (folder / "conditioning.json").unlink(),
        f"holds {SOFT}, and no conditioning.json",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(name: str, tiny: Path, model: ModelInfo, tmp_path: Path) -> None:
    folder = soft(tmp_path / "arm", tiny)
    inspect_adapter(str(folder), model, conditioned=True)
    damage, said = BROKEN[name]
    damage(folder)
    with pytest.raises(UserError, match=rf"(?s)^--adapter.*{said}"):
        inspect_adapter(str(folder), model, conditioned=True)


def test_adapters_that_stand_for_a_value(tiny: Path, model: ModelInfo, tmp_path: Path) -> None:
    folder = lora(tmp_path / "arm", tiny)
    before = adapter_digest(folder)
    inside = folder / "conditioning" / "good" / "adapter_model.safetensors"
    record_files(folder, folder.rglob("*"))
    assert inspect_adapter(str(folder), model, conditioned=True).digest == before
    save_file({**load_file(inside), "more": load_file(inside)[next(iter(load_file(inside)))]}, inside)
    with pytest.raises(UserError, match=r"conditioning/good/adapter_model.safetensors has SHA-256"):
        inspect_adapter(str(folder), model, conditioned=True)
    (folder / "checksums.json").unlink()
    assert adapter_digest(folder) != before
    with pytest.raises(UserError, match=r"values.good: does not fit its base .*tensors that would be ignored: 1"):
        inspect_adapter(str(folder), model, conditioned=True)
    tiny_adapter(inside.parent, tiny)
    config = inside.parent / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": True, "layer_replication": [[0, 1]]}))
    with pytest.raises(UserError, match=r"values.good: cannot be continued exactly: layer_replication"):
        inspect_adapter(str(folder), model, conditioned=True)


def test_whoever_does_not_apply_it(tiny: Path, model: ModelInfo, tmp_path: Path) -> None:
    """Going on from it would lose it, so that training refuses it, and so does a judge or a classifier."""
    folder = written(tmp_path / "arm", tiny)
    said = r"was trained with a conditioning \(conditioning.json; values: good, bad\), which is not applied here"
    with pytest.raises(UserError, match=said):
        inspect_adapter(str(folder), model)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    with pytest.raises(UserError, match=f"--from.*{said}"):
        harness.align("dpo", model=str(tiny), dataset=f"jsonl:{rows}", start=str(folder), out=tmp_path / "out")


def test_what_a_method_writes_is_what_is_read(tiny: Path, model: ModelInfo, tmp_path: Path) -> None:
    import torch

    folder = tiny_adapter(tmp_path / "arm", tiny)
    vectors = {f"{kind}={value}": torch.randn(2, 64) for kind in ("helpful", "kind") for value in ("good", "bad")}
    told = {"preferences": {"helpful": ["good", "bad"], "kind": ["good", "bad"]}, "position": "before_answer"}
    default = "helpful=good,kind=good"
    wrote = write_conditioning(FilesBeside(folder, "method"), vectors, default=default, **told)
    adapter = inspect_adapter(str(folder), model, conditioned=True)
    assert adapter.conditioning == wrote
    both = soft_prompt(adapter, "helpful=bad,kind=good")
    assert both.equal(torch.cat([vectors["helpful=bad"], vectors["kind=good"]]))


def test_an_adapter_of_a_peft_model(tiny: Path, model: ModelInfo, tmp_path: Path) -> None:
    """What `AdapterControl.of` takes from the trained model is an adapter that inspection takes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=3, lora_alpha=6, target_modules=["v_proj"], task_type="CAUSAL_LM")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config, adapter_name="good")
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    folder = tiny_adapter(tmp_path / "arm", tiny)
    values = {"good": AdapterControl.of(trained, "good")}
    write_conditioning(FilesBeside(folder, "method"), values, default="good")
    inspect_adapter(str(folder), model, conditioned=True)
    kept = load_file(folder / "conditioning" / "good" / "adapter_model.safetensors")
    module = trained.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    b = kept["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    assert (b == module.lora_B["good"].weight.detach().numpy()).all()


def test_where_a_control_stands() -> None:
    """After BOS where the prompt has one, else at its very start; or at its end."""
    assert control_place([1, 5, 6], "after_bos", 1) == 1
    assert control_place([5, 6], "after_bos", 1) == 0
    assert control_place([5, 6], "after_bos", None) == 0
    assert control_place([1, 5, 6], "before_answer", 1) == 3
    assert insert_control([1, 5, 6], [8, 9], "after_bos", 1) == [1, 8, 9, 5, 6]


def test_too_many_combinations() -> None:
    preferences = {f"p{i}": ("good", "bad") for i in range(12)}
    values = {f"{kind}={value}": {"text": "x"} for kind, names in preferences.items() for value in names}
    with pytest.raises(ValueError, match="more than 1000 combinations"):
        Conditioning(values=values, default="x", preferences=preferences)
