"""lm-eval's tasks through our engine against lm-eval's own ``simple_evaluate`` with its HF model: the same numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.contracts.scorer import ScoreJob, ScorerContext
from harness.core.records import Answer, Output, Sample
from harness.evaluation.rows import check_scores
from harness.steps.journal import read_rows
from harness.tasks.lm_eval.task import LmEvalVerdict
from harness_plugins.scorers.lm_eval import LmEvalScorer

# As lm-eval's own users write them: data files are named relative to where the YAML lies.
CHOICE = """\
task: t_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl, dev: dev.jsonl}}
test_split: test
fewshot_split: dev
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
GENERATE = """\
task: t_generate
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}} Is it so?"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [".", "e q"], max_gen_toks: 24, do_sample: false}
repeats: 2
filter_list:
- name: strict
  filter:
  - {function: regex, regex_pattern: "([a-z]{2})", fallback: "[none]"}
  - {function: take_first}
- name: vote
  filter:
  - {function: regex, regex_pattern: "([A-Za-z])"}
  - {function: majority_vote}
  - {function: take_first}
metric_list:
- {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""
ROLLING = """\
task: t_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{text}}"
metric_list:
- {metric: word_perplexity}
- {metric: byte_perplexity}
- {metric: bits_per_byte}
"""
LIKELY = """\
task: t_likely
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list:
- {metric: perplexity, aggregation: perplexity, higher_is_better: false}
- {metric: acc, aggregation: mean, higher_is_better: true}
"""
TASKS = ("t_choice", "t_generate", "t_rolling", "t_likely")
TEXT = "fox dog river model answer question morning library friend weather bread water list yeast week day"
WORDS = TEXT.split()


def write_tasks(folder: Path) -> Path:
    """Four lm-eval tasks over 10 made-up questions."""
    folder.mkdir(parents=True)
    for name, text in zip(TASKS, (CHOICE, GENERATE, ROLLING, LIKELY), strict=True):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")

    def row(i: int) -> dict[str, Any]:
        choices = [WORDS[(i + k) % 16] + (" and a " + WORDS[(i * k) % 16]) * (k % 3) for k in range(2 + i % 3)]
        answer = choices[i % len(choices)]
        text = " ".join(WORDS[(i * k * k + k) % 16] for k in range(20 if i else 700))  # the first one needs windows
        question = f"Is the {WORDS[i % 16]} of the {WORDS[3 * i % 16]}\u2019s {i} a ..."
        return {"question": question, "choices": choices, "label": i % len(choices), "answer": answer, "text": text}

    for name, numbers in (("choice", range(10)), ("dev", range(20, 26))):
        lines = [json.dumps(row(i)) + "\n" for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def by_lm_eval(model: Path, tasks: list[str], manager: Any, **settings: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    found = simple_evaluate(
        model=theirs, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0, **settings
    )
    assert found is not None
    return dict(found)


def same_numbers(evaluation: Any, task: str, theirs: Mapping[str, Any], leaf: str | None = None) -> int:
    """Hold our numbers on one leaf task against theirs; returns how many were compared."""
    rows = evaluation.leaves if leaf else evaluation.rows
    ours = {row.metric: row for row in rows if row.task == task and row.leaf == leaf and row.scorer == "lm_eval"}
    name, compared = leaf or task.removeprefix("lm_eval:"), 0
    filters = {key.partition(",")[2] for key in theirs["results"][name] if "," in key and "stderr" not in key}
    for key, value in theirs["results"][name].items():
        metric, _, kept = key.partition(",")
        if not kept or "stderr" in metric:
            continue
        row = ours[metric if len(filters) == 1 else key]
        exact = metric.startswith(("acc", "exact_match"))
        assert row.mean == (pytest.approx(value, abs=1e-12) if exact else pytest.approx(value, rel=1e-4)), key
        assert row.n == theirs["n-samples"][name]["effective"]
        compared += 1
    return compared


def same_answers(evaluation: Any, theirs: Mapping[str, Any], step: str, name: str) -> int:
    """Hold stored log-likelihoods (1e-4) and texts (identical) against those in lm-eval's samples."""
    (folder,) = evaluation.root.glob(f"steps/answers-*-{step}-*")
    stored: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_rows(folder / "artifact" / "answers.jsonl.gz"):
        stored.setdefault(row["item"], {})[row["index"]] = row["output"]
    compared = 0
    for sample in theirs["samples"][name]:
        outputs = stored[f"{name}:{sample['doc_id']}"]
        responses = [response for repeats in sample["resps"] for response in repeats]
        if isinstance(responses[0], float):  # rolling: the windows add up
            assert sum(output["logprob"] for output in outputs.values()) == pytest.approx(responses[0], abs=1e-3)
            compared += 1
            continue
        for index, response in enumerate(responses):
            if isinstance(response, str):
                assert outputs[index].get("text", "") == response
            else:
                assert outputs[index]["logprob"] == pytest.approx(float(response[0]), abs=1e-4)
                assert outputs[index]["is_greedy"] == (str(response[1]) == "True")
            compared += 1
    return compared


