"""`harness merge`: the bytes do not depend on how it is carried out, and the result is a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.contracts.registry import load_plugins
from harness.core.progress import Reporter
from harness.core.specs import MergeInput, MergeSpec, ModelSpec
from harness.merging.compute import seed_of
from harness.merging.plan import MergePlan, parse_input, plan_merge
from harness.merging.run import MergeSettings, run_merge
from harness.steps.files import read_json
from tests.merging.conftest import peft_state, tensor_bytes, weights

ARMS = ("a0", "a1", "a2", "a3")


def arms(made: Path, *names: str) -> list[str]:
    return [str(made / name) for name in names or ARMS]


def test_a_sum_of_adapters_is_what_peft_makes_one_by_one(made: Path, tmp_path: Path) -> None:
    """task_arithmetic: base + sum of weight times (peft's merged model - base)."""
    given = [(path, weight) for path, weight in zip(arms(made, "a0", "a1"), (0.25, 1.5), strict=True)]
    harness.merge("task_arithmetic", given, base=made / "base", out=tmp_path / "out")
    base, ours = weights(made / "base"), weights(tmp_path / "out")
    parts = [(weight, peft_state(made / "base", Path(path))) for path, weight in given]
    for name, tensor in ours.items():
        expected = base[name].double() + sum(w * (p[name].double() - base[name].double()) for w, p in parts)
        # fp32 rounding (6e-8) of sums whose parts are a few times larger than the whole.
        assert float((tensor.double() - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name
    assert ours.keys() == base.keys()


@pytest.mark.parametrize("method", ["dare_ties", "slerp"])
def test_bytes_depend_on_nothing_but_the_merge(method: str, made: Path, tmp_path: Path) -> None:
    """Workers, shard size, order of the recipe: the same bytes in every tensor."""
    spec = MergeSpec(
        method=method,
        base=ModelSpec(model=str(made / "base")),
        inputs=tuple(MergeInput(ref=one) for one in arms(made, "a0", "a2")),
        seed=3,
    )
    registry = load_plugins()
    plan = plan_merge(spec, registry, "cpu")
    backwards = tuple(reversed(plan.recipe.tensors))
    shuffled = MergePlan(**{**vars(plan), "recipe": type(plan.recipe)(**{**vars(plan.recipe), "tensors": backwards})})
    found = []
    for number, (one, workers, size) in enumerate(
        [(plan, 1, 10**9), (plan, 2, 100_000), (shuffled, 4, 30_000), (shuffled, 1, 1)]
    ):
        out = tmp_path / f"out{number}"
        running = MergeSettings(workers=workers, shard_size=size, device="cpu")
        run_merge(one, out, running, fresh=False, registry=registry, reporter=Reporter())
        found.append(tensor_bytes(out))
        files = sorted(out.glob("model*.safetensors"))
        if number == 0:
            assert [file.name for file in files] == ["model.safetensors"]
        if number == 3:
            # A tensor that is larger than a file may be gets a file of its own.
            assert len(files) == len(found[0])
        assert (out / "model.safetensors.index.json").exists() == (len(files) > 1)
    assert all(other == found[0] for other in found[1:])
    again = harness.merge(spec.model_copy(update={"seed": 4}), out=tmp_path / "other-seed")
    assert (tensor_bytes(again.folder) == found[0]) == (method == "slerp")


def test_the_seed_of_a_mask_is_a_digest_of_what_it_is_for() -> None:
    """First eight bytes, big end first, of SHA-256 of "0\\0t\\0" + "1", as `printf '0\\0t\\0001' | sha256sum` says."""
    import hashlib

    assert seed_of(0, "t", 1) == int(hashlib.sha256(b"0\x00t\x001").hexdigest()[:16], 16)
    seeds = {seed_of(seed, name, model) for seed in (0, 1) for name in ("a", "b") for model in (0, 1, 10)}
    assert len(seeds) == 12


def test_a_merged_model_is_a_model(made: Path, bf16: Path, tmp_path: Path) -> None:
    """Opened by transformers: nothing missing, nothing left over, and it writes what its weights say."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapters = arms(made, "a0", "a1")
    harness.merge("dare_ties", adapters, base=bf16, out=tmp_path / "out", shard_size=150_000)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The library opens", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4).shape[1] == ids.shape[1] + 4
    assert model.generation_config.pad_token_id == 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in model.state_dict().values())


def test_tensors_that_nothing_changes_are_the_bases_bytes(made: Path, tmp_path: Path) -> None:
    """-0.0 and a NaN's payload would not survive arithmetic; here the sign of zero is looked at."""
    import shutil

    import torch
    from safetensors.torch import save_file

    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    tensors = weights(base)
    tensors["model.embed_tokens.weight"][5] = -0.0
    tensors["model.layers.0.self_attn.extra"] = torch.tensor([1, -7], dtype=torch.int64)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    harness.merge("dare_ties", arms(made, "a0", "a1"), base=base, out=tmp_path / "out")
    before, after = tensor_bytes(base), tensor_bytes(tmp_path / "out")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["counts"] == {"tensors": 22, "merged": 2, "copied": 20, "inputs": 2}


def test_adapters_and_checkpoints_mix(made: Path, tmp_path: Path) -> None:
    """A folded adapter and the adapter are one model: merged either way the result is the same to rounding."""
    from harness.merging.fold.run import fold

    fold(str(made / "a0"), str(made / "base"), out=tmp_path / "whole", probe_prompts=0)
    for method in ("ties", "slerp"):
        mixed = [str(tmp_path / "whole"), str(made / "a1")]
        harness.merge(method, mixed, base=made / "base", out=tmp_path / f"{method}-mixed")
        harness.merge(method, arms(made, "a0", "a1"), base=made / "base", out=tmp_path / f"{method}-plain")
        one, other = weights(tmp_path / f"{method}-mixed"), weights(tmp_path / f"{method}-plain")
        for name, tensor in one.items():
            assert float((tensor - other[name]).abs().max()) < 2e-5, (method, name)


def test_checkpoints_without_a_base(made: Path, tmp_path: Path) -> None:
    given = [(made / "base", 0.25), (made / "other", 0.75)]
    harness.merge("linear", given, out=tmp_path / "out")
    one, other, ours = weights(made / "base"), weights(made / "other"), weights(tmp_path / "out")
    for name, tensor in ours.items():
        expected = 0.25 * one[name].double() + 0.75 * other[name].double()
        assert float((tensor.double() - expected).abs().max()) <= 1e-6, name


def test_tied_weights_and_padded_rows_survive(made: Path, tmp_path: Path) -> None:
    """The vocabulary has more rows than the tokenizer has tokens, and the head is stored beside the embeddings."""
    import shutil

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from tests.merging.conftest import changed_config

    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    tensors = weights(base)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], torch.zeros(7, 64)])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    changed_config(base, tie_word_embeddings=True, vocab_size=rows + 7)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items() if name != "lm_head.weight"},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    harness.merge("dare_linear", [other, base], base=base, out=tmp_path / "out")
    ours = weights(tmp_path / "out")
    assert "lm_head.weight" not in ours
    assert ours["model.embed_tokens.weight"].shape[0] == rows + 7
    assert not ours["model.embed_tokens.weight"][rows:].any()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_record_is_whole_and_names_no_path(made: Path, tmp_path: Path) -> None:
    given = [(path, weight) for path, weight in zip(arms(made, "a0", "a1"), (0.3, 0.7), strict=True)]
    options = {"density": 0.6}
    done = harness.merge("dare_ties", given, base=made / "base", out=tmp_path / "out", options=options, seed=9)
    record = read_json(tmp_path / "out" / "merge.json")
    assert record == done.record
    assert [one["weight"] for one in record["inputs"]] == [0.3, 0.7]
    assert (record["options"]["density"], record["seed"], record["method"]) == (0.6, 9, "dare_ties")
    assert "self_attn.q_proj" in (tmp_path / "out" / "merge.html").read_text()
    for file in ("merge.json", "merge.html", "lineage.json", "README.md", "config.json"):
        assert str(made) not in (tmp_path / "out" / file).read_text()
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert [one["name"] for one in lineage["inputs"]] == ["a0", "a1"]
    assert lineage["base"]["weights"] == record["base"]["digest"]
    rows = record["diagnostics"]["tensors"]
    assert [(row["layer"], row["module"]) for row in rows] == [(0, "self_attn.q_proj"), (1, "self_attn.q_proj")]
    assert [row["layer"] for row in record["diagnostics"]["layers"]] == [0, 1]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert record["bytes"]["written"] == record["files"]["model.safetensors"] == size


