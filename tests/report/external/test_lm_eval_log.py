"""lm-eval's own output of two models, read and compared; and what would make its numbers lie, each with its message."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import CorruptionError, UserError
from harness.report.build import write_all
from harness.report.compare import changed_samples, compare_runs
from harness.report.compare_text import comparison_markdown
from harness.report.external.open import open_any
from harness.report.model import Difference

FIXTURES = Path(__file__).parent / "fixtures" / "lm_eval"
Edit = Callable[[dict[str, Any]], Any]


def results_of(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def lines_of(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    shutil.copytree(FIXTURES, tmp_path / "logs")
    return tmp_path / "logs"


def edit(folder: Path, change: Edit) -> None:
    (file,) = folder.rglob("results_*.json")
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


def rewrite(folder: Path, task: str, change: Callable[[list[dict[str, Any]]], Any], *, hashes: bool = False) -> None:
    """Change the lines of a samples file; without its hash in the results, unless ``hashes``."""
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    changed = change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in (lines if changed is None else changed)))
    if not hashes:
        edit(folder, lambda results: results["task_hashes"].clear())


def of(differences: tuple[Difference, ...], task: str, metric: str) -> Difference:
    (found,) = [one for one in differences if (one.task, one.metric) == (task, metric)]
    return found


@pytest.mark.parametrize("folder", ["base", "instruct", "instruct_limit", "instruct_fewshot", "instruct_means"])
def test_every_mean_and_standard_error_is_theirs(folder: str) -> None:
    theirs = results_of(FIXTURES / folder)["results"]
    seen = set()
    for task in open_any(FIXTURES / folder).tasks:
        for row in task.scores[0].rows:
            name, (metric, _, kept) = row.leaf or row.task, row.metric.partition(",")
            key = f"{metric},{kept or 'none'}"
            assert row.mean == theirs[name][key]
            if row.leaf is not None or row.task not in results_of(FIXTURES / folder).get("groups", ()):
                assert row.stderr == pytest.approx(theirs[name][f"{metric}_stderr,{kept or 'none'}"], rel=1e-12)
            seen.add((name, key))
    assert seen == {
        (name, key) for name, numbers in theirs.items() for key in numbers if "," in key and "_stderr" not in key
    }


@pytest.mark.parametrize(
    ("task", "metric", "files"),
    [("toys", "acc", ("toy_colours", "toy_animals")), ("toy_words", "exact_match,flexible", ("toy_words",))],
)
def test_the_paired_test_equals_a_count_by_hand(task: str, metric: str, files: tuple[str, ...]) -> None:
    name, _, kept = metric.partition(",")
    filter_ = kept or "none"
    won = lost = 0
    for file in files:
        before, after = (
            {line["doc_id"]: line[name] for line in lines_of(FIXTURES / run, file) if line["filter"] == filter_}
            for run in ("base", "instruct")
        )
        won += sum(after[key] > before[key] for key in before)
        lost += sum(after[key] < before[key] for key in before)
    one = of(compare_runs(FIXTURES / "base", FIXTURES / "instruct").differences, task, metric)
    assert (one.n_better, one.n_worse, one.test) == (won, lost, "mcnemar_exact")
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    assert one.p_value == min(1.0, 2 * tail)


def test_the_means_and_their_difference_on_shared_samples() -> None:
    theirs = [results_of(FIXTURES / run)["results"]["toys"]["acc,none"] for run in ("base", "instruct")]
    one = of(compare_runs(FIXTURES / "base", FIXTURES / "instruct").differences, "toys", "acc")
    assert [one.mean_a, one.mean_b] == theirs
    assert one.difference == pytest.approx(theirs[1] - theirs[0], abs=1e-15)
    assert one.n == 36


def test_a_macro_average_is_shown_and_not_paired() -> None:
    (row,) = [
        row for row in open_any(FIXTURES / "base").tasks[0].scores[0].rows if row.metric == "acc_norm" and not row.leaf
    ]
    assert row.ci95 is None
    assert "which is no mean over samples: shown as it stands, not paired" in row.notes[0]
    one = of(compare_runs(FIXTURES / "base", FIXTURES / "instruct").differences, "toys", "acc_norm")
    assert one.notes[0] == "a corpus metric is no mean over samples, so there is nothing to pair"


def test_a_group_without_any_mean_over_samples_gives_way_to_its_tasks(logs: Path) -> None:
    for run in ("base", "instruct"):
        edit(logs / run, lambda results: results["results"]["toys"].update({"acc,none": 0.123}))
    assert [task.name for task in open_any(logs / "base").tasks] == ["toy_colours", "toy_animals", "toy_words"]


def test_prompts_answers_and_choices_of_a_changed_sample() -> None:
    (one,) = changed_samples(FIXTURES / "base", FIXTURES / "instruct", limit=1, tasks=["toys"])
    leaf, _, number = one.id.partition("/")
    line = next(line for line in lines_of(FIXTURES / "base", leaf) if line["doc_id"] == int(number))
    assert one.prompt == line["arguments"]["gen_args_0"]["arg_0"]
    assert one.answer_a is not None
    assert f"{float(line['resps'][0][0][0]):.4f} nats" in one.answer_a


def test_limits_and_what_only_one_run_has_are_said() -> None:
    one = of(compare_runs(FIXTURES / "base", FIXTURES / "instruct_limit").differences, "toys", "acc")
    assert one.n == 20
    assert "left out: 16 samples only in A, 0 only in B (limits none and 10)" in one.notes


def test_means_alone_are_tested_unpaired_and_say_so() -> None:
    report = compare_runs(FIXTURES / "base", FIXTURES / "instruct_means")
    one = of(report.differences, "toy_words", "exact_match,flexible")
    a, b = (
        (numbers["exact_match,flexible"], numbers["exact_match_stderr,flexible"])
        for numbers in (results_of(FIXTURES / run)["results"]["toy_words"] for run in ("base", "instruct_means"))
    )
    z = (b[0] - a[0]) / math.hypot(a[1], b[1])
    assert one.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=1e-12)
    assert one.test == "unpaired_normal"
    assert one.notes[0].startswith("unpaired, as if the samples were others: run B: results_")
    strict = of(report.differences, "toy_words", "exact_match,strict")
    assert strict.verdict == "not comparable"
    assert "run A's standard error of 0 says nothing of its noise" in strict.notes[0]


def appended(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*lines, lines[3]]


def other_hash_within(lines: list[dict[str, Any]]) -> None:
    lines[-1]["prompt_hash"] = "0" * 64


def without_hashes(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        del line["doc_hash"]


def half_a_metric(lines: list[dict[str, Any]]) -> None:
    lines[2]["metrics"].remove("acc_norm")


def another_score(lines: list[dict[str, Any]]) -> None:
    lines[0]["acc"] = 1.0 - lines[0]["acc"]


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("toy_colours", appended, ":25: doc_id 3 is in it twice (filter none; first in line 4)"),
        ("toy_colours", lambda lines: lines[:-1], "holds 23 samples, and results_"),
        ("toy_words", lambda lines: lines[:-1], "sample 19 of toy_words has no exact_match,flexible"),
        ("toy_words", other_hash_within, ":40: doc_id 19 has other hashes than in another line"),
        ("toy_colours", without_hashes, ":1: has no doc_hash"),
        ("toy_colours", half_a_metric, "sample toy_colours/2 of toy_colours has no acc_norm"),
        ("toy_colours", another_score, "as the mean of acc, and its 24 samples give"),
    ],
)
def test_samples_that_would_make_a_mean_lie_are_refused(logs: Path, task: str, change: Any, said: str) -> None:
    rewrite(logs / "base", task, change)
    with pytest.raises(UserError) as caught:
        open_any(logs / "base")
    assert said in str(caught.value)


def test_samples_of_another_run_are_refused(logs: Path) -> None:
    def other(lines: list[dict[str, Any]]) -> None:
        lines[0]["prompt_hash"] = "0" * 64

    rewrite(logs / "base", "toy_colours", other, hashes=True)
    with pytest.raises(UserError, match=r"its questions are not those that results_.* was made from"):
        open_any(logs / "base")


@pytest.mark.parametrize(
    ("text", "said"), [('{"doc_id": 1, "do', ":1: damaged"), ("[]\n", ":1: not a sample, but list")]
)
def test_a_torn_line_is_named(logs: Path, text: str, said: str) -> None:
    (file,) = (logs / "base").rglob("samples_toy_words_*.jsonl")
    file.write_text(text)
    with pytest.raises(CorruptionError) as caught:
        open_any(logs / "base")
    assert said in str(caught.value)


def test_a_nan_is_unscored_and_withholds_the_mean(logs: Path) -> None:
    def nan(lines: list[dict[str, Any]]) -> None:
        lines[0]["exact_match"] = math.nan

    rewrite(logs / "base", "toy_words", nan)
    edit(logs / "base", lambda results: results["results"]["toy_words"].update({"exact_match,strict": math.nan}))
    (task,) = [task for task in open_any(logs / "base").tasks if task.name == "toy_words"]
    row = task.scores[0].rows[0]
    assert (row.n, row.n_unscored, row.mean) == (19, 1, None)
    assert row.withheld == "lm-eval's own mean is nan; 1 of 20 samples have no number"
    assert task.scores[0].samples["0"]["reason"] == "exact_match,strict: lm-eval recorded nan"
    one = of(compare_runs(logs / "base", logs / "instruct").differences, "toy_words", "exact_match,strict")
    assert one.notes[0].startswith("withheld in run A: lm-eval's own mean is nan")


def question(lines: list[dict[str, Any]]) -> None:
    lines[0]["prompt_hash"] = "0" * 64
    lines[1]["doc_hash"] = "0" * 64


def test_one_doc_id_with_another_hash_is_not_comparable_unless_allowed(logs: Path) -> None:
    rewrite(logs / "instruct", "toy_animals", question)
    one = of(compare_runs(logs / "base", logs / "instruct").differences, "toys", "acc")
    said = "2 of 36 samples of one id differ in data or prompt (id toy_animals/0, toy_animals/1)"
    assert (one.verdict, one.notes[0]) == ("not comparable", f"not comparable: {said}")
    allowed = of(compare_runs(logs / "base", logs / "instruct", allow_prompt_mismatch=True).differences, "toys", "acc")
    assert allowed.p_value is not None
    assert allowed.notes[0] == f"prompts differ: {said} (--allow-prompt-mismatch)"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["n-shot"].update(toy_words=3), "num_fewshot [0] in A, [3] in B"),
        (lambda r: r.update(system_instruction_sha="ab12"), "system instruction None in A, ab12 in B"),
        (lambda r: r.update(chat_template="{{x}}", chat_template_sha="c0ffee"), "raw in A, chat in B"),
        (lambda r: r["configs"]["toy_words"]["generation_kwargs"].update(temperature=1), "generation [{'until'"),
        (lambda r: r["versions"].update(toy_words=3.0), "task versions 2 and 3 differ in prompts or data"),
        (lambda r: r["versions"].update(toy_words="2b"), "task versions 2 and None differ in prompts or data"),
        (lambda r: r["configs"]["toy_words"].update(filter_list=[]), "the scorers differ in options or model"),
        (lambda r: r["higher_is_better"]["toy_words"].update(exact_match=False), "unit or direction differ"),
    ],
)
def test_what_was_done_differently_is_not_compared(logs: Path, change: Edit, said: str) -> None:
    edit(logs / "instruct", change)
    one = of(compare_runs(logs / "base", logs / "instruct").differences, "toy_words", "exact_match,strict")
    assert one.verdict == "not comparable"
    assert said in one.notes[0]


def test_other_templates_of_two_chat_runs_are_not_compared(logs: Path) -> None:
    for run, digest in (("base", "a" * 64), ("instruct", "b" * 64)):
        edit(logs / run, lambda results, sha=digest: results.update(chat_template="{{x}}", chat_template_sha=sha))
    one = of(compare_runs(logs / "base", logs / "instruct").differences, "toys", "acc")
    assert one.notes[0] == f"not comparable: chat template {'a' * 12} in A, {'b' * 12} in B"


def test_settings_of_the_model_are_marked(logs: Path) -> None:
    args = "pretrained=tiny-instruct,dtype=bfloat16,max_length=64"
    edit(logs / "instruct", lambda r: r["config"].update(model_args=args, model_dtype="torch.bfloat16", random_seed=7))
    notes = compare_runs(logs / "base", logs / "instruct").notes
    assert notes == (
        "dtype differs: float32 in A, bfloat16 in B",
        "seed differs: 0 in A, 7 in B",
        "model_args differs: None in A, max_length=64 in B",
    )


def test_another_engine_is_refused(logs: Path) -> None:
    edit(logs / "instruct", lambda r: r["config"].update(model="vllm"))
    with pytest.raises(UserError, match="come from different engines"):
        compare_runs(logs / "base", logs / "instruct")
    notes = compare_runs(logs / "base", logs / "instruct", allow_engine_mismatch=True).notes
    assert notes[0].startswith("engine differs: hf in A, vllm in B")


def test_an_unknown_direction_gives_no_verdict(logs: Path) -> None:
    def unknown(results: dict[str, Any]) -> None:
        results["higher_is_better"]["toy_words"].clear()
        results["configs"]["toy_words"]["metric_list"][0].pop("higher_is_better")

    for run in ("base", "instruct"):
        edit(logs / run, unknown)
    row = open_any(logs / "base").tasks[1].scores[0].rows[0]
    assert row.notes == ("lm-eval does not say whether higher is better",)
    flip = {"base": 0.0, "instruct": 1.0}
    for run, value in flip.items():
        rewrite(
            logs / run, "toy_words", lambda lines, v=value: [line.update(exact_match=v) for line in lines][:0] or None
        )
        numbers = {"exact_match,strict": value, "exact_match,flexible": value}
        edit(logs / run, lambda results, new=numbers: results["results"]["toy_words"].update(new))
    one = of(compare_runs(logs / "base", logs / "instruct").differences, "toy_words", "exact_match,strict")
    assert one.verdict == "not comparable"
    assert one.notes[0] == "they differ, but this metric has no better direction"


def test_the_newest_result_file_is_read_and_the_others_are_named(logs: Path) -> None:
    (newest,) = (logs / "base").rglob("results_*.json")
    older = newest.with_name("results_2020-01-01T00-00-00.000000.json")
    results = json.loads(newest.read_text())
    results["results"] = {"toy_words": results["results"]["toy_words"]}
    older.write_text(json.dumps(results))
    assert len(open_any(logs / "base").tasks) == 2
    said = "an older result file of the folder, not read; name it to read it"
    assert compare_runs(logs / "base", logs / "instruct").notes == (f"A: {older.name}: {said}",)
    (task,) = open_any(older).tasks
    assert task.info["means_only"] == f"{older.name} comes without samples"


def test_a_folder_of_several_models_is_refused(logs: Path) -> None:
    shutil.copytree(logs / "instruct" / "tiny-instruct", logs / "base" / "tiny-instruct")
    with pytest.raises(UserError, match="holds lm-eval results of 2 models"):
        open_any(logs / "base")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("results_x.json", "{", "damaged"),
        ("results_x.json", '{"results": {}}', "has no `results` and `configs`"),
        ("results_x.json", '{"results": {}, "configs": {}}', "holds no number of any task"),
        ("samples_x.jsonl", "{}", "holds samples alone"),
        ("x.json", '{"a": 1}', "is no log that is known (keys: a)"),
        ("x.txt", "a", "is no log that is known"),
    ],
)
def test_files_that_are_no_log(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises((UserError, CorruptionError)) as caught:
        open_any(tmp_path / name)
    assert said in str(caught.value)


def test_a_peft_adapter_is_named_beside_its_model(logs: Path) -> None:
    edit(logs / "base", lambda r: r["config"].update(model_args="pretrained=org/base,peft=org/arm,dtype=float32"))
    run = open_any(logs / "base")
    assert (run.name, run.tasks[0].scores[0].rows[0].adapter) == ("org/base + org/arm", "org/arm")


def test_the_report_holds_their_numbers_and_hides_no_sample(tmp_path: Path) -> None:
    ((place, report),) = write_all(FIXTURES / "base", tmp_path / "out").items()
    assert {(row.task, row.metric, row.mean) for row in report.rows} >= {("toys", "acc", 14 / 36)}
    assert "toys" in (place / "report.html").read_text()
    shown = [file.read_text() for file in place.rglob("*") if file.suffix in (".js", ".html")]
    assert any("What colour is coal?" in text for text in shown)
    assert {"report.html", "report.json", "report.md"} <= {file.name for file in place.iterdir()}


def test_the_smallest_detectable_difference_stands_under_the_table() -> None:
    report = compare_runs(FIXTURES / "base", FIXTURES / "instruct")
    one = of(report.differences, "toy_words", "exact_match,flexible")
    # No pair differs: 20 pairs and Agresti's two more give 2/22 - 0 over 22; Holm tests three at alpha 0.05 / 3.
    stderr = math.sqrt(2 / 22 / 22)
    assert one.level_adjusted == 1 - 0.05 / 3
    fewest = math.ceil(math.log2(2 / (0.05 / 3))) / 20  # seven pairs all of one kind: 2 * 2**-7 < 0.05 / 3
    assert one.detectable == max((2.39398 + 0.84162) * stderr, fewest) == 0.35
    assert "toy_words:raw exact_match,flexible 0.350" in comparison_markdown(report).replace("\\", "")


def test_a_number_that_is_made_of_parts_is_shown_and_not_paired(logs: Path) -> None:
    def perplexity(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**line, "metrics": ["word_perplexity"], "word_perplexity": [-9.0, 4]} for line in lines]

    for run in ("base", "instruct"):
        rewrite(logs / run, "toy_words", perplexity)
        edit(logs / run, lambda results: results["results"]["toy_words"].update({"word_perplexity,strict": 9.5}))
    (row,) = [row for row in open_any(logs / "base").tasks[1].scores[0].rows if row.metric.startswith("word")]
    assert (row.mean, row.n, row.n_unscored, row.ci95) == (9.5, 20, 0, None)
    one = of(compare_runs(logs / "base", logs / "instruct").differences, "toy_words", "word_perplexity,strict")
    assert one.notes[0] == "a corpus metric is no mean over samples, so there is nothing to pair"
