from __future__ import annotations

import io
import json
import math
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.core.errors import CorruptionError
from harness.core.records import Metric, Output
from harness.report.compare import compare_runs
from harness.report.compare_text import comparison_markdown
from harness.report.model import WinRate
from harness.report.winrate_text import wins_cells, wins_table
from harness.steps.journal import read_rows, write_rows

_helper = runpy.run_path(str(Path(__file__).parents[1] / "run_folder.py"))
RunFolder, ACC, REWARD = _helper["RunFolder"], _helper["ACC"], _helper["TOX"]

Sides = list[tuple[float | None, str]]
"""Reward and answer for every prompt."""


def write(root: Path, a: Sides, b: Sides, *, metric: Metric = REWARD, **more: Any) -> tuple[Path, Path]:
    """Two runs; ``more``: of every sample, a value for each run."""
    for name, sides, run in (("a", a, 0), ("b", b, 1)):
        folder = RunFolder(root / name, model=name)
        extra = {key: value[run] for key, value in more.items()}
        samples = {
            f"s{k:03d}": {"values": {metric.name: score}, "answer": text, "prompt": f"prompt {k}", **extra}
            for k, (score, text) in enumerate(sides)
        }
        row = {"metric": metric.name, "unit": metric.unit, "n": len(sides)}
        folder.task("tox", samples, [row], metrics=(metric,), scorer="toxicity")
        folder.write_plan()
    return root / "a", root / "b"


def only(runs: tuple[Path, Path], **options: Any) -> WinRate:
    (found,) = compare_runs(*runs, **options).win_rates
    return found


def won(wins: int, ties: int, losses: int, text: str = "word") -> tuple[Sides, Sides]:
    """Sides of which B wins, ties and loses so many."""
    b = [1.0] * wins + [0.0] * ties + [-1.0] * losses
    return [(0.0, text)] * len(b), [(value, text) for value in b]


def test_a_win_rate_of_b_over_a_counts_ties_half(tmp_path: Path) -> None:
    found = only(write(tmp_path, *won(30, 10, 20)))
    assert (found.n, found.wins, found.ties, found.losses, found.share) == (60, 30, 10, 20, 35 / 60)
    # Wilson at 35 of 60: (70 + z^2 +- z sqrt(z^2 + 140 * 25/60)) / (2 (60 + z^2)).
    assert found.method == "wilson" and found.ci95 == pytest.approx((0.4573, 0.6993), abs=1e-4)
    assert (found.length_a, found.length_b) == (4.0, 4.0)
    # All lengths are equal: all pairs match, and there is nothing to fit.
    assert (found.matched.n, found.matched.share, found.matched.ci95) == (60, found.share, found.ci95)
    assert found.fitted.share is None and "of one length" in (found.fitted.withheld or "")


def test_the_other_way_round_what_was_won_is_lost(tmp_path: Path) -> None:
    a, b = write(tmp_path, *won(30, 10, 20))
    assert (only((b, a)).wins, only((b, a)).share) == (20, 25 / 60)
    lower = Metric(name="harm", higher_is_better=False, unit="logit")
    found = only(write(tmp_path / "lower", *won(30, 10, 20), metric=lower))
    assert (found.wins, found.losses) == (20, 30)


def test_only_rewards_with_a_direction_have_win_rates(tmp_path: Path) -> None:
    unknown = Metric(name="logit", higher_is_better=None, unit="logit")
    for name, metric in (("accuracy", ACC), ("unknown", unknown)):
        a, b = won(3, 0, 0)
        sides = [[(max(0.0, x or 0.0), text) for x, text in side] for side in (a, b)]
        assert compare_runs(*write(tmp_path / name, *sides, metric=metric)).win_rates == ()


def test_longer_answers_that_win_do_not_win_at_equal_length(tmp_path: Path) -> None:
    # B's answers are the longer ones in two of three; whoever is longer wins. 61 pairs are of one length, and tie.
    lengths = [(100, 10 * (20 - k)) for k in range(30)] + [(50, 80 + k) for k in range(90)] + [(70, 70)] * 60
    a = [(x / 10, "x" * x) for x, _ in lengths]
    b = [(y / 10, "x" * max(0, y)) for _, y in lengths]
    found = only(write(tmp_path, a, b))
    assert found.share == pytest.approx((10 + 90 + 61 / 2) / 180)
    assert found.length_b is not None and found.length_a is not None and found.length_b > found.length_a
    assert (found.matched.n, found.matched.share) == (63, 0.5)  # 110, 100 and 90 against 100
    assert found.fitted.share == pytest.approx(0.5, abs=0.1)
    low, high = found.fitted.ci95 or (1.0, 0.0)
    assert low < 0.5 < high < (found.ci95 or (0.0, 0.0))[0]


