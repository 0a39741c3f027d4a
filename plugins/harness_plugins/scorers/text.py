"""Scorers that compare text with the sample's target; deterministic, and without a model."""

from __future__ import annotations

import re
import unicodedata
from abc import abstractmethod
from typing import Any, Literal

from pydantic import Field, field_validator

import harness
from harness import SHARE_RESOLUTION, Answer, AnswerScorer, Metric, Sample, Score


class TextOptions(harness.Config):
    """What is evened out, in answer and target alike, before they are compared."""

    strip: bool = Field(True, description="leave out white space at both ends")
    ignore_case: bool = Field(False, description="compare case-folded")
    ignore_punctuation: bool = Field(False, description="leave out Unicode punctuation")

    def even(self, text: str) -> str:
        """The form that is compared."""
        if self.ignore_punctuation:
            text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
        if self.ignore_case:
            text = text.casefold()
        return text.strip() if self.strip else text


def _share(name: str, *, higher_is_better: bool = True, primary: bool = True) -> Metric:
    return Metric(
        name=name,
        higher_is_better=higher_is_better,
        unit="proportion",
        low=0.0,
        high=1.0,
        primary=primary,
        resolution=SHARE_RESOLUTION,
    )


class _Compare(AnswerScorer[TextOptions]):
    """One comparison per sample. Without an answer or a target there is no score."""

    class Config(TextOptions):
        """What is evened out."""

    def metrics(self, config: TextOptions) -> tuple[Metric, ...]:
        """One proportion, named like the scorer."""
        return (_share(self.name),)

    def score(self, sample: Sample, answer: Answer, config: TextOptions) -> Score:
        """1 where answer and target agree, else 0."""
        if sample.target is None:
            return Score.absent(self.metrics(config), "the sample has no target")
        return self._compared(answer.text, sample.target, config)

    @abstractmethod
    def _compared(self, answer: str, target: str, config: TextOptions) -> Score:
        """The score of one answer."""


class ExactMatch(_Compare):
    """Whether the answer is the target."""

    name = "exact_match"
    summary = "1 where the answer equals the target"

    def _compared(self, answer: str, target: str, config: TextOptions) -> Score:
        return Score({self.name: float(config.even(answer) == config.even(target))})


class Includes(_Compare):
    """Whether the target occurs in the answer. An empty target occurs in every answer."""

    name = "includes"
    summary = "1 where the target occurs in the answer"

    def _compared(self, answer: str, target: str, config: TextOptions) -> Score:
        return Score({self.name: float(config.even(target) in config.even(answer))})


class Regex(_Compare):
    """Whether what a pattern finds in the answer is the target.

    An answer in which it finds nothing is wrong (0); how many there are is told apart as ``extraction_failed``.
    """

    name = "regex"
    summary = "1 where what a pattern finds in the answer equals the target"

    class Config(TextOptions):
        """What to look for."""

        pattern: str = Field(r"(\S.*)", description="regular expression; its group 1, or all it matches without groups")
        take: Literal["first", "last"] = Field("first", description="which match counts")

        @field_validator("pattern")
        @classmethod
        def _compiles(cls, pattern: str) -> str:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression ({error})") from None
            return pattern

    def metrics(self, config: TextOptions) -> tuple[Metric, ...]:
        """Agreement, and the share of answers in which nothing was found."""
        return (_share(self.name), _share("extraction_failed", higher_is_better=False, primary=False))

    def _compared(self, answer: str, target: str, config: Any) -> Score:
        matches = list(re.finditer(config.pattern, answer))
        if not matches:
            return Score({self.name: 0.0, "extraction_failed": 1.0})
        match = matches[0] if config.take == "first" else matches[-1]
        found = (match.group(1) if match.re.groups else match.group()) or ""
        agrees = float(config.even(found) == config.even(target))
        return Score({self.name: agrees, "extraction_failed": 0.0}, detail={"extracted": found})