def test_done_before_and_not_the_same(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = harness.merge("dare_ties", arms(made, "a0"), base=made / "base", out=tmp_path / "out")
    assert not first.before
    again = harness.merge("dare_ties", arms(made, "a0"), base=made / "base", out=tmp_path / "out", workers=3)
    assert again.before
    assert again.record == first.record
    # The same path with other bytes is another merge.
    copy = tmp_path / "copy"
    import shutil

    shutil.copytree(made / "a1", copy)
    for file in copy.iterdir():
        (copy / file.name).write_bytes((made / "a1" / file.name).read_bytes())
    one = harness.merge("dare_ties", [copy], base=made / "base", out=tmp_path / "one")
    (copy / "adapter_model.safetensors").write_bytes((made / "a3" / "adapter_model.safetensors").read_bytes())
    (copy / "adapter_config.json").write_bytes((made / "a3" / "adapter_config.json").read_bytes())
    with pytest.raises(harness.UserError, match="holds another merge"):
        harness.merge("dare_ties", [copy], base=made / "base", out=tmp_path / "one")
    two = harness.merge("dare_ties", [copy], base=made / "base", out=tmp_path / "one", fresh=True)
    assert one.id != two.id
    assert not (tmp_path / ".one.merge").exists()


def test_prepare_sees_whole_models(made: Path, tmp_path: Path) -> None:
    """A merger that looks at all tensors first: here it scales by the number of tensors that differ."""
    plugin = tmp_path / "counting.py"
    plugin.write_text(
        "from harness import Merged, Merger, hookimpl\n"
        "class Counting(Merger):\n"
        "    name = 'counting'\n"
        "    operates_on = 'deltas'\n"
        "    factor = 0\n"
        "    def prepare(self, models, config):\n"
        "        copy = Counting()\n"
        "        copy.factor = sum(bool(read().any()) for model in models for read in model.values())\n"
        "        return copy\n"
        "    def keeps_equal(self, weights, config):\n"
        "        return True\n"
        "    def merge(self, tensors, *, base, weights, config, generator):\n"
        "        return Merged(tensors[0] * self.factor)\n"
        "@hookimpl\n"
        "def register_mergers():\n"
        "    yield Counting()\n"
    )
    out = tmp_path / "out"
    registry = load_plugins([plugin])
    harness.merge("counting", arms(made, "a0", "a1"), base=made / "base", out=out, registry=registry)
    base, ours = weights(made / "base"), weights(out)
    name = "model.layers.1.self_attn.q_proj.weight"
    delta = peft_state(made / "base", made / "a0")[name].double() - base[name].double()
    # Two adapters, each with two changed tensors.
    assert float((ours[name].double() - base[name].double() - 4 * delta).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        ("Merged(tensors[0].bfloat16())", "harness.Merged of shape [{0}], torch.bfloat16"),
        ("Merged(tensors[0].flatten()[:2] * 1)", "harness.Merged of shape [2], torch.float32"),
        ("tensors[0] * 1", "Tensor, not harness.Merged"),
    ],
)
def test_a_mergers_result_is_held_to_the_contract(cli: Any, made: Path, returned: str, seen: str) -> None:
    """Half the bits would be written as if they were all; the kit finds the same."""
    Path("odd.py").write_text(
        "from harness import Merged, Merger, hookimpl\n"
        "class Odd(Merger):\n"
        "    name = 'odd'\n"
        "    operates_on = 'deltas'\n"
        "    def keeps_equal(self, weights, config):\n"
        "        return True\n"
        "    def merge(self, tensors, *, base, weights, config, generator):\n"
        f"        return {returned}\n"
        "@hookimpl\n"
        "def register_mergers():\n"
        "    yield Odd()\n"
    )
    arguments = ["merge", "odd", "--plugin", "odd.py", "--base", made / "base", "--inputs", made / "a0"]
    ran = cli(*arguments, "--out", "out")
    shape = next(", ".join(map(str, t.shape)) for n, t in weights(made / "base").items() if n.endswith("q_proj.weight"))
    assert ran.code == 3, ran.err
    assert f"returned {seen.format(shape)}, expected harness.Merged of shape [{shape}], torch.float32" in ran.err
    assert "`harness.testing.check_merger` finds such." in ran.err and "Traceback" not in ran.err
    # Of what failed the record stays, and the model does not appear.
    assert [path.name for path in Path("out").iterdir()] == ["step"]
    record = json.loads(Path("out/step/status.json").read_text())
    assert (record["status"], record["kind"]) == ("failed", "merge") and "expected harness.Merged" in record["error"]


