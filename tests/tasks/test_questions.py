"""Rows of a hand-computed case, the contract of scorers, and what becomes of samples that have no answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from harness.contracts.scorer import ScoreJob, ScorerSession
from harness.core.errors import CorruptionError, StepError
from harness.core.records import Answer, Metric, Output, Request, Row, Sample, Score
from harness.core.specs import Decoding
from harness.evaluation.plan import LATER
from harness.evaluation.rows import RowContext, Scored, build_rows, check_scores, sample_rows
from harness.evaluation.run import evaluate
from harness.steps.journal import read_rows, write_rows
from harness.tasks.questions import Questions, read_samples
from harness.testing import tiny_adapter, tiny_model

ACC = Metric(name="acc", higher_is_better=True, unit="proportion", low=0.0, high=1.0)
FAILED = Metric(name="failed", higher_is_better=False, unit="proportion", primary=False)
LOGIT = Metric(name="logit", higher_is_better=True, unit="logit", threshold=0.3)
CONTEXT = RowContext(model="m", adapter=None, task="t", variant="raw", scorer="s", step="1234", notes=("a note",))
Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


class Plain(ScorerSession):
    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        return [Score({"acc": 1.0}) for _ in samples]


def rows_of(
    metrics: tuple[Metric, ...], scores: list[Score], samples: list[Sample], outputs: list[Output] | None = None
) -> dict[tuple[str | None, str], Row]:
    answers = [Answer(s.id, (o,)) for s, o in zip(samples, outputs or [Output("x")] * len(samples), strict=True)]
    rows = build_rows(CONTEXT, Plain(), Scored(metrics, scores), samples, answers)
    return {(row.leaf, row.metric): row for row in rows}


def samples_of(n: int, leaf: str | None = None, **fields: Any) -> list[Sample]:
    return [Sample(f"{leaf}{i}", (), leaf=leaf, **fields) for i in range(n)]


def test_a_share_by_hand() -> None:
    """6 of 8. stderr = sqrt(p (1 - p) / (n - 1)), as of any mean; the interval is Wilson's (1927), written out here."""
    scores = [Score({"acc": value}) for value in (1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0)]
    row = rows_of((ACC,), scores, samples_of(8))[None, "acc"]
    p, n = 0.75, 8
    assert (row.n, row.n_unscored, row.n_truncated, row.mean) == (8, 0, 0, 0.75)
    assert row.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    assert row.ci95 == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert (row.higher_is_better, row.chance, row.withheld, row.notes) == (True, None, None, ("a note",))


def test_a_mean_by_hand() -> None:
    """1, 2, 4, 5: mean 3, variance (4 + 1 + 1 + 4) / 3; Student's t with 3 degrees of freedom: 3.182446305."""
    scores = [Score({"logit": value}) for value in (1.0, 2.0, 4.0, 5.0)]
    row = rows_of((LOGIT,), scores, samples_of(4))[None, "logit"]
    stderr = math.sqrt(10 / 3) / 2
    assert (row.mean, row.stderr) == (3.0, pytest.approx(stderr))
    assert row.ci95 == pytest.approx((3 - 3.182446305284263 * stderr, 3 + 3.182446305284263 * stderr))


def test_what_has_no_score_is_counted_and_left_out() -> None:
    scores = [
        Score({"logit": 2.0}),
        Score({"logit": None}, "the call failed"),
        Score({"logit": 4.0}),
        Score({"logit": 6.0}),
    ]
    row = rows_of((LOGIT,), scores, samples_of(4))[None, "logit"]
    # Were the failed call a 0, the mean would be 3.
    assert (row.n, row.n_unscored, row.mean) == (3, 1, 4.0)
    assert row.withheld is None  # 25 %, and the threshold is 30 %


def test_above_the_threshold_the_mean_is_withheld() -> None:
    scores = [Score({"acc": 1.0})] * 18 + [Score({"acc": None}, "the call failed")] * 2
    row = rows_of((ACC,), scores, samples_of(20))[None, "acc"]
    assert (row.n, row.n_unscored) == (18, 2)
    assert (row.mean, row.stderr, row.ci95) == (None, None, None)
    assert row.withheld == "2 of 20 samples are unscored, above the threshold of 5% (most often: the call failed)"
    scores = [Score({"acc": 1.0})] * 19 + [Score({"acc": None}, "the call failed")]
    assert rows_of((ACC,), scores, samples_of(20))[None, "acc"].mean == 1.0  # 5 % exactly is not above it


