"""`harness align` against a bare TRL script: tokens/s and peak memory, as ratios within one run.

Both train the same tokenised rows with the same model, LoRA adapter, batch, lengths and optimiser; every arm runs in a
process of its own, the arms in turn, and what is timed begins after the imports: open the model, build the trainer,
compute the reference, train, save. Arms of SFT: TRL, harness. Arms of DPO: TRL, TRL with precompute_ref_log_probs,
harness (first seed: the reference store is empty), harness (second seed: it is filled).

    python benchmarks/align_throughput.py                        8 M random Llama, a few minutes on two CPU cores
    python benchmarks/align_throughput.py --model PATH --json ratios.json
    python benchmarks/align_throughput.py --shape 7b --adapter qlora --max-length 1024      with a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "8m": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "heads": 4, "kv": 2, "vocab": 8192},
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "heads": 12,
        "kv": 12,
        "vocab": 32000,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "heads": 32,
        "kv": 32,
        "vocab": 32000,
    },
}
ARMS = {"sft": ("trl", "harness"), "dpo": ("trl", "trl_precompute", "harness_first", "harness_second")}
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}
PAPER_STEPS = 700


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["sft", "dpo", "both"], default="both")
    parser.add_argument("--adapter", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--shape", choices=list(SHAPES), default="8m", help="random Llama of this shape")
    parser.add_argument("--model", help="a model folder instead")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps; each row is seen once")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512, help="tokens")
    parser.add_argument("--repeats", type=int, default=2, help="how often all arms run in turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    parser.add_argument("--json", type=Path, help="write settings, runs and ratios here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --------------------------------------------------------------------------------------------------------- the arms


def worker(file: Path) -> None:
    """Carry out one arm and write what was measured beside its description."""
    begun = time.perf_counter()
    spec = json.loads(file.read_text())
    if spec["arm"] == "prepare":
        prepare(spec)
        return
    import torch
    from datasets import Dataset  # noqa: F401 - both arms import all they need before the clock starts
    from peft import LoraConfig  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    meter = Meter()
    meter.found["import_s"] = time.perf_counter() - begun
    meter.found["import_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (harness_arm if spec["arm"].startswith("harness") else trl_arm)(spec, meter)
    meter.found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        meter.found["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    Path(spec["result"]).write_text(json.dumps(meter.found))


class Meter:
    """Wall and processor seconds of named stretches."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.found[f"{name}_s"] = time.perf_counter() - wall
        self.found[f"{name}_cpu_s"] = time.process_time() - cpu

    def around(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return function(*args, **kwargs)

        return timed


def prepare(spec: dict[str, Any]) -> None:
    """Write the model and the pairs, and what `harness align` makes of them: the rows that both arms train on."""
    from harness.alignment.run import plan_align
    from harness.contracts.registry import load_plugins
    from harness.core.specs import AlignSpec, ModelSpec
    from harness.data.selection import select
    from harness.data.tokenise import tokenise_demonstrations, tokenise_pairs
    from harness.models.inspect import open_tokenizer

    folder, count = Path(spec["folder"]), spec["steps"] * spec["batch_size"]
    if spec["model"] == str(folder / "model"):
        random_llama(folder / "model", SHAPES[spec["shape"]], spec["max_length"])
    write_pairs(folder / "pairs.jsonl", 2 * count + 50)
    registry = load_plugins()
    for method in spec["methods"]:
        given = {**spec, "method": method}
        plan = plan_align(
            AlignSpec(method=method, model=ModelSpec(model=spec["model"]), dataset=spec["dataset"], **asked(given)),
            registry,
        )
        chosen = select(spec["dataset"], schema=plan.aligner.consumes, registry=registry, samples=count, heldout=0)
        tokenise = tokenise_pairs if method == "dpo" else tokenise_demonstrations
        length = min(spec["max_length"], plan.model.max_length)
        rows = tokenise(chosen.train, open_tokenizer(plan.model), plan.template, max_length=length).rows
        if len(rows) != count:
            raise SystemExit(f"{count - len(rows)} rows do not fit into {length} tokens; raise --max-length")
        (folder / f"{method}.json").write_text(json.dumps(rows))


def random_llama(folder: Path, shape: dict[str, int], length: int) -> None:
    """A random Llama in bf16 with the tokenizer of harness.testing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from harness.testing import tiny_model

    tiny_model(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": max(length, 2048)}))
    named = {key: value for key, value in shape.items() if "_" in key}
    config = LlamaConfig(
        **named,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        max_position_embeddings=max(length, 2048),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def write_pairs(file: Path, count: int) -> None:
    """Prompts of 2 to 10 sentences and answers of 1 to 6: about as long, and as unequal, as HH-RLHF's."""
    from harness.testing.tiny import SENTENCES

    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(SENTENCES) for _ in range(draw.randint(least, most)))

    rows = [
        {"prompt": f"{i}. {text(2, 10)}", "chosen": f"Yes. {text(1, 6)}", "rejected": f"No. {text(1, 6)}"}
        for i in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def asked(spec: dict[str, Any]) -> dict[str, Any]:
    """What both arms are asked for, in the words of `harness align`."""
    keys = ("steps", "batch_size", "micro_batch_size", "max_length")
    return {
        "adapter": spec["adapter"],
        "samples": spec["steps"] * spec["batch_size"],
        "options": {**{key: spec[key] for key in keys}, "eval_rows": 0},
    }


def harness_arm(spec: dict[str, Any], meter: Meter) -> None:
    """`harness align`, timed from when its rows are tokenised, as the TRL arm's are."""
    from harness.alignment import run as alignment
    from harness.alignment.stage import StageTraining

    StageTraining.run = meter.around("train", StageTraining.run)  # type: ignore[method-assign]
    StageTraining.open_model = meter.around("open", StageTraining.open_model)  # type: ignore[method-assign]
    made = alignment.align(
        spec["method"], spec["model"], spec["dataset"], out=spec["out"], seed=spec["seed"], **asked(spec)
    )
    log = [json.loads(line) for line in (made.folder / "step" / "log.jsonl").read_text().splitlines()]
    meter.found["loop_s"] = next(line["train_runtime"] for line in log if "train_runtime" in line)
    computed = [line["computed"] for line in log if line.get("event") == "reference"]
    meter.found["reference_rows"] = computed[0] if computed else 0


def trl_arm(spec: dict[str, Any], meter: Meter) -> None:
    """What a user of TRL would write, on rows that are tokenised already."""
    rows = json.loads(Path(spec["rows"]).read_text())
    with meter.time("train"):
        train_with_trl(spec, rows, meter)


def train_with_trl(spec: dict[str, Any], rows: list[dict[str, Any]], meter: Meter) -> None:
    """Open, train and save with TRL's own trainers and the recipe's settings."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from harness import load_plugins
    from harness.alignment.driver import settings
    from harness.contracts.aligner import Aligner

    cuda = torch.cuda.is_available()
    aligner = load_plugins().find(Aligner, spec["method"], "--method")
    recipe = aligner.Config.model_validate(asked(spec)["options"])
    common = settings(
        recipe,
        Path(spec["out"]),
        seed=spec["seed"],
        micro=spec["micro_batch_size"],
        cuda=cuda,
        bf16=cuda,
        heldout=False,
    )
    dtype = torch.bfloat16 if cuda else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    more = {"quantization_config": quantization} if spec["adapter"] == "qlora" else {}
    with meter.time("open"):
        model = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=dtype, device_map={"": 0} if cuda else None, **more
        )
    shape = recipe.adapter_defaults
    lora = LoraConfig(
        r=shape["rank"],
        lora_alpha=shape["alpha"],
        lora_dropout=shape["dropout"],
        target_modules=shape["targets"],
        task_type="CAUSAL_LM",
    )
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    if spec["method"] == "sft":
        labelled = [
            {
                "input_ids": row["prompt_ids"] + row["completion_ids"],
                "labels": [-100] * len(row["prompt_ids"]) + row["completion_ids"],
            }
            for row in rows
        ]
        sft = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **common)
        data = Dataset.from_list(labelled)
        trainer = SFTTrainer(model, sft, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    else:
        dpo = DPOConfig(
            max_length=None,
            beta=recipe.beta,
            disable_dropout=False,
            precompute_ref_log_probs=spec["arm"] == "trl_precompute",
            **common,
        )
        data = Dataset.from_list([{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows])
        # Rows are tokenised; TRL would look for texts.
        tokenised = type("Tokenised", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_, **__: dataset})
        trainer = tokenised(model, args=dpo, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    meter.found["loop_s"] = trainer.train().metrics["train_runtime"]
    trainer.save_model(spec["out"])


# ------------------------------------------------------------------------------------------------------ the parent


def run_worker(spec: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
    """One arm in a process of its own; what it measured."""
    file = Path(spec["folder"]) / "worker.json"
    result = Path(spec["folder"]) / "result.json"
    result.unlink(missing_ok=True)
    file.write_text(json.dumps({**spec, "result": str(result)}))
    done = subprocess.run(
        [sys.executable, __file__, "--worker", str(file)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{spec['arm']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return json.loads(result.read_text()) if result.exists() else {}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All arms in turn, as often as asked."""
    spec: dict[str, Any] = {
        **{key: value for key, value in vars(options).items() if key not in ("json", "worker")},
        "folder": str(folder),
        "model": options.model or str(folder / "model"),
        "dataset": f"jsonl:{folder / 'pairs.jsonl'}",
        "methods": ["sft", "dpo"] if options.method == "both" else [options.method],
    }
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment["HARNESS_CACHE"] = str(folder / "cache")
    run_worker({**spec, "arm": "prepare"}, environment)
    runs = []
    for repeat in range(options.repeats):
        for method in spec["methods"]:
            rows = json.loads((folder / f"{method}.json").read_text())
            keys = (
                ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
                if method == "dpo"
                else ("prompt_ids", "completion_ids")
            )
            tokens = sum(len(row[key]) for row in rows for key in keys)
            for arm in ARMS[method]:
                given = {
                    **spec,
                    "method": method,
                    "arm": arm,
                    "rows": str(folder / f"{method}.json"),
                    "out": str(folder / f"{method}-{arm}-{repeat}"),
                    "seed": 1 if arm == "harness_second" else 0,
                }
                # Each repeat has a reference store of its own, which the first seed fills for the second.
                found = run_worker(given, {**environment, "HARNESS_CACHE": str(folder / f"cache-{repeat}")})
                runs.append({"method": method, "arm": arm, "repeat": repeat, "tokens": tokens, **found})
                print(f"{method} {arm} {repeat + 1}/{options.repeats}: {found['train_s']:.1f} s", file=sys.stderr)
    described = {key: spec[key] for key in spec if key not in ("folder", "dataset", "model")}
    return {
        "settings": {**described, "model": Path(options.model).name if options.model else options.shape},
        "runs": runs,
        "ratios": ratios(runs),
        "arms": summaries(runs, options.steps),
    }


def median(runs: list[dict[str, Any]], method: str, arm: str, key: str) -> float:
    """Of one figure over the repeats of an arm."""
    return statistics.median(run[key] for run in runs if (run["method"], run["arm"]) == (method, arm))


def summaries(runs: list[dict[str, Any]], steps: int) -> dict[str, dict[str, float]]:
    """Medians per arm; minutes for 700 steps: all but opening the model grows with the steps."""
    found = {}
    for method, arm in dict.fromkeys((run["method"], run["arm"]) for run in runs):
        wall, cpu, opened, memory = (
            median(runs, method, arm, key) for key in ("train_s", "train_cpu_s", "open_s", memory_key(runs))
        )
        tokens = median(runs, method, arm, "tokens")
        found[f"{method} {arm}"] = {
            "tokens_per_s": tokens / wall,
            "tokens_per_cpu_s": tokens / cpu,
            "wall_s": wall,
            "cpu_s": cpu,
            "loop_s": median(runs, method, arm, "loop_s"),
            "import_s": median(runs, method, arm, "import_s"),
            "peak_mib": memory,
            "minutes_for_700_steps": (opened + (wall - opened) * PAPER_STEPS / steps) / 60,
        }
    return found


def memory_key(runs: list[dict[str, Any]]) -> str:
    """Peak memory of the accelerator where there is one, else of the process."""
    return "peak_cuda_mib" if "peak_cuda_mib" in runs[0] else "peak_mib"


def ratios(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Tokens/s and memory of `harness align` over TRL's; above 1 it is faster (or needs more memory)."""
    found = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        for ours in [arm for arm in ARMS[method] if arm.startswith("harness")]:
            for theirs in [arm for arm in ARMS[method] if arm.startswith("trl")]:
                found[f"{method}: {ours} / {theirs}"] = {
                    name: median(runs, method, top, key) / median(runs, method, bottom, key)
                    for name, key, top, bottom in (
                        ("speed", "train_s", theirs, ours),
                        ("speed_cpu", "train_cpu_s", theirs, ours),
                        ("memory", memory_key(runs), ours, theirs),
                    )
                }
    return found


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    if options.worker is not None:
        worker(options.worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(options, Path(scratch))
    for title, table in (("arm (medians)", found["arms"]), ("ratio", found["ratios"])):
        columns = list(next(iter(table.values())))
        width = max(len(name) for name in [title, *table])
        print(f"\n{title:{width}}  " + "  ".join(columns))
        for name, row in table.items():
            print(f"{name:{width}}  " + "  ".join(f"{row[key]:{len(key)}.4g}" for key in columns))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
