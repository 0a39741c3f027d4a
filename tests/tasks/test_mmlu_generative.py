"""MMLU asked in words: of a chat-only endpoint, under its own name, in a suite and by itself; and how it is read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import EvalSpec, ModelSpec, load_plugins
from harness.evaluation.plan import EvalPlan, plan_eval
from harness.tasks.catalog import load_catalog
from harness_plugins.scorers.lm_eval import extract_flexible

sys.path.insert(0, str(Path(__file__).parents[1]))
from judge_server import JudgeServer, judge_server

shared = pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="HARNESS_SHARED is not set")
CHAT = {"endpoint": "chat", "model": "stub-judge", "retries": 0}
LETTERS = """\
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
description: "Questions about sums.\\n\\n"
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
doc_to_target: "{{['A', 'B', 'C', 'D'][answer]}}"
generation_kwargs: {until: ["</s>", "\\n"]}
metric_list:
- {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_punctuation: true, ignore_case: true}
"""
OURS = """\
name: letters_gen
prompt: chat
needs: [generate]
lm_eval: {task: letters, include: ., flexible: true}
"""


@pytest.fixture
def endpoint() -> Iterator[JudgeServer]:
    """An endpoint that only chats."""
    with judge_server() as server:
        yield server


def planned(endpoint: JudgeServer, tasks: tuple[str, ...] = (), suite: str | None = None, **options: Any) -> EvalPlan:
    registry = load_plugins()
    spec = EvalSpec(
        model=ModelSpec(model=endpoint.url), tasks=tasks, suite=suite, options={"engine": {**CHAT, **options}}
    )
    return plan_eval(spec, registry, load_catalog(registry))


@pytest.fixture
def letters(alone: Path) -> Path:
    """A folder with a task shaped as lm-eval's mmlu_generative: four sums, of which the first is A, the next B, ..."""
    folder = alone / "tasks"
    folder.mkdir()
    (folder / "letters.yaml").write_text(LETTERS, encoding="utf-8")
    (folder / "letters_gen.yaml").write_text(OURS, encoding="utf-8")
    rows = [{"question": f"1 + {i}?", "choices": ["1", "2", "3", "4"], "answer": i} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.shared
@shared
def test_a_suite_asked_of_a_chat_endpoint_takes_the_generative_variant_under_its_own_name(
    alone: Path, endpoint: JudgeServer
) -> None:
    plan = planned(endpoint, suite="helpful")
    assert [(task.name, task.variant, task.chosen.asked) for task in plan.tasks] == [
        ("mmlu_gen@0", "chat", "mmlu@0"),
        ("bbh@3", "chat", "bbh@3"),
    ]
    noted = [task["notes"][-1] for task in plan.to_json()["tasks"]]
    assert noted == [
        f"stands in for the suite's {name}: the endpoint takes conversations alone and gives no log-likelihoods"
        for name in ("mmlu@0", "bbh@3")
    ]
    # The same steps as when it is asked for by name: only the notes differ.
    direct = planned(endpoint, ("mmlu_gen@0", "bbh@3:chat"))
    assert [task.answers_id for task in plan.tasks] == [task.answers_id for task in direct.tasks]
    assert [task.chosen.asked for task in direct.tasks] == [None, None]


def test_limits_of_a_suite_stay() -> None:
    chosen = load_catalog(load_plugins()).choose((), "quick", None, {}, conversations=True)
    assert [(one.spec.name, one.variant, one.limit) for one in chosen] == [
        ("mmlu_gen@0", None, 4),
        ("bbh@3", "chat", 4),
        ("real_toxicity", None, 50),
    ]


def test_what_is_asked_for_by_name_is_taken_as_it_is() -> None:
    chosen = load_catalog(load_plugins()).choose(("mmlu_gen@0", "mmlu@0"), "helpful", 3, {}, conversations=True)
    assert [(one.spec.name, one.asked) for one in chosen] == [
        ("mmlu_gen@0", None),
        ("mmlu@0", None),
        ("bbh@3", "bbh@3"),
    ]


def test_options_go_by_the_name_that_runs(alone: Path, endpoint: JudgeServer) -> None:
    from harness import UserError

    registry = load_plugins()
    options = {"engine": CHAT, "mmlu@0": {"limit": 2}}
    spec = EvalSpec(model=ModelSpec(model=endpoint.url), suite="helpful", options=options)
    with pytest.raises(UserError, match=r"--set mmlu@0: no task of that name runs here\n  Did you mean 'mmlu_gen@0'\?"):
        plan_eval(spec, registry, load_catalog(registry))


def test_mmlu_by_name_is_refused_and_the_variant_named(cli: Any, endpoint: JudgeServer) -> None:
    ran = cli(
        *("eval", "--model", endpoint.url, "--set", "engine.endpoint=chat", "--set", "engine.model=stub-judge"),
        *("--task", "mmlu@0"),
    )
    assert ran.code == 2
    assert ran.err == (
        "error: --task mmlu@0: needs log-likelihoods, and an endpoint that takes conversations alone gives none\n"
        "  Ask the same in words: --task mmlu_gen@0 (not comparable with mmlu@0); or set engine.endpoint=completions "
        "and engine.tokenizer, if the server has that.\n"
    )
    assert endpoint.asked == []


def test_a_chat_endpoint_is_sent_turns_and_read_by_letter(cli: Any, letters: Path, endpoint: JudgeServer) -> None:
    # A right and strict; B right, but only flexibly; the third names no letter; the fourth a wrong one.
    said = {"1 + 0?": "A", "1 + 1?": "The answer is (B).", "1 + 2?": "three", "1 + 3?": "B. 2"}
    endpoint.say = lambda body, attempt: said[body["messages"][-1]["content"].splitlines()[0]]
    ran = cli(
        *("eval", "--model", endpoint.url, "--set", "engine.endpoint=chat", "--set", "engine.model=stub-judge"),
        *("--tasks", letters, "--task", "letters_gen", "--out", "out"),
    )
    assert ran.code == 0, ran.err
    assert len(endpoint.asked) == 4
    first = endpoint.asked[0]["messages"]
    assert [turn["role"] for turn in first] == ["system", "user"]
    assert first[0]["content"].startswith("Questions about sums.")
    assert "A. 1\nB. 2\nC. 3\nD. 4\nAnswer:" in first[1]["content"]
    assert endpoint.asked[0]["stop"] == ["</s>", "\n"]
    (scores,) = Path("out").glob("steps/scores-*/artifact/scores.json")
    rows = {row["metric"]: row for row in json.loads(scores.read_text(encoding="utf-8"))["rows"]}
    assert {name: row["mean"] for name, row in rows.items()} == {
        "exact_match": 0.25,
        "exact_match_flexible": 0.5,
        "extraction_failed": 0.25,
    }
    assert {(row["task"], row["variant"], row["n"]) for row in rows.values()} == {("letters_gen", "chat", 4)}
    # Four options: whatever the targets of these few questions are.
    assert rows["exact_match"]["chance"] == 0.25


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("**B**", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("(B) Paris", "B"),
        ("B: Paris", "B"),
        ("Answer: B", "B"),
        ("Option B.", "B"),
        ("The answer is B) Paris.", "B"),
        ("The correct answer is (B).", "B"),
        ("I think it is B", "B"),
        ("I'm sure it's B, Paris", "B"),
        ("A city of France, so C", "C"),
        ("A", "A"),
        ("A.", "A"),
        ("It is either A or B", None),
        ("A city of France", None),
        ("I do not know", None),
        ("Paris", None),
        ("", None),
        ("USA", None),
    ],
)
def test_the_letter_that_an_answer_names(said: str, letter: str | None) -> None:
    assert extract_flexible(said, "D") == letter


