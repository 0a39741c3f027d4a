"""Scores: one scorer after the other over the stored answers of every arm, when the model under test is closed.

A scorer is opened once for all tasks and arms that ask for it with the same options, and closed before the next one is
opened. Answers and samples are read back from the run, so that neither model nor tokenizer of an arm is needed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from harness.contracts.scorer import ScoreJob, ScorerContext, ScorerSession
from harness.core.costs import JudgeCosts
from harness.core.errors import CorruptionError, StepError
from harness.core.progress import Bar
from harness.core.records import Score
from harness.evaluation import ask
from harness.evaluation.plan import ScorerPlan, ScoresPlan
from harness.evaluation.resume import SAMPLES_FILE, SCORES_FILE
from harness.evaluation.rows import RowContext, Scored, build_rows, check_scores, sample_rows
from harness.evaluation.session import EvalSession, Unit
from harness.models.precision import asked_dtype
from harness.steps.files import write_json
from harness.steps.folder import StepFolder
from harness.steps.journal import rows_digest, write_rows
from harness.steps.provenance import file_digest
from harness.steps.runner import Ended, is_fatal
from harness.tasks.catalog import Chosen
from harness.tasks.questions import Questions


@dataclass
class ScoresOrder:
    """One scorer, and the steps that one opening of it serves."""

    scorer: ScorerPlan
    steps: list[tuple[Scoring, Unit, ScoresPlan]] = field(default_factory=list)

    def carry_out(self) -> None:
        """Open the scorer, score, close; what fails, also by a user's mistake, fails its own steps alone."""
        first = self.steps[0][0].run
        with first.clock("score"):
            context = ScorerContext(first.plan.spec.seed, first.store.judge, _opener(first))
            begun = time.perf_counter()
            try:
                session = self.scorer.plugin.open(self.scorer.config, context)
            except Exception as error:
                if is_fatal(error, mistakes=True):
                    raise
                for scoring, unit, plan in self.steps:
                    scoring.run.runner.fail(plan.step, scoring.run.scores_folder(unit, plan), error)
                return
            # What opened it for all of them is told with the first.
            load = time.perf_counter() - begun
            try:
                for scoring, unit, plan in self.steps:
                    scoring.score(session, unit, plan, load)
                    load = 0.0
            finally:
                self._close(session, first)

    def _close(self, session: ScorerSession, run: EvalSession) -> None:
        """What goes wrong here takes no score with it."""
        try:
            session.close()
        except Exception as error:
            run.reporter.note(f"warning: scorer {self.scorer.plugin.name} did not close: {error}")


def score_all(parts: Iterable[tuple[Scoring, Sequence[Unit]]], only: Collection[str] | None = None) -> None:
    """Score the units of one evaluation, or of many: scorers that need nothing first, then those that open a model."""
    found: dict[str, ScoresOrder] = {}
    for scoring, units in parts:
        for unit, plan in scoring.due(units, only):
            found.setdefault(plan.scorer.key, ScoresOrder(plan.scorer)).steps.append((scoring, unit, plan))
    for order in sorted(found.values(), key=lambda one: one.scorer.plugin.needs(one.scorer.config) is not None):
        order.carry_out()


