"""The board of a study that was really carried out: what folds, and what it is held against."""

from __future__ import annotations

from pathlib import Path

from harness.report.board.build import build_board

ROWS = {
    "tiny": [None],
    "sft-pairs-lora-tiny": [0, 1],
    "dpo-pairs-lora-tiny": [0, 1],
    "merged-tiny": [0, 1],
    "on": [0],
    "short": [0],
    "short-step2": [0],
    "given": [None],
    "sum-tiny": [None],
}
"""Row -> its seeds, by hand; `merged` is one merge for each seed."""


def test_arms_of_a_study_are_rows_with_their_seeds_folded(whole_run: Path) -> None:
    board = build_board([whole_run])
    rows = {row.name: row for row in board.rows}
    assert {name: [seed.seed for seed in row.seeds] for name, row in rows.items()} == ROWS
    base = rows["tiny"]
    assert {row.base for row in board.rows} == {None, base.key}
    assert rows["merged-tiny"].parents == ("sft-pairs-lora-tiny", "dpo-pairs-lora-tiny")
    assert rows["short-step2"].kind == "checkpoint"
    (column,) = board.columns
    assert (column.task, column.n_samples) == ("sums", 6)
    assert all(row.cells[column.key].n == 6 for row in board.rows)
    # Eight rows beside the base, so eight tests.
    assert column.family_size == 8
    assert rows["given"].seeds[0].made_by is None and rows["on"].seeds[0].made_by is not None
