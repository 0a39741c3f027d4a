"""Judges and wordings on a board: the spread, the order of the arms, claims that hang on the judge, what is missing."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from harness.core.records import StepRecord, digest_of
from harness.report.board.build import build_board
from harness.report.board.model import Board, JudgePanel
from harness.report.board.text import board_csv, board_markdown
from harness.report.board.write import write_board
from harness.report.pairing import match_metrics
from harness.report.study import open_runs
from harness.steps.files import read_json, write_json
from harness.steps.journal import read_rows, rows_digest, write_rows
from harness.steps.provenance import file_digest

_generator = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "board.py"))
SyntheticStudy, Family = _generator["SyntheticStudy"], _generator["Family"]
CLAIM = {"name": "helps", "a": {"method": "dpo"}, "b": {"method": "base"}, "task": "quiz"}
Change = Callable[[str, int, float], float]
"""Of the arm, the sample's number and the first judge's verdict: another judge's."""


def same(arm: str, n: int, value: float) -> float:
    return value


def flipped(arm: str, n: int, value: float) -> float:
    return 1 - value


def study(root: Path, *effects: float) -> Path:
    """A base and arms of three seeds; the first 60 samples."""
    families = [
        Family("llama", {"method": method, "adapter": "lora"}, [effect], (0, 1, 2), 0.02)
        for method, effect in zip(("dpo", "sft"), effects, strict=False)
    ]
    path: Path = SyntheticStudy(root, samples=60, claims=[CLAIM]).write(families)
    return path


def second(run: Path, changes: Mapping[tuple[str, str | None], Change]) -> Path:
    """Have further judges score all answers: records as their steps would leave them, and a plan that names all."""
    plan = read_json(run / "plan.json")
    for evaluation in plan["evaluations"]:
        for task in evaluation["tasks"]:
            (first,) = task["scores"]
            task["judged"] = [{"scores": first, "scorer": "match", "judge": "a", "wording": "ours-1"}]
            for (judge, wording), change in changes.items():
                step = _scored(run, task["arm"], first, f"{judge}+{wording}", change)
                task["scores"].append(step)
                task["judged"].append({"scores": step, "scorer": "match", "judge": judge, "wording": wording})
    write_json(run / "plan.json", plan)
    return run


def folder_of(run: Path, step: str) -> Path:
    (found,) = run.glob(f"steps/scores-*-{step[:12]}")
    return found


def _scored(run: Path, arm: str, first: str, name: str, change: Change) -> str:
    step = digest_of([first, name])
    to = run / "steps" / f"scores-{arm}-{step[:12]}"
    shutil.copytree(folder_of(run, first), to)
    info = read_json(to / "step.json")
    info["identity"]["scorer"] = {"name": "match", "judge": name}
    write_json(to / "step.json", {**info, "id": step})
    rows = read_rows(to / "artifact" / "samples.jsonl.gz")
    for n, row in enumerate(rows):
        row["values"]["acc"] = change(arm, n, row["values"]["acc"])
    (to / "artifact" / "samples.jsonl.gz").unlink()
    write_rows(to / "artifact" / "samples.jsonl.gz", rows)
    scores = read_json(to / "artifact" / "scores.json")
    mean = sum(row["values"]["acc"] for row in rows) / len(rows)
    scores["rows"][0] |= {"mean": mean, "task": f"quiz@{name}", "step": step}
    write_json(to / "artifact" / "scores.json", scores)
    record = StepRecord.model_validate(read_json(to / "status.json"))
    files = {"scores.json": file_digest(to / "artifact" / "scores.json")}
    told = record.model_copy(update={"id": step, "digest": rows_digest(rows), "files": files})
    write_json(to / "status.json", told.model_dump(mode="json"))
    return step


def panel_of(board: Board) -> JudgePanel:
    (panel,) = board.judges
    return panel


