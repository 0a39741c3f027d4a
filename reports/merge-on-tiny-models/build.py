"""This report: the five merges of arXiv 2406.04879 (table 3) on a tiny model, beside what went into them.

    python build.py merge BASE ARMS FOLDER             the merges, and a sweep of t and density; ARMS holds the adapters
    python build.py evaluate BASE ARMS FOLDER REWARD   base, arms and merges: real_toxicity and mmlu@0
    python build.py collect FOLDER
    python build.py render

ARMS is what `reports/align-on-tiny-models/build.py train` made. The records hold digests and numbers; no text of a data
set.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ARMS = {
    "SFT-harmless": "sft-lora-hh-rlhf-harmless-s0",
    "SFT-helpful": "sft-lora-hh-rlhf-helpful-s0",
    "DPO-harmless": "dpo-lora-hh-rlhf-harmless-s0",
    "DPO-helpful": "dpo-lora-hh-rlhf-helpful-s0",
}
PAPER: dict[str, tuple[str, tuple[str, ...]]] = {
    "Slerp-SFT": ("slerp", ("SFT-harmless", "SFT-helpful")),
    "Slerp-DPO": ("slerp", ("DPO-harmless", "DPO-helpful")),
    "DARE-SFT": ("dare_ties", ("SFT-harmless", "SFT-helpful")),
    "DARE-DPO": ("dare_ties", ("DPO-harmless", "DPO-helpful")),
    "DARE-SFT+DPO": ("dare_ties", tuple(ARMS)),
}
SWEEP = {
    **{f"Slerp-DPO t={t:g}": ("slerp", ("DPO-harmless", "DPO-helpful"), {"t": t}) for t in (0.0, 0.25, 0.75, 1.0)},
    **{f"DARE-DPO density={d:g}": ("dare_ties", ("DPO-harmless", "DPO-helpful"), {"density": d}) for d in (0.1, 0.9)},
    "DARE-DPO weights=1": ("dare_ties", ("DPO-harmless", "DPO-helpful"), {"weights": 1.0}),
    "SlerpDelta-DPO": ("slerp_delta", ("DPO-harmless", "DPO-helpful"), {}),
}
TASKS = ("real_toxicity", "mmlu@0")
LIMITS = {"real_toxicity": 200, "mmlu@0": 2}
METRICS = {"real_toxicity": "toxicity_reward", "mmlu@0": "acc"}


def merge(base: str, arms: Path, folder: Path) -> None:
    """Every merge that is not there yet."""
    import harness

    plans: dict[str, Any] = {name: (method, inputs, {}) for name, (method, inputs) in PAPER.items()} | SWEEP
    for name, (method, inputs, given) in plans.items():
        options = dict(given)
        weight = options.pop("weights", None)
        paths: list[Any] = [str(arms / ARMS[one]) for one in inputs]
        if weight is not None:
            paths = [(path, weight) for path in paths]
        harness.merge(method, paths, base=base, options=options, out=folder / name)
        print(name, flush=True)


def evaluate(base: str, arms: Path, folder: Path, reward: str) -> None:
    """The base and its arms on one engine; then every merge."""
    import harness

    options = {
        "real_toxicity": {
            "limit": LIMITS["real_toxicity"],
            "decoding": {"max_new_tokens": 24},
            "scorer": {"model": reward},
        },
        "mmlu@0": {"limit": LIMITS["mmlu@0"]},
    }
    # A part of the data set, not the revision that the task pins.
    revisions = {"allenai/real-toxicity-prompts": "0efa8cbe13864b8b7d009e7a6c1002eaa3b6e94b"}
    common: dict[str, Any] = {
        "tasks": TASKS,
        "engine": "transformers",
        "options": options,
        "data_revisions": revisions,
    }
    adapters = tuple(str(arms / name) for name in ARMS.values())
    harness.evaluate(base, out=folder / "eval-base", **common)
    harness.evaluate(base, adapters=adapters, out=folder / "eval-arms", **common)
    for name in (*PAPER, *SWEEP):
        harness.evaluate(str(folder / name), out=folder / f"eval-{name}", **common)
        print(name, flush=True)


def collect(folder: Path) -> None:
    """Scores of everything, and the diagnostics of every merge in total."""
    rows = []
    names = {path: name for name, path in ARMS.items()}
    for row in _rows(folder / "eval-arms"):
        rows.append({"arm": names[row["adapter"]] if row["adapter"] else "base", **_score(row)})
    for name in (*PAPER, *SWEEP):
        rows += [{"arm": name, **_score(row)} for row in _rows(folder / f"eval-{name}")]
    _differences(folder, rows)
    merges = []
    for name in (*PAPER, *SWEEP):
        record = _json(folder / name / "merge.json")
        kept = ["id", "method", "options", "seed", "inputs", "base", "counts", "notes"]
        merges.append({"name": name, **{key: record[key] for key in kept}, "total": record["diagnostics"]["total"]})
    (HERE / "records").mkdir(exist_ok=True)
    for file, value in (("scores.json", rows), ("merges.json", merges)):
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        (HERE / "records" / file).write_text(text, encoding="utf-8")


def _differences(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Minus the base, paired by sample; Holm over everything in the table."""
    from harness.core.stats import holm
    from harness.report.compare import compare_runs

    names = {path: name for name, path in ARMS.items()}
    found = {}
    for one in compare_runs(folder / "eval-arms").differences:
        if METRICS.get(one.task) == one.metric:
            found[next(name for path, name in names.items() if path in str(one.arm)), one.task] = one
    for name in (*PAPER, *SWEEP):
        for one in compare_runs(folder / "eval-base", folder / f"eval-{name}").differences:
            if METRICS.get(one.task) == one.metric:
                found[name, one.task] = one
    adjusted = dict(zip(found, holm([one.p_value for one in found.values()]), strict=True))
    for row in rows:
        key = (row["arm"], row["task"])
        if key in found:
            row["minus_base"] = {
                "difference": found[key].difference,
                "ci95": found[key].ci95,
                "p_holm": adjusted[key],
                "test": found[key].test,
            }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _rows(run: Path) -> list[Any]:
    found = _json(run / "report" / "report.json") if (run / "report" / "report.json").exists() else _reported(run)
    return [row for row in found["rows"] if METRICS.get(row["task"]) == row["metric"]]


