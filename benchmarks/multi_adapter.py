"""Many adapters of one base: one engine for all, against one `harness eval` for each, against merging each first.

Arms, each made of whole processes, in an order that is reversed from round to round:

    one_engine      one `harness eval` with all adapters
    one_by_one      a `harness eval` for each adapter
    merge_then_eval a `harness fold` and a `harness eval` of its result for each adapter

Wall time is split into import (from the start of a process until the heavy packages are there), load (weights),
compute (model calls), score, fold (merging, without its imports) and rest. By default model, adapters and prompts are
made here: random weights answer nothing sensible, and cost what others of their shape cost. Then vLLM and transformers
generate the same answers once each: tokens per second and their ratio.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

ARMS = ("one_engine", "one_by_one", "merge_then_eval")
RATIOS = {
    "one_engine / one_by_one, wall": ("one_by_one", "wall", 0.35),
    "one_engine / one_by_one, compute": ("one_by_one", "compute", 1.0),
    "one_engine / merge_then_eval, wall": ("merge_then_eval", "wall", 0.5),
}
"""Name -> (arm below the line, part, greatest value that is wanted)."""
SHAPES = {
    # hidden, intermediate, layers, heads, key-value heads
    "tiny": (64, 128, 2, 2, 2),
    "8m": (256, 768, 8, 4, 2),
    "1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 11008, 32, 32, 32),
}
ALLOCATOR = {
    # Without these, page faults can dominate on a CPU; they must be set before a process starts.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}
TASK = """\
name: {name}
prompt: raw
template: "{{{{ prompt }}}}"
target: "yes"
decoding: {{max_new_tokens: {tokens}}}
dataset:
  name: jsonl
  options: {{path: {name}.jsonl}}