def test_other_targets_are_read_as_before() -> None:
    # BBH: an option in brackets, a word.
    assert extract_flexible("The answer is (B).", "(A)") == "(B)"
    assert extract_flexible("The answer is B", "(A)") == "(B)"
    assert extract_flexible("So the answer is True.", "True") == "True"
    assert extract_flexible("valid", "invalid") == "valid"


@pytest.mark.shared
@shared
def test_all_subjects_are_asked_in_chat(cli: Any, endpoint: JudgeServer) -> None:
    endpoint.say = lambda body, attempt: "C"
    ran = cli(
        *("eval", "--model", endpoint.url, "--set", "engine.endpoint=chat", "--set", "engine.model=stub-judge"),
        *("--suite", "helpful", "--limit", "1", "--out", "out"),
    )
    assert ran.code == 0, ran.err
    assert "mmlu_gen@0 (chat) stands in for the suite's mmlu@0" in ran.err
    report = json.loads(Path("out/report/report.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in report["rows"]} == {"mmlu_gen@0", "bbh@3"}
    # 57 subjects and 27 files, one question each.
    counts = {(row["task"], row["metric"]): row["n"] for row in report["rows"]}
    assert counts["mmlu_gen@0", "exact_match"] == 57 and counts["bbh@3", "exact_match"] == 27
    chance = {row["chance"] for row in report["rows"] if (row["task"], row["metric"]) == ("mmlu_gen@0", "exact_match")}
    assert chance == {0.25}
