"""A run of ours in lm-eval's files: read by lm-eval's own table, and back again by our reader."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.records import Metric
from harness.report.compare import compare_runs
from harness.report.external.lm_eval_writer import write_lm_eval
from harness.report.external.open import open_any
from harness.report.model import ComparisonReport

sys.path.insert(0, str(Path(__file__).parents[2]))
from run_folder import ACC, RunFolder

NOW = datetime(2026, 11, 24, 12, 0, 0, 1)
CORPUS = Metric(name="kappa", higher_is_better=True, unit="score", aggregate="corpus")


def run_in(root: Path, *, model: str = "tiny", shift: int = 0) -> Path:
    """Sixty questions in two leaves, one of them unscored; thirty answers with a metric of the whole, too."""
    folder = RunFolder(root, model=model)
    values = {f"s{i}": None if i == 4 else float((i + shift) % 3 == 0) for i in range(60)}
    samples = {
        key: {
            "value": value,
            "reason": "no reply" if value is None else None,
            "prompt": f"question {key}",
            "target": "yes",
            "choices": [(" yes", -1.0), (" no", -2.0)],
            "leaf": "toy_one" if index < 30 else "toy_two",
        }
        for index, (key, value) in enumerate(values.items())
    }

    def row(of: list[float | None], **other: Any) -> dict[str, Any]:
        scored = [value for value in of if value is not None]
        return {"n": len(scored), "n_unscored": len(of) - len(scored), "mean": sum(scored) / len(scored), **other}

    every = list(values.values())
    folder.task("toy@5", samples, [row(every), row(every[:30], leaf="toy_one"), row(every[30:], leaf="toy_two")])
    said = {f"w{i}": {"values": {"acc": float(i % 2), "kappa": 0.0}, "answer": f"word {i}"} for i in range(30)}
    rows = [{"n": 30, "mean": 0.5}, {"n": 30, "mean": 0.25, "metric": "kappa", "unit": "score"}]
    folder.task("words", said, rows, metrics=(ACC, CORPUS), variant="chat", template="c0ffee")
    return folder.write_plan()


def test_lm_evals_own_table_reads_the_results(tmp_path: Path) -> None:
    from lm_eval.utils import get_file_datetime, get_file_task_name, make_table

    (file,) = write_lm_eval(run_in(tmp_path / "run"), tmp_path / "out", samples=True, now=NOW)
    results = json.loads(file.read_text())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in make_table(results).splitlines()[2:]]
    assert [line[0] for line in lines if any(line)] == ["toy@5", "- toy_one", "- toy_two", "words", ""]
    assert lines[0] == ["toy@5", "1", "none", "5", "acc", "↑", f"{20 / 59:.4f}", "±", "N/A"]
    assert [line[4:7] for line in lines[3:5]] == [["acc", "↑", "0.5000"], ["kappa", "↑", "0.2500"]]
    assert "toy@5" in make_table(results, column="groups")
    kinds = {name: config["output_type"] for name, config in results["configs"].items()}
    assert kinds == {"toy_one": "multiple_choice", "toy_two": "multiple_choice", "words": "generate_until"}
    written = {get_file_task_name(one.name): get_file_datetime(one.name) for one in file.parent.glob("samples_*")}
    assert written == dict.fromkeys(("toy_one", "toy_two", "words"), get_file_datetime(file.name).removesuffix(".json"))


def test_the_way_there_and_back_changes_no_number(tmp_path: Path) -> None:
    ours = open_any(run_in(tmp_path / "run"))
    (file,) = write_lm_eval(tmp_path / "run", tmp_path / "out", samples=True, now=NOW)
    back = open_any(file)
    kept = ("task", "variant", "leaf", "metric", "n", "n_unscored", "mean", "higher_is_better")

    def numbers(run: Any) -> list[tuple[Any, ...]]:
        rows = [row for task in run.tasks for step in task.scores for row in step.rows]
        return [tuple(getattr(row, name) for name in kept) for row in rows if row.metric != "kappa"]

    assert numbers(back) == numbers(ours)
    assert [task.template for task in back.tasks] == [None, "c0ffee"]
    (kappa,) = [row for task in back.tasks for row in task.scores[0].rows if row.metric == "kappa"]
    assert (kappa.mean, kappa.ci95) == (0.25, None)
    assert "no sample has it" in kappa.notes[0]
    sample = back.tasks[0].scores[0].samples["toy_one/4"]
    assert (sample["values"], sample["reason"]) == ({"acc": None}, "acc: no reply")
    assert back.tasks[0].scores[0].texts(["toy_one/4"])["toy_one/4"].prompt == "question s4"


def test_two_runs_compare_alike_before_and_after(tmp_path: Path) -> None:
    runs = [run_in(tmp_path / "a", model="a"), run_in(tmp_path / "b", model="b", shift=1)]
    files = [write_lm_eval(run, tmp_path / f"out {run.name}", samples=True, now=NOW)[0] for run in runs]
    before, after = compare_runs(*runs), compare_runs(*files)
    kept = ("task", "metric", "n", "difference", "p_value", "n_better", "n_worse", "ci_adjusted", "verdict")

    def numbers(report: ComparisonReport) -> list[tuple[Any, ...]]:
        shown = [one for one in report.differences if one.metric != "kappa"]
        return [tuple(getattr(one, name) for name in kept) for one in shown]

    # 20 of 59 questions against the next third: no two are right in both, so every right one is discordant.
    assert (before.differences[0].n_better, before.differences[0].n_worse) == (20, 20)
    assert numbers(after) == numbers(before)


def test_texts_are_written_only_when_asked_for(tmp_path: Path) -> None:
    (file,) = write_lm_eval(run_in(tmp_path / "run"), tmp_path / "out", now=NOW)
    assert [one.name for one in file.parent.iterdir()] == ["results_2026-11-24T12-00-00.000001.json"]
    assert "question" not in file.read_text()
    assert open_any(file).tasks[0].info["means_only"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    root = run_in(tmp_path / "run")
    for file in (root / "requests").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"holds no texts of 60 samples of toy@5"):
        write_lm_eval(root, tmp_path / "out", samples=True, now=NOW)
    assert not (tmp_path / "out").exists()
    (file,) = write_lm_eval(root, tmp_path / "out", now=NOW)
    with pytest.raises(UserError, match="is a log of another program"):
        write_lm_eval(file, tmp_path / "again", now=NOW)


def test_ours_against_theirs_is_refused(tmp_path: Path) -> None:
    root = run_in(tmp_path / "run")
    (file,) = write_lm_eval(root, tmp_path / "out", now=NOW)
    with pytest.raises(UserError, match="were written by harness and lm-eval, which ask and score a task"):
        compare_runs(root, file)


def test_from_the_command_line(tmp_path: Path, cli: Any) -> None:
    root = run_in(tmp_path / "run")
    ended = cli("export", str(root), "--out", str(tmp_path / "out"), "--samples")
    assert ended.code == 0, ended
    assert len(list((tmp_path / "out" / "tiny").glob("samples_*.jsonl"))) == 3
    shown = cli("report", str(tmp_path / "out"))
    assert shown.code == 0, shown
    assert (tmp_path / "reports" / "out-tiny" / "report.html").is_file()
    assert not list((tmp_path / "out").rglob("report*"))
    compared = cli("compare", str(tmp_path / "out"), str(tmp_path / "out"), "--json")
    assert json.loads(compared.out)["differences"][0]["difference"] == 0.0


def two_arms(root: Path) -> Path:
    """The base and one adapter of it, asked alike; the base in the template of another arm, too."""
    folder = RunFolder(root)
    for arm, right in (("base", 12), ("base (template of x)", 3), ("dpo", 20)):
        samples = {f"s{i}": {"value": float(i < right), "answer": f"{arm} {i}"} for i in range(30)}
        template = "f00d" if "x" in arm else "c0ffee"
        row = {"n": 30, "mean": right / 30, "adapter": "dpo" if arm == "dpo" else None}
        # Ids are made of name and variant: a name of its own for each, then the name that they share.
        folder.task(f"sums {arm}", samples, [row], variant="chat", arm=arm, template=template)
        folder.tasks[-1]["task"] = "sums"
    described = [{"name": task["arm"], "label": "dpo" if task["arm"] == "dpo" else None} for task in folder.tasks]
    folder.plan["arms"] = [
        {**arm, "adapter": {"name": "dpo"} if arm["label"] else None, "folded": None, "template_of": None}
        for arm in described
    ]
    return folder.write_plan()


def test_every_arm_has_a_folder_and_one_task_asked_twice_two_names(tmp_path: Path) -> None:
    files = write_lm_eval(two_arms(tmp_path / "run"), tmp_path / "out", samples=True, now=NOW)
    assert [file.parent.name for file in files] == ["tiny", "tiny__+__dpo"]
    means = {
        (name, numbers["acc,none"])
        for file in files
        for name, numbers in json.loads(file.read_text())["results"].items()
    }
    assert means == {("sums-chat-c0ffee", 12 / 30), ("sums-chat-f00d", 3 / 30), ("sums", 20 / 30)}
    assert [open_any(file).name for file in files] == ["tiny", "tiny + dpo"]
    with pytest.raises(UserError, match="holds lm-eval results of 2 models"):
        open_any(tmp_path / "out")


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.task("toy", {"s0": {"value": 1.0}}, [], state="running")
    with pytest.raises(UserError, match="the run has not ended: 1 of 1 tasks are unfinished"):
        write_lm_eval(folder.write_plan(), tmp_path / "out", now=NOW)
