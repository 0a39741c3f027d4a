"""Answers: one engine, opened once, is asked what the arms of a group want to know, task by task, all arms at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from harness.contracts.engine import Session
from harness.core.records import Answer, Sample
from harness.evaluation import ask
from harness.evaluation.load import Group, Loaded
from harness.evaluation.resume import ANSWERS_FILE
from harness.evaluation.session import EvalSession, Unit
from harness.steps.files import write_json
from harness.steps.journal import Journal, write_rows
from harness.steps.provenance import provenance_record
from harness.steps.runner import Ended, is_fatal

REQUESTS_AT_ONCE = 200_000
"""Most requests that lie in the memory at once; arms beyond that are asked in a second round of the same task."""


class Answering:
    """Carries out one group."""

    def __init__(self, run: EvalSession, group: Group, broken: Mapping[str, Exception]) -> None:
        self.run, self.group, self._broken = run, group, broken
        self._engine = Loaded(run, run.plan, group)
        self.answered: dict[str, ask.Answered] = {}

    def carry_out(self) -> None:
        """Answer every unit of the group, task by task, and close the engine."""
        tasks: dict[tuple[int, str], list[Unit]] = {}
        for unit in self.group.units:
            tasks.setdefault((id(unit.task.chosen), unit.task.variant), []).append(unit)
        try:
            for units in tasks.values():
                for chunk in self._chunks(units):
                    self._answer(chunk)
        finally:
            self._engine.close()

    def _chunks(self, units: Sequence[Unit]) -> Iterator[Sequence[Unit]]:
        size = max(1, len(units))
        first = units[0]
        if len(units) > 1 and first.id not in self._broken:
            each = sum(len(sample.requests) for sample in self.run.questions(first).samples)
            size = max(1, REQUESTS_AT_ONCE // max(1, each))
        for start in range(0, len(units), size):
            yield units[start : start + size]

    # -------------------------------------------------------------------------------------------------------- asking

    def _answer(self, units: Sequence[Unit]) -> None:
        """Answer one task for several arms, of which this process alone holds the folders meanwhile."""
        with ExitStack() as held:
            holding = self.run.runner.holding
            self._answer_held([unit for unit in units if held.enter_context(holding(self.run.folder(unit)))])

    def _answer_held(self, units: Sequence[Unit]) -> None:
        """Where it fails for several arms, arm by arm, so that only the guilty one is lost."""
        asked: list[tuple[Unit, ask.Part]] = []
        for unit in units:
            with self.run.runner.contained(unit.task.answers, self.run.folder(unit)):
                if unit.id in self._broken:
                    raise self._broken[unit.id]
                asked.append((unit, self._part(unit)))
        if len(asked) > 1:
            try:
                self._ask(asked)
                return
            except Exception as error:
                if is_fatal(error):
                    raise
                if not self._engine.is_open:  # it would not open for one of them either
                    for unit, _ in asked:
                        self.run.runner.fail(unit.task.answers, self.run.folder(unit), error)
                    return
                self.run.reporter.note(f"{asked[0][0].task.name}: {error}; its arms are asked one by one")
            self._engine.close()  # what failed may have broken the engine
        for unit, part in asked:
            with self.run.runner.contained(unit.task.answers, self.run.folder(unit)):
                self._ask([(unit, part)])

    def _part(self, unit: Unit) -> ask.Part:
        """What is to be asked for one arm, its step begun."""
        run, folder, opened = self.run, self.run.folder(unit), self.run.opened(unit)
        journal = Journal(folder.artifact / ANSWERS_FILE)
        status = folder.status()
        if status is not None:
            folder.reopen(status.error or "the stored answers are not those that were recorded")
        requests = run.store.requests(opened.digest)
        write_rows(requests, opened.rows())
        described = {
            "task": unit.task.name,
            "variant": unit.task.variant,
            "requests": requests.name,
            "questions": opened.digest,
            "dropped": opened.dropped,
            "notes": list(opened.notes),
        }
        run.runner.begin(unit.task.answers, folder, described)
        # An engine's own processes have devices that this process sees nothing of.
        run.runner.spent(folder, devices=run.plan.engine.devices(run.plan.engine_options))
        return ask.Part(opened.samples, journal, self._engine.sender(unit.arm))

    def _ask(self, asked: Sequence[tuple[Unit, ask.Part]]) -> None:
        run, task = self.run, asked[0][0].task
        totals = [sum(len(sample.requests) for sample in part.samples) for _, part in asked]
        title = f"{run.said(asked[0][0])} ({task.variant})"
        if len(asked) > 1:
            title = f"{task.name} ({task.variant}), {len(asked)} arms"

        def open_session() -> Session:
            session = self._engine.session()
            for unit, _ in asked:
                folded = {"folded": unit.arm.folded} if unit.arm.folded is not None else {}
                facts = provenance_record({"engine": dict(session.facts), **folded})
                write_json(run.folder(unit).path / "provenance.json", facts)
            return session

        advance = run.reporter.start(title, sum(totals))
        begun, loaded = time.perf_counter(), run.seconds["load"]
        try:
            answers = ask.answer(
                [part for _, part in asked], open_session, advance, batchwise=not run.plan.engine.remote
            )
        finally:
            for _, part in asked:
                part.journal.close()
        load = run.seconds["load"] - loaded
        spent = time.perf_counter() - begun - load
        run.seconds["answer"] += spent
        # What was asked together was paid together: each arm bears the share of what was computed for it.
        computed = sum(answered.computed for answered in answers)
        for (unit, _), answered, total in zip(asked, answers, totals, strict=True):
            share = answered.computed / computed if computed else 1 / len(asked)
            self._ended(unit, answered, total, {"load": load * share, "compute": spent * share})

    def _ended(self, unit: Unit, answered: ask.Answered, total: int, seconds: Mapping[str, float]) -> None:
        run, folder, opened = self.run, self.run.folder(unit), self.run.opened(unit)
        if str(answered.damage):
            run.reporter.note(f"{folder.path.name}: found {answered.damage}; what was lost was asked again")
            folder.log("recovered", damage=str(answered.damage))
        if answered.reused:
            run.reporter.note(f"{run.said(unit)}: {answered.reused} of {total} answers were stored before")
        folder.log("answered", computed=answered.computed, reused=answered.reused, errors=answered.errors)
        failed = answered.wholly_failed()
        if failed is not None:
            run.runner.fail(unit.task.answers, folder, failed)
            return
        run.runner.spent(folder, **tokens_of(opened.samples, answered.answers), reused=answered.reused)
        counts = {
            "samples": len(opened.samples),
            "requests": total,
            "errors": answered.errors,
            "batch_dependent": answered.batch_dependent,
            **{f"dropped: {reason}": count for reason, count in opened.dropped.items()},
        }
        run.runner.finish(unit.task.answers, folder, Ended("answers", answered.digest, counts=counts, seconds=seconds))
        self._keep(unit, answered)

    def _keep(self, unit: Unit, answered: ask.Answered) -> None:
        """Hold answers for scoring where there is one arm; those of many are read back when they are scored."""
        if len(self.run.plan.arms) == 1:
            self.answered[unit.id] = answered
        else:
            self.run.forget(unit)


def tokens_of(samples: Sequence[Sample], answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of all requests and of all answers. Where a server alone knows them, there is no entry: they are not 0.

    A request for a log-probability has its continuation in the prompt that a model reads, and no answer.
    """
    requests = [request for sample in samples for request in sample.requests]
    outputs = [output for answer in answers for output in answer.outputs if output.error is None]
    found = {
        "prompt_tokens": [len(request.prompt_ids) + len(request.continuation_ids) for request in requests],
        "completion_tokens": [len(output.token_ids) for output in outputs],
    }
    untold = (
        any(not request.prompt_ids for request in requests),
        any(output.text and not output.token_ids for output in outputs),
    )
    return {name: sum(counts) for (name, counts), missing in zip(found.items(), untold, strict=True) if not missing}