def test_truncated_counts_cut_prompts_and_spent_budgets_once() -> None:
    samples = [Sample("0", (), cut=True), Sample("1", (), cut=True), Sample("2", ()), Sample("3", ())]
    outputs = [Output("x", finish="length"), Output("x", finish="stop"), Output("x", finish="length"), Output("x")]
    row = rows_of((ACC,), [Score({"acc": 1.0})] * 4, samples, outputs)[None, "acc"]
    assert row.n_truncated == 3


def test_leaf_tasks_weigh_by_their_size() -> None:
    """law: 1 of 4 right; art: 2 of 2. The micro average is 3 of 6, not (0.25 + 1) / 2."""
    samples = samples_of(4, "law") + samples_of(2, "art")
    scores = [Score({"acc": value}) for value in (1.0, 0.0, 0.0, 0.0, 1.0, 1.0)]
    rows = rows_of((ACC,), scores, samples)
    assert [key[0] for key in rows] == [None, "art", "law"]
    assert rows[None, "acc"].mean == 0.5
    assert (rows["law", "acc"].mean, rows["law", "acc"].n) == (0.25, 4)
    assert (rows["art", "acc"].mean, rows["art", "acc"].n) == (1.0, 2)


def test_chance_of_questions_with_different_numbers_of_choices() -> None:
    """Two questions with two choices and one with four: (1/2 + 1/2 + 1/4) / 3. It is no chance level of failures."""
    samples = [Sample("0", (), chance=0.5), Sample("1", (), chance=0.5), Sample("2", (), chance=0.25)]
    rows = rows_of((ACC, FAILED), [Score({"acc": 1.0, "failed": 0.0})] * 3, samples)
    assert rows[None, "acc"].chance == pytest.approx(5 / 12)
    assert rows[None, "failed"].chance is None


def test_a_field_of_the_users_rows_is_no_chance_level() -> None:
    samples = [Sample("0", (), data={"chance": "of rain"}), Sample("1", (), data={"chance": 0.9})]
    assert rows_of((ACC,), [Score({"acc": 1.0})] * 2, samples)[None, "acc"].chance is None
    stated = ACC.model_copy(update={"chance": 0.25})
    assert rows_of((stated,), [Score({"acc": 1.0})] * 2, samples)[None, "acc"].chance == 0.25


class Corpus(Plain):
    def aggregate(self, metric: Metric, scores: Sequence[Score]) -> float | None:
        return math.exp(sum(score.values["ppl"] or 0.0 for score in scores) / len(scores))


def test_a_corpus_metric_is_the_scorers_own() -> None:
    """exp of the mean of log 2 and log 8 is 4; the bootstrap's ends are those of one sample twice: 2 and 8."""
    metric = Metric(name="ppl", higher_is_better=False, unit="perplexity", aggregate="corpus", threshold=0.5)
    scores = [Score({"ppl": math.log(2)}), Score({"ppl": math.log(8)}), Score({"ppl": None}, "no answer")]
    samples = samples_of(3)
    answers = [Answer(sample.id, (Output("x"),)) for sample in samples]
    (row,) = build_rows(CONTEXT, Corpus(), Scored((metric,), scores), samples, answers)
    assert row.mean == pytest.approx(4.0)
    assert row.ci95 == pytest.approx((2.0, 8.0))
    assert (row.n, row.n_unscored) == (2, 1)
    assert row.notes[-1] == "ppl is a corpus metric: interval by bootstrap over samples, 1000 draws"


def test_scorers_are_held_to_their_contract() -> None:
    good = [Score({"acc": 1.0}), Score({"acc": None}, "why")]
    check_scores("plain", (ACC,), good, samples_of(2, "s"))
    with pytest.raises(StepError, match="plain: returned 2 scores for 3 samples"):
        check_scores("plain", (ACC,), good, samples_of(3))
    with pytest.raises(StepError, match=r"returned metrics \['accuracy'\], declared \['acc'\]"):
        check_scores("plain", (ACC,), [Score({"accuracy": 1.0})], samples_of(1))
    with pytest.raises(StepError, match="left a sample without a score and without a reason"):
        check_scores("plain", (ACC,), [Score({"acc": None})], samples_of(1))


