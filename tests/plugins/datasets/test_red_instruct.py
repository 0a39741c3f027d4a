"""Red-Instruct's questions: made files in every form that they come in, and the real ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import UserError
from harness.contracts.dataset import DatasetJob, DatasetRow
from harness.core.config import parse_options
from harness.testing import check_dataset
from harness_plugins.datasets.red_instruct import CategoricalHarmfulQA, DangerousQA, HarmfulQA, RedQuestions

SHARED = os.environ.get("HARNESS_SHARED")
shared = pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")
QUESTIONS = ["How do I bake a stone? ", "Is the moon {{ cheese }} or <b>?"]


def job(dataset: RedQuestions, subset: str | None = None, revision: str | None = None, **options: Any) -> DatasetJob:
    return DatasetJob(subset, None, revision, parse_options(dataset.Config, options, "test"))


def rows(dataset: RedQuestions, asked: DatasetJob) -> list[DatasetRow]:
    return list(dataset.rows(asked))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder as the repository has it."""
    (tmp_path / "harmful_questions").mkdir()
    (tmp_path / "red_prompts").mkdir()
    for name, text in {
        "standard": "<question>",
        "cot": "<question> Slowly.",
        "cou": "Red-LM: <question>\n\nAgain: <question>\nBase-LM:\n",
    }.items():
        (tmp_path / "red_prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    write(tmp_path / "harmful_questions" / "dangerousqa.json", QUESTIONS)
    return tmp_path


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def test_a_question_is_stripped_and_put_wherever_the_template_has_a_place(clone: Path) -> None:
    found = rows(DangerousQA(), job(DangerousQA(), path=str(clone), template="cou"))
    assert [row.id for row in found] == ["dangerousqa-0000", "dangerousqa-0001"]
    assert found[0].data == {
        "question": "How do I bake a stone?",
        "category": "",
        "subcategory": "",
        "prompt": "Red-LM: How do I bake a stone?\n\nAgain: How do I bake a stone?\nBase-LM:\n",
    }
    assert found[1].data["prompt"].startswith("Red-LM: Is the moon {{ cheese }} or <b>?\n")


@pytest.mark.parametrize(("template", "prompt"), [("standard", "{}"), ("cot", "{} Slowly.")])
def test_templates(clone: Path, template: str, prompt: str) -> None:
    (first, _) = rows(DangerousQA(), job(DangerousQA(), path=str(clone), template=template))
    assert first.data["prompt"] == prompt.format(first.data["question"])


@pytest.mark.parametrize(
    "value",
    [
        [{"topic": "T", "subtopic": "S", "question": "q1"}, {"topic": "T", "subtopic": "R", "question": "q2"}],
        {"T": {"S": ["q1"], "R": ["q2"]}},
    ],
)
def test_harmful_qa_as_on_the_hub_and_as_in_the_repository(tmp_path: Path, value: Any) -> None:
    write(tmp_path / "harmfulqa.json", value)
    found = rows(HarmfulQA(), job(HarmfulQA(), path=str(tmp_path)))
    assert [(row.data["question"], row.data["category"], row.data["subcategory"]) for row in found] == [
        ("q1", "T", "S"),
        ("q2", "T", "R"),
    ]
    # The question alone needs no file of templates.
    assert found[0].data["prompt"] == "q1"


@pytest.mark.parametrize("count", [1, 2])
def test_json_lines(tmp_path: Path, count: int) -> None:
    line = json.dumps({"Category": "C", "Subcategory": "S", "Question": "问"}, ensure_ascii=False)
    (tmp_path / "catqa_chinese.json").write_text((line + "\n\n") * count, encoding="utf-8")
    found = rows(CategoricalHarmfulQA(), job(CategoricalHarmfulQA(), "zh", path=str(tmp_path)))
    assert [row.id for row in found] == [f"zh-{n:04}" for n in range(count)]
    assert found[0].data == {"question": "问", "category": "C", "subcategory": "S", "prompt": "问"}


def test_what_is_no_question_is_dropped_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "dangerousqa.json", ["  ", "q", {"question": None}, {}])
    asked = job(DangerousQA(), path=str(tmp_path))
    assert [row.id for row in rows(DangerousQA(), asked)] == ["dangerousqa-0001"]
    assert asked.dropped == {"without a question": 3}


def test_identity_is_content_not_place(clone: Path, tmp_path: Path) -> None:
    def identity(**options: Any) -> dict[str, Any]:
        return DangerousQA().identity(job(DangerousQA(), path=str(clone), **options))

    before = identity(template="cou")
    assert str(tmp_path) not in json.dumps(before)
    assert before != identity(template="cot")
    (clone / "red_prompts" / "cot.txt").write_text("<question>?", encoding="utf-8")
    assert identity(template="cou") == before
    (clone / "red_prompts" / "cou.txt").write_text("<question>?", encoding="utf-8")
    assert identity(template="cou") != before


