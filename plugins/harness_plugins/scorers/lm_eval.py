"""lm-eval's own metrics, and a second look at answers that its extraction damages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

import harness
from harness import (
    Answer,
    Config,
    LmEvalRuntime,
    LmEvalVerdict,
    Metric,
    Sample,
    Score,
    ScoreJob,
    Scorer,
    ScorerContext,
    ScorerSession,
    lm_eval_metric,
)

FLEXIBLE = lm_eval_metric("exact_match_flexible", True, False)
FAILED = FLEXIBLE.model_copy(update={"name": "extraction_failed", "higher_is_better": False, "primary": False})
_ANSWER_IS = re.compile(r"the answer is\s*:?\s*(.+)", re.IGNORECASE)
LETTER = re.compile(r"[A-Z]")
"""A target that is the bare letter of an option."""
_OPTION = re.compile(r"\(([A-Z])\)")
INVALID = "[invalid]"
"""What lm-eval's regex filter returns where it finds nothing."""


def extract_flexible(text: str, target: str) -> str | None:
    """The answer in a completion, without lm-eval's loss of its last character.

    After the last "the answer is" if it is there, else the first line that is not empty; without the closing full
    stop, quotes and markdown emphasis. Where the target is an option such as "(A)", the first option letter in that
    stretch; where it is a bare letter, as in MMLU, the letter of :func:`_bare_letter`. None: nothing to compare.
    """
    found = _ANSWER_IS.findall(text)
    stretch = found[-1] if found else next((line for line in text.splitlines() if line.strip()), "")
    stretch = stretch.strip().strip("*\"'`").rstrip(".").strip().strip("*\"'`")
    if _OPTION.fullmatch(target.strip()):
        option = _OPTION.search(stretch)
        bare = re.fullmatch(r"([A-Z])", stretch)
        letter = option or bare
        return f"({letter.group(1)})" if letter else None
    if LETTER.fullmatch(target.strip()):
        return _bare_letter(stretch)
    return stretch or None


def _bare_letter(stretch: str) -> str | None:
    """The option that a stretch of text names: "(B)" anywhere; else "B" alone, "B." "B)" "B:" or "B -" in front; else
    the only capital that stands as a word of its own ("it is B") and is no pronoun or article: "I" and a leading "A".
    """
    if option := _OPTION.search(stretch):
        return option.group(1)
    if front := re.match(
        r"\W*(?:option |choice |answer:? *)?\W*([A-HJ-Z])(?:$|\s*[.):,]|\W*$|\s+-)", stretch, re.IGNORECASE
    ):
        return front.group(1).upper()
    words = [word for word in re.findall(r"\b[A-Z]\b(?!')", stretch) if word != "I"]
    if stretch[:2] == "A ":
        words = words[1:]
    return words[0] if len(set(words)) == 1 else None


class LmEvalScorer(Scorer["LmEvalScorer.Config"]):
    """Hands lm-eval's per-document metrics through, under its names; a filter's name is added where there are two."""

    name = "lm_eval"
    summary = "lm-eval's own metrics of its own tasks"

    class Config(harness.Config):
        """Options of the lm_eval scorer."""

        flexible: bool = Field(False, description="add flexible extraction and the share of failed extractions")

    def metrics(self, config: Config) -> tuple[Metric, ...]:
        """Only those that do not depend on the task; the rest is lm-eval's (see :meth:`LmEvalSession.metrics`)."""
        return (FLEXIBLE, FAILED) if config.flexible else ()

    def open(self, config: Config, context: ScorerContext) -> LmEvalSession:
        """Nothing is opened: the task comes with what is scored."""
        return LmEvalSession(config.flexible, self.metrics(config))


