"""How long `harness study plan` takes for a study of 10,000 steps: process time, and that torch is not imported.

    python benchmarks/study_plan.py [--steps 10000] [--profile]

Tiny random bases; two methods, two data sets, LoRA and QLoRA, as many seeds as it takes, a merge for every
seed; five tasks. The first plan of a process hashes the bases' weights and reads plugins; the second has only the arms
to think of.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path

from harness.contracts.registry import load_plugins
from harness.study.plan import plan_study
from harness.testing import tiny_model

HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "vllm", "lm_eval")
BASES, TASKS = 2, 5
ARMS_OF_A_SEED = BASES * (2 * 2 * 2 + 1)
"""Two methods, two data sets and two adapters on each base, and one merge."""
STEPS_OF_A_SEED = ARMS_OF_A_SEED * (1 + 2 * TASKS)


def write_study(folder: Path, steps: int) -> Path:
    """A study of at least so many steps, its bases, data and tasks."""
    seeds = -(-steps // STEPS_OF_A_SEED)
    rows = [{"id": str(n), "a": n, "b": n} for n in range(4)]
    pairs = [{"prompt": f"What is {n}?", "chosen": f"{n}.", "rejected": "No."} for n in range(8)]
    for name, some in (("rows", rows), ("one", pairs), ("two", pairs[::-1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    (folder / "tasks").mkdir()
    for n in range(TASKS):
        task = {
            "name": f"sums{n}",
            "prompt": "chat",
            "template": f"{n}: {{{{ a }}}}+{{{{ b }}}}=",
            "target": "{{ a + b }}",
            "decoding": {"max_new_tokens": 8},
            "dataset": {"name": "jsonl", "options": {"path": str(folder / "rows.jsonl")}},
            "scorers": [{"name": "exact_match"}],
        }
        (folder / "tasks" / f"sums{n}.yaml").write_text(json.dumps(task), encoding="utf-8")
    study = {
        "study": "synthetic",
        "bases": {f"b{n}": str(tiny_model(folder / f"b{n}", seed=n)) for n in range(BASES)},
        "data": {name: f"jsonl:{folder / name}.jsonl" for name in ("one", "two")},
        "grid": [
            {
                "method": ["sft", "dpo"],
                "data": ["one", "two"],
                "adapter": ["lora", "qlora"],
                "seed": list(range(seeds)),
            }
        ],
        "merges": [
            {
                "name": "merged",
                "method": "dare_ties",
                "inputs": [{"method": "dpo", "data": data, "adapter": "lora"} for data in ("one", "two")],
            }
        ],
        "evaluation": {
            "tasks": [f"sums{n}" for n in range(TASKS)],
            "task_folders": str(folder / "tasks"),
            "engine": "transformers",
        },
    }
    file = folder / "study.yaml"
    file.write_text(json.dumps(study), encoding="utf-8")  # JSON is YAML
    return file


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    given = parser.parse_args()
    print(f"imports: {time.process_time():.2f} s of CPU")
    with tempfile.TemporaryDirectory() as folder:
        file = write_study(Path(folder), given.steps)
        began = time.process_time()
        registry = load_plugins([])
        print(f"plugins: {time.process_time() - began:.2f} s")
        for what in ("first plan", "second plan"):
            began, wall = time.process_time(), time.perf_counter()
            plan = plan_study(file, registry=registry)
            told = f"{len(plan.arms):,} arms, {len(plan.graph):,} steps"
            print(f"{what}: {told}: {time.process_time() - began:.2f} s of CPU, {time.perf_counter() - wall:.2f} s")
        began = time.process_time()
        size = len(json.dumps(plan.to_json()))
        print(f"plan.json: {size / 1e6:.1f} MB, {time.process_time() - began:.2f} s of CPU")
        if given.profile:
            with cProfile.Profile() as profile:
                plan_study(file, registry=registry)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    heavy = [name for name in HEAVY if name in sys.modules]
    print(f"imported of {', '.join(HEAVY)}: {', '.join(heavy) or 'none'}")
    sys.exit(1 if heavy else 0)


if __name__ == "__main__":
    main()