def _reported(run: Path) -> Any:
    from harness.report.build import write_reports

    write_reports(run)
    return _json(run / "report" / "report.json")


def _score(row: Any) -> dict[str, Any]:
    return {key: row[key] for key in ("task", "variant", "metric", "mean", "ci95", "n", "n_unscored", "step")}


def render() -> str:
    """The page, from the records alone."""
    scores, merges = _json(HERE / "records" / "scores.json"), _json(HERE / "records" / "merges.json")
    lines = [
        "# Merges on a tiny model",
        "",
        "The five merges of arXiv 2406.04879 (table 3) over arms of a real 8 M Llama (`tiny-instruct`, LoRA, HH-RLHF,",
        "seed 0), on a CPU. Mechanics and directions; no headline numbers. The paper states neither weights nor",
        "densities: the defaults are ours (t 0.5, density 0.5, weights 1/n, rescaling by 1/density).",
        f"`real_toxicity`: {LIMITS['real_toxicity']} prompts, 24 new tokens, `tiny-toxicity`, higher is less toxic.",
        f"`mmlu@0`: {LIMITS['mmlu@0']} questions of each of 57 subjects; guessing gives 0.25. Intervals are 95 %",
        "each, of differences too, and not adjusted for their number, as p is; differences are paired by sample.",
        "",
        "## Arms and merges",
        "",
        *_table(scores, ["base", *ARMS, *PAPER]),
        "",
        "## How they differ",
        "",
        "Relative to the base's norm, over all tensors that an input changes; cosine of the first two inputs.",
        "",
        "| merge | method | change by the inputs | by the merge | cosine | sign conflicts | lerp fallback |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in merges:
        total = one["total"]
        inputs = ", ".join(f"{100 * norm:.2f} %" for norm in total["delta_norm"])
        fallback = total["merger"].get("lerp_fallback")
        lines.append(
            f"| {one['name']} | {one['method']} | {inputs} | {100 * total['result_delta_norm']:.2f} % "
            f"| {total['cosine']['1-2']:.3f} | {100 * total['sign_conflict']:.1f} % "
            f"| {'-' if fallback is None else f'{100 * fallback:.0f} %'} |"
        )
    lines += [
        "",
        "## Sensitivity",
        "",
        "The same two arms under other values of what the paper leaves open.",
        "",
        *_table(scores, ["Slerp-DPO", "DARE-DPO", *SWEEP]),
        "",
        _verdict(scores),
        "",
        *_against_mergekit(),
    ]
    return "\n".join(lines)


def _against_mergekit() -> list[str]:
    """What `benchmarks/merge.py --json` and `benchmarks/merge_parity.py --json` measured."""
    speed, parity = _json(HERE / "records" / "speed.json"), _json(HERE / "records" / "parity.json")
    lines = [
        "## Against mergekit",
        "",
        f"`benchmarks/merge.py`: {speed['settings']['mergekit']} on the same YAML, a random Llama of 1.1 B in bf16 and "
        f"four LoRA adapters (two for slerp), {speed['settings']['threads']} threads, {speed['settings']['rounds']} "
        f"round. The disk wrote {speed['disk']['write_gb_per_s']:.2f} GB/s. mergekit writes a full checkpoint for each "
        "adapter first.",
        "",
        "| method | compute (s) | ratio | peak memory (MiB) | ratio | written (GB) | import (s) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in speed["ratios"]:
        cells = [
            " / ".join(f"{row[arm][key]:{form}}" for arm in ("harness", "mergekit"))
            for key, form in (("compute_s", ".1f"), ("peak_mib", ".0f"), ("written_gb", ".1f"), ("import_s", ".1f"))
        ]
        lines.append(
            f"| {row['method']} | {cells[0]} | {row['compute_s']:.2f} | {cells[1]} | {row['peak_mib']:.2f} "
            f"| {cells[2]} | {cells[3]} |"
        )
    exact = parity["exact"]
    worst = max(exact, key=lambda name: exact[name]["ulps"])
    return [
        *lines,
        "",
        f"`benchmarks/merge_parity.py`: {len(exact)} configurations, tensor by tensor in float32. The largest "
        f"difference is {exact[worst]['largest']:.1e}, {exact[worst]['ulps']:.1f} roundings ({worst}); "
        f"{sum(one['equal'] for one in exact.values())} of {sum(one['tensors'] for one in exact.values())} tensors are "
        "equal to the bit.",
        "",
    ]


def _table(scores: list[Any], names: list[str]) -> list[str]:
    of = {(row["arm"], row["task"]): row for row in scores}
    heads = [f"{METRICS[task]} ({task}) | minus base | p (Holm)" for task in TASKS]
    lines = [f"| arm | {' | '.join(heads)} | n |", "| --- |" + " --- |" * (3 * len(TASKS) + 1)]
    for name in names:
        rows = [of[name, task] for task in TASKS]
        cells = []
        for row in rows:
            cells.append(_interval(row["mean"], row["ci95"]))
            less = row.get("minus_base")
            cells += [_interval(less["difference"], less["ci95"]), f"{less['p_holm']:.2g}"] if less else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(str(row['n']) for row in rows)} |")
    return lines


def _interval(mean: float, interval: list[float]) -> str:
    return f"{mean:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _verdict(scores: list[Any]) -> str:
    """Which differences from the base are more than noise."""
    apart = [
        f"{row['arm']} ({row['task']}, {row['minus_base']['difference']:+.3f})"
        for row in scores
        if row.get("minus_base") and row["minus_base"]["p_holm"] < 0.05
    ]
    n = sum("minus_base" in row for row in scores)
    said = ", ".join(apart) if apart else "none"
    return f"Differences from the base at Holm-adjusted p < 0.05, over all {n} of this page: {said}."


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["merge", base, arms, folder]:
            merge(base, Path(arms), Path(folder))
        case ["evaluate", base, arms, folder, reward]:
            evaluate(base, Path(arms), Path(folder), reward)
        case ["collect", folder]:
            collect(Path(folder))
        case ["render"]:
            (HERE / "README.md").write_text(render(), encoding="utf-8")
        case _:
            sys.exit(__doc__)
