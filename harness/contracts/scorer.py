"""The contract of scorers: what turns answers into numbers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from harness.contracts.plugin import C, Plugin
from harness.core.records import Answer, Metric, Sample, Score


@dataclass(frozen=True)
class ScorerContext:
    """What a scorer may use besides samples and answers."""

    task: str
    seed: int
    folder: Path | None = None
    """A folder of the run that survives interruption: for a judge's verdicts, say."""
    shared: Path | None = None
    """The same for all steps of the run: what a judge said there needs no second call, nor a second payment."""
    progress: Callable[[int], None] = lambda more: None
    """Told how many more samples have been scored."""
    stored: Callable[[int], None] = lambda more: None
    """Told how many more samples an earlier run has scored: they cost no time now."""
    open_engine: Callable[..., Any] | None = None
    """Opens a model here for the scorer, a judge say: ``open_engine(model, engine="auto", options=None)``.

    What comes back has ``session`` (:class:`harness.Session`), ``tokenizer`` and ``chat(messages)``, the token ids and
    text of a conversation up to its answer; the scorer closes it. None where nothing may be opened: in a kit, say."""
    runtime: Any = None
    """The open task; used by the scorer that hands lm-eval's own metrics through."""


Need = Literal["classifier", "engine", "endpoint"]


class Scorer(Plugin[C]):
    """Turns answers into numbers; sees only samples and answers, never the model under test."""

    kind = "scorer"
    needs: ClassVar[Need | None] = None
    """What it must have besides samples and answers: a classifier's weights, an engine opened on this machine,
    an endpoint that is called; None: nothing. It tells whoever decides where a step runs; it changes no number."""

    @abstractmethod
    def metrics(self, options: C) -> tuple[Metric, ...]:
        """Direction, unit, range and chance level of every number that :meth:`score` returns."""

    def metrics_of(self, options: C, context: ScorerContext) -> tuple[Metric, ...]:
        """As :meth:`metrics`, asked after :meth:`score`, for a scorer that learns its metrics from the open task."""
        return self.metrics(options)

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], context: ScorerContext) -> list[Score]:
        """One score per sample, in order. What cannot be scored is ``Score.absent``, never a number.

        Options are ``self.options``; a scorer's model is opened here once for all samples.
        """

    def identity(self, options: C) -> dict[str, Any]:
        """What of the scorer enters a scores step's id; a scorer with a model adds the digest of its weights."""
        return {"name": self.name, "options": options.model_dump(mode="json")}

    def label(self, options: C) -> str | None:
        """What a task's name carries in rows because of this scorer, the judge say: ``alpaca_eval2@LABEL``."""
        return None

    def aggregate(self, metric: Metric, scores: Sequence[Score]) -> float | None:
        """One number over samples, for a metric that declares ``aggregate="corpus"`` (perplexity, F1, BLEU)."""
        raise NotImplementedError(f"{self.name} declares {metric.name} as a corpus metric and does not aggregate it")

    def notes(self) -> tuple[str, ...]:
        """What should stand beside the numbers, asked after :meth:`score`: which judge, what it cost."""
        return ()

    def withheld(self, metric: Metric, scores: Sequence[Score]) -> str | None:
        """Why this metric's mean must not be shown although there are scores; None: it may."""
        return None

    def close(self) -> None:
        """Release what :meth:`score` opened; called once after the last call of it."""

    def check(self, options: C) -> None:
        """Raise a UserError before anything runs if the scorer cannot work (a missing model, a missing key)."""

    @property
    def options(self) -> C:
        """The options in force (set by the harness through :meth:`bound`)."""
        return cast(C, self.__dict__.get("_options") or self.Config())

    def bound(self, options: C) -> Self:
        """A copy of this scorer with its options."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, _options=options)
        return copy