def test_spread_order_and_agreement_beside_the_first_judges_numbers(tmp_path: Path) -> None:
    """Judge b calls the first ten samples of every arm right, and turns all verdicts round in its second wording."""
    lenient = {("b", "ours-1"): lambda arm, n, value: 1.0 if n < 10 else value, ("b", "ours-2"): flipped}
    run = second(study(tmp_path / "run", 1.0, 0.5), lenient)
    board = build_board([run])
    panel = panel_of(board)
    assert [one.name for one in panel.askers] == ["a, ours-1", "b, ours-1", "b, ours-2"]
    assert [column.primary for column in board.columns] == [True, False, False]
    first = next(one for one in board.columns if one.primary)
    assert (first.key, first.task, panel.column) == (panel.column, "quiz", first.key)
    for row in board.rows:
        means = [row.cells[one.column or ""].mean or 0.0 for one in panel.askers]
        spread = row.cells[first.key].spread
        assert spread is not None and row.cells[first.key].mean == means[0]
        assert (spread.low, spread.high, spread.n) == (min(means), max(means), 3)
        assert means[2] == pytest.approx(1 - means[0])
    said = {(one.a, one.b): one for one in panel.agreement}
    turned = said["a, ours-1", "b, ours-2"]
    # All seven arms' samples; where every verdict is turned round, the order of the rows is, too.
    assert (turned.tau, turned.n_rows, turned.n_answers) == (-1.0, 3, 7 * 60)
    assert turned.kappa is not None and turned.kappa < 0
    assert said["a, ours-1", "b, ours-1"].tau == 1.0
    assert [one for one in panel.remarks if "agree less than chance would" in one]
    text = board_markdown(board)
    assert "## Judges of quiz, acc" in text and "it is no interval" in text
    header, *lines = board_csv(board).splitlines()
    place = header.split(",").index("judges")
    assert sorted(line.split(",")[place] for line in lines) == [""] * 6 + ["3"] * 3
    write_board([run], tmp_path / "out", samples=False)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Judges of quiz, acc" in page and "Kendall" in page


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [(same, "supported", "supported"), (flipped, "undecided (judge)", "contradicted"), (None, "undecided (judge)", "")],
)
def test_a_claim_holds_under_every_judge_or_is_undecided(
    tmp_path: Path, change: Change | None, status: str, said: str
) -> None:
    """The effect is 1.2 standard deviations: far beyond chance; a judge who says 1 to everything sees none of it."""
    change = change or (lambda arm, n, value: 1.0)
    (claim,) = build_board([second(study(tmp_path / "run", 1.2), {("b", "ours-1"): change})]).claims
    assert claim.status == status
    assert claim.by_judge == {"a, ours-1": "supported", "b, ours-1": said or "undecided"}
    if status != "supported":
        assert claim.why.startswith(f"supported under a, ours-1, {said or 'undecided'} under b, ours-1; ")


def test_a_claim_that_names_a_judge_is_about_that_judge(tmp_path: Path) -> None:
    run = second(study(tmp_path / "run", 1.2), {("b", "ours-1"): flipped})
    plan = read_json(run / "plan.json")
    plan["claims"] = [{**CLAIM, "task": "quiz@b+ours-1"}]
    write_json(run / "plan.json", plan)
    (claim,) = build_board([run]).claims
    assert (claim.status, claim.by_judge) == ("contradicted", {})


def _failed(run: Path, step: str) -> None:
    folder = folder_of(run, step)
    record = StepRecord.model_validate(read_json(folder / "status.json"))
    failed = record.model_copy(update={"status": "failed", "error": "the judge is down", "digest": None, "files": {}})
    write_json(folder / "status.json", failed.model_dump(mode="json"))


def _stale(run: Path, step: str) -> None:
    folder = folder_of(run, step)
    record = StepRecord.model_validate(read_json(folder / "status.json"))
    told = record.model_copy(update={"made_from": {"answers": digest_of("other answers")}})
    write_json(folder / "status.json", told.model_dump(mode="json"))


def _gone(run: Path, step: str) -> None:
    shutil.rmtree(folder_of(run, step))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (_failed, "b, ours-1: failed: the judge is down"),
        (_stale, "b, ours-1: stale: it scored other answers than those that are there now"),
        (_gone, "b, ours-1: not finished"),
    ],
)
def test_a_judge_whose_record_is_missing_or_stale_is_named_and_never_left_out_in_silence(
    tmp_path: Path, harm: Callable[[Path, str], None], why: str
) -> None:
    run = second(study(tmp_path / "run", 1.2), {("b", "ours-1"): same})
    task = next(one for one in read_json(run / "plan.json")["evaluations"][0]["tasks"] if one["arm"].endswith("-s1"))
    harm(run, task["scores"][1])
    board = build_board([run])
    panel = panel_of(board)
    base, arm = board.rows
    column = panel.column or ""
    assert base.cells[column].spread is not None
    assert arm.cells[column].spread is None
    assert (arm.cells[column].spread_note or "").startswith(why)
    (missing,) = panel.missing
    assert missing.startswith(f"{arm.name}: {why}")
    (claim,) = board.claims
    assert claim.status == "undecided (judge)"
    assert claim.by_judge == {"a, ours-1": "supported", "b, ours-1": "not all numbers"}
    assert "judges: not all known" in board_markdown(board)


def test_the_judge_who_counts_is_never_replaced_in_silence(tmp_path: Path) -> None:
    run = second(study(tmp_path / "run", 1.2), {("b", "ours-1"): same})
    for task in read_json(run / "plan.json")["evaluations"][0]["tasks"]:
        _failed(run, task["scores"][0])
    board = build_board([run])
    panel = panel_of(board)
    assert panel.column is None
    assert panel.remarks == ("a, ours-1, who would count, has no numbers: those of the others are theirs alone",)
    (claim,) = board.claims
    assert (claim.status, claim.effect) == ("undecided (judge)", None)
    assert claim.why == panel.remarks[0]
    assert [column.task for column in board.columns] == ["quiz@b+ours-1"]


def test_compare_pairs_each_judge_with_itself(tmp_path: Path) -> None:
    run = second(study(tmp_path / "run", 1.2), {("b", "ours-1"): flipped})
    (found,) = open_runs(run).values()
    base, arm = (one.tasks[0] for one in found.arms[:2])
    pairs = [(a.row.task, b.row.task) for a, b in match_metrics(base, arm) if a.row is not None and b.row is not None]
    assert pairs == [("quiz", "quiz"), ("quiz@b+ours-1", "quiz@b+ours-1")]
