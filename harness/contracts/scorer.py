"""The contract of scorers: what turns answers into numbers.

A scorer is opened once for everything that it scores in a run, alone on its device, and closed after its last use. One
that opens nothing and looks at one answer at a time is an :class:`AnswerScorer`, the short form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal

from harness.contracts.hub_files import HubFiles
from harness.contracts.plugin import C, Plugin
from harness.core.costs import JudgeCosts
from harness.core.records import Answer, Metric, Sample, Score


@dataclass(frozen=True)
class ScorerContext:
    """What a scorer may use of the run that it is opened for: the same for all tasks and arms."""

    seed: int = 0
    shared: Path | None = None
    """A folder of the run that survives interruption: what a judge said there needs no second call, nor a second
    payment. None: nothing is kept."""
    open_engine: Callable[..., Any] | None = None
    """Opens a model here for the scorer, a judge say: ``open_engine(model, engine="auto", options=None)``.

    What comes back has ``session`` (:class:`harness.Session`), ``tokenizer`` and ``chat(messages)``, the token ids and
    text of a conversation up to its answer; the scorer closes it. None where nothing may be opened: in a kit, say."""


@dataclass(frozen=True)
class ScoreJob:
    """What is scored at once: the answers of one arm to one task."""

    task: str = ""
    folder: Path | None = None
    """Where files may be left that belong to these scores: their step's ``artifact/``."""
    progress: Callable[[int], None] = lambda more: None
    """Told how many more samples have been scored."""
    stored: Callable[[int], None] = lambda more: None
    """Told how many more samples an earlier run has scored: they cost no time now."""
    open_task: Callable[[], Any] = lambda: None
    """The task itself, a :class:`harness.LmEvalRuntime`, for the scorer that hands lm-eval's own metrics through.

    It takes the tokenizer of the model under test; samples and answers do not, so that no other scorer needs it."""


class ScorerSession(ABC):
    """An open scorer: it scores one task of one arm after the other. Closed once, also after an error."""

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        """One score per sample, in order. What cannot be scored is ``Score.absent``, never a number.

        Samples are as the run has stored them: what is asked, the target, and the data set's row as JSON data.
        """

    def metrics(self) -> tuple[Metric, ...] | None:
        """What the last :meth:`score` returned, for a scorer that learns it from the task; None: as it declares."""
        return None

    def label(self) -> str | None:
        """What a task's name carries in rows because of this scorer, the judge say: ``alpaca_eval2@LABEL``."""
        return None

    def aggregate(self, metric: Metric, scores: Sequence[Score]) -> float | None:
        """One number over samples, for a metric that declares ``aggregate="corpus"`` (perplexity, F1, BLEU)."""
        raise NotImplementedError(f"{metric.name} is declared as a corpus metric, and nothing aggregates it")

    def withheld(self, metric: Metric, scores: Sequence[Score]) -> str | None:
        """Why this metric's mean must not be shown although there are scores; None: it may."""
        return None

    def notes(self) -> tuple[str, ...]:
        """What should stand beside the numbers of the last :meth:`score`: which judge, what it cost."""
        return ()

    def paid(self) -> JudgeCosts | None:
        """What the last :meth:`score` paid a judge for, also where it failed; None: no judge was asked."""
        return None

    def close(self) -> None:  # noqa: B027 - optional
        """Release what was opened; a second call does nothing."""


@dataclass(frozen=True)
class Wording:
    """One way of putting a scorer's question to its judge: a name for tables, and what the scorer makes of it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


Need = Literal["classifier", "engine", "endpoint"]


class Scorer(Plugin[C]):
    """Turns answers into numbers; sees only samples and answers, never the model under test."""

    kind = "scorer"

    def needs(self, config: C) -> Need | None:
        """What it must have besides samples and answers: a classifier's weights, an engine opened on this machine,
        an endpoint that is called; None: nothing. It tells whoever decides when and where a step runs; it changes no
        number."""
        return None

    @abstractmethod
    def metrics(self, config: C) -> tuple[Metric, ...]:
        """Direction, unit, range and chance level of every number of a score."""

    @abstractmethod
    def open(self, config: C, context: ScorerContext) -> ScorerSession:
        """Open what it needs, for all tasks and arms of a run; what is open belongs to the session, not to the plugin.

        Raises:
            Exception: the steps of this scorer fail, and no other's.
        """

    def identity(self, config: C) -> dict[str, Any]:
        """What of the scorer enters a scores step's id; a scorer with a model adds the digest of its weights."""
        return {"name": self.name, "options": config.model_dump(mode="json")}

    def hub_files(self, config: C) -> tuple[HubFiles, ...]:
        """What it reads from the hub: `harness fetch` brings it."""
        return ()

    def wordings(self) -> tuple[Wording, ...]:
        """Wordings in which its judge can be asked, the first its own; empty: there is one, or no judge."""
        return ()

    def judged_by(
        self, options: Mapping[str, Any], judge: Mapping[str, Any] | None, wording: Wording | None, where: str
    ) -> dict[str, Any] | None:
        """The options with which another judge, or another wording, is asked; None: nobody is, which is the default.

        Args:
            options: of the scorer, as the task gives them.
            judge: of the judge, ``{"model": ...}`` at least; None: the options' own.
            wording: one of :meth:`wordings`, or a user's; None: the scorer has one alone.
            where: the task, for messages.

        Raises:
            UserError: the judge or the wording does not fit.
        """
        return None

    def judge_name(self, config: C) -> str:
        """A short name of the judge that is asked, for tables; a scorer with :meth:`judged_by` says it."""
        return self.name

    def check(self, config: C) -> None:
        """Raise a UserError before anything runs if the scorer cannot work (a missing model, a missing key)."""


class AnswerScorer(Scorer[C]):
    """The short form: one answer at a time, and nothing to open.

    An answer that failed never gets here: it has no score, and its error is the reason.
    """

    @abstractmethod
    def score(self, sample: Sample, answer: Answer, config: C) -> Score:
        """The score of one answer; ``Score.absent(self.metrics(config), reason)`` where there is none."""

    def aggregate(self, metric: Metric, scores: Sequence[Score]) -> float | None:
        """As :meth:`ScorerSession.aggregate`."""
        raise NotImplementedError(f"{metric.name} is declared as a corpus metric, and nothing aggregates it")

    def open(self, config: C, context: ScorerContext) -> ScorerSession:
        """A session that puts every answer to :meth:`score`."""
        return _OneByOne(self, config)


class _OneByOne(ScorerSession, Generic[C]):
    """The session of a scorer that opens nothing."""

    def __init__(self, scorer: AnswerScorer[C], config: C) -> None:
        self._scorer, self._config = scorer, config

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        metrics = self._scorer.metrics(self._config)
        return [
            self._scorer.score(sample, answer, self._config)
            if answer.error is None
            else Score.absent(metrics, answer.error)
            for sample, answer in zip(samples, answers, strict=True)
        ]

    def aggregate(self, metric: Metric, scores: Sequence[Score]) -> float | None:
        return self._scorer.aggregate(metric, scores)
