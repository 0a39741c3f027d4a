"""`harness study` against the glue that it replaces: one process per arm of TRL, mergekit and lm-eval, in one run.

Sixteen arms of one base: {SFT, DPO} x two data sets x two seeds, a Slerp merge of the two data sets for each method and
seed, and one more seed of each method and data set; all of them, and the base, answer the same lm-eval tasks. The peer
is what a user would script: a TRL trainer per arm, `mergekit` per merge, `lm_eval` per arm with all tasks in one call.
Both train the same rows (the peer is given them tokenised) with the same recipe.

The study runs twice: in one process, and by a worker process for each core; scripts do one thing after another. Wall
time of the first is split into import, load (weights) and compute (training loops, merging, model calls); CPU times
stand beside, for machines that are not idle. What is neither is start-up, data, files and reports.

    python benchmarks/study_makespan.py                              8 M random Llama; makes mergekit's environment
    python benchmarks/study_makespan.py --model PATH --mergekit-python ENV/bin/python --json figures.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from align_throughput import ALLOCATOR, SHAPES, Meter, random_llama, train_with_trl, write_pairs
from eval_overhead import TASKS
from merge import mergekit_python

METHODS, DATA, SEEDS = ("sft", "dpo"), ("one", "other"), (0, 1, 2)
MERGED_SEEDS = (0, 1)
ARMS = len(METHODS) * len(DATA) * len(SEEDS) + len(METHODS) * len(MERGED_SEEDS)
PARTS = ("wall", "import", "load", "compute", "cpu", "compute_cpu")
WORKERS = "harness, a worker for each core"
TARGETS = {"wall": 0.3, "compute": 0.8}
BENCHMARKS = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder with a chat template; a random one by default")
    parser.add_argument("--shape", choices=list(SHAPES), default="8m", help="of the random Llama")
    parser.add_argument("--tasks", default=TASKS, help="lm-eval's names, separated by commas")
    parser.add_argument("--limit", type=int, default=20, help="documents per task")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of every arm")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512, help="tokens")
    parser.add_argument("--eval-batch-size", type=int, default=32, help="lm-eval's; harness plans by tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    parser.add_argument("--mergekit-python", type=Path, help="python of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="where everything is made")
    parser.add_argument("--json", type=Path, help="write settings and figures here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------- one process


def worker(file: Path) -> None:
    """Carry out one process's work and write what it spent."""
    spec = json.loads(file.read_text())
    meter = Meter()
    {"prepare": prepare, "study": study_process, "trl": trl_process}[spec["do"]](spec, meter)
    Path(spec["marks"]).write_text(json.dumps(meter.found))


def study_process(spec: dict[str, Any], meter: Meter) -> None:
    """`harness study run`, with the opening of weights, the training loops, merges and model calls timed."""
    import lm_eval.tasks  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    from harness.alignment import stage
    from harness.cli.app import main
    from harness.evaluation import ask
    from harness.study import make
    from harness_plugins.engines.transformers.engine import TransformersEngine

    meter.found["import_s"] = time.time() - float(os.environ["BENCHMARK_STARTED"])
    add = _Adder(meter)
    stage.StageTraining.open_model = add.around("load", stage.StageTraining.open_model)  # type: ignore[method-assign]
    TransformersEngine.open = add.around("load", TransformersEngine.open)  # type: ignore[method-assign]
    ask.answer = add.around("compute", ask.answer, without="load")
    make.carry_out_merge = add.around("compute", make.carry_out_merge)
    import transformers

    transformers.Trainer.train = add.around("compute", transformers.Trainer.train)  # type: ignore[method-assign]
    sys.argv = ["harness", "study", "run", spec["file"], "--out", spec["out"]]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise


