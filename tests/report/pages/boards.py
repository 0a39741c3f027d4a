"""Boards written down by hand, of any size, for the tests of their pages."""

from __future__ import annotations

from typing import Any

from harness.report.board.model import (
    BaseDifference,
    Board,
    BoardRow,
    Cell,
    ClaimResult,
    Column,
    SeedCell,
    SeedRow,
    Source,
)

TASKS = (
    ("mmlu@0", "raw", "acc", "proportion", True),
    ("bbh@3", "raw", "exact_match", "proportion", True),
    ("real_toxicity", "raw", "toxicity", "logit", False),
    ("dangerous_qa", "chat", "attack_success", "proportion", False),
    ("alpaca_eval2@judge", "chat", "win_rate", "percent", True),
)


def column(task: str, variant: str, metric: str, unit: str, higher: bool) -> Column:
    """One column; its key is the task's name."""
    fields: dict[str, Any] = {"task": task, "variant": variant, "metric": metric, "unit": unit, "scorer": "match"}
    return Column(
        key=task, label=f"{task}:{variant}", higher_is_better=higher, primary=True, n_samples=1000, n_clusters=1000,
        rank_note="1 + the rows that are better", **fields,
    )  # fmt: skip


def cell(mean: float, base: float | None, higher: bool, rank: int) -> Cell:
    """A cell 0.02 wide to either side; from 0.05 on its difference from the base is one."""
    difference = None
    if base is not None:
        less = mean - base
        better = (less > 0) is higher
        verdict = "no difference shown" if abs(less) < 0.05 else "better" if better else "worse"
        difference = BaseDifference(
            base="base", n=1000, difference=less, ci_adjusted=(less - 0.02, less + 0.02), p_adjusted=0.01,
            verdict=verdict, detectable_adjusted=0.031,
        )  # fmt: skip
    return Cell(mean=mean, ci95=(mean - 0.02, mean + 0.02), n=1000, rank=rank, difference=difference)


def board(arms: int, *, seeds: int = 1, tasks: int = 5, bases: int = 1, **fields: Any) -> Board:
    """Arm k of a base is 0.01 * (k % 37) - 0.18 from it, on every task; its rank is k."""
    columns = tuple(column(*one) for one in TASKS[:tasks])
    rows = []
    for b in range(bases):
        base = BoardRow(
            key=f"base{b}", name=f"base{b}", kind="base", factors={"method": "base"}, base_name=f"base{b}",
            cells={one.key: cell(0.4, None, True, 1) for one in columns},
        )  # fmt: skip
        rows.append(base)
        for k in range(arms // bases):
            mean = 0.4 + 0.01 * (k % 37) - 0.18
            cells = {one.key: cell(mean, 0.4, bool(one.higher_is_better), k) for one in columns}
            factors = {
                "method": ("sft", "dpo")[k % 2],
                "data": ("helpful", "harmless", "mixture")[k % 3],
                "adapter": "lora",
            }
            name = f"{factors['method']}-{factors['data']}-base{b}-{k}"
            own = tuple(
                SeedRow(
                    name=f"{name}-s{s}", seed=s,
                    cells={one.key: SeedCell(mean=mean, ci95=(mean - 0.03, mean + 0.03), n=1000) for one in columns},
                )
                for s in range(seeds)
            )  # fmt: skip
            rows.append(
                BoardRow(
                    key=f"{b}-{k}", name=name, kind="align", base=base.key, base_name=base.name, factors=factors,
                    cells=cells, seeds=own,
                )
            )  # fmt: skip
    given: dict[str, Any] = {
        "harness": "0.1.0",
        "title": "a study",
        "finding": "One sentence of what was found.",
        "sources": (Source(name="a study", engine="vllm"),),
        "columns": columns,
        "rows": tuple(rows),
    }
    return Board(**{**given, **fields})


CLAIM = ClaimResult(
    name="dpo-safer", summary="DPO lowers attack success", task="dangerous_qa:chat", metric="attack_success",
    direction="lower", status="supported", effect=-0.12, ci95=(-0.16, -0.08), p_adjusted=0.0004, detectable=0.04,
    rows_a=("dpo",), rows_b=("sft",), why="Holm-adjusted p 0.0004 < 0.05",
)  # fmt: skip
