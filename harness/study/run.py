"""Carry out a study in one run folder: arms after those that they are made from, with their answers; then scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.evaluation.many import Evaluations
from harness.evaluation.plan import EvalPlan, TaskPlan
from harness.steps.files import write_json
from harness.steps.store import RUN, RunStore
from harness.study.folder import check_study, write_plan
from harness.study.make import GONE, Maker
from harness.study.plan import Planner, Promise, StudyPlan
from harness.study.reuse import stores_of
from harness.study.searched import choose_recipes, with_failed_cells
from harness.study.status import read_plan
from harness.study.tracked import track_scores, tracking_in
from harness.study.turns import in_turn, is_model, merged_models


@dataclass
class Study:
    """What a study left behind."""

    root: Path
    plan: StudyPlan
    failures: dict[str, str] = field(default_factory=dict)
    """Step folder or arm -> why it failed, or was left out."""


def carry_out_steps(plan: StudyPlan, out: Path, keys: Collection[str], *, reporter: Reporter | None = None) -> Study:
    """Carry out single steps of a study whose folder other processes may work in: what `harness study step` does.

    Raises:
        UserError: a key that is no step's, or is not ready.
    """
    written = check_study(out, plan)
    for key in keys:
        if key not in plan.graph.steps:
            raise UserError(f"key {key}", "is no step of this study", "See `harness study steps FILE`.")
    store, reporter = RunStore(out), reporter or Reporter()
    if not written or {step.id for step in plan.graph} != {str(step["key"]) for step in read_plan(out)["steps"]}:
        write_plan(store, plan)
    done = StudyRun(plan, store, reporter, retry_failed=True, only=keys).carry_out()
    if plan.to_search:
        # What is listed next is planned with it.
        choose_recipes(plan, out, reporter)
    return done


def run_study(
    plan: StudyPlan,
    out: Path,
    *,
    fresh: bool = False,
    retry_failed: bool = False,
    reporter: Reporter | None = None,
    execute: Callable[[StudyPlan, Path, Reporter, bool], Study] | None = None,
) -> Study:
    """Carry out a study; what its folder holds already is kept, and goes on from where it stopped.

    Args:
        plan: of :func:`plan_study`.
        out: run folder.
        fresh: delete what it holds of an earlier study first.
        retry_failed: try again what failed; by default it is left, with all that builds on it.
        reporter: says what is going on; silent by default.
        execute: carries it out elsewhere (:func:`harness.study.workers.through`); in this process by default.

    Raises:
        UserError: the folder holds something else, or a mistake that concerns every arm.
    """
    reporter = reporter or Reporter()
    stores_of(plan.read, out)
    if fresh:
        RUN.refuse(out, fresh=True)
    else:
        check_study(out, plan)
    with RunStore(out) as store:
        if fresh:
            RUN.clear(out)
        if retry_failed and (again := plan.searches.keys() & with_failed_cells(out)):
            # A cell that ends well this time may be the better one.
            for name in again:
                plan.read.source["chosen"].pop(name, None)
            plan = Planner(plan.read, plan.registry).plan()
        check_study(out, plan)

        def carry_out(plan: StudyPlan) -> Study:
            if execute is not None:
                return execute(plan, out, reporter, retry_failed)
            return StudyRun(plan, store, reporter, retry_failed=retry_failed).carry_out()

        write_plan(store, plan)
        tried: set[str] = set()
        failures: dict[str, str] = {}
        while plan.to_search:
            cells = plan.of_searches()
            tried |= {name for name, one in cells.promises.items() if one.arm.cell}
            failures |= {name: why for name, why in carry_out(cells).failures.items() if name in tried}
            plan.read.source["chosen"] = choose_recipes(plan, out, reporter)
            before, plan = plan, Planner(plan.read, plan.registry).plan()
            check_study(out, plan)
            write_plan(store, plan)
            if plan.waiting.keys() == before.waiting.keys():
                break
        # Cells have just been tried, and are not tried again.
        found = carry_out(plan.of_arms(plan.promises.keys() - tried))
        found = Study(out, plan, {**failures, **found.failures})
        plan.registry.announce("study_finished", run=out)
        track_scores(out, tracking_in(out, plan), reporter)
        return found


def unsearched(plan: StudyPlan) -> dict[str, str]:
    """Arms whose recipe no search has chosen, and why they are left out."""
    return {name: f"left out: {arm.search or arm.parents[0]} has not chosen" for name, arm in plan.waiting.items()}


class StudyRun(Maker):
    """One pass over a study in this process: its arms, then what they are asked; merged models one by one, last."""

    def __init__(self, *given: Any, **options: Any) -> None:
        """As of :class:`Maker`."""
        super().__init__(*given, **options)
        self._answered: list[Promise] = []
        """Merged models that are not to be asked any more."""
        self._seen: dict[tuple[tuple[str, str], str | None, str | None], str] = {}
        """What arms are made of -> the first of them."""

    def carry_out(self) -> Study:
        """Make the arms, answer, score."""
        try:
            return self._carry_out_all()
        finally:
            if self.own_bases:
                self.bases.release()

    def _carry_out_all(self) -> Study:
        wanted, last = self._wanted(), merged_models(self.plan)
        if self.only is None:
            self.left_out |= unsearched(self.plan)
        self._asked = self.only is None or any(key in self.plan.owners for key in self.only)
        self._evaluations = Evaluations(self.plan.registry, self.store, self.reporter, self.observers, self.stores)
        for promise in in_turn(self.plan):
            if promise.arm.name in wanted and promise.arm.name not in last:
                self.make(promise)
        for key in self.only or ():
            if (shared := self.plan.preparations.get(key)) is not None:
                self.why_not_prepared(shared)
        # Whatever the turn in which they were made.
        self._ask([name for name, one in self.plan.promises.items() if name in self.made and one.arm.is_asked])
        # Each is large: it is made, answered for and let go before the next.
        for name in last:
            if name in wanted:
                self.make(self.plan.promises[name])
                self._ask([name] if name in self.made else [])
        self._evaluations.score(self._ids())
        failures = {**self.runner.failures, **self.left_out, **self._evaluations.failures}
        return Study(self.store.root, self.plan, failures)

    def _ask(self, names: Sequence[str]) -> None:
        """Answer for arms that have been made, and let go the merged models that nothing needs any more."""
        asked = self._without_twins(names)
        plans = self.planner.evaluations({name: self.made[name] for name in asked}) if self._asked else []
        for plan in plans:
            self._index_evaluation(plan)
        self.write_index()
        if plans:
            # An engine needs the room.
            self.bases.release()
        for plan in plans:
            answers = self._ids()
            made = self._opened_by(plan)
            if not self._evaluations.is_answered(plan, answers) and made is not None:
                self.bring_back(made)
            ended = self._evaluations.answer(plan, answers)
            if made is not None and is_model(made) and ended:
                self._answered.append(made)
        for made in self._answered:
            self._let_go(made)

    def _wanted(self) -> set[str]:
        """Arms that the steps in hand are about, with all that these are made from.

        Of steps of evaluations all arms of the models that they open: which rows the base has depends on them.
        """
        if self.only is None:
            return set(self.plan.promises)
        loads = {self.plan.promises[self.plan.owners[key]].loads for key in self.only if key in self.plan.owners}
        found = {
            name
            for name, one in self.plan.promises.items()
            if (one.loads in loads and not one.arm.cell) or (one.step is not None and one.step.id in self.only)
        }
        # Of what is prepared alone what its arms go on from, not they themselves.
        shared = [self.plan.preparations[key].arms for key in self.only if key in self.plan.preparations]
        found.update(parent for names in shared for name in names for parent in self.plan.promises[name].arm.parents)
        for promise in reversed(self.plan.promises.values()):
            if promise.arm.name in found:
                found.update(promise.arm.parents)
        return found

    # ---------------------------------------------------------------------------------------------------------- arms

    def _without_twins(self, names: Sequence[str]) -> list[str]:
        """Leave out arms of the same bytes, which are one: asked twice they would write into the same folders."""
        found = []
        for name in names:
            made = self.made[name]
            digest = made.adapter.digest if made.adapter is not None else None
            first = self._seen.setdefault((made.loads, digest, made.arm.control), name)
            if first == name:
                found.append(name)
                continue
            self.left_out[name] = f"left out: it is byte for byte {first}"
            self.reporter.note(f"{name}: {self.left_out[name]}")
            if is_model(made):
                self._answered.append(made)
        return found

    def _opened_by(self, plan: EvalPlan) -> Promise | None:
        """The arm whose weights an evaluation opens: the base itself, or a merged model."""
        loads = plan.model.name, plan.model.weights_digest
        return next((one for one in self.made.values() if one.loads == loads), None)

    def _let_go(self, made: Promise) -> None:
        """Delete the weights of a merged model that has been answered for; its record and recipe stay."""
        if "merge" in self.plan.read.spec.keep:
            return
        if any(made.arm.name in arm.parents and not self._is_made(arm.name) for arm in self.plan.arms):
            return
        artifact = Path(made.model.path)
        if not (marker := artifact.parent / GONE).exists():
            write_json(marker, {"weights": made.model.weights_digest, "why": "nothing needs them any more"})
        # Also where it was said before, and the process was killed; another process may be at it.
        for file in artifact.glob("model*.safetensors"):
            file.unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------------------------- index

    def _ids(self) -> set[str] | None:
        """Ids of the steps that are meant; None: all."""
        if self.only is None:
            return None
        return {self.index[key] for key in self.only if key in self.index}

    def _index_evaluation(self, plan: EvalPlan) -> None:
        """Ids of answers and scores by their keys, which the plan has in the same places."""
        keys = {place: task for planned in self.plan.evaluations for place, task in _placed(planned)}
        for place, task in _placed(plan):
            if (planned := keys.get(place)) is not None:
                self.index[planned.answers.id] = task.answers.id
                for mine, its in zip(planned.scores, task.scores, strict=True):
                    self.index[mine.id] = its.id


def _placed(plan: EvalPlan) -> Iterator[tuple[tuple[str, str | None, str | None, str, str], TaskPlan]]:
    """Tasks by what they have in common whether their arms are promised or there; not by the name of a base's row,
    which says whose template it is asked in.
    """
    for row in plan.arms:
        for task in row.tasks:
            yield (row.model.name, row.label, task.template, task.name, task.variant), task
