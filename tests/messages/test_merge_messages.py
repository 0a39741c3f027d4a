"""What a user of `harness merge` and `harness fold` gets wrong: exit 2, one message in three parts, nothing written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.merging import write as merge_write
from harness.testing import tiny_adapter, tiny_model

Refuse = Callable[..., str]


@pytest.fixture
def models(alone: Path, tiny: Path) -> Path:
    """Copies of `base`, `other` and two arms, to be spoilt, in the working folder."""
    shutil.copytree(tiny, alone / "base")
    tiny_model(alone / "other", seed=3)
    for number in range(2):
        tiny_adapter(alone / f"a{number}", alone / "base", seed=number + 1)
    return alone


@pytest.fixture
def refuse(cli: Any, models: Path) -> Refuse:
    """Run a command that must be refused; returns the message, once all else has been checked."""

    def run(*arguments: str) -> str:
        ran = cli(*arguments, "--out", "out")
        assert ran.code == 2, ran.err
        assert "Traceback" not in ran.err
        assert ran.err.count("error: ") == 1
        assert ran.out == ""
        assert not Path("out").exists()
        assert not Path(".out.merge").exists()
        message: str = ran.err[ran.err.index("error: ") :]
        where, _, fix = message.removeprefix("error: ").partition("\n  ")
        assert ": " in where
        assert fix.strip()
        return message

    return run


def merge(*more: str, inputs: tuple[str, ...] = ("a0", "a1"), base: str = "base") -> list[str]:
    return ["merge", "dare_ties", "--base", base, "--inputs", *inputs, *more]


def rewrite(folder: str, **changes: Any) -> None:
    """Change tensors of a folder's weights: a function of the tensor, or None to leave it out."""
    from safetensors.torch import load_file, save_file

    file = next(Path(folder).glob("*.safetensors"))
    tensors = load_file(file)
    for name, change in changes.items():
        full = next(one for one in tensors if one.endswith(name))
        tensor = tensors.pop(full)
        if change is not None:
            tensors[full] = change(tensor)
    save_file(tensors, file, metadata={"format": "pt"})


def configure(folder: str, file: str, **changes: Any) -> None:
    path = Path(folder) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def poke(value: float) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor[0, 1] = value
        return tensor

    return change


def test_nothing_is_wrong_with_the_rest(cli: Any, models: Path) -> None:
    """Or the refusals below would prove nothing."""
    for number, command in enumerate((merge(), merge("--as", "adapter"), ["fold", "a0", "--base", "base"])):
        more = ["--probe-prompts", "0"] if command[0] == "fold" else []
        ran = cli(*command, *more, "--out", f"out{number}")
        assert (ran.code, ran.out.splitlines()[-1]) == (0, f"out{number}"), ran.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["merge", "--base", "base", "--inputs", "a0"], ("METHOD: how to merge is not said", "--config")),
        (["merge", "dare_ties", "--base", "base"], ("--inputs: there is nothing to merge", "ARM[:WEIGHT]")),
        (["merge", "dare-ties", "--base", "base", "--inputs", "a0"], ("'dare-ties'", "Did you mean 'dare_ties'")),
        (["merge", "dare_ties", "--inputs", "a0"], ("--inputs [1] a0: is an adapter, and no base", "--base BASE")),
        (merge(inputs=("a0", "a1:much")), ("--inputs: 'much' in 'a1:much' is no weight", "ARM:0.5")),
        (merge(inputs=("a0", "b1")), ("--inputs b1: no such folder", "Did you mean a1?")),
        (["fold", "b1", "--base", "base"], ("ADAPTER b1: no such folder", "Did you mean a1?")),
        (merge(base="bass"), ("--base bass: no such folder", "base")),
        (merge("--set", "desity=0.5"), ("unknown key 'desity'", "'density'")),
        (merge("--rank", "3"), ("--rank: is of an adapter, and a model is written", "--as adapter")),
        (merge("--as", "adaptor"), ("harness merge, form", "'adapter'")),
        (merge("--as", "adapter", "--rank", "65"), ("no changed matrix has a rank above 64", "64 or less")),
        (merge("--dtype", "float8"), ("harness merge, dtype", "float8")),
        (merge("--shard-size", "many"), ("--shard-size: 'many' is no size", "5GB")),
        (merge("--shard-size", "0GB"), ("'0GB' is no size", "5GB")),
        (merge("--device", "tpu"), ("device", "tpu")),
        (merge("--workers", "0"), ("workers", "greater than or equal to 1")),
        (
            ["merge", "ties", "--config", "x.yaml", "--base", "base"],
            ("--config: x.yaml says everything, and METHOD, --base is given too", "one or the other"),
        ),
        (
            ["merge", "task_arithmetic", "--base", "base", "--inputs", "other", "--as", "adapter"],
            ("can be written as an adapter", "--as model"),
        ),
        (
            ["merge", "linear", "--base", "base", "--inputs", "a0", "other", "--as", "adapter", "--rank", "4"],
            ("only linear layers can be written as an adapter", "--as model"),
        ),
        (["fold", "other", "--base", "base"], ("ADAPTER other: is a checkpoint", "peft adapter")),
        (["fold", "a0", "--base", "base", "--precision", "fp8"], ("precision", "'nf4-roundtrip'")),
        (["fold", "a0", "--base", "base", "--probe-prompts", "-1"], ("-1 is negative", "0 (no comparison)")),
        (["fold", "a0", "--base", "base", "--probe-prompts", "99"], ("20 sentences are bundled", "--probe FILE")),
        (["fold", "a0", "--base", "base", "--probe", "none.jsonl"], ("none.jsonl: cannot be read", "JSON lines")),
    ],
)
def test_what_is_typed_wrong(refuse: Refuse, arguments: list[str], says: tuple[str, str]) -> None:
    message = refuse(*arguments)
    for text in says:
        assert text in message


