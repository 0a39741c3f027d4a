"""`harness merge --config` against mergekit on the same YAML files and the same tiny random Llamas.

Deterministic methods are compared tensor by tensor: the largest difference, and how many units of float32 rounding
that is of the tensor's largest entry. DARE below density 1 draws its masks from different generators, so what is
compared is the share of entries kept, the sum of magnitudes and the mean.

mergekit needs an environment of its own: give its interpreter, or let one be made (with uv, from the package index).

    python benchmarks/merge_parity.py --mergekit-python /path/to/venv/bin/python
    python benchmarks/merge_parity.py --make-environment /path/to/new/venv --json parity.json
    python benchmarks/merge_parity.py --mergekit-python PYTHON --fixture tests/numerics/mergekit_0.1.5
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

MERGEKIT = "mergekit==0.1.5"
SHAPE = {"hidden_size": 8, "intermediate_size": 6, "vocab_size": 4, "num_hidden_layers": 3, "head_dim": 4}
HEADS, KV_HEADS = 2, 1
ULP = 2.0**-23
PEER = """
import sys
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

for name in sys.argv[1:]:
    with open(f"{name}.yaml", encoding="utf-8") as file:
        config = MergeConfiguration.model_validate(yaml.safe_load(file))
    options = MergeOptions(
        write_model_card=False, copy_tokenizer=False, quiet=True, random_seed=1, lora_merge_cache="folded"
    )
    run_merge(config, f"{name}-mergekit", options=options)
"""
"""Run by mergekit's interpreter: what `mergekit-yaml` does, for several files."""
ALLOWED_ULPS = 8
"""Differences of the order of operations: a few roundings of the largest entry."""


def both(low: int, high: int, *names: str) -> dict[str, Any]:
    """A slice with the same layers of some models."""
    return {"sources": [{"model": name, "layer_range": [low, high]} for name in names]}


def weighed(**weights: Any) -> list[dict[str, Any]]:
    """Models with a weight each."""
    return [{"model": name, "parameters": {"weight": weight}} for name, weight in weights.items()]


GRADED = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.2]},
    {"value": 0.45},
]
CONFIGS: dict[str, dict[str, Any]] = {
    "slerp_graded": {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [both(0, 3, "a", "b")],
        "parameters": {"t": GRADED},
        "dtype": "float32",
    },
    "slerp_base_last": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "b"}, {"model": "base"}],
        "parameters": {"t": 0.3},
    },
    "linear": {"merge_method": "linear", "models": weighed(base=0.5, a=0.9, b=0.2)},
    "linear_graded": {
        "merge_method": "linear",
        "models": weighed(a=[0.1, 0.8], b=[{"filter": "v_proj", "value": 0.7}, {"filter": "*", "value": [1, 0, 0.5]}]),
        "parameters": {"normalize": False},
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": weighed(a=0.7, b=-0.2),
        "parameters": {"lambda": 0.9},
    },
    "task_arithmetic_mean": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "base"}, *weighed(b=0.3, a="6e-1")],
        "parameters": {"normalize": True, "density": 0.5},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.4}},
            {
                "model": "b",
                "parameters": {"weight": 0.5, "density": [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.33}]},
            },
        ],
    },
    "ties_sum": {
        "merge_method": "ties",
        "base_model": "base",
        "models": weighed(a=1.0, b=0.5),
        "parameters": {
            "normalize": [True, False, False],
            "lambda": 1.2,
            "rescale": True,
            "density": 0.3,
            "int8_mask": True,
        },
    },
    "dare_linear": {"merge_method": "dare_linear", "base_model": "base", "models": weighed(a=0.4, b=0.7)},
    "dare_ties": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": weighed(a=1.0, b=1.0),
        "parameters": {"density": 1.0},
    },
    "dare_ties_mean": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": weighed(a=0.4, b=0.7),
        "parameters": {"normalize": True, "rescale": False},
    },
    "nuslerp": {"merge_method": "nuslerp", "base_model": "base", "models": weighed(a=0.4, b=0.7)},
    "nuslerp_rows": {
        "merge_method": "nuslerp",
        "models": weighed(a=0.2, b=0.6),
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp_columns": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": weighed(a=0.5, b=0.3),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "linear_slices": {
        "merge_method": "linear",
        "slices": [both(0, 2, "a", "b"), {**both(1, 3, "b", "base"), "parameters": {"weight": [0.2, 0.4]}}],
        "parameters": {"weight": [{"filter": "layers.0", "value": 0.9}, {"value": 0.3}]},
    },
    "ties_slices": {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            both(0, 1, "base", "a", "b"),
            {
                "sources": [
                    {"model": "a", "layer_range": [1, 3], "parameters": {"weight": 0.8, "density": 0.5}},
                    {"model": "base", "layer_range": [0, 2]},
                ],
            },
        ],
        "parameters": {"weight": 0.5, "density": 0.7},
    },
}
ADAPTED: dict[str, dict[str, Any]] = {
    "adapters": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": weighed(**{"base+arm": 0.8, "a": 0.3}),
    },
    "adapters_slerp": {
        "merge_method": "slerp",
        "base_model": "base+arm",
        "models": [{"model": "b"}],
        "parameters": {"t": 0.4},
    },
}
"""With an adapter, which mergekit folds into a whole model first."""
RANDOM: dict[str, dict[str, Any]] = {
    f"dare_linear_{density}": {
        "merge_method": "dare_linear",
        "base_model": "base",
        "models": [{"model": "wide", "parameters": {"weight": 1.0, "density": density}}],
        "parameters": {"rescale": rescale},
    }
    for density, rescale in ((0.1, True), (0.5, True), (0.9, False))
}


