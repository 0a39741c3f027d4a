"""Logs of other programs beside runs of ours on one board: rows of their own, in columns of what was asked the same."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from harness.report.board.build import build_board
from harness.report.board.gather import EXTERNAL
from harness.report.board.text import board_csv, board_markdown
from tests.report.external.test_lm_eval_log import FIXTURES, results_of, rewrite

SyntheticStudy = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "board.py"))["SyntheticStudy"]
A, B = "base", "instruct"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES, tmp_path / "logs")
    return tmp_path / "logs"


@pytest.fixture
def ours(tmp_path: Path, logs: Path) -> Path:
    """A run that was asked a task of the same name as one of the logs, with as many samples."""
    name = next(iter(results_of(logs / A)["results"]))
    return Path(SyntheticStudy(tmp_path / "ours", samples=20, tasks=(name,)).write([]))


def test_two_logs_share_columns_and_a_run_of_ours_none(ours: Path, logs: Path) -> None:
    board = build_board([ours, logs / A, logs / B])
    assert [row.kind for row in board.rows] == ["base", EXTERNAL, EXTERNAL]
    assert all(row.name.endswith(" (lm-eval)") and row.base is None for row in board.rows[1:])
    assert board.rows[1].name != board.rows[2].name
    columns = {row.key: set(row.cells) for row in board.rows}
    mine, first, second = (columns[row.key] for row in board.rows)
    assert first and first == second and not mine & first
    for row, folder in zip(board.rows[1:], (A, B), strict=True):
        results = results_of(logs / folder)["results"]
        for column in board.columns:
            if (cell := row.cells.get(column.key)) is not None:
                metric, _, kept = column.metric.partition(",")
                assert cell.mean == results[column.task][f"{metric},{kept or 'none'}"]
    text = board_markdown(board)
    assert text.count("(lm-eval)") >= 2 and f",{EXTERNAL}," in board_csv(board)


@pytest.mark.parametrize("what", ["prompt", "instruct_fewshot", "instruct_limit"])
def test_what_was_asked_otherwise_is_another_column(logs: Path, what: str) -> None:
    """Ids alone say nothing: they are the same numbers in every log."""
    if what == "prompt":
        for task in _with_samples(logs / B):
            rewrite(logs / B, task, _another_prompt)
    board = build_board([logs / A, logs / (B if what == "prompt" else what)])
    first, second = ({board.column(key).task for key in row.cells} for row in board.rows)
    assert first & second
    assert not set(board.rows[0].cells) & set(board.rows[1].cells)
    again = [column for column in board.columns if column.task in first & second]
    assert all(column.differs and column.rank_n is None for column in again)


def _another_prompt(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line | ({"prompt_hash": "0" * 64} if line["doc_id"] == 0 else {}) for line in lines]


def _with_samples(folder: Path) -> list[str]:
    return [file.name.removeprefix("samples_").rsplit("_", 1)[0] for file in folder.rglob("samples_*.jsonl")]


def test_means_alone_have_no_cell(logs: Path) -> None:
    board = build_board([logs / A, logs / "instruct_means"])
    assert not board.rows[1].cells
    assert any("its log holds no samples" in note for note in board.rows[1].notes)


def test_the_command_line(cli: Any, ours: Path, logs: Path, tmp_path: Path) -> None:
    (file,) = (logs / A).rglob("results_*.json")
    ran = cli("report", ours, file, "--out", tmp_path / "both")
    assert ran.code == 0, ran.err
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count('<span class="tag">made elsewhere</span>') == 1
    assert len(json.loads((tmp_path / "both" / "board.json").read_text())["rows"]) == 2
    ran = cli("report", file, "--png", "--out", tmp_path / "one")
    assert ran.code == 2 and "--png: is of a board, and a log alone has none" in ran.err
    ran = cli("report", ours, file)
    assert ran.code == 2 and "--out: 2 runs have no report folder in common" in ran.err
