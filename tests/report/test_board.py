"""Boards over real step folders: seeds folded, columns apart, nothing printed of a record that does not add up."""

from __future__ import annotations

import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core.errors import CorruptionError, UserError
from harness.core.records import StepRecord
from harness.core.stats import Seeds, crossed_difference, crossed_mean, holm
from harness.report.board.build import build_board
from harness.report.board.model import Board, BoardRow
from harness.report.board.text import board_markdown, escape_latex, latex_table
from harness.report.board.write import FILES, load_board, write_board
from harness.steps.files import read_json, write_json
from harness.steps.journal import read_rows, rows_digest, write_rows
from harness.steps.provenance import file_digest

_generator = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "board.py"))
SyntheticStudy, Family = _generator["SyntheticStudy"], _generator["Family"]
_helper = runpy.run_path(str(Path(__file__).parents[1] / "run_folder.py"))
RunFolder = _helper["RunFolder"]

LORA = {"method": "dpo", "data": "safe", "adapter": "lora"}


def family(effect: float = 1.0, seeds: tuple[int, ...] = (0, 1, 2), base: str = "llama", **factors: Any) -> Any:
    return Family(base, {**LORA, **factors}, [effect], seeds, 0.05)


def study(root: Path, *families: Any, **settings: Any) -> Path:
    path: Path = SyntheticStudy(root, samples=60, **settings).write(families)
    return path


def named(board: Board) -> dict[str, BoardRow]:
    return {row.name: row for row in board.rows}


def values_of(run: Path, arm: str) -> list[float]:
    (file,) = run.glob(f"steps/scores-{arm}-*/artifact/samples.jsonl.gz")
    return [row["values"]["acc"] for row in read_rows(file)]


def rewrite(run: Path, arm: str, change: Any) -> Path:
    """Change rows of samples, or the whole-task row, of one arm, as a faulty writer would: all digests are right."""
    (folder,) = run.glob(f"steps/scores-{arm}-*")
    rows, scores = read_rows(folder / "artifact" / "samples.jsonl.gz"), read_json(folder / "artifact" / "scores.json")
    change(rows, scores["rows"][0])
    write_rows(folder / "artifact" / "samples.jsonl.gz", rows)
    write_json(folder / "artifact" / "scores.json", scores)
    record = StepRecord.model_validate(read_json(folder / "status.json"))
    told = {"digest": rows_digest(rows), "files": {"scores.json": file_digest(folder / "artifact" / "scores.json")}}
    write_json(folder / "status.json", record.model_copy(update=told).model_dump(mode="json"))
    return folder


def test_seeds_are_folded_and_held_against_their_base(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family(1.0), family(0.0, (0,), method="sft"))
    board = build_board([run])
    assert [row.name for row in board.rows] == ["llama", "dpo-safe-lora-llama", "sft-safe-lora-llama"]
    (column,) = board.columns
    base, dpo, sft = board.rows
    assert (dpo.base, dpo.base_name, dpo.factors) == (base.key, "llama", {**LORA, "base": "llama"})
    assert (dpo.recipe["method"], board.sources[0].versions) == ("dpo", {"harness": ("0.1.0",)})
    assert all((run / "steps" / (one.folder or "?")).is_dir() for one in dpo.seeds)
    assert [(one.name, one.seed) for one in dpo.seeds] == [(f"dpo-safe-lora-llama-s{n}", n) for n in (0, 1, 2)]
    cells = np.array([values_of(run, one.name) for one in dpo.seeds])
    told, cell = crossed_mean(Seeds(cells), share=True), dpo.cells[column.key]
    assert told.interval is not None
    assert (cell.mean, cell.ci95, cell.n_seeds) == (told.mean, (told.interval.low, told.interval.high), 3)
    assert cell.mean == pytest.approx(cells.mean())
    assert [one.cells[column.key].mean for one in dpo.seeds] == [pytest.approx(row.mean()) for row in cells]
    own = np.array([values_of(run, "llama")])
    apart = crossed_difference(Seeds(cells), Seeds(own, trained=False))
    single = np.array([values_of(run, "sft-safe-lora-llama-s0")])
    other = crossed_difference(Seeds(single), Seeds(own, trained=False))
    found, few = cell.difference, sft.cells[column.key].difference
    assert found is not None and few is not None
    assert (found.difference, found.p_value, found.test) == (apart.difference, apart.p_value, "crossed_t")
    assert [found.p_adjusted, few.p_adjusted] == holm([apart.p_value, other.p_value])
    assert (found.verdict, found.note) == ("better", None)
    assert (few.verdict, few.test, few.note) == ("no difference shown", "mcnemar_exact", "training noise not estimated")
    # 5 % over a family of two: the effect that could have been found is larger.
    assert (found.detectable or 0) < (found.detectable_adjusted or 0)
    assert (column.family, column.family_size) == ("the 2 differences from a base in this column", 2)
    assert [row.cells[column.key].rank for row in board.rows] == [2, 1, 2]
    assert "2 differences from a base, 1 are better and 0 worse" in board.finding
    assert "1 of them leave training noise out" in board.finding


