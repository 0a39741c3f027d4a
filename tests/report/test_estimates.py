"""A seeded subset on a board: estimates where the base was asked the whole set, and elsewhere the plain mean, named."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from harness.core.records import StepRecord
from harness.report.board.build import build_board
from harness.report.board.estimates import SUBSET
from harness.report.board.model import Board, Cell
from harness.report.board.text import board_csv, board_markdown
from harness.steps.files import read_json, write_json
from harness.steps.journal import read_rows, rows_digest, write_rows
from harness.steps.provenance import file_digest

_generator = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "board.py"))
SyntheticStudy, Family = _generator["SyntheticStudy"], _generator["Family"]


def study(root: Path, name: str, families: list[Any]) -> Path:
    path: Path = SyntheticStudy(root / name, samples=120, leaves=4, name=name).write(families)
    return path


def subset(run: Path, keep: int = 10, values: dict[str, float] | None = None) -> Path:
    """Make a run one that was asked the first ``keep`` samples of each leaf task, and says that they were drawn."""
    for file in run.glob("steps/answers-*/step.json"):
        info = read_json(file)
        info["identity"] |= {"limit": keep, "task": {"name": "quiz", "subset": "seeded"}}
        write_json(file, info)
    for folder in run.glob("steps/scores-*"):
        rows = [row for n, row in enumerate(read_rows(folder / "artifact" / "samples.jsonl.gz")) if n < 4 * keep]
        for row in rows:
            row["values"]["acc"] = (values or {}).get(row["id"], row["values"]["acc"])
        (folder / "artifact" / "samples.jsonl.gz").unlink()
        write_rows(folder / "artifact" / "samples.jsonl.gz", rows)
        scores = read_json(folder / "artifact" / "scores.json")
        scored = [row["values"]["acc"] for row in rows]
        scores["rows"][0] |= {"mean": sum(scored) / len(scored), "n": len(scored)}
        write_json(folder / "artifact" / "scores.json", scores)
        record = StepRecord.model_validate(read_json(folder / "status.json"))
        files = {"scores.json": file_digest(folder / "artifact" / "scores.json")}
        told = record.model_copy(update={"digest": rows_digest(rows), "files": files})
        write_json(folder / "status.json", told.model_dump(mode="json"))
    return run


def cells(board: Board) -> dict[str, Cell]:
    """Of the column that was asked the subset."""
    (column,) = [one for one in board.columns if one.n_samples == 40]
    return {row.name: row.cells[column.key] for row in board.rows if column.key in row.cells}


def renamed(run: Path, scores: str) -> Path:
    """Other ids for the steps of a run, as another question gives; the records are taken as they are."""
    for kind in ("answers", "scores"):
        for folder in list(run.glob(f"steps/{kind}-*")):
            info, record = read_json(folder / "step.json"), read_json(folder / "status.json")
            old, new = info["id"], scores + info["id"][1:]
            write_json(folder / "step.json", {**info, "id": new})
            write_json(folder / "status.json", {**record, "id": new})
            folder.rename(folder.with_name(folder.name.replace(old[:12], new[:12])))
    plan = read_json(run / "plan.json")
    for task in plan["evaluations"][0]["tasks"]:
        task["answers"], task["scores"] = scores + task["answers"][1:], [scores + one[1:] for one in task["scores"]]
    write_json(run / "plan.json", plan)
    return run


def test_means_are_estimates_where_the_base_was_asked_the_whole(tmp_path: Path) -> None:
    """Equal allotment to equal strata: the estimate is the base's whole mean plus the mean difference on the subset."""
    whole = study(tmp_path, "whole", [])
    part = renamed(subset(study(tmp_path, "part", [Family("llama", {"method": "dpo"}, [0.6], (0, 1, 2), 0.05)])), "z")
    alone = cells(build_board([part]))
    assert {cell.part.note for cell in alone.values() if cell.part is not None} == {SUBSET}
    board = build_board([part, whole])
    found = cells(board)
    (column,) = [one for one in board.columns if one.n_samples == 120]
    of_whole = board.rows[0].cells[column.key]
    base, arm = found["llama"], found["dpo-llama"]
    assert base.part is not None and base.part.whole and (base.mean, base.ci95) == (of_whole.mean, of_whole.ci95)
    assert arm.part is not None and arm.mean is not None and of_whole.mean is not None
    plain = [alone[name].mean or 0.0 for name in ("dpo-llama", "llama")]
    assert arm.mean == pytest.approx(of_whole.mean + plain[0] - plain[1])
    assert (arm.part.n, arm.part.n_whole, arm.part.plain) == (40, 120, pytest.approx(plain[0]))
    assert arm.method == "difference_estimator"
    # Differences, verdicts and ranks stay those of the samples that both were asked.
    assert arm.difference == alone["dpo-llama"].difference
    text = board_markdown(board)
    assert "estimated, 40 of 120" in text and "whole set, 120" in text
    assert "subset mean, 40" in board_markdown(build_board([part]))
    lines = [line.split(",") for line in board_csv(board).splitlines()]
    place = lines[0].index("n_whole")
    assert sorted(line[place] for line in lines[1:]) == ["", "120", "120"]


def test_the_first_of_a_set_are_no_draw(tmp_path: Path) -> None:
    run = subset(study(tmp_path, "part", []))
    for file in run.glob("steps/answers-*/step.json"):
        info = read_json(file)
        info["identity"]["task"] = {"name": "quiz"}
        write_json(file, info)
    assert cells(build_board([run, study(tmp_path, "whole", [])]))["llama"].part is None
