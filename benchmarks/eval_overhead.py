"""What `harness eval` costs beside the model's own work, as ratios of one run.

Arms, each in its own process, in an order that is reversed from round to round:

    harness         one `harness eval` with all tasks
    raw             the same requests through the same engine, and nothing else
    lm_eval_once    one call of lm-eval's own command line with all tasks, backend `hf`
    lm_eval_each    one such call per task

Wall time is split into import (from the start of the process until the heavy packages are there), load (weights),
compute (model calls) and rest (data, prompts, metrics, files, report). All arms get the same device, dtype, threads and
allocator settings, and bytecode from one cache that a warm-up has filled.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

TASKS = "mmlu_anatomy,mmlu_astronomy,mmlu_virology,bbh_fewshot_navigate,bbh_fewshot_snarks"
ARMS = ("harness", "raw", "lm_eval_once", "lm_eval_each")
RATIOS = {
    "harness / raw, compute": (("harness", "compute"), ("raw", "compute"), 1.05),
    # Within one process: what the machine does beside cannot blur it.
    "harness: compute / engine calls within it": (("harness", "compute"), ("harness", "engine"), 1.05),
    "harness / lm_eval_once, wall": (("harness", "wall"), ("lm_eval_once", "wall"), 0.9),
    "harness / lm_eval_each, wall": (("harness", "wall"), ("lm_eval_each", "wall"), 0.4),
}
"""Name -> (arm, part) over (arm, part), and the greatest value that is wanted."""
HELP_TARGET = 0.25
"""Seconds that `harness --help` may take."""
ALLOCATOR = {
    # Without these, page faults can dominate on a CPU; they must be set before a process starts.
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one arm in one round."""

    wall: float
    imports: float
    load: float
    compute: float
    cpu: float
    compute_cpu: float
    """CPU time of compute."""
    engine: float
    """Within compute: the model calls alone."""

    @property
    def rest(self) -> float:
        """What is neither import, load nor compute."""
        return self.wall - self.imports - self.load - self.compute

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(mine + theirs for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )


# ------------------------------------------------------------------------------------------------------ the measuring