def test_as_simple_evaluate(alone: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness import evaluate

    folder = write_tasks(alone / "theirs")
    # By path and by folder: both ways to bring a YAML file.
    ours = evaluate(
        str(tiny),
        tasks=[str(folder / "t_choice.yaml"), *TASKS[1:]],
        task_folders=[str(folder)],
        engine="transformers",
        out=alone / "ours",
    )
    assert not ours.failures
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(folder)
    theirs = by_lm_eval(tiny, list(TASKS), TaskManager(include_defaults=False, include_path=str(folder)))
    assert same_numbers(ours, "t_choice", theirs) == 2
    assert same_numbers(ours, "t_generate", theirs) == 2
    assert same_numbers(ours, "t_rolling", theirs) == 3
    assert same_numbers(ours, "t_likely", theirs) == 2
    # 10 questions with 2 + i % 3 choices: 4 of 2, 3 of 3, 3 of 4.
    assert same_answers(ours, theirs, "t_choice", "t_choice") == 8 + 9 + 12
    assert same_answers(ours, theirs, "t_generate", "t_generate") == 2 * 20  # two repeats, once per filter
    assert same_answers(ours, theirs, "t_rolling", "t_rolling") == 10
    assert same_answers(ours, theirs, "t_likely", "t_likely") == 10
    chance = {row.metric: row.chance for row in ours.rows if row.task == "t_choice"}
    assert chance["acc"] == pytest.approx((4 / 2 + 3 / 3 + 3 / 4) / 10)
    # The prompts differ from each other only if the shots were really drawn.
    (requests,) = (alone / "ours" / "requests").glob(f"{requests_of(alone / 'ours', 't_choice')}")
    prompts = [row["prompt"] for row in read_rows(requests)]
    assert all(prompt.count("Question: ") == 3 for prompt in prompts)
    # The long text does not fit the context of 512 tokens: lm-eval's windows.
    (requests,) = (alone / "ours" / "requests").glob(f"{requests_of(alone / 'ours', 't_rolling')}")
    assert len(read_rows(requests)[0]["requests"]) > 1


def requests_of(root: Path, task: str) -> str:
    (step,) = root.glob(f"steps/answers-*-{task}-*/step.json")
    return str(json.loads(step.read_text(encoding="utf-8"))["requests"])


def test_seed_and_shots(alone: Path, tiny: Path) -> None:
    """--seed moves lm-eval's choice of shots; num_fewshot can be set; a limit takes the first of them."""
    from harness import evaluate

    folder = write_tasks(alone / "theirs")
    prompts = {}
    for out, seed, shots in (("a", 0, 2), ("b", 7, 2), ("c", 0, 1)):
        options = {"t_choice": {"lm_eval": {"num_fewshot": shots}}}
        evaluation = evaluate(
            str(tiny),
            tasks=["t_choice"],
            task_folders=[str(folder)],
            engine="transformers",
            out=alone / out,
            seed=seed,
            limit=4,
            options=options,
        )
        assert [row.n for row in evaluation.rows] == [4, 4]
        (requests,) = (alone / out / "requests").glob("*.gz")
        prompts[out] = [row["prompt"] for row in read_rows(requests)]
    assert prompts["a"] != prompts["b"]
    assert [prompt.count("Question: ") for prompt in prompts["a"] + prompts["c"]] == [3] * 4 + [2] * 4
    last = [prompt.rsplit("Question: ", 1)[1] for prompt in prompts["a"]]
    assert last == [prompt.rsplit("Question: ", 1)[1] for prompt in prompts["b"]]


def test_generation_settings_that_engines_do_not_know() -> None:
    from harness.core.errors import StepError
    from harness.tasks.lm_eval.collect import decoding_of

    decoding = decoding_of({"until": "\n", "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}, 256, "t")
    assert (decoding.stop, decoding.max_new_tokens, decoding.temperature) == (("\n",), 7, 0.0)
    decoding = decoding_of(
        {"until": ["a", "b", "a", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9}, 256, "t"
    )
    assert (decoding.stop, decoding.max_new_tokens) == (("a", "b"), 256)
    assert (decoding.temperature, decoding.top_p) == (0.7, 0.9)
    with pytest.raises(StepError, match="t: generation_kwargs num_beams are not supported"):
        decoding_of({"until": [], "num_beams": 4}, 256, "t")


def test_one_task_that_cannot_run_does_not_stop_the_others(cli: Any, alone: Path, tiny: Path) -> None:
    folder = write_tasks(alone / "theirs")
    text = (folder / "t_generate.yaml").read_text(encoding="utf-8")
    (folder / "t_generate.yaml").write_text(text.replace("do_sample: false", "num_beams: 4"), encoding="utf-8")
    command = ["eval", "--model", tiny, "--tasks", folder, "--task", "t_generate", "--task", "t_likely", "--limit", "2"]
    ran = cli(*command, "--engine", "transformers", "--out", "out")
    assert ran.code == 3
    assert "generation_kwargs num_beams are not supported" in ran.err
    report = json.loads((alone / "out" / "report" / "report.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in report["rows"]} == {"t_likely"}
    assert {task["task"]: task["status"] for task in report["tasks"]} == {"t_generate": "failed", "t_likely": "done"}
    assert any("num_beams" in note for note in report["notes"])


SHARED = os.environ.get("HARNESS_SHARED")


@pytest.mark.shared
@pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")
def test_real_tasks_as_simple_evaluate(alone: Path) -> None:
    """MMLU anatomy and a BBH file on tiny-instruct in fp32, by lm-eval's own names."""
    from lm_eval.tasks import TaskManager

    from harness import evaluate
    from harness.core.specs import ModelSpec
    from harness.tasks.lm_eval.load import tasks_folder

    model = Path(str(SHARED)) / "models" / "tiny-instruct"
    names = ["mmlu_anatomy", "bbh_fewshot_navigate"]
    ours = evaluate(
        ModelSpec(model=str(model), dtype="float32"),
        tasks=[f"lm_eval:{name}" for name in names],
        engine="transformers",
        limit=2,
        out=alone / "ours",
    )
    folders = [str(tasks_folder() / "mmlu" / "default"), str(tasks_folder() / "bbh" / "fewshot")]
    manager = TaskManager(include_defaults=False, include_path=folders)
    theirs = by_lm_eval(model, names, manager, limit=2)
    for name, answers in zip(names, (8, 2), strict=True):
        assert same_numbers(ours, f"lm_eval:{name}", theirs) >= 1
        assert same_answers(ours, theirs, f"lm_eval-{name}", name) == answers


class PercentRuntime:
    """Two documents with one f1 each, per document or of the corpus, in percent."""

    def __init__(self, aggregate: Any) -> None:
        self._aggregate = aggregate

    def narrowed(self, kept: Any) -> PercentRuntime:
        return self

    def process(self, answers: Any) -> list[LmEvalVerdict]:
        return [LmEvalVerdict({"none": {"f1": value}}, {}) for value in (50.0, 100.0)]

    def metrics(self) -> dict[str, Any]:
        return {"f1": (True, self._aggregate)}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def whole(values: list[float]) -> float:
    return mean(values)


@pytest.mark.parametrize("aggregate", [mean, whole])
def test_a_range_that_only_its_name_suggests_gives_way_to_the_values(aggregate: Any) -> None:
    """squad's f1 is in percent, glue's a proportion: the name alone must not make scores of the one a mistake."""
    samples = [Sample(name, ()) for name in "ab"]
    session = LmEvalScorer().open(LmEvalScorer.Config(), ScorerContext())
    job = ScoreJob(open_task=lambda: PercentRuntime(aggregate))
    scores = session.score(samples, [Answer(name, (Output("x"),)) for name in "ab"], job)
    (metric,) = session.metrics() or ()
    check_scores("lm_eval", (metric,), scores, samples)
    assert (metric.unit, metric.low, metric.high) == ("score", None, None)
    assert metric.aggregate == ("mean" if aggregate is mean else "corpus")
