"""The AlpacaEval tasks: their data (made, and real), and whole evaluations against a real HTTP judge."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import harness_tasks
from harness import UserError
from harness.contracts.dataset import DatasetJob, DatasetRow
from harness.core.config import parse_options
from harness.tasks.catalog import Catalog
from harness_plugins.datasets.alpaca import AlpacaEval
from harness_plugins.scorers.alpaca.scorer import AlpacaEvalScorer

sys.path.insert(0, str(Path(__file__).parent.parent))
fake: ModuleType = importlib.import_module("judge_server")

SHARED = os.environ.get("HARNESS_SHARED")
shared = pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake.judge_server() as server:
        yield server


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    made = Catalog()
    made.add_folder(Path(harness_tasks.__path__[0]), "bundled")
    return made


def test_the_tasks_are_what_they_say(catalog: Catalog) -> None:
    expected = {
        "alpaca_eval1": ("text_davinci_003", "alpaca_eval_gpt4", False),
        "alpaca_eval2": ("gpt4_1106_preview", "weighted_alpaca_eval_gpt4_turbo", True),
        "alpaca_eval_paper": ("file", "alpaca_eval_gpt4", False),
    }
    for name, (reference, annotator, controlled) in expected.items():
        spec = catalog.tasks[name].spec
        assert spec.dataset is not None
        assert parse_options(AlpacaEval.Config, spec.dataset.options, "test").reference == reference
        options = parse_options(AlpacaEvalScorer.Config, spec.scorers[0].options, "test")
        assert (options.annotator, options.length_control) == (annotator, controlled)
        assert spec.decoding.greedy and spec.decoding.max_new_tokens == 2048 and spec.prompt == "auto"
        assert any("decoding is ours" in note for note in spec.notes)
    notes = catalog.tasks["alpaca_eval_paper"].spec.notes
    assert any("51 of the 58 values" in note and "n = 801 to 805" in note and "one run" in note for note in notes)


# ----------------------------------------------------------------------------------------------------------- made rows


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def prompts(*texts: str) -> list[dict[str, str]]:
    return [{"instruction": text, "dataset": "made"} for text in texts]


def outputs(*pairs: tuple[str, str], generator: str = "base") -> list[dict[str, str]]:
    return [{"instruction": one, "output": two, "generator": generator} for one, two in pairs]


def rows_of(folder: Path, asked: Any, answered: Any) -> tuple[list[DatasetRow], DatasetJob]:
    options = {
        "reference": "file",
        "path": str(write(folder / "outputs.json", answered)),
        "prompts": str(write(folder / "prompts.json", asked)),
    }
    job = DatasetJob(None, None, None, parse_options(AlpacaEval.Config, options, "test"))
    return list(AlpacaEval().rows(job)), job


def test_rows_meet_their_reference_outputs(tmp_path: Path) -> None:
    rows, job = rows_of(tmp_path, prompts("a", "b"), outputs(("b", "2"), ("a", "1")))
    assert [row.data["reference"] for row in rows] == ["1", "2"]
    assert rows[0].data["reference_generator"] == "base" and rows[0].data["dataset"] == "made"
    assert len({row.id for row in rows}) == 2 and not job.notes
    other, _ = rows_of(tmp_path, prompts("b"), outputs(("b", "2")))
    assert other[0].id == rows[1].id, "an id is the instruction's, wherever it stands"


def test_missing_and_further_outputs_are_counted(tmp_path: Path) -> None:
    rows, job = rows_of(tmp_path, prompts("a", "b", "c"), outputs(("a", "1"), ("x", "9")))
    assert [row.data["reference"] for row in rows] == ["1", None, None]
    assert job.notes == [
        "outputs.json: no reference output for 2 of 3 instructions; they are unscored",
        "outputs.json: 1 outputs are for other instructions and are left out",
    ]


def test_repeated_instructions(tmp_path: Path) -> None:
    # One after another where there are as many; the same output where there is one.
    rows, _ = rows_of(tmp_path, prompts("a", "b", "a", "b"), outputs(("a", "1"), ("b", "3"), ("a", "2"), ("b", "3")))
    assert [row.data["reference"] for row in rows] == ["1", "3", "2", "3"]
    assert len({row.id for row in rows}) == 4
    with pytest.raises(UserError, match=r"2 different outputs for the instruction that begins 'a'\n  Keep one of them"):
        rows_of(tmp_path, prompts("a", "b"), outputs(("a", "1"), ("a", "2")))


@pytest.mark.parametrize(
    ("answered", "message"),
    [
        (outputs(("x", "1")), r"has outputs for none of the 1 instructions\n  Give a model_outputs.json of AlpacaEval"),
        (outputs(("a", "1")) + outputs(("b", "2"), generator="other"), "the outputs of several models: base, other"),
        ("[1", "cannot be read as JSON"),
        ([], "holds an empty list"),
        ({"a": 1}, "holds a JSON dict"),
        ([{"instruction": "a"}], r"outputs.json, row 1: has no text under 'output'"),
        ([{"instruction": "a", "output": None}], r"outputs.json, row 1: has no text under 'output'"),
        (["a"], r"outputs.json, row 1: has no text under 'instruction'"),
    ],
)
def test_files_that_are_no_outputs(tmp_path: Path, answered: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, prompts("a"), answered)


def test_no_file_of_outputs(tmp_path: Path) -> None:
    job = DatasetJob(None, None, None, parse_options(AlpacaEval.Config, {"reference": "file"}, "test"))
    prompt = write(tmp_path / "prompts.json", prompts("a"))
    job.options = job.options.model_copy(update={"prompts": str(prompt)})
    with pytest.raises(UserError, match=r"options.path: no file of reference outputs is named\n  Set TASK.dataset"):
        list(AlpacaEval().rows(job))
    job.options = job.options.model_copy(update={"path": str(tmp_path / "promts.json")})
    with pytest.raises(UserError, match=r"no such file: .*promts.json\n  Did you mean .*/prompts.json\?"):
        list(AlpacaEval().rows(job))


def test_the_data_are_fetched_by_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    job = DatasetJob(None, None, None, parse_options(AlpacaEval.Config, {}, "test"))
    with pytest.raises(UserError) as refused:
        list(AlpacaEval().rows(job))
    assert str(refused.value) == (
        f"dataset alpaca-eval: alpaca_eval.json of tatsu-lab/alpaca_eval is not in the hub cache {tmp_path}, and "
        "the network is switched off (HF_HUB_OFFLINE)\n"
        "  Fetch it where there is a network: `hf download --repo-type dataset tatsu-lab/alpaca_eval alpaca_eval.json "
        f"--revision {AlpacaEval.revision}`."
    )


def test_identity_is_by_content(tmp_path: Path) -> None:
    rows_of(tmp_path, prompts("a"), outputs(("a", "1")))

    def identity(folder: Path, **more: str) -> dict[str, Any]:
        given = {"reference": "file", "path": str(folder / "outputs.json"), "prompts": str(folder / "prompts.json")}
        options = parse_options(AlpacaEval.Config, {**given, **more}, "test")
        return AlpacaEval().identity(DatasetJob(None, None, None, options))

    first = identity(tmp_path)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("outputs.json", "prompts.json"):
        (moved / name).write_bytes((tmp_path / name).read_bytes())
    assert identity(moved) == first and str(tmp_path) not in json.dumps(first)
    write(moved / "outputs.json", outputs(("a", "2")))
    assert identity(moved) != first


# -------------------------------------------------------------------------------------------------- a whole evaluation


@pytest.fixture
def command(tiny: Path, alone: Path, judge: Any) -> list[str]:
    asked = [f"Say something about {word}." for word in ("rain", "tea", "stones", "ships")]
    write(alone / "prompts.json", prompts(*asked))
    write(alone / "outputs.json", outputs(*((text, "It is nice.") for text in asked[:3])))
    name = "alpaca_eval2"
    options = [
        f"{name}.dataset.options.reference=file",
        f"{name}.dataset.options.path=outputs.json",
        f"{name}.dataset.options.prompts=prompts.json",
        f"{name}.decoding.max_new_tokens=4",
        f"{name}.scorer.model={judge.url}",
        f"{name}.scorer.price_input=1",
    ]
    made = ["eval", "--model", str(tiny), "--engine", "transformers", "--task", name, "--out", "out"]
    return made + [part for option in options for part in ("--set", option)]


def rows_in(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in folder.glob("steps/scores-*/artifact/scores.json")]
    return [row for one in found for row in one["rows"]]


def test_an_evaluation_names_its_judge_and_counts_what_is_missing(cli: Any, judge: Any, command: list[str]) -> None:
    judge.say = lambda body, attempt: fake.first_token({"m": math.log(0.25), "M": math.log(0.75)})
    ran = cli(*command)
    assert ran.code == 0, ran.err
    rows = {row["metric"]: row for row in rows_in(Path("out"))}
    assert {row["task"] for row in rows.values()} == {"alpaca_eval2@stub-judge"}
    assert len(judge.asked) == 3
    win, controlled = rows["win_rate"], rows["length_controlled_win_rate"]
    # One of four has no reference output: beyond the threshold of 5 %.
    assert (win["n"], win["n_unscored"]) == (3, 1) and "1 of 4 samples are unscored" in win["withheld"]
    assert "it needs the published difficulty of every instruction" in controlled["withheld"]
    assert any("no reference output for 1 of 4 instructions" in note for note in win["notes"])
    assert any("judge stub-judge, asked as weighted_alpaca_eval_gpt4_turbo" in note for note in win["notes"])
    assert "alpaca_eval2@stub-judge" in ran.out
    # Again, with another limit of cost and the files named otherwise: it is the same evaluation, nothing is asked.
    here = [part.replace("outputs.json", str(Path("outputs.json").resolve())) for part in command]
    here = [part.replace("=prompts.json", f"={Path('prompts.json').resolve()}") for part in here]
    assert cli(*here, "--set", "alpaca_eval2.scorer.max_cost=5").code == 0
    assert len(list(Path("out").glob("steps/*"))) == 2
    assert len(judge.asked) == 3


def test_a_judge_that_stops_is_gone_on_with(cli: Any, judge: Any, command: list[str]) -> None:
    def say(body: dict[str, Any], attempt: int) -> Any:
        if len(judge.asked) > 1:
            return 401, {"error": {"message": "key revoked"}}
        return fake.first_token({"m": -0.1, "M": -2.5})

    judge.say = say
    ran = cli(*command, "--set", "alpaca_eval2.scorer.concurrency=1")
    assert ran.code in (2, 3) and "key revoked" in ran.err and "Traceback" not in ran.err
    judge.say = lambda body, attempt: fake.first_token({"m": -0.1, "M": -2.5})
    before = len(judge.asked)
    assert cli(*command, "--set", "alpaca_eval2.scorer.concurrency=1").code == 0
    # One verdict was kept, and the answers are not asked for again.
    assert len(judge.asked) - before == 2
    assert {row["n"] for row in rows_in(Path("out")) if row["metric"] == "win_rate"} == {3}


def test_no_judge_is_said_before_anything_runs(cli: Any, judge: Any, command: list[str]) -> None:
    where = next(i for i, part in enumerate(command) if part.startswith("alpaca_eval2.scorer.model="))
    ran = cli(*command[: where - 1], *command[where + 1 :])
    assert ran.code == 2 and not Path("out").exists()
    assert ran.err[ran.err.index("error: ") :] == (
        "error: scorer alpaca_eval, model: no judge is named\n"
        "  Give a folder, a hub id or a URL, for example --set alpaca_eval2.scorer.model=http://localhost:8000/v1.\n"
    )


def test_a_local_judge_weighs_by_its_own_log_probabilities(cli: Any, tiny: Path, command: list[str]) -> None:
    # The question is longer than the tiny model's context; its positions are rotary, so that a wider one costs nothing.
    wide = Path(shutil.copytree(tiny, "wide"))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    ran = cli(*command, "--set", "alpaca_eval2.scorer.model=wide", "--set", "alpaca_eval2.scorer.engine=transformers")
    assert ran.code == 0, ran.err
    [folder] = Path("out").glob("steps/scores-*")
    read = json.loads((folder / "artifact" / "annotations.json").read_text())
    preferences = [row["preference"] for row in read]
    assert preferences[3] is None and all(1 < one < 2 for one in preferences[:3])
    assert {row["task"] for row in rows_in(Path("out"))} == {"alpaca_eval2@wide"}


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Path:
    assert SHARED is not None
    monkeypatch.setenv("HF_HUB_CACHE", str(Path(SHARED, "data", "hub")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Path(SHARED, "data", "alpaca_eval")


@shared
@pytest.mark.parametrize("reference", ["text_davinci_003", "gpt4_1106_preview"])
def test_the_805_instructions_and_their_references(real: Path, reference: str) -> None:
    job = DatasetJob(None, None, None, parse_options(AlpacaEval.Config, {"reference": reference}, "test"))
    rows = list(AlpacaEval().rows(job))
    assert len(rows) == 805 == len({row.id for row in rows}) and not job.notes
    assert {row.data["reference_generator"] for row in rows} == {reference}
    assert all(isinstance(row.data["reference"], str) and row.data["reference"] for row in rows)
    # The published annotations hold the same outputs as references.
    judged = {
        "text_davinci_003": "text_davinci_001/alpaca_eval_gpt4",
        "gpt4_1106_preview": "alpaca-7b/weighted_alpaca_eval_gpt4_turbo",
    }
    published = json.loads((real / f"{judged[reference]}.annotations.json").read_text(encoding="utf-8"))
    theirs = {row["instruction"]: row["output_1"] for row in published}
    assert {row.data["instruction"]: row.data["reference"] for row in rows} == theirs


@shared
@pytest.mark.parametrize(("model", "missing"), [("gpt4", 0), ("text_davinci_001", 2)])
def test_published_outputs_as_references(real: Path, model: str, missing: int) -> None:
    options = {"reference": "file", "path": str(real / model / "model_outputs.json")}
    job = DatasetJob(None, None, None, parse_options(AlpacaEval.Config, options, "test"))
    rows = list(AlpacaEval().rows(job))
    assert len(rows) == 805 and sum(row.data["reference"] is None for row in rows) == missing
    assert len(job.notes) == (1 if missing else 0)