def test_where_the_result_goes(cli: Any, models: Path) -> None:
    ran = cli(*merge())
    assert ran.code == 2
    assert "--out: where the result goes is not said\n  Add --out FOLDER." in ran.err


def test_models_that_do_not_fit(refuse: Refuse) -> None:
    import torch

    mix = ("a0", "other")
    rewrite("other", **{"0.mlp.up_proj.weight": lambda t: torch.cat([t, t])})
    message = refuse(*merge(inputs=mix))
    assert "--inputs [2] other, model.layers.0.mlp.up_proj.weight: has shape [256, 64]" in message
    assert "of --base base has [128, 64]" in message
    rewrite("other", **{"0.mlp.up_proj.weight": lambda t: t[:128], "embed_tokens.weight": lambda t: t[:-3]})
    message = refuse(*merge(inputs=mix))
    assert "other, model.embed_tokens.weight: has shape" in message
    assert "one vocabulary" in message
    rewrite("other", **{"embed_tokens.weight": None})
    assert "other, model.embed_tokens.weight: is missing; --base base has it" in refuse(*merge(inputs=mix))
    configure("other", "config.json", architectures=["MistralForCausalLM"])
    message = refuse(*merge(inputs=mix))
    assert "is a MistralForCausalLM, and --base base is a LlamaForCausalLM" in message
    configure("other", "config.json", quantization_config={"quant_method": "gptq"})
    assert "its weights are quantised (gptq)" in refuse(*merge(inputs=mix))


def test_adapters_that_do_not_fit(refuse: Refuse) -> None:
    import torch

    rewrite("a1", **{"1.self_attn.q_proj.lora_B.weight": lambda t: torch.cat([t, t])})
    message = refuse(*merge())
    assert "--inputs [2] a1: model.layers.1.self_attn.q_proj.lora_B.weight has shape [128, 2], and on this" in message
    assert "base it has to have [64, 2]" in message and "trained on as --base" in message
    rewrite("a1", **{"1.self_attn.q_proj.lora_B.weight": None})
    assert "missing tensors: 1 (model.layers.1.self_attn.q_proj.lora_B.weight)" in refuse(*merge())
    configure("a1", "adapter_config.json", base_model_name_or_path="elsewhere")
    message = refuse(*merge())
    assert "--inputs [2] a1: its base is 'elsewhere', not 'base'" in message
    assert "as --base" in message
    configure("a1", "adapter_config.json", layer_replication=[[0, 1]], init_lora_weights="pissa")
    for command in (merge(), ["fold", "a1", "--base", "base"]):
        configure("a1", "adapter_config.json", base_model_name_or_path="base")
        message = refuse(*command)
        assert "changed weights: layer_replication, init_lora_weights pissa (which changes the base too)" in message


def test_a_module_that_the_base_has_not(refuse: Refuse) -> None:
    from safetensors.torch import load_file, save_file

    file = Path("a0/adapter_model.safetensors")
    save_file({name.replace(".1.", ".7."): tensor for name, tensor in load_file(file).items()}, file)
    message = refuse(*merge())
    assert "missing tensors: 2 (model.layers.1.self_attn.q_proj.lora_A.weight, " in message
    assert "tensors that would be ignored: 2 (model.layers.7.self_attn.q_proj.lora_A.weight, " in message


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_numbers_that_are_none(refuse: Refuse, value: float, word: str) -> None:
    name = "model.layers.1.self_attn.q_proj"
    rewrite("a1", **{f"{name}.lora_A.weight": poke(value)})
    assert f"--inputs [2] a1, base_model.model.{name}.lora_A.weight: holds {word}" in refuse(*merge())
    # Also where nothing is merged.
    rewrite("base", **{"1.mlp.up_proj.weight": poke(value)})
    assert f"--base base, model.layers.1.mlp.up_proj.weight: holds {word}" in refuse(*merge(inputs=("a0",)))
    assert f"up_proj.weight: holds {word}" in refuse("fold", "a0", "--base", "base", "--probe-prompts", "0")