class _Adder:
    """Sums of wall and processor seconds under a name."""

    def __init__(self, meter: Meter) -> None:
        self.found = meter.found

    def around(self, name: str, function: Any, without: str | None = None) -> Any:
        """Time every call; ``without`` is taken off where it happens within."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun, cpu = time.perf_counter(), time.process_time()
            inner = self._of(without)
            try:
                return function(*args, **kwargs)
            finally:
                within = self._of(without)
                spent = time.perf_counter() - begun - (within[0] - inner[0])
                used = time.process_time() - cpu - (within[1] - inner[1])
                self.found[f"{name}_s"] = self.found.get(f"{name}_s", 0.0) + spent
                self.found[f"{name}_cpu_s"] = self.found.get(f"{name}_cpu_s", 0.0) + used

        return timed

    def _of(self, name: str | None) -> tuple[float, float]:
        return self.found.get(f"{name}_s", 0.0), self.found.get(f"{name}_cpu_s", 0.0)


def trl_process(spec: dict[str, Any], meter: Meter) -> None:
    """One arm with TRL's own trainer."""
    from datasets import Dataset  # noqa: F401
    from peft import LoraConfig  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    meter.found["import_s"] = time.time() - float(os.environ["BENCHMARK_STARTED"])
    Trainer.train = _Adder(meter).around("compute", Trainer.train)  # type: ignore[method-assign]
    train_with_trl(spec, json.loads(Path(spec["rows"]).read_text()), meter)
    meter.found["load_s"] = meter.found["open_s"]


def prepare(spec: dict[str, Any], meter: Meter) -> None:
    """The base, the pairs, and their rows as `harness align` tokenises them, which the peer is given."""
    from harness.alignment.run import plan_align
    from harness.contracts.registry import load_plugins
    from harness.core.specs import AlignSpec, ModelSpec
    from harness.data.selection import select
    from harness.data.tokenise import tokenise_demonstrations, tokenise_pairs
    from harness.models.inspect import open_tokenizer

    folder, count = Path(spec["folder"]), spec["steps"] * spec["batch_size"]
    if spec["model"] == str(folder / "model"):
        random_llama(folder / "model", SHAPES[spec["shape"]], 2048)
    registry = load_plugins()
    for number, name in enumerate(DATA):
        write_pairs(folder / f"{name}.jsonl", 2 * count + 50 + number)
        for method in METHODS:
            recipe = {"steps": spec["steps"], "eval_rows": 0, "max_length": spec["max_length"]}
            dataset = f"jsonl:{folder / name}.jsonl"
            base = ModelSpec(model=spec["model"], dtype="float32")
            plan = plan_align(
                AlignSpec(method=method, model=base, dataset=dataset, samples=count, options=recipe), registry
            )
            chosen = select(dataset, schema=plan.aligner.consumes, registry=registry, samples=count, heldout=0)
            tokenise = tokenise_pairs if method == "dpo" else tokenise_demonstrations
            length = min(spec["max_length"], plan.model.max_length)
            rows = tokenise(chosen.train, open_tokenizer(plan.model), plan.template, max_length=length).rows
            (folder / f"{method}-{name}.json").write_text(json.dumps(rows))


# ---------------------------------------------------------------------------------------------------------- the sides


