"""inspect's own logs of two models, read by inspect_ai and compared; and logs that must not be."""

from __future__ import annotations

import json
import math
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from harness.core.errors import CorruptionError, UserError
from harness.report.compare import changed_samples, compare_runs
from harness.report.external.open import open_any
from harness.report.model import Difference

FIXTURES = Path(__file__).parent / "fixtures" / "inspect"
VALUES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}


@pytest.fixture
def inspect_ai() -> Any:
    """inspect_ai, which is in no pinned install: it holds fsspec back."""
    return pytest.importorskip("inspect_ai", reason="needs inspect_ai: pip install 'harness-align[inspect]'")


def test_without_inspect_ai_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(UserError) as caught:
        open_any(FIXTURES / "small_once.eval")
    assert "is a log of inspect, and inspect_ai is not installed\n  pip install 'harness-align[inspect]'" in str(
        caught.value
    )


def log_of(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name).read_text())


def changed(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    log = log_of(name)
    change(log)
    (tmp_path / name).write_text(json.dumps(log))
    return tmp_path / name


def of(differences: tuple[Difference, ...], metric: str) -> Difference:
    (found,) = [one for one in differences if one.metric == metric]
    return found


@pytest.mark.usefixtures("inspect_ai")
@pytest.mark.parametrize("name", ["small.json", "large.json", "system.json", "no_samples.json"])
def test_every_mean_is_theirs(name: str) -> None:
    rows = {row.metric: row for row in open_any(FIXTURES / name).tasks[0].scores[0].rows}
    log = log_of(name)
    for score in log["results"]["scores"]:
        for metric in ("accuracy", "mean"):
            if metric in score["metrics"]:
                row = rows.pop(f"{score['name']}/{metric}")
                if row.withheld is None:
                    assert row.mean == score["metrics"][metric]["value"]
                    if "stderr" in score["metrics"]:
                        assert row.stderr == pytest.approx(score["metrics"]["stderr"]["value"], rel=1e-12)
                else:
                    assert row.withheld == "1 of 16 samples are unscored"
    assert not rows


@pytest.mark.usefixtures("inspect_ai")
def test_epochs_are_answers_to_one_prompt_and_letters_are_as_inspect_reads_them() -> None:
    step = open_any(FIXTURES / "large.json").tasks[0].scores[0]
    by_hand: dict[str, list[float]] = {}
    for sample in log_of("large.json")["samples"]:
        value = sample["scores"]["grade"]["value"]
        if value in VALUES:  # not NaN, which marks what has no score
            by_hand.setdefault(sample["id"], []).append(VALUES[value])
    assert min(map(len, by_hand.values())) == 2
    for name, row in step.samples.items():
        assert row["values"]["grade/accuracy"] == pytest.approx(fmean(by_hand[name]), abs=1e-15)
    (row,) = [row for row in step.rows if row.metric == "grade/accuracy"]
    assert row.n == 16
    assert row.notes[0] == "3 answers to each of 16 prompts; n counts prompts, a score is inspect's mean of its answers"


@pytest.mark.usefixtures("inspect_ai")
def test_the_paired_test_of_two_eval_files_equals_a_count_by_hand() -> None:
    one = of(compare_runs(FIXTURES / "small_once.eval", FIXTURES / "large_once.eval").differences, "polite/accuracy")
    polite = []
    for name in ("small_once.eval", "large_once.eval"):
        with zipfile.ZipFile(FIXTURES / name) as archive:
            samples = [json.loads(archive.read(file)) for file in archive.namelist() if file.startswith("samples/")]
        polite.append({sample["id"]: "please" in sample["output"]["completion"] for sample in samples})
    won = sum(polite[1][key] > polite[0][key] for key in polite[0])
    lost = sum(polite[1][key] < polite[0][key] for key in polite[0])
    assert (one.n_better, one.n_worse, one.n) == (won, lost, 16)
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert one.p_value == min(1.0, 2 * tail)


@pytest.mark.usefixtures("inspect_ai")
def test_samples_that_errored_are_unscored_and_counted() -> None:
    task = open_any(FIXTURES / "errors.json").tasks[0]
    (row,) = [row for row in task.scores[0].rows if row.metric == "grade/accuracy"]
    assert (row.n, row.n_unscored, row.withheld) == (15, 1, "1 of 16 samples are unscored")
    record = task.scores[0].record
    assert record is not None
    assert record.notes == ("1 of 16 samples errored: unscored, not counted as 0",)
    (reason,) = {row["reason"] for row in task.scores[0].samples.values()} - {None}
    assert reason.startswith("errored: ValueError('the endpoint went away')")


@pytest.mark.usefixtures("inspect_ai")
def test_an_answer_that_could_not_be_graded_is_unscored() -> None:
    rows = open_any(FIXTURES / "small_once.eval").tasks[0].scores[0].samples
    reasons = [row["reason"] for row in rows.values() if row["values"]["grade/accuracy"] is None]
    assert reasons == ["grade: grader_failed"]


@pytest.mark.usefixtures("inspect_ai")
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("broken_off.json", lambda log: None, "the evaluation did not end: its status is 'error'"),
        ("errors.json", lambda log: log.update(status="cancelled"), "its status is 'cancelled'"),
        ("errors.json", lambda log: log.update(invalidated=True), "samples of it were marked as invalid"),
        ("errors.json", lambda log: log["results"].update(scores=[]), "holds no score"),
        ("errors.json", lambda log: log["samples"].append(log["samples"][0]), "sample 'q0' is in it twice (epoch 1)"),
        ("errors.json", lambda log: log["samples"].pop(), "holds 15 samples, and its results count 16"),
        ("large.json", lambda log: log["samples"][3].update(input="x"), "has other words in one epoch than in another"),
        ("system.json", lambda log: log["samples"][3]["scores"]["style"]["value"].update(length=99), "as the mean of"),
    ],
)
def test_logs_that_would_lie_are_refused(tmp_path: Path, name: str, change: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        open_any(changed(tmp_path, name, change))
    assert said in str(caught.value)


@pytest.mark.usefixtures("inspect_ai")
def test_a_torn_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.eval").write_bytes((FIXTURES / "large_once.eval").read_bytes()[:9000])
    with pytest.raises(CorruptionError, match=r"x\.eval: inspect_ai cannot read it"):
        open_any(tmp_path / "x.eval")


@pytest.mark.usefixtures("inspect_ai")
def test_what_inspect_counts_as_0_for_being_no_number_is_said_and_not_paired(tmp_path: Path) -> None:
    def unreadable(log: dict[str, Any]) -> None:
        sample = next(one for one in log["samples"] if one["scores"]["grade"]["value"] == "I")
        sample["scores"]["grade"]["value"] = "hardly"

    (row, *_) = open_any(changed(tmp_path, "system.json", unreadable)).tasks[0].scores[0].rows
    assert "inspect counts 1 values that are no number as 0 ('hardly')" in row.notes
    assert "no mean over samples: shown as it stands, not paired" in row.notes[0]
    assert row.ci95 is None


@pytest.mark.usefixtures("inspect_ai")
@pytest.mark.parametrize(
    ("other", "change", "said"),
    [
        ("system.json", lambda log: None, "not comparable: solver [['generate'"),
        ("small.json", lambda log: log["eval"]["model_generate_config"].update(temperature=0.7), "generation {}"),
        ("small.json", lambda log: log["eval"]["config"].update(message_limit=4), "limits [None"),
        (
            "small.json",
            lambda log: log["eval"]["task_args"].update(shots=3),
            "task arguments {} in A, {'shots': 3} in B",
        ),
        ("small.json", lambda log: log["eval"].update(task_version=2), "task versions 0 and 2 differ"),
        ("small.json", lambda log: [one.update(target="x") for one in log["samples"][:3]], "samples of one id differ"),
    ],
)
def test_what_was_done_differently_is_not_compared(tmp_path: Path, other: str, change: Any, said: str) -> None:
    if other == "small.json":  # one sample stands in it three times
        first = change

        def change(log: dict[str, Any]) -> None:
            log["samples"].sort(key=lambda one: (one["id"], one["epoch"]))
            first(log)

    one = of(compare_runs(FIXTURES / "large.json", changed(tmp_path, other, change)).differences, "polite/accuracy")
    assert one.verdict == "not comparable"
    assert said in one.notes[0]


@pytest.mark.usefixtures("inspect_ai")
def test_a_folder_holds_one_log_per_task_of_one_model(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "small_once.eval", tmp_path)
    assert open_any(tmp_path).name == "mockllm/small"
    shutil.copy(FIXTURES / "large_once.eval", tmp_path)
    with pytest.raises(UserError, match="holds logs of models mockllm/large, mockllm/small"):
        open_any(tmp_path)


@pytest.mark.usefixtures("inspect_ai")
def test_changed_samples_show_question_and_answers() -> None:
    (one,) = changed_samples(FIXTURES / "small_once.eval", FIXTURES / "large_once.eval", limit=1)[-1:]
    assert one.prompt is not None
    assert "What colour is" in one.prompt


@pytest.mark.usefixtures("inspect_ai")
def test_other_reducers_have_other_names() -> None:
    report = compare_runs(FIXTURES / "small.json", FIXTURES / "max_reducer.json")
    assert report.notes == ("colours:chat: A and B have no metric in common",)
    rows = {row.metric: row.mean for row in open_any(FIXTURES / "max_reducer.json").tasks[0].scores[0].rows}
    theirs = {score["name"]: score["metrics"] for score in log_of("max_reducer.json")["results"]["scores"]}
    assert rows["grade/accuracy (max)"] == theirs["grade"]["accuracy"]["value"]
    assert rows["length/mean (max)"] == theirs["length"]["mean"]["value"]