def test_a_board_is_rebuilt_byte_for_byte_wherever_it_lies(tmp_path: Path) -> None:
    run = study(
        tmp_path / "run", family(1.0), claims=[{"name": "c", "a": LORA, "b": {"method": "base"}, "task": "quiz"}]
    )
    write_board([run], tmp_path / "one", layout="paper")
    shutil.move(run, tmp_path / "elsewhere")
    write_board([tmp_path / "elsewhere"], tmp_path / "two", layout="paper")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert {str(file) for file in files} >= set(FILES)
    for file in files:
        text = (tmp_path / "one" / file).read_bytes()
        assert text == (tmp_path / "two" / file).read_bytes(), file
        assert str(tmp_path).encode() not in text
    assert load_board(tmp_path / "one") == build_board([tmp_path / "elsewhere"])
    (tmp_path / "one" / "board.json").write_text('{"rows": 3}')
    with pytest.raises(CorruptionError, match=r"board\.json: no board"):
        load_board(tmp_path / "one")


def test_the_same_arm_in_two_runs_is_one_row_and_seeds_of_two_studies_fold(tmp_path: Path) -> None:
    one = study(tmp_path / "one", family(1.0, (0, 1)), name="one")
    shutil.copytree(one, tmp_path / "copy")
    assert named(build_board([one, tmp_path / "copy"])).keys() == named(build_board([one])).keys()
    two = study(tmp_path / "two", family(1.0, (2, 3)), seed=0, name="two")
    shutil.rmtree(next(two.glob("steps/scores-llama-*")))
    board = build_board([one, two])
    assert [seed.seed for seed in named(board)["dpo-safe-lora-llama"].seeds] == [0, 1, 2, 3]
    assert [source.name for source in board.sources] == ["one", "two"]
    assert named(board)["llama"].seeds[0].sources == (0, 1)


def test_two_arms_of_one_run_that_came_out_alike_are_two_rows(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family(), family(method="sft"))
    plan = read_json(run / "plan.json")
    tasks = {task["arm"]: task for task in plan["evaluations"][0]["tasks"]}
    for seed in (0, 1, 2):
        dpo, sft = tasks[f"dpo-safe-lora-llama-s{seed}"], tasks[f"sft-safe-lora-llama-s{seed}"]
        sft.update(answers=dpo["answers"], scores=dpo["scores"])
    write_json(run / "plan.json", plan)
    shutil.copytree(run, tmp_path / "copy")
    for roots in ([run], [run, tmp_path / "copy"]):
        board = build_board(roots)
        assert [row.name for row in board.rows] == ["llama", "dpo-safe-lora-llama", "sft-safe-lora-llama"]
        assert "dpo-safe-lora-llama-s1 and sft-safe-lora-llama-s1 are the same, byte for byte" in board.notes
        assert len({row.cells[board.columns[0].key].mean for row in board.rows[1:]}) == 1


def test_one_step_with_other_numbers_in_two_runs_is_refused(tmp_path: Path) -> None:
    one = study(tmp_path / "one", family())
    two = study(tmp_path / "two", family(), seed=1)
    with pytest.raises(CorruptionError, match=r"two runs hold the step \w{12} with other numbers \(.+\); leave one"):
        build_board([one, two])