class Bench:
    """Both sides in one scratch folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.model = str(Path(options.model).resolve()) if options.model else str(folder / "model")
        self.tasks: list[str] = options.tasks.split(",")
        self.python = mergekit_python(options.mergekit_python, folder)
        self.environment = {
            **ALLOCATOR,
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "HARNESS_CACHE": str(folder / "cache"),
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def process(self, name: str, command: list[str], marks: Path | None = None) -> dict[str, float]:
        """One process from its start to its end: wall, CPU, and what it wrote down of itself."""
        if marks is not None:
            marks.unlink(missing_ok=True)
        log = self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as stream:
            begun = time.perf_counter()
            environment = {**self.environment, "BENCHMARK_STARTED": repr(time.time())}
            running = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
            _, status, usage = os.wait4(running.pid, 0)
            wall = time.perf_counter() - begun
            running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode:
            raise SystemExit(f"{name} failed ({running.returncode}):\n{log.read_text(errors='replace')[-4000:]}")
        print(f"{name}: {wall:.1f} s", file=sys.stderr, flush=True)
        if marks is None:
            return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime}
        found = json.loads(marks.read_text())
        imports = found.get("import_s", found.get("imports", 0.0))
        spent = {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "import": imports}
        for part in ("load", "compute"):
            spent[part] = found.get(f"{part}_s", found.get(part, 0.0))
        spent["compute_cpu"] = found.get("compute_cpu_s", found.get("compute_cpu", 0.0))
        return spent

    def own(self, do: str, **more: Any) -> dict[str, float]:
        """A process of this very file."""
        settings = {key: value for key, value in vars(self.options).items() if isinstance(value, int | str)}
        file, marks = self.folder / "worker.json", self.folder / "marks.json"
        told = {"do": do, "marks": str(marks), "folder": str(self.folder)}
        file.write_text(json.dumps({**settings, "model": self.model, **told, **more}))
        name = more.get("name", do)
        return self.process(name, [sys.executable, __file__, "--worker", str(file)], marks)

    # -------------------------------------------------------------------------------------------------------- harness

    def study(self) -> dict[str, float]:
        """The whole study in one process."""
        o, file = self.options, self.folder / "study.yaml"
        recipe = {
            "steps": o.steps,
            "batch_size": o.batch_size,
            "micro_batch_size": o.micro_batch_size,
            "max_length": o.max_length,
            "eval_rows": 0,
        }
        grid = {"method": list(METHODS), "data": list(DATA), "samples": o.steps * o.batch_size, "set": recipe}
        rest = [seed for seed in SEEDS if seed not in MERGED_SEEDS]
        merges = [
            {"name": f"slerp-{method}", "method": "slerp", "inputs": [f"{method}-{name}-*" for name in DATA]}
            | {"dtype": "float32"}
            for method in METHODS
        ]
        study = {
            "study": "makespan",
            "bases": {"base": {"model": self.model, "dtype": "float32"}},
            "data": {name: f"jsonl:{self.folder / name}.jsonl" for name in DATA},
            "grid": [{**grid, "seed": list(MERGED_SEEDS)}, {**grid, "name": "more", "seed": rest}],
            "merges": merges,
            "evaluation": {
                "tasks": [f"lm_eval:{task}" for task in self.tasks],
                "limit": o.limit,
                "engine": "transformers",
                "set": {"engine": {"device": "auto"}},
            },
        }
        file.write_text(yaml.safe_dump(study, sort_keys=False))
        return self.own("study", file=str(file), out=str(self.folder / "run"))

    def study_by_workers(self) -> dict[str, float]:
        """The same study as a user's command with a worker process for each core, whose parts are not told apart."""
        command = [str(Path(sys.executable).parent / "harness"), "study", "run", str(self.folder / "study.yaml")]
        command += ["--out", str(self.folder / "run-workers"), "--set", f"executor.workers={self.options.threads}"]
        # Nothing that the first has hashed or tokenised helps it.
        self.environment["HARNESS_CACHE"] = str(self.folder / "cache-workers")
        # Workers share out the cores themselves; a number that is set counts for each of them.
        del self.environment["OMP_NUM_THREADS"]
        try:
            return self.process("study, a worker for each core", command)
        finally:
            self.environment["OMP_NUM_THREADS"] = str(self.options.threads)

    # ----------------------------------------------------------------------------------------------------------- peer

    def peer(self) -> dict[str, dict[str, float]]:
        """Process after process; the sums by tool."""
        spent = {tool: dict.fromkeys(PARTS, 0.0) for tool in ("trl", "mergekit", "lm_eval")}

        def add(tool: str, one: dict[str, float]) -> None:
            spent[tool] = {part: spent[tool][part] + one[part] for part in PARTS}

        asked: list[str] = [f"pretrained={self.model}"]
        for method, data, seed in _trained():
            name = f"{method}-{data}-s{seed}"
            rows, out = str(self.folder / f"{method}-{data}.json"), str(self.folder / name)
            shared = {"method": method, "adapter": "lora", "arm": "trl", "samples": 0}
            add("trl", self.own("trl", name=name, rows=rows, out=out, seed=seed, **shared))
            asked.append(f"pretrained={self.model},peft={out}")
        for method in METHODS:
            for seed in MERGED_SEEDS:
                name = f"merged-{method}-s{seed}"
                add("mergekit", self._mergekit(name, [f"{method}-{data}-s{seed}" for data in DATA]))
                asked.append(f"pretrained={self.folder / name}")
        for number, model in enumerate(asked):
            add("lm_eval", self._lm_eval(f"lm_eval-{number}", model))
        return spent

    def _mergekit(self, name: str, inputs: list[str]) -> dict[str, float]:
        config, marks = self.folder / f"{name}.yaml", self.folder / "marks.json"
        models = [{"model": f"{self.model}+{self.folder / one}"} for one in inputs]
        asked = {"merge_method": "slerp", "models": models, "base_model": models[0]["model"], "dtype": "float32"}
        config.write_text(yaml.safe_dump({**asked, "parameters": {"t": 0.5}, "tokenizer_source": "base"}))
        file = str(BENCHMARKS / "merge.py")
        command = [str(self.python), file, "--worker", "mergekit", str(config), str(self.folder / name), str(marks)]
        return self.process(name, command, marks)

    def _lm_eval(self, name: str, model: str) -> dict[str, float]:
        marks, o = self.folder / "marks.json", self.options
        command = [sys.executable, str(BENCHMARKS / "eval_overhead_arm.py"), "lm_eval", str(marks), "run"]
        command += ["--model", "hf", "--model_args", f"{model},dtype=float32", "--limit", str(o.limit)]
        command += ["--tasks", ",".join(self.tasks), "--batch_size", str(o.eval_batch_size)]
        command += ["--output_path", str(self.folder / name)]
        return self.process(name, command, marks)


