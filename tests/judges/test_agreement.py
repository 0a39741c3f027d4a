"""Judges against people: labels in every form, and figures by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.records import Metric
from harness.judges.agreement import Agreement, agreement, read_labels

RunFolder: Any = runpy.run_path(str(Path(__file__).parents[1] / "run_folder.py"))["RunFolder"]
ASR = Metric(name="attack_success", higher_is_better=False, unit="proportion", low=0.0, high=1.0)


def sample(**verdicts: bool | None) -> dict[str, Any]:
    first = next(iter(verdicts.values()))
    value = None if first is None else float(first)
    return {"value": value, "reason": "odd", "answer": "x", "detail": {"verdicts": verdicts}}


def run_of(root: Path, *tasks: tuple[str, dict[str, dict[str, Any]]]) -> Path:
    run = RunFolder(root)
    for name, samples in tasks:
        run.task(name, samples, [{"metric": "attack_success", "n": len(samples)}], metrics=(ASR,), scorer="attack")
    path: Path = run.write_plan()
    return path


def labels(folder: Path, text: str, name: str = "labels.csv") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def only(found: tuple[list[Agreement], list[str]]) -> Agreement:
    (one,), _ = found
    return one


def test_figures_by_hand(tmp_path: Path) -> None:
    """Both harmful 20, judge alone 5, people alone 10, both harmless 15: the textbook table of Cohen's kappa.

    They agree on 35 of 50; by chance on 25/50 x 30/50 + 25/50 x 20/50 = 0.5, so kappa is (0.7 - 0.5) / 0.5 = 0.4.
    """
    cells = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    run = run_of(tmp_path / "run", ("t", {f"s{i}": sample(llm=judge) for i, (judge, _) in enumerate(cells)}))
    rows = [f"s{i},{'harmful' if people else 'safe'}" for i, (_, people) in enumerate(cells)]
    one = only(agreement(run, labels(tmp_path, "id,label\n" + "\n".join(rows))))
    assert (one.task, one.judge, one.scorer, one.n) == ("t", "llm", "attack", 50)
    assert (one.both_harmful, one.judge_alone, one.people_alone, one.both_harmless) == (20, 5, 10, 15)
    assert one.agreement.value == 0.7
    assert one.kappa.value == pytest.approx(0.4)
    # Wilson for 35 of 50: centre (35 + z^2/2) / (50 + z^2), half z sqrt(35 x 15 / 50 + z^2/4) / (50 + z^2).
    assert (one.agreement.low, one.agreement.high) == pytest.approx((0.56247, 0.80900), abs=1e-4)
    # The large-sample standard error is sqrt(0.7 x 0.3) / (0.5 sqrt(50)) = 0.13: 0.4 -+ 0.254.
    assert (one.kappa.low, one.kappa.high) == pytest.approx((0.146, 0.654), abs=0.04)
    assert "agrees with people on 70.0% of 50 (56.2% to 80.9%)" in one.lines()[0]
    assert one.lines()[1].startswith("  Cohen's kappa 0.400 (")
    assert one.to_json()["kappa"]["value"] == one.kappa.value


def test_what_is_missing_on_either_side_is_counted(tmp_path: Path) -> None:
    verdicts = {"a": sample(llm=True), "b": sample(llm=None), "c": sample(llm=False), "d": sample(llm=False)}
    run = run_of(tmp_path / "run", ("t", verdicts))
    found, notes = agreement(run, labels(tmp_path, "id,label\na,1\nb,1\nc,0\nd,\nzz,1\n"))
    assert (found[0].n, found[0].n_unscored, found[0].n_unlabelled) == (2, 1, 1)
    assert notes == ["1 labels are of no sample here", "1 rows of labels.csv have no label"]
    assert found[0].lines()[-1] == "  left out: 1 without a verdict, 1 without a label"


def test_every_judge_of_a_scorer(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("t", {"a": sample(refusal=True, llm=False), "b": sample(refusal=True, llm=True)}))
    found, _ = agreement(run, labels(tmp_path, "id,label\na,0\nb,1\n"))
    assert {one.judge: one.agreement.value for one in found} == {"refusal": 0.5, "llm": 1.0}
    # People called one harmful, the rules both: chance explains the half.
    assert {one.judge: one.kappa.value for one in found} == {"refusal": 0.0, "llm": 1.0}


def test_a_judge_without_verdicts_and_tasks_without_labels(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("t", {"a": sample(llm=None, refusal=True)}), ("other", {"b": sample(llm=True)}))
    found, _ = agreement(run, labels(tmp_path, "id,label\na,1\n"))
    assert [(one.task, one.judge) for one in found] == [("t", "llm"), ("t", "refusal")]
    assert found[0].lines() == ["t, tiny, judge llm (attack): gave no verdict on any of the 1 labelled samples"]


def test_kappa_that_is_not_defined(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("t", {"a": sample(llm=True), "b": sample(llm=True)}))
    one = only(agreement(run, labels(tmp_path, "id,label\na,1\nb,1\n")))
    assert one.agreement.value == 1.0 and one.kappa.value is None
    assert one.lines()[1] == "  Cohen's kappa: not defined, as one label or verdict explains it all"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("id,label\na,harmful\nb,SAFE\n", "x.csv"),
        ("\ufefflabel,id,who\nYes,a,me\nno,b,me\n", "x.csv"),
        ('[{"id": "a", "label": 1}, {"id": "b", "label": 0}]', "x.json"),
        ('{"id": "a", "label": true}\n\n{"id": "b", "label": false}\n', "x.jsonl"),
        ('id,label\n"a",[[B]]\nb,[[A]]\n', "x.csv"),
    ],
)
def test_forms_of_labels(tmp_path: Path, text: str, name: str) -> None:
    assert read_labels(labels(tmp_path, text, name)).harmful == {(None, None, "a"): True, (None, None, "b"): False}


def test_which_answer_is_meant(tmp_path: Path) -> None:
    one, two = {"a": sample(llm=True), "b": sample(llm=True)}, {"a": sample(llm=False)}
    run = run_of(tmp_path / "run", ("one", one), ("two", two))
    file = labels(tmp_path, "id,label\nb,1\na,1\n")
    with pytest.raises(UserError) as refused:
        agreement(run, file)
    assert refused.value.what == "'a' is a sample of several answers: arm tiny, task one; arm tiny, task two"
    assert "columns task and arm" in refused.value.fix
    assert only(agreement(run, file, task="one")).agreement.value == 1.0
    told = labels(tmp_path, "id,task,label\na,one,1\na,two,1\n", "told.csv")
    found, _ = agreement(run, told)
    assert {one.task: one.agreement.value for one in found} == {"one": 1.0, "two": 0.0}


# ------------------------------------------------------------------------------------------------------------ messages


def refusal(tmp_path: Path, text: str, **more: Any) -> UserError:
    run = run_of(tmp_path / "run", ("t", {"a": sample(llm=True)}))
    with pytest.raises(UserError) as refused:
        agreement(run, labels(tmp_path, text), **more)
    return refused.value


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    error = refusal(tmp_path / "1", "id,verdict\na,1\n") if (tmp_path / "1").mkdir() is None else None
    assert error is not None and error.what == "no column 'label'" and error.fix.endswith("Here: id, verdict.")
    for number, (text, where, what) in enumerate(
        [
            ("id,label\na,perhaps\n", ":2, label", "'perhaps' is neither harmful nor harmless"),
            ("id,label\na,1\na,0\n", ":3, id", "'a' is labelled twice"),
            ("id,label\n", "", "holds no label"),
            ("", "", "holds no label"),
            ("id,label\nzz,1\n", "", "none of its ids is a sample of this run"),
            ('{"id": "a", "label": 1}\nnonsense\n', ":2", "not JSON: Expecting value: line 1 column 1 (char 0)"),
            ('["a"]', ", row 1", "a JSON str, not an object"),
        ]
    ):
        folder = tmp_path / f"case{number}"
        folder.mkdir()
        error = refusal(folder, text)
        assert (error.where, error.what) == (f"{folder / file.name}{where}", what), text


def test_no_such_file_task_or_scorer(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("dangerous", {"a": sample(llm=True)}))
    with pytest.raises(UserError, match=r"--human-labels .*nothing\.csv: cannot be read"):
        agreement(run, tmp_path / "nothing.csv")
    file = labels(tmp_path, "id,label\na,1\n")
    with pytest.raises(UserError, match="--task: unknown task 'dangerus'\n  Did you mean 'dangerous'"):
        agreement(run, file, task="dangerus")
    with pytest.raises(UserError, match="--scorer: unknown scorer 'x'\n  Known: attack"):
        agreement(run, file, scorer="x")


def test_a_run_without_verdicts(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", ("t", {"a": {"value": 1.0, "answer": "x"}}))
    with pytest.raises(UserError, match="no step of this run holds verdicts\n  Evaluate a task with a judge"):
        agreement(run, labels(tmp_path, "id,label\na,1\n"))


def test_ids_and_labels_are_shown_safely(tmp_path: Path) -> None:
    error = refusal(tmp_path, json.dumps([{"id": "a", "label": "x\u202ey"}]))
    assert "\u202e" not in str(error) and "⟨U+202E⟩" in str(error)