def test_another_recipe_or_the_same_seed_again_is_another_row(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family())
    (folder,) = run.glob("steps/align-dpo-safe-lora-llama-s2-*")
    described = read_json(folder / "step.json")
    described["identity"]["recipe"] = {"learning_rate": 5e-5}
    write_json(folder / "step.json", described)
    rows = [row for row in build_board([run]).rows if row.kind == "align"]
    assert [[seed.seed for seed in row.seeds] for row in rows] == [[0, 1], [2]]
    assert len({row.name for row in rows}) == 2 and all("(" in row.name for row in rows)


def test_other_versions_limits_and_scorers_are_other_columns(tmp_path: Path) -> None:
    one, two = study(tmp_path / "one", family()), study(tmp_path / "two", family())
    plan = read_json(two / "plan.json")
    for task in plan["evaluations"][0]["tasks"]:
        task["version"] = 2
    write_json(two / "plan.json", plan)
    board = build_board([one, two])
    assert [column.version for column in board.columns] == [1, 2]
    assert board.columns[0].differs == ("1 of 2 of this name",)
    assert board.columns[1].differs == ("2 of 2 of this name", "version was 1, is 2")
    assert all(len(row.cells) == 2 for row in board.rows)


def test_two_templates_of_one_base_are_two_columns_and_one_for_each_base_is_one(tmp_path: Path) -> None:
    def template(run: Path, arm: str, digest: str) -> None:
        rewrite(run, arm, lambda rows, row: row.update(template=digest))

    run = study(tmp_path / "run", family(base="a"), family(base="b"), bases=("a", "b"))
    arms = [path.name.split("-", 1)[1].rsplit("-", 1)[0] for path in run.glob("steps/scores-*")]
    for arm in arms:
        template(run, arm, "aaaa" if arm == "a" or "-a-" in arm else "bbbb")
    (column,) = build_board([run]).columns
    assert column.templates == ("aaaa", "bbbb")
    template(run, "dpo-safe-lora-a-s0", "cccc")
    board = build_board([run])
    assert [column.templates for column in board.columns] == [("aaaa",), ("cccc",), ("bbbb",)]
    row = named(board)["dpo-safe-lora-a"]
    first, second = (row.cells[column.key] for column in board.columns[:2])
    assert (first.n_seeds, first.note) == (2, "training noise not estimated; 1 of 3 seeds have no numbers here")
    assert second.difference is not None
    assert second.difference.verdict == "not comparable"
    assert second.difference.note == "the base was not asked this in the same way"


def test_what_failed_is_missing_and_said(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family())
    (folder,) = run.glob("steps/scores-dpo-safe-lora-llama-s1-*")
    (folder / "status.json").unlink()
    board = build_board([run])
    row, (column,) = named(board)["dpo-safe-lora-llama"], board.columns
    assert row.cells[column.key].n_seeds == 2
    assert row.notes == ("dpo-safe-lora-llama-s1: quiz:raw: not finished",)
    assert "* dpo-safe-lora-llama: dpo-safe-lora-llama-s1: quiz:raw: not finished" in board_markdown(board)


def test_a_mean_that_is_not_of_its_samples_is_refused(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family())
    folder = rewrite(run, "dpo-safe-lora-llama-s1", lambda rows, row: row.update(mean=0.123))
    with pytest.raises(
        CorruptionError, match=r"scores\.json: the mean of acc is 0\.123 of 60, its samples' 0\.\d+ of 60;"
    ):
        build_board([run])
    rewrite(run, "dpo-safe-lora-llama-s1", lambda rows, row: row.update(metric="other"))
    with pytest.raises(CorruptionError, match=f"{folder.name}/artifact/scores.json: has no row of acc"):
        build_board([run])