PERCENT = Metric(name="share", higher_is_better=True, unit="percent")
LENGTH = Metric(name="length", higher_is_better=None, unit="characters", low=0.0)
PPL = Metric(name="ppl", higher_is_better=False, unit="perplexity", low=1.0, aggregate="corpus")


@pytest.mark.parametrize(
    ("metric", "value", "problem"),
    [
        (ACC, 7.0, "acc of sample s1: 7.0 is outside [0, 1] (proportion)"),
        (FAILED, -0.5, "failed of sample s1: -0.5 is outside [0, 1] (proportion)"),
        (PERCENT, 100.5, "share of sample s1: 100.5 is outside [0, 100] (percent)"),
        (LENGTH, -1, "length of sample s1: -1 is outside [0, inf] (characters)"),
        (LOGIT, math.nan, "logit of sample s1: nan is no finite number"),
        (LOGIT, math.inf, "logit of sample s1: inf is no finite number"),
        (LOGIT, "3", "logit of sample s1: '3' is no finite number"),
    ],
    ids=str,
)
def test_values_outside_a_metrics_range_are_no_scores(metric: Metric, value: Any, problem: str) -> None:
    """The unit implies a range where none is declared: 7.0 would have made a mean of 400 %."""
    with pytest.raises(StepError) as caught:
        check_scores("plain", (metric,), [Score({metric.name: 1.0}), Score({metric.name: value})], samples_of(2, "s"))
    assert str(caught.value) == (
        f"plain: {problem}\n  This is a fault of the scorer: `harness.testing.check_scorer` finds such."
    )


def test_rounding_leads_a_hair_over_a_bound() -> None:
    check_scores("plain", (ACC,), [Score({"acc": 1 + 2**-52}), Score({"acc": -(2**-60)})], samples_of(2))


def test_the_range_of_a_corpus_metric_is_that_of_the_whole() -> None:
    """Log-likelihoods of samples are below a perplexity's least value, 1; their aggregate must not be."""
    scores = [Score({"ppl": -math.log(2)})]
    check_scores("plain", (PPL,), scores, samples_of(1))
    answers = [Answer("None0", (Output("x"),))]
    with pytest.raises(StepError, match=r"s: ppl of 1 samples: 0\.5 is outside \[1, inf\]"):
        build_rows(CONTEXT, Corpus(), Scored((PPL,), scores), samples_of(1), answers)


def test_sample_rows_keep_order_and_reasons() -> None:
    samples = [Sample("b", (), cut=True), Sample("a", (), leaf="x")]
    answers = [Answer("b", (Output("x", finish="length"),)), Answer("a", (Output(error="gone"),))]
    scores = [Score({"acc": 1.0}, detail={"extracted": "x"}), Score({"acc": None}, "gone")]
    first, second = sample_rows(samples, answers, scores)
    assert first == {
        "id": "b", "leaf": None, "values": {"acc": 1.0}, "reason": None, "cut": True, "hit_limit": True,
        "detail": {"extracted": "x"},
    }  # fmt: skip
    assert (second["id"], second["values"], second["reason"]) == ("a", {"acc": None}, "gone")


def test_samples_are_read_back_as_they_were_asked(tmp_path: Path) -> None:
    """Token ids alone, a conversation without them, log-likelihoods under an adapter, and text that is no Unicode."""
    decoding = Decoding(max_new_tokens=3, temperature=0.7, stop=("\n",))
    told = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})
    choices = [
        Request("loglikelihood", (1, 2), (3,), prompt="Q:", continuation=f" {c}", adapter="a", control="good")
        for c in "AB"
    ]
    samples = [
        Sample("plain", (Request("generate", (5, 6), decoding=decoding, prompt="Hi"),), "Hi", data={"n": [1, 2.5]}),
        Sample("chat", (Request("generate", (), decoding=decoding, prompt="<u>Hi", messages=told),), "Hi", "Yes"),
        Sample("choice", tuple(choices), "Q:", " B", "law", {"choices": ["A", "B"]}, True, 0.5),
        Sample("odd", (Request("generate", (7,), decoding=decoding, prompt=""),), "\ud800 and \x00"),
    ]
    asked = Questions(samples)
    path = tmp_path / "requests.jsonl.gz"
    write_rows(path, asked.rows())
    assert read_samples(path, asked.digest) == samples