def tensors(seed: int, shape: dict[str, int]) -> dict[str, torch.Tensor]:
    """A random Llama in float32: matrices around 0, norms around 1."""
    draw = torch.Generator().manual_seed(seed)
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], hidden)}
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        sizes |= {f"{at}.self_attn.{one}_proj.weight": (KV_HEADS * head, hidden) for one in "kv"}
        sizes |= {f"{at}.self_attn.q_proj.weight": (HEADS * head, hidden)}
        sizes |= {f"{at}.self_attn.o_proj.weight": (hidden, HEADS * head)}
        sizes |= {f"{at}.mlp.{one}_proj.weight": (inner, hidden) for one in ("up", "gate")}
        sizes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        sizes |= {f"{at}.{one}_layernorm.weight": (hidden,) for one in ("input", "post_attention")}
    sizes |= {"model.norm.weight": (hidden,), "lm_head.weight": (shape["vocab_size"], hidden)}
    return {
        name: (1.0 if len(size) == 1 else 0.0) + 0.1 * torch.randn(size, generator=draw) for name, size in sizes.items()
    }


def moved(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A model some way from the base, a tenth of whose entries stayed exactly where they were."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in base.items():
        step = 0.04 * torch.randn(value.shape, generator=draw)
        found[name] = value + step * (torch.rand(value.shape, generator=draw) > 0.1)
    return found


def write(folder: Path, model: dict[str, torch.Tensor], shape: dict[str, int]) -> None:
    """A checkpoint as transformers writes it, without a tokenizer."""
    folder.mkdir(parents=True)
    config = {
        **shape,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})


def models(folder: Path) -> None:
    """`base`, `a`, `b`, and the adapter `arm`."""
    base = tensors(0, SHAPE)
    write(folder / "base", base, SHAPE)
    for seed, name in enumerate("ab", start=1):
        write(folder / name, moved(base, seed), SHAPE)
    write_adapter(folder / "arm", base)