def test_the_contract(clone: Path) -> None:
    check_dataset(DangerousQA(), options={"path": str(clone), "template": "cot"})


# ------------------------------------------------------------------------------------------------------------ messages


def refused(dataset: RedQuestions, asked: DatasetJob) -> UserError:
    with pytest.raises(UserError) as error:
        rows(dataset, asked)
    return error.value


def test_no_such_folder(tmp_path: Path) -> None:
    error = refused(DangerousQA(), job(DangerousQA(), path=str(tmp_path / "no")))
    assert (error.where, error.what) == ("dataset dangerous-qa, options.path", f"no such folder: {tmp_path / 'no'}")
    assert "git clone https://github.com/declare-lab/red-instruct" in error.fix
    assert "options.path=red-instruct" in error.fix


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    error = refused(DangerousQA(), job(DangerousQA(), "adversarialqa", path=str(tmp_path)))
    assert error.what == f"{tmp_path} holds none of adversarialqa.json, harmful_questions/adversarialqa.json"


def test_a_folder_without_the_template(clone: Path) -> None:
    error = refused(DangerousQA(), job(DangerousQA(), path=str(clone), template="suffix"))
    assert error.where == "dataset dangerous-qa, options.template"
    assert error.what == f"{clone / 'red_prompts' / 'suffix.txt'} is not there"


def test_a_template_without_a_place(clone: Path) -> None:
    (clone / "red_prompts" / "cot.txt").write_text("Slowly.", encoding="utf-8")
    assert refused(DangerousQA(), job(DangerousQA(), path=str(clone), template="cot")).what == (
        "holds no <question>, which the question would replace"
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1, 2]", "holds no list of questions"),
        ("3", "holds no list of questions"),
        ('{"question": "q"}\nnonsense', "not JSON: Expecting value"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "dangerousqa.json").write_text(text, encoding="utf-8")
    assert refused(DangerousQA(), job(DangerousQA(), path=str(tmp_path))).what.startswith(what)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield


def test_what_is_in_no_cache_is_told_where_to_have(nowhere: None) -> None:
    error = refused(DangerousQA(), job(DangerousQA()))
    assert error.where.startswith("data set declare-lab/DangerousQA") and "hub cache" in error.what
    assert "git clone https://github.com/declare-lab/red-instruct" in error.fix
    error = refused(HarmfulQA(), job(HarmfulQA(), template="cou"))
    assert error.what == "red_prompts/cou.txt of declare-lab/DangerousQA is not in the cache"


# --------------------------------------------------------------------------------------------------------- real files


@pytest.mark.shared
@shared
@pytest.mark.parametrize(
    ("dataset", "subset", "count", "categories", "subcategories"),
    [
        (DangerousQA(), "dangerousqa", 200, 1, 1),
        (DangerousQA(), "adversarialqa", 500, 1, 1),
        (HarmfulQA(), None, 1960, 10, 98),
        (CategoricalHarmfulQA(), "en", 550, 11, 55),
        (CategoricalHarmfulQA(), "zh", 550, 11, 55),
        (CategoricalHarmfulQA(), "vi", 550, 11, 55),
    ],
)
def test_the_real_ones_have_the_published_counts(
    dataset: RedQuestions, subset: str | None, count: int, categories: int, subcategories: int
) -> None:
    asked = job(dataset, subset, template="cou")
    found = rows(dataset, asked)
    assert len(found) == len({row.id for row in found}) == count
    assert asked.dropped == {} and asked.notes == []
    assert len({row.data["category"] for row in found}) == categories
    assert len({(row.data["category"], row.data["subcategory"]) for row in found}) == subcategories
    for row in found:
        question, prompt = row.data["question"], row.data["prompt"]
        assert question and question == question.strip() and question in prompt and "<question>" not in prompt
        assert prompt.startswith("-Example-") and prompt.rstrip().endswith("Base-LM:")
    assert dataset.identity(asked)["revision"] == dataset.revision


@pytest.mark.shared
@shared
def test_a_folder_gives_the_rows_of_the_hub() -> None:
    assert SHARED is not None
    (folder,) = Path(SHARED, "data", "hub", "datasets--declare-lab--DangerousQA", "snapshots").iterdir()
    for template in ("standard", "cot"):
        by_hub = rows(DangerousQA(), job(DangerousQA(), template=template))
        assert rows(DangerousQA(), job(DangerousQA(), path=str(folder), template=template)) == by_hub
    assert by_hub[0].data["prompt"] == by_hub[0].data["question"] + " Let's think step by step."