class Scoring:
    """Scores units of one evaluation whose answers are there."""

    def __init__(self, run: EvalSession, answered: Mapping[str, ask.Answered]) -> None:
        self.run, self._answered = run, answered

    def due(self, units: Sequence[Unit], only: Collection[str] | None) -> Iterator[tuple[Unit, ScoresPlan]]:
        """What is to be scored, of what is meant: no scores yet, or those of other answers."""
        for unit in units:
            answers = self.run.folder(unit).status()
            if answers is None or answers.status != "done":
                continue
            for plan in unit.task.scores:
                if (only is None or plan.id in only) and self._is_due(
                    self.run.scores_folder(unit, plan), answers.digest
                ):
                    yield unit, plan

    def _is_due(self, folder: StepFolder, answers: str | None) -> bool:
        """Whether it has not ended, or had other answers; then its end is taken back."""
        status = folder.status()
        if status is None:
            return True
        if status.status == "done" and status.made_from.get("answers") == answers:
            return False
        folder.reopen(status.error or "the answers it scored have changed")
        return True

    def score(self, session: ScorerSession, unit: Unit, plan: ScoresPlan, load: float = 0.0) -> None:
        """Score one unit with an open scorer, which took ``load`` seconds to open; a failure is recorded."""
        runner, folder = self.run.runner, self.run.scores_folder(unit, plan)
        with runner.holding(folder) as free:
            if free:
                with runner.contained(plan.step, folder, mistakes=True):
                    self._score(session, unit, plan, load)

    def _score(self, session: ScorerSession, unit: Unit, step: ScoresPlan, load: float) -> None:
        run, folder, scorer = self.run, self.run.scores_folder(unit, step), step.scorer
        begun = time.perf_counter()
        asked, answered = run.stored(unit), self._answers(unit)
        count = len(asked.samples)
        bar = Bar(run.reporter.start(f"{run.said(unit)}: {step.ref.name}", count), count)
        job = ScoreJob(unit.task.name, folder.artifact, bar.advance, bar.stored, lambda: run.questions(unit).runtime)
        begun_of = replace(step.step, made_from={"answers": answered.digest})
        run.runner.begin(begun_of, folder, self._json(unit, step, asked))
        try:
            scores = session.score(asked.samples, answered.answers, job)
        finally:
            # Also what a judge was paid whose verdicts did not all come.
            run.runner.spent(folder, judge=_paid(session, step.ref.name))
        bar.fill()
        # lm-eval's metrics are known once its task has been scored.
        learnt = session.metrics()
        scored = Scored(scorer.plugin.metrics(scorer.config) if learnt is None else learnt, scores)
        check_scores(step.ref.name, scored.metrics, scores, asked.samples)
        rows = sample_rows(asked.samples, answered.answers, scores)
        write_rows(folder.artifact / SAMPLES_FILE, rows)
        folder.describe(metrics=[metric.model_dump(mode="json") for metric in scored.metrics])
        numbers = build_rows(
            self._context(session, folder, unit, step, asked), session, scored, asked.samples, answered.answers
        )
        write_json(folder.artifact / SCORES_FILE, {"rows": [row.model_dump(mode="json") for row in numbers]})
        files = {SCORES_FILE: file_digest(folder.artifact / SCORES_FILE)}
        seconds = {"load": load, "compute": time.perf_counter() - begun}
        run.runner.finish(
            begun_of, folder, Ended("scores", rows_digest(rows), files, counts=_counts(scores), seconds=seconds)
        )

    def _answers(self, unit: Unit) -> ask.Answered:
        found = self._answered.get(unit.id) or self.run.answers(unit)
        if found is None:
            name = self.run.folder(unit).path.name
            raise CorruptionError(f"{name}: its answers are no longer there; run the same command again")
        return found

    def _json(self, unit: Unit, step: ScoresPlan, asked: Questions) -> dict[str, Any]:
        return {
            "task": unit.task.name,
            "variant": unit.task.variant,
            "title": f"{unit.task.name} ({unit.task.variant})",
            "scorer": step.ref.name,
            "answers": unit.id,
            "answers_folder": self.run.folder(unit).path.name,
            "requests": self.run.store.requests(asked.digest).name,
            **({"judge": step.asked.judge, "wording": step.asked.wording} if step.asked is not None else {}),
        }

    def _context(
        self, session: ScorerSession, folder: StepFolder, unit: Unit, step: ScoresPlan, asked: Questions
    ) -> RowContext:
        """What all rows of a step say, after it was scored."""
        arm, task, label = unit.arm, unit.task, session.label()
        said = step.asked
        if said is not None:
            label = said.judge if said.first_wording else f"{said.judge}+{said.wording}"
        asked_as = (
            f"asked of judge {said.judge}, in wording {said.wording}" if said is not None and said.wording else None
        )
        lent = f"asked in the chat template of {arm.template_of}, as the base has none"
        folded = f"{arm.label} was folded into the base, as the engine cannot serve it: {arm.folded}"
        return RowContext(
            model=arm.model.name,
            adapter=arm.label,
            control=arm.control,
            task=task.name if label is None else f"{task.name}@{label}",
            variant=task.variant,
            template=task.template,
            scorer=step.ref.name,
            step=folder.id,
            dtype=None if self.run.plan.engine.remote else asked_dtype(arm.model),
            notes=(
                *((self.run.plan.dtype_note,) if self.run.plan.dtype_note is not None else ()),
                *task.chosen.spec.notes,
                *asked.notes,
                *session.notes(),
                *((asked_as,) if asked_as is not None else ()),
                *((_subset(task.chosen, self.run.plan.spec.seed),) if _draws(task.chosen) else ()),
                *((lent,) if arm.template_of is not None else ()),
                *((folded,) if arm.folded is not None else ()),
                *((arm.said_control,) if arm.said_control is not None else ()),
            ),
        )


def _draws(chosen: Chosen) -> bool:
    return chosen.limit is not None and chosen.spec.subset == "seeded"


def _subset(chosen: Chosen, seed: int) -> str:
    return f"of a seeded subset: at most {chosen.limit} samples of each leaf task, drawn by seed {seed}"


def _paid(session: ScorerSession, name: str) -> JudgeCosts | None:
    paid = session.paid()
    if paid is not None and not isinstance(paid, JudgeCosts):
        raise StepError(f"scorer {name}", f"paid() gave {paid!r}", "It gives a harness.JudgeCosts, or None.")
    return paid


def _counts(scores: Sequence[Score]) -> dict[str, int]:
    again = sum(bool(score.detail.get("again")) for score in scores)
    return {
        "samples": len(scores),
        "unscored": sum(any(value is None for value in score.values.values()) for score in scores),
        **({"again": again} if again else {}),
    }


def _opener(run: EvalSession) -> Any:
    """How a scorer opens an engine of its own: a local judge, say."""
    from harness.evaluation.engines import open_engine

    return partial(open_engine, run.registry)
