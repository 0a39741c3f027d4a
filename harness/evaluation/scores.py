"""Scores: every scorer over the stored answers of every arm, after the model under test is closed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from harness.contracts.scorer import ScorerContext
from harness.core.errors import CorruptionError
from harness.core.progress import Bar
from harness.core.records import Score
from harness.evaluation import ask
from harness.evaluation.plan import ScorePlan
from harness.evaluation.resume import ANSWERS_FILE, SAMPLES_FILE, SCORES_FILE
from harness.evaluation.rows import RowContext, Scored, build_rows, check_scores, sample_rows
from harness.evaluation.session import EvalSession, Unit
from harness.models.precision import asked_dtype
from harness.steps.files import write_json
from harness.steps.folder import StepFolder
from harness.steps.journal import Journal, rows_digest, write_rows
from harness.steps.provenance import file_digest
from harness.steps.runner import Ended
from harness.tasks.questions import Questions


class Scoring:
    """Scores units whose answers are there; scorers open what they need once for all of them."""

    def __init__(self, run: EvalSession, answered: Mapping[str, ask.Answered]) -> None:
        self.run, self._answered = run, answered

    def carry_out(self, units: Sequence[Unit]) -> None:
        """Score; what fails, also by a user's mistake, fails its own step and leaves the others their scores."""
        for unit in units:
            if not self._has_answers(unit):
                continue
            for step in unit.task.scores:
                folder = self.run.scores_folder(unit, step)
                with self.run.runner.holding(folder) as free:
                    if free:
                        with self.run.runner.contained(step.step, folder, mistakes=True):
                            self._score(unit, step, self._answers(unit))
            self.run.forget(unit)

    def _has_answers(self, unit: Unit) -> bool:
        status = self.run.folder(unit).status()
        return unit.id in self._answered or (status is not None and status.status == "done")

    def _answers(self, unit: Unit) -> ask.Answered:
        kept = self._answered.get(unit.id)
        if kept is not None:
            return kept
        folder = self.run.folder(unit)
        stored = ask.load_answers(self.run.opened(unit).samples, Journal(folder.artifact / ANSWERS_FILE))
        if stored is None:
            raise CorruptionError(f"{folder.path.name}: its answers are no longer there; run the same command again")
        return stored

    def _score(self, unit: Unit, step: ScorePlan, answered: ask.Answered) -> None:
        run, folder, opened = self.run, self.run.scores_folder(unit, step), self.run.opened(unit)
        status = folder.status()
        if status is not None and status.status == "done":
            if status.made_from.get("answers") == answered.digest:
                return
            folder.reopen("the answers it scored have changed")
        elif status is not None:
            folder.reopen(status.error or "it had failed")
        begun_of = replace(step.step, made_from={"answers": answered.digest})
        with run.clock("score"):
            begun = time.perf_counter()
            title = f"{unit.task.name}: {step.ref.name}"
            if len(run.plan.arms) > 1:
                title = f"{unit.arm.name}, {title}"
            bar = Bar(run.reporter.start(title, len(opened.samples)), len(opened.samples))
            context = ScorerContext(
                task=unit.task.name,
                seed=run.plan.spec.seed,
                folder=folder.artifact,
                shared=run.store.judge,
                progress=bar.advance,
                stored=bar.stored,
                open_engine=_opener(run),
                runtime=opened.runtime,
            )
            run.runner.begin(begun_of, folder, self._json(unit, step, opened))
            scores = step.scorer.score(opened.samples, answered.answers, context)
            bar.fill()
            # lm-eval's metrics are known once its task is open.
            metrics = step.scorer.metrics_of(step.scorer.options, context)
            check_scores(step.scorer, metrics, scores, opened.samples)
            self._write(folder, unit, step, Scored(metrics, scores), answered)
            spent = time.perf_counter() - begun
        digest = rows_digest(sample_rows(opened.samples, answered.answers, scores))
        files = {SCORES_FILE: file_digest(folder.artifact / SCORES_FILE)}
        ended = Ended("scores", digest, files, counts=_counts(scores), seconds={"compute": spent})
        run.runner.finish(begun_of, folder, ended)

    def _json(self, unit: Unit, step: ScorePlan, opened: Questions) -> dict[str, Any]:
        return {
            "task": unit.task.name,
            "variant": unit.task.variant,
            "title": f"{unit.task.name} ({unit.task.variant})",
            "scorer": step.ref.name,
            "answers": unit.id,
            "answers_folder": self.run.folder(unit).path.name,
            "requests": self.run.store.requests(opened.digest).name,
        }

    def _write(self, folder: StepFolder, unit: Unit, step: ScorePlan, scored: Scored, answered: ask.Answered) -> None:
        opened, arm, task = self.run.opened(unit), unit.arm, unit.task
        label = step.scorer.label(step.scorer.options)
        lent = f"asked in the chat template of {arm.template_of}, as the base has none"
        folded = f"{arm.label} was folded into the base, as the engine cannot serve it: {arm.folded}"
        context = RowContext(
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
                *opened.notes,
                *step.scorer.notes(),
                *((lent,) if arm.template_of is not None else ()),
                *((folded,) if arm.folded is not None else ()),
            ),
        )
        rows = build_rows(context, step.scorer, scored, opened.samples, answered.answers)
        write_rows(folder.artifact / SAMPLES_FILE, sample_rows(opened.samples, answered.answers, scored.scores))
        folder.describe(metrics=[metric.model_dump(mode="json") for metric in scored.metrics])
        write_json(folder.artifact / SCORES_FILE, {"rows": [row.model_dump(mode="json") for row in rows]})


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
