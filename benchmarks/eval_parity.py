"""How far two evaluations of the same questions agree, item by item: two engines, or harness and lm-eval's own logs.

    python benchmarks/eval_parity.py RUN_A RUN_B
    python benchmarks/eval_parity.py RUN_A LM_EVAL_OUTPUT_FOLDER

The second is a run folder of `harness eval`, or what `lm_eval run --log_samples --output_path` wrote. Prints and, with
--json, writes figures alone: no text of a data set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.report.read import open_run

Key = tuple[str, int]


@dataclass
class Task:
    """Answers and scores of one task by leaf task and document number."""

    metric: str
    scores: dict[Key, float] = field(default_factory=dict)
    logprobs: dict[Key, list[float]] = field(default_factory=dict)
    texts: dict[Key, str] = field(default_factory=dict)
    interval: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Share of right answers."""
        return sum(self.scores.values()) / len(self.scores)


def _key(leaf: str, number: str | int) -> Key:
    return leaf, int(number)


def of_run(root: Path) -> dict[str, Task]:
    """Tasks of a harness run, by name."""
    found: dict[str, Task] = {}
    for task in open_run(root).tasks:
        step = next(step for step in task.scores if step.info.get("scorer") == "lm_eval")
        row = next(row for row in step.rows if row.leaf is None and row.metric in ("acc", "exact_match"))
        one = found[task.name] = Task(row.metric, interval=row.ci95)
        for sample, stored in step.samples.items():
            one.scores[_key(*sample.rsplit(":", 1))] = stored["values"][row.metric]
        for sample, texts in step.texts(step.samples).items():
            key = _key(*sample.rsplit(":", 1))
            if texts.generated is not None:
                one.texts[key] = texts.generated
            else:
                one.logprobs[key] = [logprob for _, logprob, _ in texts.choices if logprob is not None]
    return found


def of_lm_eval(folder: Path, like: Mapping[str, Task]) -> dict[str, Task]:
    """The same from lm-eval's samples_*.jsonl; ``like`` says which leaf task belongs to which of our tasks."""
    owner = {leaf: name for name, task in like.items() for leaf, _ in task.scores}
    found: dict[str, Task] = {}
    for file in sorted(folder.rglob("samples_*.jsonl")):
        leaf = file.stem.removeprefix("samples_").rsplit("_", 1)[0]
        if leaf not in owner:
            continue
        one = found.setdefault(owner[leaf], Task(like[owner[leaf]].metric))
        for line in file.read_text(encoding="utf-8").splitlines():
            logged = json.loads(line)
            key = _key(leaf, logged["doc_id"])
            one.scores[key] = float(logged[one.metric])
            first = [repeats[0] for repeats in logged["resps"]]
            if isinstance(first[0], str):
                one.texts[key] = first[0]
            else:
                one.logprobs[key] = [float(logprob) for logprob, _ in first]
    return found


def compare(ours: Task, theirs: Task) -> dict[str, Any]:
    """Figures of agreement; every item of one must be in the other."""
    if set(ours.scores) != set(theirs.scores):
        raise SystemExit(f"not the same items: {len(set(ours.scores) ^ set(theirs.scores))} are in one of them alone")
    pairs = [abs(a - b) for key, row in ours.logprobs.items() for a, b in zip(row, theirs.logprobs[key], strict=True)]
    figures: dict[str, Any] = {
        "metric": ours.metric,
        "items": len(ours.scores),
        "a": ours.mean,
        "b": theirs.mean,
        "a_interval": ours.interval,
        "scores_that_differ": sum(ours.scores[key] != theirs.scores[key] for key in ours.scores),
    }
    if pairs:
        figures |= {"logprobs": len(pairs), "largest_difference": max(pairs)}
    if ours.texts:
        figures["texts_that_differ"] = sum(ours.texts[key] != theirs.texts[key] for key in ours.texts)
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="run folder of harness eval")
    parser.add_argument("b", type=Path, help="another, or lm-eval's output folder")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    ours = of_run(options.a)
    theirs = of_run(options.b) if (options.b / "plan.json").is_file() else of_lm_eval(options.b, ours)
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise SystemExit(f"{options.b} holds none of {', '.join(ours)}")
    figures = {name: compare(ours[name], theirs[name]) for name in shared}
    text = json.dumps(figures, indent=1, sort_keys=True) + "\n"
    if options.json is not None:
        options.json.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
