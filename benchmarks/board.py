"""How long a board takes: 1,000 arms x 5 tasks of synthetic records, in 200 rows of five seeds.

    python benchmarks/board.py [--arms 1000] [--tasks 5] [--seeds 5] [--samples 200] [--keep FOLDER]

The records are real step folders, written through the store; their scores are drawn from a population whose truth is
known, so that tests use the same generator. Printed are process seconds of `write_board`, and the sizes of its files.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.core.records import Metric, Row, StepRecord, digest_of
from harness.core.stats import summarise
from harness.report.board.write import write_board
from harness.steps.files import write_json
from harness.steps.journal import rows_digest, write_rows
from harness.steps.provenance import file_digest
from harness.steps.step import Step, make_step
from harness.steps.store import RunStore

ACC = Metric(name="acc", higher_is_better=True, unit="proportion", low=0.0, high=1.0, chance=0.25)
METHODS = ("sft", "dpo", "ipo", "orpo")


@dataclass(frozen=True)
class Family:
    """Arms that differ in their seed alone, and how much better than their base they truly are, by task."""

    base: str
    factors: Mapping[str, Any]
    effects: Sequence[float]
    """Shift of the latent ability, one for each task; 0 is no effect."""
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    spread: float = 0.0
    """Standard deviation of the shift over seeds: training noise."""

    @property
    def name(self) -> str:
        """As a study calls it, without the seed."""
        return "-".join(str(value) for key, value in self.factors.items() if key != "base") + f"-{self.base}"


@dataclass
class SyntheticStudy:
    """A study's folder with scores that are right where ability + question + noise is above 0, all three normal."""

    root: Path
    bases: Sequence[str] = ("llama",)
    tasks: Sequence[str] = ("quiz",)
    samples: int = 200
    seed: int = 0
    name: str = "synthetic"
    claims: Sequence[Mapping[str, Any]] = ()
    level: float = 0.3
    leaves: int = 1
    arms: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.store = RunStore(self.root)
        self.questions = {task: self.rng.normal(0, 1.0, self.samples) for task in self.tasks}

    def write(self, families: Sequence[Family]) -> Path:
        """Write bases, arms and plan; returns the run's folder."""
        # What is measured is reading, and tests need no durable disk.
        held, os.fsync = os.fsync, lambda _: None
        try:
            for base in self.bases:
                model = {"name": base, "weights_digest": digest_of(base)}
                self.evaluations[base] = {"model": model, "engine": {"name": "transformers"}, "arms": [], "tasks": []}
                self._arm(base, base, "base", {"base": base, "method": "base"}, [self.level] * len(self.tasks), None)
            for family in families:
                for seed in family.seeds:
                    shift = self.rng.normal(0, family.spread) if family.spread else 0.0
                    levels = [self.level + effect + shift for effect in family.effects]
                    told = {**family.factors, "base": family.base, "seed": seed}
                    self._arm(f"{family.name}-s{seed}", family.base, "align", told, levels, family.name)
            plan = {"study": self.name, "summary": "synthetic", "arms": self.arms, "claims": list(self.claims)}
            write_json(self.store.plan_file, {**plan, "evaluations": list(self.evaluations.values()), "steps": []})
            write_json(self.root / "index.json", {"ids": self.ids, "left_out": {}})
        finally:
            os.fsync = held
        return self.root

    def _arm(
        self, name: str, base: str, kind: str, factors: Mapping[str, Any], levels: Sequence[float], recipe: str | None
    ) -> None:
        made_by = self._made(name, factors, recipe) if recipe is not None else None
        self.arms.append(
            {"name": name, "kind": kind, "base": base, "factors": dict(factors), "made_by": made_by, "from": []}
        )
        label = None if kind == "base" else name
        adapter = None if label is None else {"name": name}
        evaluation = self.evaluations[base]
        evaluation["arms"].append({"name": name, "label": label, "adapter": adapter, "folded": None})
        identity = {"model": {"weights": digest_of(base)}, "adapter": label and digest_of(name), "engine": "synthetic"}
        for task, level in zip(self.tasks, levels, strict=True):
            asked = {**identity, "task": {"name": task}, "variant": "raw", "limit": None, "data": {}, "seed": 0}
            answers = make_step("answers", asked, arm=name)
            folder = self.store.step("answers", name, answers.id)
            folder.begin(answers, {"task": task}, {"harness": "0.1.0"})
            folder.finish(StepRecord(id=answers.id, kind="answers", status="done", digest=digest_of([name, task])))
            scores = self._scores(name, base, label, task, level, answers)
            evaluation["tasks"].append(
                {"task": task, "arm": name, "version": 1, "answers": answers.id, "scores": [scores]}
            )

    def _made(self, name: str, factors: Mapping[str, Any], recipe: str) -> str:
        step = make_step("align", {"method": factors["method"], "recipe": recipe, "seed": factors["seed"]}, arm=name)
        folder = self.store.step("align", name, step.id)
        folder.begin(step, {}, {"harness": "0.1.0"})
        folder.finish(StepRecord(id=step.id, kind="align", status="done"))
        return step.id

    def _scores(self, name: str, base: str, label: str | None, task: str, level: float, answers: Step) -> str:
        right = self.rng.normal(0, 1.0, self.samples) < level + self.questions[task]
        values = right.astype(float).tolist()
        step = make_step("scores", {"answers": answers.id, "scorer": {"name": "match"}, "scorer_code": 1}, arm=name)
        folder = self.store.step("scores", name, step.id)
        described = {"task": task, "variant": "raw", "scorer": "match", "metrics": [ACC.model_dump(mode="json")]}
        folder.begin(step, described, {"harness": "0.1.0"})
        rows = [
            {"id": f"q{n}", "leaf": f"leaf{n % self.leaves}" if self.leaves > 1 else None, "values": {"acc": value}}
            | {"reason": None, "cut": False, "hit_limit": False, "detail": {}}
            for n, value in enumerate(values)
        ]
        write_rows(folder.artifact / "samples.jsonl.gz", rows)
        told = summarise(values, kind="proportion")
        assert told.interval is not None
        ends = {"mean": told.mean, "stderr": told.stderr, "ci95": (told.interval.low, told.interval.high)}
        common = {"metric": "acc", "unit": "proportion", "higher_is_better": True, "chance": 0.25, "step": step.id}
        row = Row(model=base, adapter=label, task=task, scorer="match", n=told.n, **ends, **common)
        write_json(folder.artifact / "scores.json", {"rows": [row.model_dump(mode="json")]})
        files = {"scores.json": file_digest(folder.artifact / "scores.json")}
        folder.finish(StepRecord(id=step.id, kind="scores", status="done", digest=rows_digest(rows), files=files))
        return step.id