class LmEvalSession(ScorerSession):
    """Scores one of lm-eval's tasks after the other; metrics and their aggregation are those of the last one."""

    def __init__(self, flexible: bool, ours: tuple[Metric, ...]) -> None:
        self._flexible, self._ours = flexible, ours
        self._of_task: tuple[Metric, ...] = ()
        self._aggregations: dict[str, Callable[[list[Any]], float]] = {}

    def metrics(self) -> tuple[Metric, ...]:
        """lm-eval's metrics of the task, then ours."""
        return (*self._of_task, *self._ours)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        """lm-eval's filters and ``process_results`` over the stored answers; failed calls stay unscored."""
        runtime: LmEvalRuntime = job.open_task()
        answered = [answer.error is None for answer in answers]
        whole = runtime.narrowed(answered)
        results = iter(whole.process([answer for answer, ok in zip(answers, answered, strict=True) if ok]))
        per_sample = [next(results) if ok else None for ok in answered]
        names = self._learn(runtime, [result.metrics for result in per_sample if result is not None])
        scores = []
        for sample, answer, result in zip(samples, answers, per_sample, strict=True):
            if result is None:
                scores.append(Score.absent(self.metrics(), f"no answer: {answer.error}"))
                continue
            scores.append(self._score(sample, answer, result, names))
            job.progress(1)
        return scores

    def _learn(
        self, runtime: LmEvalRuntime, results: Sequence[dict[str, dict[str, Any]]]
    ) -> dict[tuple[str, str], str]:
        """Names of (filter, metric) pairs, and which of them are corpus metrics."""
        known = runtime.metrics()
        pairs = list(dict.fromkeys((f, m) for result in results for f, values in result.items() for m in values))
        filters = {f for f, _ in pairs}
        names = {(f, m): m if len(filters) == 1 else f"{m},{f}" for f, m in pairs}
        metrics, self._aggregations = [], {}
        for (f, m), name in names.items():
            direction, aggregate = known.get(m, (None, None))
            corpus = any(not isinstance(r[f][m], int | float) for r in results if f in r and m in r[f])
            corpus = corpus or getattr(aggregate, "__name__", "mean") not in ("mean", "nanmean")
            if corpus and aggregate is not None:
                self._aggregations[name] = aggregate
            seen = [r[f][m] for r in results if r.get(f, {}).get(m) is not None]
            metrics.append(_fitting(lm_eval_metric(name, direction, corpus), seen, self._aggregations.get(name)))
        self._of_task = tuple(metrics)
        return names

    def _score(self, sample: Sample, answer: Answer, result: LmEvalVerdict, names: dict[tuple[str, str], str]) -> Score:
        values: dict[str, float | None] = {}
        items: dict[str, Any] = {}
        reason = None
        for (f, m), name in names.items():
            value = result.metrics.get(f, {}).get(m)
            if value is None:
                values[name], reason = None, f"lm-eval gave no {m}"
            elif name in self._aggregations:
                values[name] = float(value) if isinstance(value, int | float) else 0.0
                items[name] = _plain(value)
            else:
                values[name] = float(value)
        detail: dict[str, Any] = {"items": items} if items else {}
        if self._flexible:
            values.update(_flexible(sample, answer, result, detail))
        return Score(values, reason, detail)

    def aggregate(self, metric: Metric, scores: Sequence[Score]) -> float | None:
        """lm-eval's own aggregation over documents."""
        return float(self._aggregations[metric.name]([score.detail["items"][metric.name] for score in scores]))


def _fitting(metric: Metric, values: list[Any], aggregate: Callable[[list[Any]], float] | None) -> Metric:
    """The metric without the range that its name suggests where its values say otherwise: squad's f1 is in percent."""
    if aggregate is None or not values:
        fits = all(metric.problem(float(value)) is None for value in values)
    else:
        fits = metric.problem(float(aggregate([_plain(value) for value in values])), whole=True) is None
    return metric if fits else metric.model_copy(update={"unit": "score", "low": None, "high": None})


def _flexible(sample: Sample, answer: Answer, result: LmEvalVerdict, detail: dict[str, Any]) -> dict[str, float | None]:
    target = (sample.target or "").strip()
    extracted = extract_flexible(answer.text, target)
    strict = next(iter(result.extracted.values()), "")
    detail["extracted"] = extracted
    detail["extracted_strict"] = strict
    hit = extracted is not None and extracted.casefold() == target.rstrip(".").casefold()
    # A letter can be looked for in what was said; other answers are whatever the strict pattern cuts out.
    failed = extracted is None if LETTER.fullmatch(target) else strict.strip() in ("", INVALID)
    return {FLEXIBLE.name: float(hit), FAILED.name: float(failed)}


def _plain(value: Any) -> Any:
    """lm-eval's per-document value as JSON data (tuples and numpy numbers included)."""
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return (
        value.item()
        if hasattr(value, "item") and not hasattr(value, "__len__")
        else ([_plain(inner) for inner in value] if hasattr(value, "tolist") else value)
    )