def test_a_result_that_does_not_fit_its_type(refuse: Refuse) -> None:
    """60,000 + 60,000 is more than float16 holds (65,504)."""
    rewrite("base", **{"0.self_attn.q_proj.weight": lambda t: t * 0 + 60_000})
    rewrite("a0", **{"0.self_attn.q_proj.lora_A.weight": lambda t: t * 0 + 30_000})
    rewrite("a0", **{"0.self_attn.q_proj.lora_B.weight": lambda t: t * 0 + 1})
    command = ["merge", "task_arithmetic", "--base", "base", "--inputs", "a0:1", "--dtype", "float16"]
    message = refuse(*command)
    assert "tensor model.layers.0.self_attn.q_proj.weight: merging gives infinity in float16" in message


def test_templates_that_differ(refuse: Refuse, cli: Any) -> None:
    Path("other/chat_template.jinja").write_text("{{ messages }}")
    message = refuse(*merge(inputs=("a0", "other")))
    assert "--inputs [2] other: has another chat template than --base base" in message
    assert "--allow-template-mismatch" in message
    Path("a1/chat_template.jinja").write_text("{{ messages }}")
    assert "--inputs [2] a1: was trained with chat template" in refuse(*merge())
    assert cli(*merge("--allow-template-mismatch"), "--out", "out").code == 0


def test_no_room(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_write.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    for command in (merge(), ["fold", "a0", "--base", "base", "--probe-prompts", "0"]):
        message = refuse(*command)
        # 148,224 parameters in fp32
        assert "--out out: the result takes 0.5" in message
        assert "MB, and 0.010 MB are free on that disk" in message


def test_a_disk_that_fills_up(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(descriptor: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merge_write.os, "pwrite", full)
    message = refuse(*merge())
    assert "the disk is full (No space left on device)" in message
    assert "Nothing of the unfinished model is kept." in message


def test_folders_of_others(cli: Any, models: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("years of work")
    for more in ([], ["--fresh"]):
        ran = cli(*merge(*more), "--out", "out")
        assert ran.code == 2
        assert "--out out: holds files that are no merge's (thesis.txt)" in ran.err
    # Neither does a record among them make them ours.
    assert cli(*merge(), "--out", "mine").code == 0
    Path("mine/thesis.txt").write_text("more work")
    ran = cli(*merge("--seed", "1", "--fresh"), "--out", "mine")
    assert "holds files that are no merge's (thesis.txt)" in ran.err
    assert Path("mine/thesis.txt").read_text() == "more work"
    Path("mine/thesis.txt").unlink()
    ran = cli(*merge("--seed", "1"), "--out", "mine")
    assert "--out mine: holds another merge; different: " in ran.err
    assert "--fresh to replace it" in ran.err
    assert cli(*merge("--seed", "1", "--fresh"), "--out", "mine").code == 0
    Path("mine/model.safetensors").write_bytes(b"torn")
    ran = cli(*merge("--seed", "1"), "--out", "mine")
    assert "--out mine: model.safetensors has SHA-256 " in ran.err
    Path("file").write_text("")
    assert "--out file: is no folder" in cli(*merge(), "--out", "file").err
    Path(".new.merge").mkdir()
    Path(".new.merge/notes.txt").write_text("")
    ran = cli(*merge(), "--out", "new")
    assert "holds files that are no merge's (notes.txt)" in ran.err
    assert Path(".new.merge/notes.txt").exists()


def test_probes_that_hold_nothing(refuse: Refuse) -> None:
    file = Path("probe.jsonl")
    command = ("fold", "a0", "--base", "base", "--probe", "probe.jsonl")
    for text, says in (
        ("\n", "probe.jsonl: is empty"),
        ('{"text": "One."}\nnot json\n', "probe.jsonl:2: holds no text"),
        ('{"text": ""}\n', "probe.jsonl:1: holds no text"),
    ):
        file.write_text(text)
        message = refuse(*command)
        assert says in message
        assert '{"text": "..."}' in message


def test_more_texts_than_fit(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.merging.fold import probe as fold_probe

    monkeypatch.setattr(fold_probe, "MOST_BYTES", 100_000)
    message = refuse("fold", "a0", "--base", "base")
    assert "the distributions of 20 texts take" in message
    assert "--probe-prompts " in message


def test_rank_of_a_checkpoint(refuse: Refuse) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file("base/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, "other/model.safetensors", metadata={"format": "pt"})
    message = refuse("merge", "task_arithmetic", "--base", "base", "--inputs", "other", "--as", "adapter")
    assert "--rank: other is a checkpoint: its change has no rank of its own\n  Add --rank R." in message


def test_as_adapter_of_weights_that_do_not_sum_to_one(refuse: Refuse) -> None:
    command = ["merge", "linear", "--base", "base", "--inputs", "a0:0.5", "a1:0.2", "--set", "normalize=false"]
    message = refuse(*command, "--as", "adapter")
    assert "linear with these weights changes lm_head.weight, which no input changes" in message
    assert "Give weights that sum to 1, or write a model: --as model." in message