def write_adapter(folder: Path, base: dict[str, torch.Tensor]) -> None:
    """A LoRA adapter in peft's format, on q_proj and v_proj."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(4)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "lora_dropout": 0.0}
    config |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    factors = {}
    for name, value in base.items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{stem}.lora_A.weight"] = 0.1 * torch.randn(2, value.shape[1], generator=draw)
            factors[f"{stem}.lora_B.weight"] = 0.1 * torch.randn(value.shape[0], 2, generator=draw)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def wide_models(folder: Path) -> None:
    """`base` and `wide` with matrices large enough for statistics."""
    shape = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "vocab_size": 64}
    base = tensors(0, shape)
    write(folder / "base", base, shape)
    write(folder / "wide", moved(base, 3), shape)


def run(command: list[str], folder: Path) -> None:
    """Run a command there; its output is shown if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def by_mergekit(python: Path, configs: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """mergekit's results, all in one process of its own environment; the YAML files stay for us to read."""
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    run([str(python), "-c", PEER, *configs], folder)
    return {name: loaded(folder / f"{name}-mergekit") for name in configs}


def by_harness(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Our result, by the command line."""
    out = folder / f"{name}-harness"
    code = "from harness.cli.app import main; main()"
    command = [sys.executable, "-c", code, "merge", "--config", f"{name}.yaml", "--out", str(out), "--seed", "1"]
    run([*command, "--device", "cpu"], folder)
    return loaded(out)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The largest difference of any tensor, absolute and in units of rounding of that tensor's largest entry."""
    if ours.keys() != theirs.keys():
        sys.exit(f"different tensors: {sorted(ours.keys() ^ theirs.keys())}")
    worst: dict[str, Any] = {"tensors": len(ours), "largest": 0.0, "ulps": 0.0, "tensor": "", "equal": 0}
    for name, value in theirs.items():
        far = float((ours[name].double() - value.double()).abs().max())
        ulps = far / (ULP * float(value.abs().max()))
        worst["equal"] += far == 0
        worst["largest"] = max(worst["largest"], far)
        if ulps > worst["ulps"]:
            worst |= {"ulps": ulps, "tensor": name}
    return worst


def statistics(
    merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor], full: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Of the entries that differ between base and model: share kept, sum of magnitudes and mean against the whole's."""
    kept = count = 0
    magnitude = whole = total = full_total = 0.0
    for name, start in base.items():
        delta, complete = (merged[name] - start).double(), (full[name] - start).double()
        count += int((complete != 0).sum())
        kept += int((delta != 0).sum())
        magnitude, whole = magnitude + float(delta.abs().sum()), whole + float(complete.abs().sum())
        total, full_total = total + float(delta.sum()), full_total + float(complete.sum())
    return {
        "entries": count,
        "kept": kept / count,
        "magnitude": magnitude / whole,
        "mean": (total - full_total) / count,
    }


def compare(python: Path) -> dict[str, Any]:
    """All configurations, by both."""
    found: dict[str, Any] = {"exact": {}, "random": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "small"
        models(folder)
        for name, theirs in by_mergekit(python, {**CONFIGS, **ADAPTED}, folder).items():
            found["exact"][name] = row = differences(by_harness(name, folder), theirs)
            print(
                f"{name:22} {row['tensors']:3} tensors, {row['equal']:3} equal to the bit, largest difference "
                f"{row['largest']:.2e} = {row['ulps']:.1f} roundings of the largest entry {row['tensor']}"
            )
        folder = Path(scratch) / "wide"
        wide_models(folder)
        base, full = loaded(folder / "base"), loaded(folder / "wide")
        for name, theirs in by_mergekit(python, RANDOM, folder).items():
            pair = {
                "harness": statistics(by_harness(name, folder), base, full),
                "mergekit": statistics(theirs, base, full),
            }
            density = RANDOM[name]["models"][0]["parameters"]["density"]
            spread = math.sqrt(density * (1 - density) / pair["harness"]["entries"])
            found["random"][name] = {**pair, "density": density, "standard_error": spread}
            for who, row in pair.items():
                away = (row["kept"] - density) / spread
                print(
                    f"{name:22} {who:9} kept {row['kept']:.5f} ({away:+.2f} standard errors from {density}), "
                    f"magnitude {row['magnitude']:.6f} of the whole, mean off by {row['mean']:+.1e}"
                )
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    wrong = [
        f"{name}: {row['ulps']:.1f} roundings" for name, row in found["exact"].items() if row["ulps"] > ALLOWED_ULPS
    ]
    for name, row in found["random"].items():
        for who in ("harness", "mergekit"):
            if abs(row[who]["kept"] - row["density"]) > 4 * row["standard_error"]:
                wrong.append(f"{name}: {who} keeps {row[who]['kept']:.5f}")
        if abs(row["harness"]["magnitude"] - row["mergekit"]["magnitude"]) > 0.02:
            wrong.append(f"{name}: magnitudes {row['harness']['magnitude']:.4f}, {row['mergekit']['magnitude']:.4f}")
    return wrong


def fixture(python: Path, out: Path) -> None:
    """Write the inputs, the configurations and what mergekit makes of them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "small"
        models(folder)
        flat: dict[str, torch.Tensor] = {}
        sizes: dict[str, dict[str, list[int]]] = {}
        held = {f"input.{name}": loaded(folder / name) for name in ("base", "a", "b")}
        held |= {f"output.{name}": model for name, model in by_mergekit(python, CONFIGS, folder).items()}
        for key, model in held.items():
            sizes[key] = {name: list(model[name].shape) for name in sorted(model)}
            flat[key] = torch.cat([model[name].flatten() for name in sorted(model)])
        config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    save_file(flat, out / "tensors.safetensors")
    data = {"made_with": MERGEKIT, "config": config, "configs": CONFIGS, "layers": _layers(sizes)}
    (out / "merges.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    print(f"{out}: {sum(file.stat().st_size for file in out.iterdir())} bytes")


def _layers(sizes: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, list[int]]]:
    """Shapes by name for each number of layers, and which model has how many."""
    found: dict[str, Any] = {"of": {}, "shapes": {}}
    for key, shapes in sizes.items():
        count = 1 + max(int(name.split(".")[2]) for name in shapes if ".layers." in name)
        found["of"][key] = count
        found["shapes"][str(count)] = shapes
    return found


def main() -> None:
    """Compare, or write the fixture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mergekit-python", type=Path, help="interpreter of an environment with " + MERGEKIT)
    where.add_argument("--make-environment", type=Path, help="make that environment here, with uv")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--fixture", type=Path, help="instead of comparing, write inputs and mergekit's outputs here")
    arguments = parser.parse_args()
    python = arguments.mergekit_python
    if arguments.make_environment:
        folder = arguments.make_environment.absolute()
        python = folder / "bin" / "python"
        run(["uv", "venv", "--python", "3.11", str(folder)], Path.cwd())
        run(["uv", "pip", "install", "--python", str(python), MERGEKIT], Path.cwd())
    python = python.absolute()
    if arguments.fixture:
        fixture(python, arguments.fixture)
        return
    found = compare(python)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = failures(found)
    if wrong:
        sys.exit("not as mergekit: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