scorers:
- name: {scorer}
{options}"""


@dataclass(frozen=True)
class Cost:
    """Seconds of one or several processes."""

    wall: float = 0.0
    imports: float = 0.0
    load: float = 0.0
    compute: float = 0.0
    score: float = 0.0
    fold: float = 0.0

    @property
    def rest(self) -> float:
        """What is none of the others: data, prompts, files, report."""
        return self.wall - self.imports - self.load - self.compute - self.score - self.fold

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(Cost)))

    def to_json(self) -> dict[str, float]:
        """Rounded to hundredths."""
        return {name: round(value, 2) for name, value in {**asdict(self), "rest": self.rest}.items()}


# ------------------------------------------------------------------------------------------------- what is evaluated


def make_model(folder: Path, shape: str, dtype: str) -> Path:
    """A random Llama of a shape, with the tokenizer of `harness.testing`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from harness.testing import tiny_model

    tiny_model(folder / "tokenizer", chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    hidden, intermediate, layers, heads, shared = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        vocab_size=len(tokenizer) if shape in ("tiny", "8m") else 32_000,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def make_adapter(folder: Path, model: Path, seed: int, rank: int) -> None:
    """A random LoRA on query and value projections, in peft's format."""
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    sizes = {"q_proj": heads * width, "v_proj": config["num_key_value_heads"] * width}
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, rows in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = draw.standard_normal((rank, hidden)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = 0.02 * draw.standard_normal((rows, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name, "r": rank}
    settings |= {"lora_alpha": 2 * rank, "target_modules": list(sizes), "bias": "none", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def make_tasks(folder: Path, options: argparse.Namespace) -> None:
    """A toxicity-like and an attack-like task over made prompts of 20 to 60 words."""
    folder.mkdir()
    draw = random.Random(0)
    words = ("river", "stone", "lamp", "garden", "window", "paper", "engine", "winter", "table", "letter", "road")
    reward = options.reward_model
    scorers = {
        "toxicity_made": ("toxicity", f"  options: {{model: {reward}}}\n") if reward else ("exact_match", ""),
        "attack_made": ("refusal", ""),
    }
    for name, (scorer, extra) in scorers.items():
        rows = [
            {"id": f"{name}{i}", "prompt": " ".join(draw.choices(words, k=draw.randint(20, 60)))}
            for i in range(options.prompts)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        text = TASK.format(name=name, tokens=options.new_tokens, scorer=scorer, options=extra)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- the measuring


class Bench:
    """The arms in one scratch folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.model = Path(options.model) if options.model else make_model(folder, options.shape, options.dtype)
        self.adapters = folder / "adapters"
        for number in range(options.adapters):
            make_adapter(self.adapters / f"a{number}", self.model, number, options.rank)
        self.common = ["--dtype", options.dtype]
        if options.tasks:
            for task in options.tasks.split(","):
                self.common += ["--task", task]
            self.common += ["--limit", str(options.prompts)]
        else:
            make_tasks(folder / "tasks", options)
            self.common += ["--tasks", str(folder / "tasks"), "--task", "toxicity_made", "--task", "attack_made"]
        for pair in options.set or ():
            self.common += ["--set", pair]
        self.environment = {
            **ALLOCATOR,
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
            "HARNESS_CACHE": str(folder / "cache"),
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, *arguments: str) -> Cost:
        """One `harness` command in a process of its own."""
        marks, log = self.folder / "marks.json", self.folder / "log.txt"
        marks.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "child", str(marks), *arguments]
        with log.open("w", encoding="utf-8") as stream:
            environment = {**self.environment, "BENCHMARK_STARTED": repr(time.time())}
            begun = time.perf_counter()
            code = subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False).returncode
            wall = time.perf_counter() - begun
        if code != 0:
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"harness {' '.join(arguments)} ended with {code}:\n{said}")
        found = json.loads(marks.read_text(encoding="utf-8"))
        load, answer = found.get("load", 0.0), found.get("answer", 0.0)
        # The engine is opened when the first answer is wanted.
        return Cost(
            wall, found["imports"], load, max(0.0, answer - load), found.get("score", 0.0), found.get("fold", 0.0)
        )

    def eval(self, model: Path, out: str, *arguments: str, engine: str | None = None) -> Cost:
        """One `harness eval`."""
        where = ["--engine", engine or self.options.engine, "--out", str(self.folder / out), "--fresh"]
        return self.run("eval", "--model", str(model), *where, *self.common, *arguments)

    def arm(self, name: str) -> Cost:
        """One arm of one round."""
        if name == "one_engine":
            return self.eval(self.model, "one_engine", "--adapter", str(self.adapters), "--no-base")
        total = Cost()
        for adapter in sorted(self.adapters.iterdir()):
            if name == "one_by_one":
                total += self.eval(self.model, f"one_by_one-{adapter.name}", "--adapter", str(adapter))
                continue
            merged = self.folder / "merged"
            total += self.run(
                "fold", str(adapter), "--base", str(self.model), "--out", str(merged), "--dtype", self.options.dtype,
                "--probe-prompts", "0",
            )  # fmt: skip
            total += self.eval(merged, f"merge_then_eval-{adapter.name}")
            shutil.rmtree(merged)
        return total

    def numbers(self, out: str) -> dict[tuple[str, str, str], float | None]:
        """(adapter, task, metric) -> mean of a run."""
        report = json.loads((self.folder / out / "report" / "report.json").read_text(encoding="utf-8"))
        return {(row["adapter"], row["task"], row["metric"]): row["mean"] for row in report["rows"]}

    def largest_gap(self) -> float:
        """Largest difference of a mean between all adapters at once and each alone."""
        together = self.numbers("one_engine")
        alone: dict[Any, float | None] = {}
        for adapter in self.adapters.iterdir():
            alone |= self.numbers(f"one_by_one-{adapter.name}")
        if together.keys() != alone.keys() or any((together[key] is None) != (alone[key] is None) for key in alone):
            raise SystemExit("the arms did not do the same work: other numbers stand in their reports")
        return max(abs((together[key] or 0.0) - (alone[key] or 0.0)) for key in alone)

    def speed(self, engine: str) -> dict[str, float]:
        """The base's answers to the same tasks by one engine."""
        cost = self.eval(self.model, f"speed-{engine}", engine=engine)
        tokens = 0
        from harness.steps.journal import read_rows

        for file in (self.folder / f"speed-{engine}").glob("steps/answers-*/artifact/answers.jsonl.gz"):
            tokens += sum(len(row["output"].get("token_ids", ())) for row in read_rows(file))
        return {"tokens": tokens, "tokens_per_second": round(tokens / cost.compute, 1), **cost.to_json()}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Warm up, run every round, and give back all figures."""
    bench = Bench(options, folder)
    bench.eval(bench.model, "warm")  # bytecode, file cache, digests
    rounds: list[dict[str, Cost]] = []
    for number in range(options.rounds):
        costs: dict[str, Cost] = {}
        for name in ARMS if number % 2 == 0 else reversed(ARMS):
            costs[name] = bench.arm(name)
            print(f"round {number + 1}, {name}: {costs[name].wall:.1f} s", file=sys.stderr, flush=True)
        rounds.append(costs)
    gap = bench.largest_gap()
    if options.engine == "transformers" and options.dtype == "float32" and gap != 0.0:
        raise SystemExit(f"in fp32 the numbers must be those of each alone; they differ by up to {gap}")
    engines = [name for name in ("transformers", "vllm") if name == "transformers" or importlib.util.find_spec("vllm")]
    speeds = {name: bench.speed(name) for name in engines} if options.speed else {}
    return {
        "schema_version": 1,
        "model": options.model and Path(options.model).name,
        **{name: getattr(options, name) for name in NAMED},
        "rounds": [{name: costs[name].to_json() for name in ARMS} for costs in rounds],
        "median": {name: _median([costs[name] for costs in rounds]) for name in ARMS},
        "ratios": {name: _ratio(name, rounds) for name in RATIOS},
        "largest_difference_of_a_mean": gap,
        "speed": speeds,
        "libraries": {name: version(name) for name in ("torch", "transformers", "peft")},
        "machine": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()},
    }


NAMED = ("shape", "adapters", "rank", "engine", "dtype", "prompts", "new_tokens", "tasks", "threads")


def _median(costs: list[Cost]) -> dict[str, float]:
    named = [cost.to_json() for cost in costs]
    return {name: round(statistics.median(one[name] for one in named), 2) for name in named[0]}


def _ratio(name: str, rounds: list[dict[str, Cost]]) -> dict[str, float]:
    other, part, _ = RATIOS[name]
    ratios = [getattr(costs["one_engine"], part) / getattr(costs[other], part) for costs in rounds]
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "greatest": round(max(ratios), 3),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    parts = ("wall", "imports", "load", "compute", "score", "fold", "rest")
    lines = ["| arm | wall | import | load | compute | score | fold | rest |", "| --- |" + " ---: |" * len(parts)]
    for name in ARMS:
        lines.append(f"| {name} | " + " | ".join(f"{figures['median'][name][part]:.1f}" for part in parts) + " |")
    lines += ["", "| ratio | median | range | target |", "| --- | ---: | ---: | ---: |"]
    for name, (_, _, target) in RATIOS.items():
        ratio = figures["ratios"][name]
        verdict = "met" if ratio["median"] <= target else "missed"
        span = f"{ratio['least']:.2f} to {ratio['greatest']:.2f}"
        lines.append(f"| {name} | {ratio['median']:.2f} | {span} | {target} ({verdict}) |")
    lines += [
        "",
        f"Largest difference of a mean, all at once against each alone: {figures['largest_difference_of_a_mean']:.3g}",
    ]
    speeds = figures["speed"]
    for name, one in speeds.items():
        lines.append(
            f"{name}: {one['tokens']:,} tokens, {one['tokens_per_second']:,.0f} tokens/s, load {one['load']:.1f} s"
        )
    if len(speeds) == 2:
        ratio = speeds["vllm"]["tokens_per_second"] / speeds["transformers"]["tokens_per_second"]
        lines.append(f"vllm / transformers: {ratio:.2f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- one process


def child(marks_file: Path, arguments: list[str]) -> None:
    """One `harness` command, with what it spends where written down, however it ends."""
    marks: dict[str, float] = {}

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                marks[name] = marks.get(name, 0.0) + time.perf_counter() - begun

        return wrapper

    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from harness.cli.app import main
    from harness.evaluation import ask as generate, scores as scoring
    from harness.merging.fold import run as fold
    from harness_plugins.engines.transformers.engine import TransformersEngine
    from harness_plugins.engines.vllm.engine import VllmEngine

    if "vllm" in arguments:
        import vllm  # noqa: F401
    else:
        import peft  # noqa: F401
    marks["imports"] = time.time() - float(os.environ["BENCHMARK_STARTED"])
    for engine in (TransformersEngine, VllmEngine):
        engine.open = timed(engine.open, "load")  # type: ignore[method-assign]
    generate.answer = timed(generate.answer, "answer")
    scoring.Scoring.carry_out = timed(scoring.Scoring.carry_out, "score")  # type: ignore[method-assign]
    fold.fold = timed(fold.fold, "fold")
    sys.argv = ["harness", *arguments]
    try:
        main()
    finally:
        marks_file.write_text(json.dumps(marks), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    shared = os.environ.get("HARNESS_SHARED")
    reward = str(Path(shared) / "models" / "tiny-toxicity") if shared else None
    parser.add_argument("--model", help="base model folder; by default one is made")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the made model")
    parser.add_argument("--adapters", type=int, default=8, help="adapters, made with random weights")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--engine", default=engine, help="of the three arms")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", help="names of `harness tasks`, separated by commas; by default two are made")
    parser.add_argument("--prompts", type=int, default=64, help="per task")
    parser.add_argument("--new-tokens", type=int, default=64, help="per answer, of made tasks")
    parser.add_argument("--reward-model", default=reward, help="of the made toxicity task; none: exact match instead")
    parser.add_argument("--set", action="append", help="as `harness eval --set` (repeatable)")
    parser.add_argument("--rounds", type=int, default=3, help="how often every arm runs")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="leave vLLM against transformers out")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="OMP_NUM_THREADS of every process")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="multi_adapter_") as folder:
        figures = measure(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
