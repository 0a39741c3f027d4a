"""This report: `train` makes the arms, `collect` takes figures out of them, `render` writes README.md from the records.

    python build.py train WORLD FOLDER      WORLD: folder of the demo's world, of `harness demo`
    python build.py collect FOLDER
    python build.py render

The records hold ids, digests and numbers.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
ROWS = 3_000
COMMON: dict[str, Any] = {
    "batch_size": 16,
    "micro_batch_size": 16,
    "eval_rows": 128,
    "max_length": 96,
    "control_steps": 80,
    "steps": 40,
}
ARMS: dict[str, dict[str, Any]] = {
    "prompt, 1 token": {"control": "prompt", "tokens": 1},
    "prompt, 8 tokens": {"control": "prompt", "tokens": 8},
    "lora, rank 2": {"control": "lora", "control_rank": 2, "control_alpha": 4},
    "lora, rank 8": {"control": "lora", "control_rank": 8, "control_alpha": 16},
}
PLACES = {"control": "step/stages/control", "control, then model": "step"}
VALUES = {1.0: "good", 0.0: "bad"}


def write_rows(folder: Path) -> Path:
    """Answers in both registers to words in both, rated 1 where they are polite."""
    from harness.demo.language import Language

    file = folder / "rated.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": prompt, "completion": response, "ratings": {"preference": float(polite)}}
        for prompt, response, polite in Language(0).rated(ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def train(world: Path, folder: Path) -> None:
    """Train every arm that is not there yet."""
    import harness
    from harness.contracts.registry import load_plugins

    registry, data = load_plugins(), write_rows(folder)
    # Arms innermost: an interrupted run leaves whole seeds.
    for seed, (name, own) in itertools.product(SEEDS, ARMS.items()):
        out = folder / f"{_slug(name)}-s{seed}"
        options = {**COMMON, **own}
        harness.align(
            "meet", str(world / "base"), f"jsonl:{data}", out=out, seed=seed, options=options, registry=registry
        )
        print(out.name, flush=True)


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def collect(folder: Path) -> None:
    """Held-out figures of every arm whose seeds are all there, over its seeds, by the value of the rows."""
    texts = (folder / "rated.jsonl").read_text(encoding="utf-8").splitlines()
    rated = [VALUES[json.loads(line)["ratings"]["preference"]] for line in texts]
    arms = []
    for name, place in itertools.product(ARMS, PLACES):
        paths = [folder / f"{_slug(name)}-s{seed}" for seed in SEEDS]
        if not all((path / "step" / "status.json").exists() for path in paths):
            continue  # a row needs all its seeds
        status = [json.loads((path / PLACES[place] / "status.json").read_text(encoding="utf-8")) for path in paths]
        figures = {}
        for value in VALUES.values():
            for figure in ("loss", "gain"):
                found = [_values(path / PLACES[place], figure, rated, value) for path in paths]
                figures[f"{figure}/{value}"] = _over_seeds(found)
        arms.append(
            {"arm": name, "stages": place, "digests": [one["digest"][:12] for one in status], "figures": figures}
        )
    (HERE / "records").mkdir(exist_ok=True)
    record = {"seeds": list(SEEDS), "rows": ROWS, "common": COMMON, "arms": arms}
    (HERE / "records" / "arms.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _values(place: Path, figure: str, rated: list[str], value: str) -> dict[str, float]:
    """Of the held-out rows with this value; the id of a row of a file ends in the number of its line, from 1."""
    from harness.steps.journal import read_rows

    rows = read_rows(place / "heldout.jsonl.gz")
    return {row["id"]: row[figure] for row in rows if rated[int(row["id"].rpartition("/")[2]) - 1] == value}


def _over_seeds(found: list[dict[str, float]]) -> dict[str, Any]:
    """Mean over rows and seeds with the noise of both."""
    import numpy as np

    from harness.core.stats import Seeds, crossed_mean

    ids = sorted(set.intersection(*(set(values) for values in found)))
    matrix = np.array([[values[i] for i in ids] for values in found])
    summary = crossed_mean(Seeds(matrix))
    assert summary.interval is not None
    ends = [summary.interval.low, summary.interval.high]
    return {
        "n_rows": len(ids),
        "mean": summary.mean,
        "ci95": ends,
        "per_seed": [float(value) for value in matrix.mean(axis=1)],
    }


def render() -> str:
    """The page, from the records alone."""
    record = json.loads((HERE / "records" / "arms.json").read_text(encoding="utf-8"))
    common = record["common"]
    lines = [
        "# MEET on a tiny world",
        "",
        "Does control steer a model of half a million parameters? `meet` on the demo's own world (`harness demo`), where",  # noqa: E501
        "each answer is polite (good) or rude (bad) and the prompt does not say which; on a CPU in fp32.",
        f"{record['rows']:,} rated rows; {common['control_steps']} steps of the control with the model frozen, then",
        f"{common['steps']} of both, {common['batch_size']} rows each; seeds {', '.join(map(str, record['seeds']))}.",
        "",
        "`gain` is log p(answer | its own value) - log p(answer | the other value), in nats per token, on held-out rows",  # noqa: E501
        "whose prompts are in no training row: above 0, the answers of a value are likelier under it. `loss` is their",
        "negative log-likelihood under their own value. Intervals are 95 %, with the noise of seeds and of rows.",
        "",
        "| control | trained | answers | loss | gain | 95 % interval | gain per seed | rows |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    steers = total = 0
    for arm in record["arms"]:
        for value in ("good", "bad"):
            loss, gain = (arm["figures"][f"{figure}/{value}"] for figure in ("loss", "gain"))
            low, high = gain["ci95"]
            steers, total = steers + (low > 0), total + 1
            seeds = ", ".join(f"{one:.3f}" for one in gain["per_seed"])
            lines.append(
                f"| {arm['arm']} | {arm['stages']} | {value} | {loss['mean']:.3f} | {gain['mean']:+.3f} "
                f"| [{low:+.3f}, {high:+.3f}] | {seeds} | {gain['n_rows']} |"
            )
    absent = [name for name in ARMS if name not in {arm["arm"] for arm in record["arms"]}]
    lines += ["", f"In {steers} of {total} rows the interval of the gain lies above 0."]
    if absent:
        lines += [f"Not trained, for want of time: {'; '.join(absent)}."]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", world, folder]:
            train(Path(world), Path(folder))
        case ["collect", folder]:
            collect(Path(folder))
        case ["render"]:
            (HERE / "README.md").write_text(render(), encoding="utf-8")
        case _:
            sys.exit(__doc__)