class Bench:
    """One set of arms in one scratch folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.tasks: list[str] = options.tasks.split(",")
        self.environment = {
            **ALLOCATOR,
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPYCACHEPREFIX": str(folder / "bytecode"),
        }
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, child: str, arguments: list[str]) -> Cost:
        """One process, from its start to its end."""
        marks_file = self.folder / "marks.json"
        marks_file.unlink(missing_ok=True)
        command = [
            sys.executable,
            str(Path(__file__).resolve().with_name("eval_overhead_arm.py")),
            child,
            str(marks_file),
            *arguments,
        ]
        with (self.folder / f"{child}.log").open("w", encoding="utf-8") as log:
            started = time.time()
            begun = time.perf_counter()
            process = subprocess.Popen(
                command, env={**self.environment, "BENCHMARK_STARTED": repr(started)}, stdout=log, stderr=log
            )
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - begun
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            said = (self.folder / f"{child}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"{child} failed with exit code {process.returncode}:\n{said}")
        marks = json.loads(marks_file.read_text(encoding="utf-8"))
        cpu = usage.ru_utime + usage.ru_stime
        compute, compute_cpu = marks.get("compute", 0.0), marks["compute_cpu"]
        engine = marks.get("engine", compute)
        return Cost(wall, marks["imports"], marks.get("load", 0.0), compute, cpu, compute_cpu, engine)

    def harness(self, limit: int, run: Path) -> Cost:
        """One `harness eval`; load and compute are the sums over its answers steps."""
        options = self.options
        arguments = ["eval", "--model", options.model, "--engine", "transformers", "--dtype", options.dtype]
        arguments += ["--set", f"engine.device={options.device}", "--limit", str(limit), "--out", str(run), "--fresh"]
        for task in self.tasks:
            arguments += ["--task", f"lm_eval:{task}"]
        cost = self.run("harness", arguments)
        load = compute = 0.0
        for file in run.glob("steps/answers-*/status.json"):
            seconds = json.loads(file.read_text(encoding="utf-8"))["seconds"]
            load, compute = load + seconds["load"], compute + seconds["compute"]
        return replace(cost, load=load, compute=compute)

    def lm_eval(self, limit: int, tasks: list[str], out: Path) -> Cost:
        """One call of lm-eval's command line."""
        options = self.options
        arguments = ["run", "--model", "hf", "--model_args", f"pretrained={options.model},dtype={options.dtype}"]
        arguments += ["--device", options.device, "--batch_size", str(options.batch_size)]
        arguments += ["--tasks", ",".join(tasks), "--limit", str(limit), "--output_path", str(out)]
        return self.run("lm_eval", arguments)

    def arm(self, name: str) -> Cost:
        """One arm of one round."""
        limit = self.options.limit
        if name == "harness":
            return self.harness(limit, self.folder / "run")
        if name == "raw":
            return self.run("raw", [str(self.folder / "run"), *map(str, self._model())])
        if name == "lm_eval_once":
            return self.lm_eval(limit, self.tasks, self.folder / "lm_eval_once")
        costs = [self.lm_eval(limit, [task], self.folder / "lm_eval_each") for task in self.tasks]
        return sum(costs[1:], costs[0])

    def _model(self) -> tuple[str, str, str]:
        return self.options.model, self.options.dtype, self.options.device

    def disagreements(self) -> list[str]:
        """Tasks whose numbers differ between harness and lm-eval: then the arms did not do the same work."""
        report = json.loads((self.folder / "run/report/report.json").read_text(encoding="utf-8"))
        ours = {(row["task"].removeprefix("lm_eval:"), row["metric"]): row["mean"] for row in report["rows"]}
        file = max((self.folder / "lm_eval_once").rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
        theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
        found = []
        for (task, metric), mean in ours.items():
            value = theirs[task].get(f"{metric},none", theirs[task].get(metric))
            if value is None or abs(value - mean) > 1e-9:
                found.append(f"{task} {metric}: harness {mean}, lm-eval {value}")
        return found

    def help_seconds(self, times: int = 9) -> float:
        """Median wall time of `harness --help`."""
        seconds = []
        for _ in range(times + 1):
            begun = time.perf_counter()
            command = [sys.executable, "-c", "from harness.cli.app import main; main()", "--help"]
            subprocess.run(command, env=self.environment, check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[1:])


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Warm up, run every round, and give back all figures."""
    bench = Bench(options, folder)
    help_seconds = bench.help_seconds()
    bench.harness(1, folder / "warm")
    bench.lm_eval(1, bench.tasks, folder / "warm_lm_eval")
    rounds: list[dict[str, Cost]] = []
    for number in range(options.rounds):
        costs: dict[str, Cost] = {}
        # raw takes its requests from the run that harness leaves, so harness is first in the first round.
        for name in ARMS if number % 2 == 0 else reversed(ARMS):
            costs[name] = bench.arm(name)
            print(f"round {number + 1}, {name}: {costs[name].wall:.1f} s", file=sys.stderr, flush=True)
        rounds.append(costs)
    different = bench.disagreements()
    if different:
        raise SystemExit("the arms did not do the same work:\n" + "\n".join(different))
    return {
        "schema_version": 1,
        "model": Path(options.model).name,
        **{name: getattr(options, name) for name in ("tasks", "limit", "dtype", "device", "batch_size", "threads")},
        "rounds": [{name: _seconds(costs[name]) for name in ARMS} for costs in rounds],
        "median": {name: _median([costs[name] for costs in rounds]) for name in ARMS},
        "ratios": {name: _ratio(name, rounds) for name in RATIOS},
        "help_seconds": round(help_seconds, 3),
        "libraries": {name: version(name) for name in ("torch", "transformers", "lm_eval", "datasets")},
        "machine": {"system": platform.system(), "machine": platform.machine(), "cpus": os.cpu_count()},
    }


def _seconds(cost: Cost) -> dict[str, float]:
    return {name: round(value, 2) for name, value in {**asdict(cost), "rest": cost.rest}.items()}


def _median(costs: list[Cost]) -> dict[str, float]:
    named = [{**asdict(cost), "rest": cost.rest} for cost in costs]
    return {name: round(statistics.median(one[name] for one in named), 2) for name in named[0]}


def _ratio(name: str, rounds: list[dict[str, Cost]]) -> dict[str, float | None]:
    """Median, least and greatest over the rounds; between processes also the median ratio of CPU times."""
    (upper, part), (lower, other), _ = RATIOS[name]
    ratios = [getattr(costs[upper], part) / getattr(costs[lower], other) for costs in rounds]
    time_of = {"wall": "cpu", "compute": "compute_cpu"}[part]
    cpu = None
    if upper != lower:
        cpu = statistics.median(getattr(costs[upper], time_of) / getattr(costs[lower], time_of) for costs in rounds)
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "greatest": round(max(ratios), 3),
        "cpu": None if cpu is None else round(cpu, 3),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| arm | wall | import | load | compute | rest | CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ARMS:
        cost = figures["median"][name]
        cells = [cost[key] for key in ("wall", "imports", "load", "compute", "rest", "cpu")]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    lines += ["", "| ratio | median | range | CPU time | target |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, (_, _, target) in RATIOS.items():
        ratio = figures["ratios"][name]
        verdict = "met" if ratio["median"] <= target else "missed"
        span = f"{ratio['least']:.2f} to {ratio['greatest']:.2f}"
        cpu = "" if ratio["cpu"] is None else f"{ratio['cpu']:.2f}"
        lines.append(f"| {name} | {ratio['median']:.2f} | {span} | {cpu} | {target} ({verdict}) |")
    verdict = "met" if figures["help_seconds"] <= HELP_TARGET else "missed"
    lines.append(f"| `harness --help`, seconds | {figures['help_seconds']:.2f} | | | {HELP_TARGET} ({verdict}) |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--tasks", default=TASKS, help="lm-eval's names, separated by commas")
    parser.add_argument("--limit", type=int, default=20, help="documents per task")
    parser.add_argument("--rounds", type=int, default=3, help="how often every arm runs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, mps, cuda or cuda:N")
    parser.add_argument("--batch-size", type=int, default=32, help="lm-eval's; harness plans by tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="OMP_NUM_THREADS of every arm")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="eval_overhead_") as folder:
        figures = measure(options, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    main()
