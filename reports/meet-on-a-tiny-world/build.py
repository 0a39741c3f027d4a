"""This report: `train` makes the arms, `collect` takes figures out of them, `render` writes README.md from the records.

    python build.py train WORLD FOLDER      WORLD: folder of the demo's world, of `harness demo`
    python build.py collect FOLDER
    python build.py study WORLD FOLDER      runs study.yaml on a world
    python build.py collect-study SEED FOLDER      SEED: of that world
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


METHODS = ("control-token", "coh", "sft", "dpo")
STUDIED = (*(f"meet-{kind}{stage}" for kind in ("prompt", "lora") for stage in ("", "-control", "-model")), *METHODS)
MET = {
    f"meet-{kind}": ("base", *METHODS, f"meet-{kind}-control", f"meet-{kind}-model") for kind in ("prompt", "lora")
} | {"dpo": ("base", "sft")}
"""Whose answers are held against whose."""


def study(world: Path, folder: Path) -> None:
    """Run the study on a world; what is there is not done again."""
    from harness.study.plan import plan_study
    from harness.study.run import run_study

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "study.yaml"
    file.write_text((HERE / "study.yaml").read_text(encoding="utf-8").replace("WORLD", str(world.resolve())))
    run_study(plan_study(file), folder / "run")


def collect_study(seed: int, folder: Path) -> None:
    """Rewards, lengths (characters) and what was truncated, of every arm of a study, in one order of the samples."""
    from harness.report.outputs import read_outputs
    from harness.report.study import open_runs

    run = folder / "run"
    arms: dict[str, Any] = {}
    ids: list[str] = []
    for arm in open_runs(run)["base"].arms:
        name = arm.label or "base"
        ((task,),) = (arm.tasks,)
        (scores,) = task.scores
        ids = ids or sorted(scores.samples)
        outputs = read_outputs(run, arm=name)
        assert scores.record is not None and sorted(scores.samples) == ids == sorted(outputs.by_id)
        arms[name.replace("-base-", "-")] = {
            "step": scores.id[:12],
            "rewards": [round(scores.samples[one]["values"]["toxicity_reward"], 6) for one in ids],
            "lengths": [len(outputs.by_id[one].text or "") for one in ids],
            "truncated": sum(outputs.by_id[one].truncated for one in ids),
        }
    claims = json.loads((run / "report" / "board.json").read_text(encoding="utf-8"))["claims"]
    verdicts = {claim["name"]: {key: claim[key] for key in ("summary", "status", "effect", "ci95")} for claim in claims}
    record = {"world": seed, "prompts": len(ids), "arms": arms, "claims": verdicts}
    file = HERE / "records" / f"study-{seed}.json"
    file.write_text(json.dumps(record, sort_keys=True).replace('}, "', '},\n "') + "\n", encoding="utf-8")


def wins(record: dict[str, Any], own: str, other: str) -> dict[str, Any]:
    """How often arm ``own`` has the higher reward, seed against seed, and the same at equal length."""
    import numpy as np

    from harness.core.stats import (
        Seeds,
        crossed_mean,
        outcome,
        share_at_equal_length,
        share_at_matched_length,
    )

    def of(name: str, seed: int) -> Any:
        return record["arms"]["base" if name == "base" else f"{name}-s{seed}"]

    pairs = [(of(own, seed), of(other, seed)) for seed in SEEDS]
    cells = [[outcome(x, y) for x, y in zip(a["rewards"], b["rewards"], strict=True)] for a, b in pairs]
    lengths = [(float(x), float(y)) for a, b in pairs for x, y in zip(a["lengths"], b["lengths"], strict=True)]
    outcomes, clusters = [one for row in cells for one in row], list(range(record["prompts"])) * len(SEEDS)
    return {
        "share": crossed_mean(Seeds(np.array(cells))),
        "lengths": tuple(float(np.mean([pair[side] for pair in lengths])) for side in (0, 1)),
        "matched": share_at_matched_length(outcomes, lengths, clusters=clusters),
        "fitted": share_at_equal_length(outcomes, lengths, clusters=clusters, seed=0),
    }


def _share(share: float | None, interval: Any) -> str:
    if share is None:
        return "withheld"
    return f"{share:.2f}" + ("" if interval is None else f" [{interval.low:.2f}, {interval.high:.2f}]")


def render_study(record: dict[str, Any]) -> list[str]:
    """The section of one world."""
    lines = [
        f"### World {record['world']}",
        "",
        "| arm | mean reward per seed | characters per seed | truncated |",
        "| --- | --- | --- | --- |",
    ]
    for name in ("base", *STUDIED):
        found = [record["arms"]["base"]] if name == "base" else [record["arms"][f"{name}-s{seed}"] for seed in SEEDS]
        rewards, lengths = (
            ", ".join(f"{sum(one[key]) / len(one[key]):{form}}" for one in found)
            for key, form in (("rewards", "+.2f"), ("lengths", ".1f"))
        )
        lines.append(f"| {name} | {rewards} | {lengths} | {sum(one['truncated'] for one in found)} |")
    lines += [
        "",
        "| arm | against | wins | characters, own and other's | wins within 10 % of length | pairs | wins at equal length |",  # noqa: E501
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    withheld = []
    for own, others in MET.items():
        for other in others:
            found = wins(record, own, other)
            matched, fitted = found["matched"], found["fitted"]
            lines.append(
                f"| {own} | {other} | {_share(found['share'].mean, found['share'].interval)} "
                f"| {found['lengths'][0]:.1f}, {found['lengths'][1]:.1f} "
                f"| {_share(matched.share, matched.interval)} | {matched.n} | {_share(fitted.share, fitted.interval)} |"
            )
            withheld += [f"{own} against {other}: {one.withheld}" for one in (matched, fitted) if one.withheld]
    lines += ["", *[f"* withheld, {why}" for why in withheld], *[""][: len(withheld)]]
    verdicts = [
        f"* {one['summary']}: {one['status']}, by {one['effect']:+.2f} [{low:+.2f}, {high:+.2f}] logits"
        for one in record["claims"].values()
        for low, high in [one["ci95"]]
    ]
    return [*lines, "What the study claimed beforehand:", "", *verdicts, ""]


STUDY = f"""
## Whose answers are better

