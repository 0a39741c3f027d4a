"""This report: `train` makes the arms, `collect` takes figures out of them, `render` writes README.md from the records.

    python build.py train BASE FOLDER                  36 arms and 3 that learn nothing
    python build.py evaluate BASE FOLDER REWARD_MODEL  base and the arms of seed 0, `real_toxicity`, 48 prompts
    python build.py collect FOLDER
    python build.py render

The records hold ids, digests and numbers; no text of a data set.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
DATA = ("hh-rlhf:harmless", "hh-rlhf:helpful", "beavertails:harmless")
REVISIONS = {
    "Anthropic/hh-rlhf": "4eb128d3964432635c1a14aa51f8eef74ea777c2",
    "PKU-Alignment/PKU-SafeRLHF": "fee3f30fe3eebadf5cb6c6800b6952ec1fafdd63",
    "allenai/real-toxicity-prompts": "0efa8cbe13864b8b7d009e7a6c1002eaa3b6e94b",
}
"""Parts of the data sets, not the revisions that the loaders pin."""
COMMON = {"max_length": 192, "eval_rows": 256}
METHODS = ("sft", "dpo")
_SFT = {"steps": 16, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-3}
# A pair says far less than a demonstration does: a margin shows after some hundred of them.
_LONG = {"steps": 100, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 5e-4}
_SHORT = {**_LONG, "steps": 50, "learning_rate": 1e-3}
FIGURES = {"sft": ("loss",), "dpo": ("rewards/accuracies", "rewards/margins")}


def recipe(method: str, adapter: str, data: str) -> dict[str, Any]:
    """What one arm is trained with; half the steps at twice the rate where many arms cost too many hours."""
    if method == "sft":
        return {**COMMON, **_SFT}
    return {**COMMON, **(_LONG if adapter == "lora" and data.startswith("hh-rlhf") else _SHORT)}


def train(base: str, folder: Path) -> None:
    """Train every arm that is not there yet."""
    import harness
    from harness.contracts.registry import load_plugins

    registry = load_plugins()
    for data in DATA:
        # One step at next to no learning rate: the held-out loss of the start.
        options = {**COMMON, **_SFT, "steps": 1, "learning_rate": 1e-12}
        name = f"start-{data.replace(':', '-')}"
        harness.align(
            "sft", base, data, options=options, out=folder / name, registry=registry, data_revisions=REVISIONS
        )
    # Seeds innermost: an interrupted run leaves whole rows of the table.
    for adapter, method, data, seed in itertools.product(("lora", "qlora"), METHODS, DATA, SEEDS):
        name = f"{method}-{adapter}-{data.replace(':', '-')}-s{seed}"
        harness.align(
            method,
            base,
            data,
            adapter=adapter,
            seed=seed,
            options=recipe(method, adapter, data),
            out=folder / name,
            registry=registry,
            data_revisions=REVISIONS,
        )
        print(name, flush=True)


def evaluate(base: str, folder: Path, reward: str) -> None:
    """`harness eval` of the base and of one seed of every arm, on one loaded engine."""
    import harness

    arms = sorted(path for path in folder.glob("*-s0") if (path / "adapter_config.json").exists())
    done = harness.evaluate(
        base,
        adapters=tuple(map(str, arms)),
        tasks=["real_toxicity"],
        engine="transformers",
        limit=48,
        options={"real_toxicity": {"decoding": {"max_new_tokens": 24}, "scorer": {"model": reward}}},
        data_revisions=REVISIONS,
        out=folder / "eval",
    )
    found = [
        {"arm": row.adapter or "base", "n": row.n, "mean": row.mean, "ci95": row.ci95, "step": row.step}
        for row in done.rows
        if row.metric == "toxicity_reward"
    ]
    (HERE / "records").mkdir(exist_ok=True)
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    (HERE / "records" / "toxicity.json").write_text(text, encoding="utf-8")


def collect(folder: Path) -> None:
    """Held-out figures of every arm, over its seeds."""
    arms = []
    for data in DATA:
        start = _values(folder / f"start-{data.replace(':', '-')}", "loss")
        for method, names in FIGURES.items():
            for adapter in ("lora", "qlora"):
                paths = [folder / f"{method}-{adapter}-{data.replace(':', '-')}-s{seed}" for seed in SEEDS]
                if not all((path / "adapter_config.json").exists() for path in paths):
                    continue  # a row needs all its seeds
                arms.append(
                    {
                        "data": data,
                        "method": method,
                        "adapter": adapter,
                        "recipe": recipe(method, adapter, data),
                        "steps": [_json(path / "training" / "status.json")["id"][:12] for path in paths],
                        "digests": [_json(path / "training" / "status.json")["digest"][:12] for path in paths],
                        "figures": {
                            name: _over_seeds(paths, name, start if name == "loss" else None) for name in names
                        },
                    }
                )
    (HERE / "records").mkdir(exist_ok=True)
    record = {"seeds": list(SEEDS), "arms": arms}
    (HERE / "records" / "arms.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _values(path: Path, name: str) -> dict[str, float]:
    from harness.steps.journal import read_rows

    return {row["id"]: row[name] for row in read_rows(path / "training" / "heldout.jsonl.gz")}


def _over_seeds(paths: list[Path], name: str, start: dict[str, float] | None) -> dict[str, Any]:
    """Mean over rows and seeds with the noise of both; of a loss, its change from the start."""
    import numpy as np

    from harness.core.stats import Seeds, crossed_mean

    found = [_values(path, name) for path in paths]
    ids = sorted(set.intersection(*(set(values) for values in found)))
    matrix = np.array([[values[i] - (start[i] if start else 0.0) for i in ids] for values in found])
    summary = crossed_mean(Seeds(matrix))
    assert summary.interval is not None
    return {
        "n_rows": len(ids),
        "n_seeds": len(paths),
        "mean": summary.mean,
        "ci95": [summary.interval.low, summary.interval.high],
        "method": summary.interval.method,
        "per_seed": [float(value) for value in matrix.mean(axis=1)],
        "start": float(np.mean([start[i] for i in ids])) if start else None,
    }


def _how(arms: list[dict[str, Any]]) -> list[str]:
    """How the intervals of these records were made: before 0.1 was out, by a bootstrap."""
    if any("method" in figure for arm in arms for figure in arm["figures"].values()):
        how = ("by Student's t with the noise of seeds and", "of rows (docs/reading-the-numbers.md); the means")
        return [f"Held-out rows share no prompt with training rows. Intervals are 95 %, {how[0]}", how[1]]
    return [
        "Held-out rows share no prompt with training rows. Intervals are 95 %, seeds and rows resampled independently",
        "(10,000 draws); over three seeds such an interval is too narrow when training noise dominates, so the means",
    ]


def render() -> str:
    """The page, from the records alone."""
    record = _json(HERE / "records" / "arms.json")
    lines = [
        "# Alignment on a tiny model",
        "",
        "Mechanics and directions on a real 8 M Llama (`tiny-instruct`), on a CPU in fp32; no headline numbers.",
        f"Seeds {', '.join(map(str, record['seeds']))}; "
        + ", ".join(f"{name} {value}" for name, value in sorted(COMMON.items()))
        + "; a recipe is steps x rows at a learning rate.",
        "",
        *_how(record["arms"]),
        "of the seeds stand beside it. `beavertails:helpful` has no row here: its labels are null in this copy of the",
        "data.",
        "",
        "| data | method | adapter | recipe | figure | mean | 95 % interval | per seed | rows |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in record["arms"]:
        for name, figure in arm["figures"].items():
            shown = f"change of loss (start {figure['start']:.3f})" if figure["start"] is not None else _TITLES[name]
            low, high = figure["ci95"]
            seeds = ", ".join(f"{value:.3f}" for value in figure["per_seed"])
            own = arm["recipe"]
            trained = f"{own['steps']} x {own['batch_size']} at {own['learning_rate']:g}"
            lines.append(
                f"| {arm['data']} | {arm['method']} | {arm['adapter']} | {trained} | {shown} | {figure['mean']:.3f} "
                f"| [{low:.3f}, {high:.3f}] | {seeds} | {figure['n_rows']} |"
            )
    lines += ["", _verdict(record["arms"]) + _untrained(record["arms"]), ""]
    lines += [
        "## Evaluated",
        "",
        "`harness eval` of the base and of seed 0 of every arm: `real_toxicity`, the 48 most severe prompts, 24 new",
        "tokens, scored by `tiny-toxicity` (higher is less toxic). So few steps and prompts show that arms can be",
        "trained and evaluated alike, not which method is better.",
        "",
        "| arm | toxicity_reward | 95 % interval | n |",
        "| --- | --- | --- | --- |",
    ]
    for row in _json(HERE / "records" / "toxicity.json"):
        lines.append(
            f"| {row['arm']} | {row['mean']:.3f} | [{row['ci95'][0]:.3f}, {row['ci95'][1]:.3f}] | {row['n']} |"
        )
    lines.append("")
    return "\n".join(lines)


_TITLES = {"rewards/accuracies": "preference accuracy", "rewards/margins": "reward margin"}
_NEUTRAL = {"loss": 0.0, "rewards/accuracies": 0.5, "rewards/margins": 0.0}


def _verdict(arms: list[Any]) -> str:
    """How many figures moved the right way, and of how many the interval says so."""
    right = sure = total = 0
    for arm in arms:
        for name, figure in arm["figures"].items():
            sign = -1 if name == "loss" else 1
            total += 1
            right += sign * (figure["mean"] - _NEUTRAL[name]) > 0
            edge = figure["ci95"][1] if sign < 0 else figure["ci95"][0]
            sure += sign * (edge - _NEUTRAL[name]) > 0
    return (
        f"Of {total} figures {right} moved the right way (a lower loss, a margin above 0, an accuracy above one half); "
        f"of {sure} the interval excludes no movement."
    )


def _untrained(arms: list[Any]) -> str:
    """Which rows the table lacks."""
    have = {(arm["method"], arm["adapter"], arm["data"]) for arm in arms}
    wanted = itertools.product(METHODS, ("lora", "qlora"), DATA)
    absent = [
        f"{method} with {adapter} on {data}" for method, adapter, data in wanted if (method, adapter, data) not in have
    ]
    return f" Not trained, for want of hours: {', '.join(absent)}." if absent else ""


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", base, folder]:
            train(base, Path(folder))
        case ["evaluate", base, folder, reward]:
            evaluate(base, Path(folder), reward)
        case ["collect", folder]:
            collect(Path(folder))
        case ["render"]:
            (HERE / "README.md").write_text(render(), encoding="utf-8")
        case _:
            sys.exit(__doc__)
