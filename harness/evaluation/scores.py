"""Scores: one scorer after the other over the stored answers of every arm, when the model under test is closed.

A scorer is opened once for all tasks and arms that ask for it with the same options, and closed before the next one is
opened. Answers and samples are read back from the run, so that neither model nor tokenizer of an arm is needed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.contracts.scorer import ScoreJob, ScorerContext, ScorerSession
from harness.core.errors import CorruptionError
from harness.core.progress import Bar
from harness.core.records import Score
from harness.evaluation import ask
from harness.evaluation.plan import ScorerPlan, ScoresStep
from harness.evaluation.resume import SAMPLES_FILE, SCORES_FILE
from harness.evaluation.rows import RowContext, Scored, build_rows, check_scores, sample_rows
from harness.evaluation.session import EvalSession, Unit, is_fatal
from harness.models.precision import asked_dtype
from harness.steps.files import read_json, write_json
from harness.steps.folder import StepFolder
from harness.steps.journal import rows_digest, write_rows
from harness.steps.provenance import provenance_record
from harness.tasks.questions import Questions


@dataclass
class ScoresOrder:
    """One scorer, and the steps that one opening of it serves."""

    scorer: ScorerPlan
    steps: list[tuple[Unit, ScoresStep]] = field(default_factory=list)


class Scoring:
    """Scores units whose answers are there."""

    def __init__(self, run: EvalSession, answered: Mapping[str, ask.Answered]) -> None:
        self.run, self._answered = run, answered

    def carry_out(self, units: Sequence[Unit]) -> None:
        """Score; what fails, also by a user's mistake, fails its own steps and leaves the others their scores."""
        for order in self._orders(units):
            with self.run.clock("score"):
                self._carry_out(order)

    def _orders(self, units: Sequence[Unit]) -> list[ScoresOrder]:
        """What is to be scored, by scorer: those that need nothing first, then those that open a model."""
        found: dict[str, ScoresOrder] = {}
        for unit in units:
            answers = self.run.folder(unit).status()
            if answers is None or answers.status != "done":
                continue
            for step in unit.task.scores:
                if self._is_due(self.run.scores_folder(unit, step), answers.digest):
                    order = found.setdefault(step.scorer.key, ScoresOrder(step.scorer))
                    order.steps.append((unit, step))
        return sorted(found.values(), key=lambda one: one.scorer.plugin.needs(one.scorer.config) is not None)

    def _is_due(self, folder: StepFolder, answers: str | None) -> bool:
        """Whether it has not ended, or had other answers; then its end is taken back."""
        status = folder.status()
        if status is None:
            return True
        if status.status == "done" and read_json(folder.path / "step.json").get("answers_digest") == answers:
            return False
        folder.reopen(status.error or "the answers it scored have changed")
        return True

    def _carry_out(self, order: ScoresOrder) -> None:
        run, scorer = self.run, order.scorer
        context = ScorerContext(run.plan.spec.seed, run.store.judge, _opener(run))
        try:
            session = scorer.plugin.open(scorer.config, context)
        except Exception as error:
            if is_fatal(error, mistakes=True):
                raise
            for unit, step in order.steps:
                run.fail(unit, run.scores_folder(unit, step), error)
            return
        try:
            for unit, step in order.steps:
                with run.contained(unit, run.scores_folder(unit, step), mistakes=True):
                    self._score(session, unit, step)
        finally:
            self._close(session, order)

    def _close(self, session: ScorerSession, order: ScoresOrder) -> None:
        """What goes wrong here takes no score with it."""
        try:
            session.close()
        except Exception as error:
            self.run.reporter.note(f"warning: scorer {order.scorer.plugin.name} did not close: {error}")

    def _score(self, session: ScorerSession, unit: Unit, step: ScoresStep) -> None:
        run, folder, scorer = self.run, self.run.scores_folder(unit, step), step.scorer
        run.registry.announce("step_started", step={"id": folder.id, "kind": "scores", "task": unit.task.name})
        begun = time.perf_counter()
        asked, answered = run.stored(unit), self._answers(unit)
        count = len(asked.samples)
        bar = Bar(run.reporter.start(f"{run.said(unit)}: {step.ref.name}", count), count)
        job = ScoreJob(unit.task.name, folder.artifact, bar.advance, bar.stored, lambda: run.questions(unit).runtime)
        folder.begin(self._json(unit, step, answered, asked), provenance_record({}))
        scores = session.score(asked.samples, answered.answers, job)
        bar.fill()
        # lm-eval's metrics are known once its task has been scored.
        learnt = session.metrics()
        scored = Scored(scorer.plugin.metrics(scorer.config) if learnt is None else learnt, scores)
        check_scores(step.ref.name, scored.metrics, scores, asked.samples)
        rows = sample_rows(asked.samples, answered.answers, scores)
        write_rows(folder.artifact / SAMPLES_FILE, rows)
        described = read_json(folder.path / "step.json")
        described["metrics"] = [metric.model_dump(mode="json") for metric in scored.metrics]
        write_json(folder.path / "step.json", described)
        numbers = build_rows(
            self._context(session, folder, unit, step, asked), session, scored, asked.samples, answered.answers
        )
        write_json(folder.artifact / SCORES_FILE, {"rows": [row.model_dump(mode="json") for row in numbers]})
        run.finish(folder, rows_digest(rows), _counts(scores), {"compute": time.perf_counter() - begun})

    def _answers(self, unit: Unit) -> ask.Answered:
        found = self._answered.get(unit.id) or self.run.answers(unit)
        if found is None:
            name = self.run.folder(unit).path.name
            raise CorruptionError(f"{name}: its answers are no longer there; run the same command again")
        return found

    def _json(self, unit: Unit, step: ScoresStep, answered: ask.Answered, asked: Questions) -> dict[str, Any]:
        return {
            "arm": unit.arm.name,
            "task": unit.task.name,
            "variant": unit.task.variant,
            "title": f"{unit.task.name} ({unit.task.variant})",
            "scorer": step.ref.name,
            "config": step.config,
            "answers": unit.id,
            "answers_folder": self.run.folder(unit).path.name,
            "answers_digest": answered.digest,
            "requests": self.run.store.requests(asked.digest).name,
        }

    def _context(
        self, session: ScorerSession, folder: StepFolder, unit: Unit, step: ScoresStep, asked: Questions
    ) -> RowContext:
        """What all rows of a step say, after it was scored."""
        arm, task, label = unit.arm, unit.task, session.label()
        lent = f"asked in the chat template of {arm.template_of}, as the base has none"
        folded = f"{arm.label} was folded into the base, as the engine cannot serve it: {arm.folded}"
        return RowContext(
            model=arm.model.name,
            adapter=arm.label,
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
                *((lent,) if arm.template_of is not None else ()),
                *((folded,) if arm.folded is not None else ()),
            ),
        )


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
