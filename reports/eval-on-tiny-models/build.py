"""This report: `collect` takes figures out of run folders, `render` writes README.md from the records alone.

    python build.py collect FOLDER     FOLDER holds what the commands in README.md wrote
    python build.py render

The records hold ids, digests, versions and numbers; no text of a data set and none that a model wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS = ("transformers", "vllm", "tox-tiny-base", "tox-tiny-instruct")
MEASURED = {
    "vllm.json": "transformers against vllm",
    "lm_eval.json": "harness (transformers) against lm-eval's own command line",
}
TOLERANCE = {"vllm.json": 1e-3, "lm_eval.json": 1e-4}
"""Largest differences of log-likelihoods (nats) in float32 that issue 2 allows."""


# ---------------------------------------------------------------------------------------------------------- collecting


def collect(folder: Path) -> None:
    """Write the records of every run; the parity and overhead figures are written by benchmarks/ and only checked."""
    records = HERE / "records"
    records.mkdir(exist_ok=True)
    for name in RUNS:
        _write(records / f"run-{name}.json", record_of(folder / name))
    from harness.report.compare import compare_runs

    # tiny-base has no chat template, so that without leave these two are not comparable.
    runs = folder / "tox-tiny-base", folder / "tox-tiny-instruct"
    _write(records / "compare.json", compare_runs(*runs, allow_prompt_mismatch=True).to_dict())


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def record_of(root: Path) -> dict[str, Any]:
    """What a run did and found, without texts."""
    from harness.report.read import open_run

    run = open_run(root)
    model = run.plan["model"]
    tasks = []
    for task in run.tasks:
        assert task.answers is not None and task.answers.record is not None
        tasks.append(
            {
                "task": task.name,
                "variant": task.variant,
                "limit": task.info["limit"],
                "questions": task.answers.info["questions"],
                "answers": {"id": task.answers.id, "digest": task.answers.record.digest},
                "counts": task.answers.record.counts,
                "scores": [_scores(step) for step in task.scores],
            }
        )
    facts = next(task.answers.provenance for task in run.tasks if task.answers is not None)
    return {
        "schema_version": 1,
        "model": {key: model[key] for key in ("name", "weights_digest", "tokenizer_digest", "template_digest")},
        "engine": {"name": run.plan["engine"]["name"], **_facts(facts["engine"])},
        "provenance": {key: facts[key] for key in ("harness", "numerics", "libraries", "machine")},
        "tasks": tasks,
    }


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("device", "dtype") if key in facts}


def _scores(step: Any) -> dict[str, Any]:
    metrics = [row.metric for row in step.rows if row.leaf is None]
    return {
        "id": step.id,
        "digest": step.record.digest,
        "rows": [row.model_dump(mode="json", exclude={"notes"}) for row in step.rows if row.leaf is None],
        # Item by item, so that every mean can be computed again.
        "values": {name: {item: row["values"][name] for item, row in step.samples.items()} for name in metrics},
    }


# ----------------------------------------------------------------------------------------------------------- rendering


def load(name: str) -> Any:
    """One record."""
    return json.loads((HERE / "records" / name).read_text(encoding="utf-8"))


def render() -> str:
    """README.md, from the records alone."""
    parts = [(HERE / "introduction.md").read_text(encoding="utf-8").rstrip()]
    parts.append(_numbers())
    parts.append(_parity())
    parts.append(_toxicity())
    parts.append(_overhead())
    parts.append(_many_adapters())
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _interval(interval: list[float] | None) -> str:
    return "–" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _numbers() -> str:
    rows = []
    for name in RUNS:
        run = load(f"run-{name}.json")
        for task in run["tasks"]:
            for step in task["scores"]:
                for row in step["rows"]:
                    rows.append(
                        [
                            f"{row['model']}, {run['engine']['name']}, {run['engine']['dtype']}",
                            f"{row['task']}:{row['variant']}",
                            f"{row['metric']} {'↑' if row['higher_is_better'] else '↓'}",
                            f"{row['mean']:.3f}",
                            _interval(row["ci95"]),
                            "–" if row["chance"] is None else f"{row['chance']:.3f}",
                            f"{row['n']:,}",
                            str(row["n_unscored"]),
                            str(row["n_truncated"]),
                            f"`{row['step'][:12]}`",
                        ]
                    )
    head = ["model, engine, dtype", "task", "metric", "mean", "95 % interval", "chance", "n", "unscored", "truncated"]
    return "## Numbers\n\n" + _table([*head, "scores step"], rows)


def _parity() -> str:
    rows = []
    for file, what in MEASURED.items():
        for task, figures in load(f"parity-{file}").items():
            largest = figures.get("largest_difference")
            verdict = "–" if largest is None else f"{largest:.1e} (allowed {TOLERANCE[file]:.0e})"
            texts = figures.get("texts_that_differ")
            rows.append(
                [
                    what,
                    task,
                    f"{figures['items']:,}",
                    f"{figures['metric']} {figures['a']:.4f} / {figures['b']:.4f}",
                    str(figures["scores_that_differ"]),
                    f"{figures['logprobs']:,}" if "logprobs" in figures else "–",
                    verdict,
                    "–" if texts is None else f"{texts} of {figures['items']}",
                ]
            )
    head = ["pair", "task", "items", "means", "scores that differ", "log-likelihoods", "largest difference (nats)"]
    return "## Agreement, item by item, float32\n\n" + _table([*head, "texts that differ"], rows)


def _toxicity() -> str:
    rows = []
    compared = load("compare.json")["differences"]
    for one in compared:
        p = one["p_adjusted"]
        rows.append(
            [
                f"{one['metric']} ({one['variant_a']} → {one['variant_b']})",
                f"{one['mean_a']:.3f}",
                f"{one['mean_b']:.3f}",
                f"{one['difference']:+.3f} {_interval(one['ci_adjusted'])}",
                "< 0.001" if p < 0.001 else f"{p:.3f}",
                str(one["test"]).replace("_", " "),
                f"{one['n_better']} / {one['n_worse']} of {one['n']:,}",
                f"{one['verdict']} (prompts differ)" if one["prompts_differ"] else one["verdict"],
            ]
        )
    head = ["metric", "tiny-base", "tiny-instruct", "difference, interval (Holm)", "p (Holm)", "test", "better / worse"]
    said = (
        f"`harness compare` refuses these two: not comparable: {compared[0]['prompts_differ']}. With "
        "`--allow-prompt-mismatch` it gives the figures below, marked: they say how the two were asked as much as what "
        "fine-tuning did, and nothing follows from them about either alone."
    )
    title = "## real_toxicity: `harness compare` of tiny-base and tiny-instruct"
    return f"{title}\n\n{said}\n\n{_table([*head, 'verdict'], rows)}"


def _overhead() -> str:
    figures = load("overhead.json")
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))
    try:
        from eval_overhead import table
    finally:
        sys.path.pop(0)
    said = (
        f"`benchmarks/eval_overhead.py`, {figures['model']}, {figures['tasks'].replace(',', ', ')}; "
        f"{figures['limit']} documents per task, {figures['dtype']}, {figures['device']}, {figures['threads']} thread, "
        f"lm-eval's batch size {figures['batch_size']}, {len(figures['rounds'])} rounds. Seconds are medians over the "
        "rounds; a ratio is taken within each round. On a busy machine wall times of single rounds scatter; "
        "the ratio of CPU times (of compute, in the first row) stands beside and is the firmer one there."
    )
    return f"## What it costs\n\n{said}\n\n{table(figures)}"


def _many_adapters() -> str:
    figures = load("multi_adapter.json")
    parts = ("wall", "imports", "load", "compute", "score", "fold", "rest")
    rows = [
        [arm.replace("_", " "), *(f"{cost[part]:.1f}" for part in parts)] for arm, cost in figures["median"].items()
    ]
    ratios = "; ".join(f"{name.replace('_', ' ')}: {one['median']:.2f}" for name, one in figures["ratios"].items())
    speed = figures["speed"]
    per_second = {name: one["tokens_per_second"] for name, one in speed.items()}
    said = (
        f"`benchmarks/multi_adapter.py`: {figures['adapters']} LoRA adapters of rank {figures['rank']} on a random "
        f"Llama (shape {figures['shape']}), {figures['engine']}, {figures['dtype']}, two tasks of "
        f"{figures['prompts']} prompts and {figures['new_tokens']} new tokens; {len(figures['rounds'])} round, seconds "
        "of whole processes."
    )
    generated = (
        f"Ratios: {ratios}. Generating the same {speed['vllm']['tokens']:,} tokens: vLLM "
        f"{per_second['vllm']:,.0f} tokens/s, transformers {per_second['transformers']:,.0f}, ratio "
        f"{per_second['vllm'] / per_second['transformers']:.2f}. Largest difference of a mean, all at once against "
        f"each alone: {figures['largest_difference_of_a_mean']:g}."
    )
    return f"## Many adapters\n\n{said}\n\n{_table(['arm', *parts], rows)}\n\n{generated}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"] and len(sys.argv) == 3:
        collect(Path(sys.argv[2]))
    elif sys.argv[1:] != ["render"]:
        sys.exit(__doc__)
    (HERE / "README.md").write_text(render(), encoding="utf-8")
