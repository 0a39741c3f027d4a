"""AlpacaEval's annotations, read as runs: win rates as alpaca_eval's, paired by instruction."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.report.compare import compare_runs
from harness.report.external.open import open_any


def annotations(path: Path, model: str, preferences: list[float | None], **other: Any) -> Path:
    rows = [
        {
            "instruction": f"Say {index}.",
            "output_1": f"reference {index}",
            "output_2": f"{model} {index}",
            "generator_1": "reference",
            "generator_2": model,
            "annotator": "judge",
            "preference": preference,
            **other,
        }
        for index, preference in enumerate(preferences)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_win_rates_are_those_of_the_package(tmp_path: Path) -> None:
    from alpaca_eval.metrics import get_winrate

    preferences = [1.0, 2.0, 1.5, 1.25, 1.999, 0, 2.0, 1.1] * 4
    (task,) = open_any(annotations(tmp_path / "annotations.json", "m", preferences)).tasks
    theirs = get_winrate([{"preference": value} for value in preferences])
    rows = {row.metric: row for row in task.scores[0].rows}
    assert 100 * rows["win_rate"].mean == pytest.approx(float(theirs["win_rate"]), rel=1e-14)
    assert 100 * rows["win_rate"].stderr == pytest.approx(float(theirs["standard_error"]), rel=1e-12)
    assert 100 * rows["discrete_win_rate"].mean == pytest.approx(float(theirs["discrete_win_rate"]), rel=1e-14)
    assert (task.name, rows["win_rate"].n) == ("alpaca_eval@judge", 32)


def test_two_models_are_paired_by_instruction(tmp_path: Path) -> None:
    a = annotations(tmp_path / "a.json", "a", [1.0] * 8 + [2.0] * 12)
    b = annotations(tmp_path / "b.json", "b", [2.0] * 8 + [1.0] + [2.0] * 11)
    rows = json.loads(b.read_text())
    b.write_text(json.dumps(rows[::-1]))  # in another order
    (one,) = [one for one in compare_runs(a, b).differences if one.primary]
    # 8 to the better, 1 to the worse: 2 * (1 + 9) / 2**9.
    assert (one.n_better, one.n_worse, one.p_value) == (8, 1, 20 / 512)


def test_pairs_without_a_verdict_are_unscored(tmp_path: Path) -> None:
    (task,) = open_any(annotations(tmp_path / "a.json", "a", [None] + [2.0] * 24 + [1.0] * 15)).tasks
    row = task.scores[0].rows[0]
    assert (row.n, row.n_unscored, row.mean) == (39, 1, 24 / 39)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"generator_1": "another"}, "not comparable: reference reference in A, another in B"),
        ({"output_1": "as before"}, "12 of 12 samples of one id differ in data or prompt"),
        ({"annotator": "gpt"}, None),
    ],
)
def test_other_references_and_judges_are_not_compared(tmp_path: Path, other: dict[str, str], said: str | None) -> None:
    a = annotations(tmp_path / "a.json", "a", [1.0, 2.0] * 6)
    report = compare_runs(a, annotations(tmp_path / "b.json", "b", [2.0] * 12, **other))
    if said is None:  # the judge is part of the task's name
        assert (report.only_a, report.only_b) == (("alpaca_eval@judge:chat",), ("alpaca_eval@gpt:chat",))
    else:
        assert report.differences[0].verdict == "not comparable"
        assert said in report.differences[0].notes[0]


def test_files_that_would_lie_are_refused(tmp_path: Path) -> None:
    file = annotations(tmp_path / "a.json", "a", [1.0, 2.0])
    rows = json.loads(file.read_text())
    for changed, said in (
        ([*rows, rows[0]], "row 3: repeats the instruction 'Say 0.'"),
        ([{**rows[0], "instruction": None}], "row 1: has no instruction to pair it by"),
        ([*rows, {**rows[1], "annotator": "other"}], "Give a file of one model against one reference by one judge."),
        ([{**rows[0], "preference": None}], "holds no verdict"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(UserError) as caught:
            open_any(file)
        assert said in str(caught.value)


@pytest.mark.shared
@pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="needs HARNESS_SHARED")
def test_published_annotations_give_the_published_win_rates() -> None:
    folder = Path(os.environ["HARNESS_SHARED"]) / "data" / "alpaca_eval"
    leaderboard = (folder / "leaderboard_weighted_alpaca_eval_gpt4_turbo.csv").read_text().splitlines()
    column = leaderboard[0].split(",").index("win_rate")
    files = []
    for model in ("alpaca-7b", "vicuna-7b-v1.5"):
        files.append(folder / model / "weighted_alpaca_eval_gpt4_turbo.annotations.json")
        published = float(next(line for line in leaderboard if line.startswith(f"{model},")).split(",")[column])
        mean = open_any(files[-1]).tasks[0].scores[0].rows[0].mean
        assert mean is not None
        assert 100 * mean == pytest.approx(published, abs=1e-9)
    (one,) = [one for one in compare_runs(*files).differences if one.primary]
    assert (one.n, one.verdict) == (805, "better")