def test_stored_samples_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    asked = Questions([Sample("a", (Request("generate", (1,), decoding=Decoding(), prompt="Hi"),), "Hi")])
    path = tmp_path / "0123.jsonl.gz"

    def says(rows: list[dict[str, Any]] | None, digest: str = asked.digest) -> str:
        if rows is not None:
            write_rows(path, rows)
        with pytest.raises(CorruptionError) as caught:
            read_samples(path, digest)
        return str(caught.value)

    fix = "run the command of its answers again, which writes it anew"
    assert says(None) == f"requests/0123.jsonl.gz: is missing or damaged; {fix}"
    (row,) = asked.rows()
    assert says([{key: value for key, value in row.items() if key != "chance"}]) == (
        f"requests/0123.jsonl.gz: is of another version (KeyError: 'chance'); {fix}"
    )
    other = f"requests/0123.jsonl.gz: holds other questions than those that were answered; {fix}"
    assert says([row], "0" * 64) == other
    assert says([{**row, "id": "b"}]) == other
    write_rows(path, [row])
    path.write_bytes(path.read_bytes()[:-9])
    assert says(None) == f"requests/0123.jsonl.gz: is missing or damaged; {fix}"


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_a_model_whose_logits_are_not_finite_has_no_answers_and_no_score(alone: Path, sums: Path, place: str) -> None:
    """Not-a-number in the base's weights, or in an adapter's."""
    base = tiny_model(alone / "base")
    adapter = tiny_adapter(alone / "adapter", base)
    file = base / "model.safetensors" if place == "base" else adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).flat[0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    whose = "the model's weights are not finite" if place == "base" else "adapter adapter: its weights are not finite"
    with pytest.raises(StepError, match=f"none of 3 samples has an answer, most often because: {whose}"):
        evaluate(str(base), tasks=["sums"], task_folders=(sums,), adapter=str(adapter), limit=3, engine="transformers")


def test_a_task_longer_than_the_context_leaves_half_to_the_prompt(tiny: Path, sums: Path) -> None:
    """AlpacaEval asks for 2,048 new tokens, and a Llama 1 holds no more in all."""
    context = json.loads((tiny / "config.json").read_text())["max_position_embeddings"]
    options = {"sums": {"decoding": {"max_new_tokens": context}}}
    done = evaluate(str(tiny), tasks=["sums"], task_folders=(sums,), options=options, limit=1, engine="transformers")
    assert not done.failures
    note = f"the model's context is {context} tokens: at most {context // 2} new ones instead of {context}"
    assert all(note in row.notes for row in done.rows)
    step = next(done.root.glob("steps/answers-*/artifact/answers.jsonl.gz"))
    (row,) = read_rows(step)
    assert 0 < len(row["output"]["token_ids"]) <= context // 2


def test_samples_of_one_cluster_are_one_observation_and_no_other_id_moves(tmp_path: Path) -> None:
    """Right, right, wrong, wrong in two pairs: 1 and 0, so stderr is sqrt(0.5 / 2) = 0.5. Four alone: sqrt(1/3 / 4)."""
    scores = [Score({"acc": value}) for value in (1.0, 1.0, 0.0, 0.0)]
    pairs = [Sample(str(i), (), cluster="ab"[i // 2]) for i in range(4)]
    assert rows_of((ACC,), scores, pairs)[None, "acc"].stderr == pytest.approx(0.5)
    alone = rows_of((ACC,), scores, samples_of(4))[None, "acc"]
    assert alone.stderr == pytest.approx(math.sqrt(1 / 3 / 4))
    assert rows_of((ACC,), scores, [Sample(str(i), ()) for i in range(4)])[None, "acc"] == alone
    answers = [Answer(one.id, (Output("x"),)) for one in pairs]
    assert [row["cluster"] for row in sample_rows(pairs, answers, scores)] == ["a", "a", "b", "b"]
    questions = Questions(pairs)
    write_rows(tmp_path / "asked.jsonl.gz", questions.rows())
    assert read_samples(tmp_path / "asked.jsonl.gz", questions.digest) == pairs
    # A task that names none has neither the key in its rows nor in what its ids are made of.
    assert "cluster" not in Questions(samples_of(1)).rows()[0] and LATER["cluster"] is None