def test_unscored_and_withheld_never_count_as_0(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family())

    def unscored(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        for one in rows[:3]:
            one["values"]["acc"], one["reason"] = None, "the judge failed"
        scored = [one["values"]["acc"] for one in rows[3:]]
        row.update(n=57, n_unscored=3, mean=sum(scored) / 57)

    rewrite(run, "dpo-safe-lora-llama-s1", unscored)
    board = build_board([run])
    (column,) = board.columns
    cell = named(board)["dpo-safe-lora-llama"].cells[column.key]
    assert (cell.n, cell.n_unscored) == (60, 3)
    whole = np.array(
        [[np.nan if v is None else v for v in values_of(run, f"dpo-safe-lora-llama-s{n}")] for n in range(3)]
    )
    assert cell.mean == pytest.approx(np.nanmean(np.nanmean(whole, axis=0)))
    rewrite(run, "dpo-safe-lora-llama-s1", lambda rows, row: row.update(withheld="too many", mean=None, ci95=None))
    cell = named(build_board([run]))["dpo-safe-lora-llama"].cells[column.key]
    assert (cell.mean, cell.withheld, cell.rank) == (None, "too many", None)
    assert cell.difference is not None and cell.difference.verdict == "not comparable"


def test_clusters_and_strata_come_from_the_records(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family(), leaves=6)
    for path in run.glob("steps/scores-*"):
        arm = path.name.split("-", 1)[1].rsplit("-", 1)[0]
        if arm:
            rewrite(run, arm, lambda rows, _: [one.update(cluster=str(n // 2)) for n, one in enumerate(rows[:40])])
    (column,) = build_board([run]).columns
    # Twenty pairs and twenty samples that stand for themselves. Members of a pair lie in two leaves, so there are no
    # strata to be held apart; the leaf tasks are still counted.
    assert (column.n_clusters, column.n_strata) == (40, 6)


def test_one_scan_of_steps_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = study(tmp_path / "run", family(), family(0.0, method="sft"))
    scans: list[str] = []
    real = os.scandir

    def counted(path: Any) -> Any:
        scans.append(str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", counted)
    build_board([run])
    # One for the runs of its bases, one for the recipes of its arms.
    assert [Path(path).name for path in scans].count("steps") == 2


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family(1.0, (0,)))
    code = "import sys, harness.report.board.write as w, pathlib as p"
    code += f"; w.write_board([p.Path({str(run)!r})], p.Path('out'))"
    code += "; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {"torch", "transformers", "datasets", "vllm", "pandas", "lm_eval"} & set(done.stdout.split())


def test_csv_has_every_number_and_no_formula(tmp_path: Path) -> None:
    run = study(tmp_path / "run", family(data="=1+1"))
    write_board([run], tmp_path / "out")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "board.csv").read_text())))
    assert [row["arm"] for row in rows] == ["llama", "dpo-=1+1-lora-llama"]
    assert rows[1]["factor_data"] == "'=1+1"
    cell = load_board(tmp_path / "out").rows[1].cells[rows[1]["column"]]
    assert float(rows[1]["mean"]) == cell.mean and cell.difference is not None
    assert float(rows[1]["difference"]) == cell.difference.difference


def test_latex_is_escaped() -> None:
    assert escape_latex("a_b & 5 % \\input{x} ^~ # $ <") == (
        r"a\_b \& 5 \% \textbackslash{}input\{x\} \textasciicircum{}\textasciitilde{} \# \$ $<$"
    )
    assert escape_latex("世 \u202e") == "U+4E16 U+27E8U+202EU+27E9"
    text = latex_table("c", ["Arm", "n"], [("group",), ("a", "1")])
    assert r"\multicolumn{2}{l}{\emph{group}} \\" in text and r"a & 1 \\" in text


def test_a_run_without_a_base_and_one_of_an_older_version(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    row = {"metric": "acc", "n": 2, "mean": 0.5, "ci95": (0.1, 0.9)}
    folder.task("t", {"a": {"value": 1.0}, "b": {"value": 0.0}}, [row])
    board = build_board([folder.write_plan()])
    assert [row.kind for row in board.rows] == ["base"]
    assert board.finding == "No row has a base that was asked the same, so nothing is compared."


def test_the_paper_s_tables_pair_lora_and_qlora(tmp_path: Path) -> None:
    families = [family(0.5, data="bt-safe", adapter=adapter) for adapter in ("lora", "qlora")]
    run = study(tmp_path / "run", *families, family(0.2, data="hh-safe", adapter="qlora"))
    arm = "{base: llama, method: dpo, data: bt-safe, adapter: qlora}"
    head = "source: Somebody | 2024\nunits: {quiz: percent}\nnumbers:\n"
    (tmp_path / "theirs.yaml").write_text(
        f"{head}  - {{table: Table 1, arm: {arm}, values: {{quiz: 25}}}}\n"
        f"  - {{table: Table 2, arm: {arm.replace('llama', 'other')}, values: {{quiz: 26}}}}\n"
    )
    write_board([run], tmp_path / "out", layout="paper", published=tmp_path / "theirs.yaml")
    lines = (tmp_path / "out" / "tables" / "paper.md").read_text().splitlines()
    pairs = lines[lines.index("## LoRA and QLoRA on the same data") + 2 :][:5]
    assert "quiz LoRA | quiz QLoRA" in pairs[0]
    assert [line.split(" | ")[0] for line in pairs[2:4]] == ["| llama", "| DPO"]
    assert pairs[3].split(" | ")[1] == "bt-safe" and pairs[3].endswith("/ 0.250 |") and pairs[3].count("±") == 2
    assert not (tmp_path / "out" / "tables" / "paper-merges.tex").exists()
    assert any("56,168" in line for line in lines)
    told = (tmp_path / "out" / "tables" / "published.md").read_text()
    assert "Somebody \\| 2024" in told and "* 1 published numbers have no arm or task here." in told
    (row,) = [line.split(" | ") for line in told.splitlines() if line.startswith("| dpo-bt-safe-qlora-llama")]
    # 25 per cent, beside a mean of ours and its interval.
    assert (row[3], row[7], row[9]) == ("3", "0.250", "Table 1 |") and row[8] in ("yes", "no")
    line = f"  - {{table: Table 1, arm: {arm}, values: {{quiz: 25}}}}\n"
    for text, message in (
        (head + line.replace("llama", "lama"), r"none of its 1 numbers is of an arm.*base: lama.*\n  Name bases"),
        (
            head + line.replace("quiz: 25", "quizz: 1"),
            r"theirs\.yaml:4, .*'quizz' has no unit\n  Name it under `units`",
        ),
        (head + line.replace("25", "high"), r"theirs\.yaml:4, numbers\.0\.values\.quiz: .*high"),
        (head + line.replace("25", ".nan"), r"theirs\.yaml:4, numbers\.0\.values\.quiz: "),
        (head.replace("percent", "logit") + line, r"is in logit, and quiz:raw acc in proportion\n  Mend `units`"),
        (
            head + line + line.replace("25", "27"),
            r"theirs\.yaml:5, .* is 0\.27 here and 0\.25 in Table 1\n  Keep the one",
        ),
        ("numbers: []", r"theirs\.yaml"),
    ):
        (tmp_path / "theirs.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            write_board([run], tmp_path / "out", layout="paper", published=tmp_path / "theirs.yaml")


def test_the_command_line(cli: Any, tmp_path: Path) -> None:
    one, two = study(tmp_path / "one", family(), name="one"), study(tmp_path / "two", family(method="sft"), name="two")
    shutil.rmtree(next(two.glob("steps/scores-llama-*")))
    ran = cli("report", one, two, "--out", tmp_path / "out", "--title", "Both")
    assert ran.code == 0, ran.err
    assert "Both" in ran.out and "2 differences from a base" in " ".join(ran.out.split())
    assert json.loads((tmp_path / "out" / "board.json").read_text())["title"] == "Both"
    for arguments, message in (
        ((one, two), "--out: 2 runs have no report folder in common"),
        ((one, "--layout", "nature"), "--layout: 'nature' is none"),
        ((one, "--published", "x.yaml"), "--published: there is no file x.yaml"),
        ((one, "--published", "papr"), "--published: unknown published file 'papr'"),
        ((one, "--alpha", "5"), "alpha: is the level of a test, and 5 is none"),
    ):
        ran = cli("report", *arguments)
        assert (ran.code, ran.err.partition("error: ")[2].startswith(message)) == (2, True), ran.err