def many(arms: int, tasks: int, seeds: int, rng: np.random.Generator) -> list[Family]:
    """So many arms on four bases, half of them with an effect."""
    bases = [f"base{n}" for n in range(4)]
    families = []
    for n in range(-(-arms // seeds)):
        factors = {"method": METHODS[n // 4 % 4], "data": f"d{n // 16}", "adapter": "lora"}
        effects = rng.normal(0.3, 0.2, tasks) if n % 2 else np.zeros(tasks)
        families.append(Family(bases[n % 4], factors, effects.tolist(), tuple(range(seeds)), 0.05))
    return families


def main() -> None:
    """Write the records, build the board, print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("arms", 1000), ("tasks", 5), ("seeds", 5), ("samples", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, help="folder for the records and the board; a temporary one by default")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (asked.keep or Path(temporary)) / "run"
        tasks = [f"task{n}" for n in range(asked.tasks)]
        study = SyntheticStudy(root, [f"base{n}" for n in range(4)], tasks, asked.samples)
        study.write(many(asked.arms, asked.tasks, asked.seeds, np.random.default_rng(1)))
        began, wall = time.process_time(), time.perf_counter()
        board = write_board([root], root.parent / "board")
        took = f"{time.process_time() - began:.1f} s of processor, {time.perf_counter() - wall:.1f} s of clock"
        print(f"{len(study.arms)} arms, {len(board.rows)} rows, {len(board.columns)} columns: {took}")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
        for file in sorted((root.parent / "board").rglob("*.*")):
            print(f"{file.name} {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
