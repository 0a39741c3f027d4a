"""`harness merge` against mergekit on one YAML: time and peak resident memory, as ratios of one run.

A random Llama of a given shape and four LoRA adapters (two on q_proj and v_proj of rank 64, two on all seven
projections of rank 16: the shapes of arXiv 2406.04879's SFT and DPO arms). Each arm runs in a process of its own, the
two in turn; imports are timed apart. mergekit runs in an environment of its own, with its defaults; what it writes on
the way (one full checkpoint per adapter) is part of what it does, and its cache is emptied before every run, as for
new adapters.

    python benchmarks/merge.py                                       makes the environment with uv, about 1.6 GB
    python benchmarks/merge.py --mergekit-python ENV/bin/python --method ties --rounds 3 --json figures.json
    python benchmarks/merge.py --shape tiny --rounds 1               a try, in a minute

Disk: about 16 GB for the shape 1b, in --folder. The disk's bandwidth is measured in the same run; `over copy` is the
harness's time over that of reading and writing the result's bytes once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "heads": 4, "kv": 2, "vocab": 2048},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "heads": 32,
        "kv": 4,
        "vocab": 32000,
    },
}
ATTENTION = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {"sft-a": (ATTENTION, 64), "sft-b": (ATTENTION, 64), "dpo-a": (EVERYTHING, 16), "dpo-b": (EVERYTHING, 16)}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.25}},
    "task_arithmetic": {"each": {"weight": 0.25}},
    "ties": {"each": {"weight": 0.25, "density": 0.5}, "all": {"normalize": True}},
    "dare_ties": {"each": {"weight": 0.25, "density": 0.5}},
    "dare_linear": {"each": {"weight": 0.25, "density": 0.5}},
    "slerp": {"all": {"t": 0.5}},
}
MERGEKIT = "mergekit==0.1.5"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--method", nargs="+", choices=list(PARAMETERS), default=["dare_ties", "slerp"])
    parser.add_argument("--rounds", type=int, default=2, help="how often both arms run, in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of either arm")
    parser.add_argument("--mergekit-python", type=Path, help="python of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="where models are made and merged (16 GB for 1b)")
    parser.add_argument("--json", type=Path, help="write settings, runs and ratios here")
    parser.add_argument("--worker", nargs=4, metavar=("ARM", "CONFIG", "OUT", "RESULT"), help=argparse.SUPPRESS)
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------- the arms


def worker(arm: str, config: Path, out: Path, result: Path) -> None:
    """One merge; what is timed begins after the imports."""
    begun = time.perf_counter()
    threads = int(os.environ["OMP_NUM_THREADS"])
    run = _mergekit(config, out, threads) if arm == "mergekit" else _harness(config, out, threads)
    found = {"import_s": time.perf_counter() - begun, "import_mib": _peak()}
    before, begun, cpu = _moved(), time.perf_counter(), time.process_time()
    run()
    found |= {
        "compute_s": time.perf_counter() - begun,
        "compute_cpu_s": time.process_time() - cpu,
        "peak_mib": _peak(),
        **{f"{name}_gb": (value - before[name]) / 1e9 for name, value in _moved().items()},
    }
    result.write_text(json.dumps(found))


def _mergekit(config: Path, out: Path, threads: int) -> Any:
    # peft and transformers come in when the first adapter is met: imports, not merging.
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    cache = str(out.parent / "mergekit-cache")
    options = MergeOptions(lora_merge_cache=cache, quiet=True, num_threads=threads, random_seed=0)
    text = config.read_text()

    def run() -> None:
        options.apply_global_options()
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options=options, config_source=text
        )

    return run


def _harness(config: Path, out: Path, threads: int) -> Any:
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401

    import harness
    from harness.contracts.registry import load_plugins
    from harness.merging.mergekit.config import read_merge_config

    registry, merge = load_plugins(), harness.merge
    return lambda: merge(read_merge_config(config), out=out, workers=threads, registry=registry)


def _peak() -> float:
    """Peak resident memory (MiB). Not ru_maxrss: a child inherits its parent's (Linux)."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _moved() -> dict[str, int]:
    """Bytes that this process asked the system to write, page cache included (Linux)."""
    lines = Path("/proc/self/io").read_text().split("\n")
    return {"written": next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))}


# ------------------------------------------------------------------------------------------------------- the material


def prepare(folder: Path, shape: str) -> None:
    """A random bf16 Llama, its tokenizer, and four adapters with weights that are not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = dict(SHAPES[shape])
    heads, kv, vocab = sizes.pop("heads"), sizes.pop("kv"), sizes.pop("vocab")
    config = LlamaConfig(
        **sizes, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocab, max_position_embeddings=2048
    )
    torch.manual_seed(0)
    with torch.device("cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base")
    words = {f"w{i}": i for i in range(vocab - 3)} | {"<unk>": vocab - 3, "<s>": vocab - 2, "</s>": vocab - 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "base")
    for seed, (name, (targets, rank)) in enumerate(ADAPTERS.items(), start=1):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, target_modules=targets))
        adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
        with torch.no_grad():
            for key, value in adapted.named_parameters():
                if "lora_B" in key:
                    value.normal_(std=0.01)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()


def write_config(folder: Path, method: str) -> Path:
    """mergekit's YAML, which both arms read."""
    import yaml

    base, wanted = str(folder / "base"), PARAMETERS[method]
    names = list(ADAPTERS)[:2] if method == "slerp" else list(ADAPTERS)
    models = [{"model": f"{base}+{folder / name}", "parameters": dict(wanted.get("each", {}))} for name in names]
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16", "tokenizer_source": "base"}
    if method == "slerp":
        # mergekit's slerp calls one of its two models the base; its parameter t says how far to the other.
        config["base_model"] = models[0]["model"]
    elif method != "linear":
        config["base_model"] = base
    if "all" in wanted:
        config["parameters"] = wanted["all"]
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return file