def _trained() -> Iterator[tuple[str, str, int]]:
    return ((method, data, seed) for method in METHODS for data in DATA for seed in SEEDS)


def disagreements(folder: Path, tasks: list[str]) -> list[str]:
    """Numbers of the base that differ between the two: then they were not asked the same."""
    report = json.loads((folder / "run/report/base/report.json").read_text(encoding="utf-8"))
    ours = {
        (row["task"].removeprefix("lm_eval:"), row["metric"]): row["mean"]
        for row in report["rows"]
        if row["adapter"] is None and row["model"] == "base"
    }
    file = next((folder / "lm_eval-0").rglob("results_*.json"))
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    found = [] if {task for task, _ in ours} == set(tasks) else [f"tasks of the base: {sorted(ours)}"]
    for (task, metric), mean in ours.items():
        value = theirs[task].get(f"{metric},none", theirs[task].get(metric))
        if value is not None and abs(value - mean) > 1e-9:
            found.append(f"{task} {metric}: harness {mean}, lm-eval {value}")
    return found


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| side | " + " | ".join(PARTS) + " |", "| --- |" + " ---: |" * len(PARTS)]
    for name, spent in figures["spent"].items():
        lines.append(
            f"| {name} | " + " | ".join(f"{spent[part]:.1f}" if part in spent else "" for part in PARTS) + " |"
        )
    lines += ["", "| harness / peer | ratio | target |", "| --- | ---: | ---: |"]
    for part, ratio in figures["ratios"].items():
        target = TARGETS.get(part.partition(",")[0].removesuffix("_cpu"))
        verdict = "" if target is None else f"{target} ({'met' if ratio <= target else 'missed'})"
        lines.append(f"| {part} | {ratio:.2f} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both sides, print, write."""
    options = arguments()
    if options.worker is not None:
        worker(options.worker)
        return
    with tempfile.TemporaryDirectory(prefix="makespan-", dir=options.folder) as scratch:
        bench = Bench(options, Path(scratch))
        bench.own("prepare")
        ours = bench.study()
        workers = bench.study_by_workers()
        peers = bench.peer()
        if found := disagreements(bench.folder, bench.tasks):
            raise SystemExit("the two did not do the same work:\n" + "\n".join(found))
    whole = {part: sum(one[part] for one in peers.values()) for part in PARTS}
    tools = {f"peer: {tool}": one for tool, one in peers.items()}
    figures = {
        "arms": ARMS,
        "settings": {key: value for key, value in vars(options).items() if isinstance(value, int | str)},
        "load_average": os.getloadavg(),
        "peak_mib_of_any_process": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        "spent": {
            "harness": ours,
            WORKERS: workers,
            "peer": whole,
            **tools,
        },
        "ratios": {part: ours[part] / whole[part] for part in PARTS if whole[part]}
        | {f"{part}, {WORKERS}": workers[part] / whole[part] for part in workers},
    }
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