def test_nothing_at_equal_length_under_fifty_pairs(tmp_path: Path) -> None:
    found = only(write(tmp_path, *won(25, 4, 20)))
    assert found.share == 27 / 49
    assert found.matched.share is None and found.matched.ci95 is None and found.matched.n == 49
    assert found.matched.withheld == "49 of 49 pairs have lengths within 10%, and 50 are needed"
    assert found.fitted.withheld == "49 pairs, and a fit needs 50"


def test_what_was_not_scored_is_no_pair(tmp_path: Path) -> None:
    a, b = won(4, 0, 2)
    a[0], b[5] = (None, ""), (None, "")
    row_free = write(tmp_path, a, b)
    found = only(row_free)
    assert (found.n, found.n_unscored, found.wins, found.losses) == (4, 2, 3, 1)
    assert "left out: 2 prompts unscored in A or B" in shown(row_free)


def test_a_score_that_is_no_number_is_no_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        compare_runs(*write(tmp_path, [(0.0, "x")] * 3, [(1.0, "x"), (math.nan, "x"), (1.0, "x")]))


def test_empty_answers_are_as_long_as_they_are(tmp_path: Path) -> None:
    found = only(write(tmp_path, [(0.0, "")] * 60, [(1.0, "")] * 30 + [(1.0, "x")] * 30))
    assert (found.length_a, found.length_b, found.matched.n) == (0.0, 0.5, 30)


def test_truncated_answers_are_counted(tmp_path: Path) -> None:
    runs = write(tmp_path, *won(3, 0, 1), hit_limit=(False, True))
    found = only(runs)
    assert (found.n_truncated_a, found.n_truncated_b) == (0, 4)
    assert "0 answers of A and 4 of B spent their token budget" in shown(runs)


def test_answers_to_other_prompts_are_not_held_against_each_other_by_length(tmp_path: Path) -> None:
    a, b = write(tmp_path, *won(40, 0, 20))
    (file,) = (b / "requests").iterdir()
    rows = read_rows(file)
    rows[7]["prompt"] = "another"
    write_rows(file, rows)
    found = only((a, b))
    why = "1 of 60 samples of one id have other prompts in A and B (id s007): their lengths are not compared"
    assert (found.length_a, found.matched.withheld, found.fitted.withheld) == (None, why, why)


def test_answers_that_are_not_those_that_were_scored_are_an_error(tmp_path: Path) -> None:
    a, b = write(tmp_path, *won(4, 0, 2))
    (file,) = b.glob("steps/answers-*/artifact/answers.jsonl.gz")
    rows = read_rows(file)
    rows[0]["output"] = Output(text="much longer than it was").to_json()
    write_rows(file, rows)
    with pytest.raises(CorruptionError, match="its answers are not those that toxicity scored"):
        compare_runs(a, b)
    write_rows(file, rows[1:])
    with pytest.raises(CorruptionError, match="not those that toxicity scored"):
        compare_runs(a, b)


def test_a_run_without_texts_has_a_win_rate_and_no_lengths(tmp_path: Path) -> None:
    a, b = write(tmp_path, *won(40, 0, 20))
    shutil.rmtree(b / "requests")
    found = only((a, b))
    assert (found.share, found.length_b) == (40 / 60, None)
    assert found.matched.withheld == "the answers are not in the folder, so their lengths are not known"
    assert wins_cells(found)[2:] == ("–, –", "withheld, n 0", "withheld")


def shown(runs: tuple[Path, Path], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    table = wins_table(compare_runs(*runs))
    assert table is not None
    console.print(table)
    return " ".join(console.file.getvalue().split())


def test_what_is_told_of_it(tmp_path: Path, cli: Any) -> None:
    a, b = write(tmp_path, *won(30, 10, 20))
    assert "0.583 60 A 4.0 0.583, n 60 withheld" in shown((a, b))
    assert "| tox:raw | toxicity | 0.583 \\[0.457, 0.699\\] | 30, 10, 20 | 4.0, 4.0 |" in comparison_markdown(
        compare_runs(a, b)
    )
    ran = cli("compare", a, b, "--show", "0", "--html", "--out", tmp_path / "page")
    assert "win rates of B over A" in ran.out
    assert "30, 10, 20" in (tmp_path / "page" / "compare.html").read_text(encoding="utf-8")
    (told,) = json.loads(cli("compare", a, b, "--json").out)["win_rates"]
    assert (told["share"], told["matched"]["n"]) == (35 / 60, 60)