def bandwidth(folder: Path, size: int = 1 << 30) -> dict[str, float]:
    """Sequential bytes per second of the disk: written with fsync, and read back past the page cache."""
    file, block = folder / "bandwidth.bin", os.urandom(1 << 24)
    begun = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // len(block)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        written = time.perf_counter() - begun
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass
    read = time.perf_counter() - begun
    file.unlink()
    return {"write_gb_per_s": size / written / 1e9, "read_gb_per_s": size / read / 1e9}


def cold(folder: Path) -> None:
    """Ask the system to forget the inputs' pages, so that either arm reads from the disk."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mergekit_python(given: Path | None, folder: Path) -> Path:
    """The interpreter of mergekit's own environment; made where none is given."""
    if given is not None:
        return given
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if uv is None:
        raise SystemExit("no uv here: name an environment that has mergekit with --mergekit-python")
    made = folder / "mergekit-env" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", str(made.parents[1])], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(made), MERGEKIT], check=True)
    return made


# ---------------------------------------------------------------------------------------------------------- one run


def run_arm(arm: str, python: Path, config: Path, folder: Path, threads: int) -> dict[str, float]:
    """One merge in a process of its own; what it wrote is deleted afterwards."""
    out, result = folder / f"out-{arm}", folder / f"{arm}.json"
    for left in (out, folder / "mergekit-cache"):
        shutil.rmtree(left, ignore_errors=True)
    cold(folder)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(python), __file__, "--worker", arm, str(config), str(out), str(result)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(result.read_text())
    found["out_gb"] = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e9
    for left in (out, folder / "mergekit-cache"):
        shutil.rmtree(left, ignore_errors=True)
    return found


def main() -> None:
    """Make the material, run both arms in turn for every method, print ratios."""
    options = arguments()
    if options.worker:
        arm, config, out, result = options.worker
        worker(arm, Path(config), Path(out), Path(result))
        return
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=options.folder))
    try:
        python = {"mergekit": mergekit_python(options.mergekit_python, folder), "harness": Path(sys.executable)}
        prepare(folder, options.shape)
        disk = bandwidth(folder)
        print(f"disk: {disk['write_gb_per_s']:.2f} GB/s written (fsync), {disk['read_gb_per_s']:.2f} GB/s read")
        runs = []
        for method in options.method:
            config = write_config(folder, method)
            for number in range(options.rounds):
                order = ["mergekit", "harness"] if number % 2 == 0 else ["harness", "mergekit"]
                for arm in order:
                    found = run_arm(arm, python[arm], config, folder, options.threads)
                    runs.append({"method": method, "round": number, "arm": arm, **found})
                    print(json.dumps(runs[-1]), flush=True)
        record = {"settings": _settings(options), "disk": disk, "runs": runs, "ratios": ratios(runs, disk)}
        show(record["ratios"])
        if options.json:
            options.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"shape": options.shape, "rounds": options.rounds, "threads": options.threads, "mergekit": MERGEKIT}


def ratios(runs: list[dict[str, Any]], disk: dict[str, float]) -> list[dict[str, Any]]:
    """harness over mergekit, medians over rounds; and the harness against a plain copy of its bytes."""
    rows = []
    for method in dict.fromkeys(run["method"] for run in runs):
        of = {
            arm: {
                key: statistics.median(run[key] for run in runs if run["arm"] == arm and run["method"] == method)
                for key in ("import_s", "compute_s", "compute_cpu_s", "peak_mib", "written_gb", "out_gb")
            }
            for arm in ("mergekit", "harness")
        }
        ours, theirs = of["harness"], of["mergekit"]
        copy_s = ours["out_gb"] / disk["write_gb_per_s"] + ours["out_gb"] / disk["read_gb_per_s"]
        rows.append(
            {
                "method": method,
                **{key: ours[key] / theirs[key] for key in ("compute_s", "compute_cpu_s", "peak_mib", "written_gb")},
                "import_s": ours["import_s"] / theirs["import_s"],
                "over_copy": ours["compute_s"] / copy_s,
                "harness": ours,
                "mergekit": theirs,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    heads = ("compute", "cpu", "memory", "written", "import", "over copy")
    print(f"\n{'method':<16}" + "".join(f"{head:>11}" for head in heads) + "   harness / mergekit")
    for row in rows:
        keys = ("compute_s", "compute_cpu_s", "peak_mib", "written_gb", "import_s", "over_copy")
        figures = "".join(f"{row[key]:>10.2f}x" for key in keys)
        shown = (f"{row[arm]['compute_s']:.1f} s {row[arm]['peak_mib']:.0f} MiB" for arm in ("harness", "mergekit"))
        print(f"{row['method']:<16}{figures}   {' / '.join(shown)}")


if __name__ == "__main__":
    main()