def test_inputs_as_a_user_writes_them(tmp_path: Path) -> None:
    assert parse_input("arm") == MergeInput(ref="arm")
    assert parse_input("arm:0.25") == MergeInput(ref="arm", weight=0.25)
    assert parse_input((tmp_path, 2)) == MergeInput(ref=str(tmp_path), weight=2.0)
    odd = tmp_path / "arm:0.5"
    odd.mkdir()
    assert parse_input(str(odd)) == MergeInput(ref=str(odd))


def test_the_command_line(cli: Any, made: Path) -> None:
    arguments = ["merge", "dare_ties", "--base", made / "base", "--inputs", made / "a0", made / "a1"]
    ran = cli(*arguments, "--inputs", made / "a2", "--set", "density=0.5", "--out", "out")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "out"
    assert "cosine 1-3" in ran.out
    record = json.loads(Path("out/merge.json").read_text())
    assert [one["name"] for one in record["inputs"]] == ["a0", "a1", "a2"]
    again = cli(*arguments, "--inputs", made / "a2", "--out", "out")
    assert "out holds this merge already" in again.err
    # Two arms of one direction: an arc of no length.
    same = cli("merge", "slerp", "--base", made / "base", "--inputs", made / "a0", made / "a0", "--out", "same")
    assert "slerp fell back to lerp for 2 of 2 tensors (100 %)" in same.err


def test_mergekits_yaml(cli: Any, made: Path) -> None:
    Path("config.yaml").write_text(
        f"merge_method: ties\nbase_model: {made / 'base'}\ndtype: bfloat16\nparameters: {{density: 0.5}}\n"
        f"models:\n- model: {made / 'other'}\n  parameters: {{weight: 0.5}}\n"
        f"- model: {made / 'base'}+{made / 'a0'}\n  parameters: {{weight: 0.5}}\n"
    )
    ran = cli("merge", "--config", "config.yaml", "--out", "out")
    assert ran.code == 0, ran.err
    import torch

    assert weights(Path("out"))["model.norm.weight"].dtype == torch.bfloat16
    # The method knows nothing of files: the same from the command line.
    ran = cli(
        "merge", "ties", "--base", made / "base", "--inputs", f"{made / 'other'}:0.5", f"{made / 'a0'}:0.5",
        "--set", "density=0.5", "--dtype", "bfloat16", "--out", "plain",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert tensor_bytes(Path("out")) == tensor_bytes(Path("plain"))