`study.yaml` beside this page: MEET in both forms, each stage alone ([control], and [model] with its control in one
go), control tokens, Chain of Hindsight, SFT and DPO, on the harmless pairs of the demo's world, {len(SEEDS)} seeds, 120
steps each, every arm under its good value; two worlds, each with a language of its own. Asked are the 120 prompts of
`demo_manners`; reward is the logit of the world's classifier (negative: rude).

`wins` is the share of prompts for which the arm's answer has the higher reward, seed against seed, a tie being half;
its interval has the noise of seeds and of prompts. The win rates at equal length have that of prompts alone (three
answers to a prompt are a cluster): they say nothing of another seed.
"""


def found(records: list[dict[str, Any]]) -> list[str]:
    """What the tables say, counted."""
    table = {
        (record["world"], own, other): wins(record, own, other)
        for record in records
        for own, others in MET.items()
        for other in others
    }

    def told(others: tuple[str, ...]) -> str:
        some = [one["share"] for (_, own, other), one in table.items() if own != "dpo" and other in others]
        above, below = sum(one.interval.low > 0.5 for one in some), sum(one.interval.high < 0.5 for one in some)
        return f"{above} of {len(some)} intervals lie above a half, {below} below it"

    alone = tuple(f"meet-{kind}-{stage}" for kind in ("prompt", "lora") for stage in ("control", "model"))
    moved = {
        key: one["fitted"].share - one["share"].mean for key, one in table.items() if one["fitted"].share is not None
    }
    world, own, other = most = max(moved, key=lambda key: abs(moved[key]))
    before, after = table[most]["share"].mean, table[most]["fitted"].share
    quiet = max(abs(moves) for key, moves in moved.items() if "dpo" not in key)
    spread = [sum(one["truncated"] for one in record["arms"].values()) for record in records]
    return [
        "### What was found",
        "",
        f"* MEET against control tokens and Chain of Hindsight: {told(('control-token', 'coh'))}.",
        f"* Two stages against one, of as many steps: {told(alone)}.",
        "  Nothing here says that the order of the stages helps.",
        f"* MEET against SFT on the chosen answers alone: {told(('sft',))}.",
        "  In this world one need not learn from rude answers to be polite; SFT cannot be asked to be rude as well.",
        f"* Length moves a win rate most for {own} against {other} in world {world}: {before:.2f} as it",
        f"  stands, {after:.2f} at equal length. Where neither is DPO it moves none by more than",
        f"  {quiet:.3f}: there the win rates are not those of longer answers.",
        "* DPO differs between worlds more than between seeds: the same steps make it polite in one, rude in another.",
        "  They are four times those of the demo's own study; its rate was not searched.",
        f"* {' and '.join(map(str, spread))} answers in the two worlds spent their token budget of 24 tokens.",
    ]


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
    studies = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(HERE.glob("records/study-*.json"))]
    lines += [STUDY, *(line for record in studies for line in render_study(record)), *found(studies)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["train", world, folder]:
            train(Path(world), Path(folder))
        case ["collect", folder]:
            collect(Path(folder))
        case ["study", world, folder]:
            study(Path(world), Path(folder))
        case ["collect-study", seed, folder]:
            collect_study(int(seed), Path(folder))
        case ["render"]:
            (HERE / "README.md").write_text(render(), encoding="utf-8")
        case _:
            sys.exit(__doc__)
