"""Many evaluations in one run folder: each model is opened once for its answers, each scorer once over all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from harness.contracts.executor import Observers
from harness.contracts.registry import Registry
from harness.core.progress import Reporter
from harness.evaluation.answers import Answering
from harness.evaluation.load import groups_of, remove_scratch
from harness.evaluation.plan import EvalPlan
from harness.evaluation.scores import Scoring, score_all
from harness.evaluation.session import EvalSession, Unit
from harness.evaluation.take import take_steps
from harness.steps.store import RunStore


class Evaluations:
    """Answers one plan after the other, and then scores them together."""

    def __init__(
        self,
        registry: Registry,
        store: RunStore,
        reporter: Reporter,
        observers: Observers | None = None,
        reuse: Sequence[RunStore] = (),
    ) -> None:
        """``observers``: hear of the steps; those of the registry by default. ``reuse``: runs to take steps from."""
        self._reuse = reuse
        self._registry, self._store, self._reporter, self._observers = registry, store, reporter, observers
        self._parts: list[tuple[Scoring, Sequence[Unit]]] = []

    def is_answered(self, plan: EvalPlan, only: Collection[str] | None = None) -> bool:
        """Whether all answers of a plan, or those whose ids are given, are there as far as their records say."""
        run = EvalSession(plan, self._registry, self._store, self._reporter, self._observers)
        records = [run.folder(unit).status() for unit in run.units if only is None or unit.id in only]
        return all(record is not None and record.status == "done" for record in records)

    def answer(self, plan: EvalPlan, only: Collection[str] | None = None) -> bool:
        """Answer what has not been answered; what fails is recorded and does not stop the rest.

        Args:
            plan: ids and where they are answered.
            only: ids of answers steps, where not all are meant.

        Returns:
            whether all is answered now.

        Raises:
            UserError: a mistake that concerns every step: an engine that cannot be opened as asked, a full disk.
        """
        run = EvalSession(plan, self._registry, self._store, self._reporter, self._observers)
        pending = [unit for unit in run.units if not run.ended(unit)]
        for other in self._reuse:
            take_steps(run, [unit for unit in pending if only is None or unit.id in only], other)
        if self._reuse:
            pending = [unit for unit in pending if not run.ended(unit)]
        meant = [unit for unit in pending if only is None or unit.id in only]
        unanswered = [unit for unit in meant if run.answered(unit) is None]
        broken = {unit.id: error for unit in unanswered if (error := run.unopenable(unit)) is not None}
        remove_scratch(self._store.scratch)
        for group in groups_of(plan, unanswered):
            Answering(run, group, broken).carry_out()
        self._parts.append((Scoring(run, {}), pending))
        return self.is_answered(plan)

    def score(self, only: Collection[str] | None = None) -> None:
        """Score what has been answered and not scored; ``only``: ids of scores steps, where not all are meant."""
        score_all(self._parts, only)

    @property
    def failures(self) -> dict[str, str]:
        """Step folder name -> why it failed."""
        return {name: why for scoring, _ in self._parts for name, why in scoring.run.runner.failures.items()}
