"""Carry out a study in one run folder: arms after those that they are made from, then answers, then scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from harness.alignment.folder import intact as intact_adapter
from harness.alignment.plan import AlignPlan
from harness.alignment.run import carry_out_align
from harness.contracts.executor import Observers
from harness.core.errors import CorruptionError, UserError
from harness.core.progress import Reporter
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import MergeInput, ModelSpec
from harness.core.text import first_line
from harness.evaluation.many import Evaluations
from harness.evaluation.plan import EvalPlan, TaskPlan
from harness.merging.plan import MergePlan, plan_merge
from harness.merging.publish import intact as intact_merge
from harness.merging.run import MergeSettings, carry_out_merge
from harness.models.inspect import inspect_adapter, inspect_model
from harness.steps.files import read_json, write_json
from harness.steps.folder import StepFolder
from harness.steps.lock import FolderLock
from harness.steps.runner import Runner, is_fatal
from harness.steps.step import Step
from harness.steps.store import RUN, RunStore
from harness.study.arms import Arm
from harness.study.folder import check_study, write_index, write_plan
from harness.study.plan import Planner, Promise, StudyPlan

MODEL = "model.json"
"""In the folder of a merge: what an evaluation knows of the model, should its weights be let go."""
GONE = "gone.json"
"""In the folder of a merge whose weights were let go: nothing needs them any more."""


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
    store = RunStore(out)
    if not written:
        write_plan(store, plan)
    return StudyRun(plan, store, reporter or Reporter(), retry_failed=True, only=keys).carry_out()


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
    if fresh:
        RUN.refuse(out, fresh=True)
    else:
        check_study(out, plan)
    with RunStore(out) as store:
        if fresh:
            RUN.clear(out)
        check_study(out, plan)
        write_plan(store, plan)
        if execute is not None:
            found = execute(plan, out, reporter, retry_failed)
        else:
            found = StudyRun(plan, store, reporter, retry_failed=retry_failed).carry_out()
        plan.registry.announce("study_finished", run=out)
        return found


def _let_go(folder: StepFolder) -> bool:
    """Whether the weights of a merge were let go; only where all else that is known of it is whole."""
    marker, status = folder.path / GONE, folder.status()
    if not marker.exists():
        return False
    with contextlib.suppress(OSError, CorruptionError):
        if status is not None and status.status == "done" and read_json(folder.path / MODEL):
            return True
    marker.unlink()
    return False


class StudyRun:
    """One pass over a study in this process."""

    def __init__(
        self,
        plan: StudyPlan,
        store: RunStore,
        reporter: Reporter,
        *,
        retry_failed: bool = False,
        only: Collection[str] | None = None,
        observers: Observers | None = None,
    ) -> None:
        """Prepare.

        Args:
            plan: of the study.
            store: its run folder.
            reporter: says what is going on.
            retry_failed: try again what failed.
            only: keys of the steps to carry out, where not all are meant.
            observers: hear of the steps; those of the plan's registry by default.
        """
        self.plan, self.store, self.reporter, self._again, self._only = plan, store, reporter, retry_failed, only
        self.runner = Runner(observers or plan.registry, reporter)
        self._observers = observers
        self.planner = Planner(plan.read, plan.registry)
        self.made: dict[str, Promise] = {}
        """Arm -> what it is made of, now that it is there."""
        self.index: dict[str, str] = {}
        """Key -> id."""
        self.left_out: dict[str, str] = {}

    def carry_out(self) -> Study:
        """Make the arms, answer, score."""
        wanted = self._wanted()
        for promise in self.plan.promises.values():
            if promise.arm.name in wanted:
                self._make(promise)
        self._leave_out_twins()
        evaluations = Evaluations(self.plan.registry, self.store, self.reporter, self._observers)
        asked = self._only is None or any(key in self.plan.owners for key in self._only)
        plans = self.planner.evaluations(self.made) if asked else []
        for plan in plans:
            self._index_evaluation(plan)
        self._write_index()
        for plan in plans:
            answers = self._ids()
            if not evaluations.is_answered(plan, answers):
                self._bring_back(plan)
            self._let_go(plan, evaluations.answer(plan, answers))
        evaluations.score(self._ids())
        failures = {**self.runner.failures, **self.left_out, **evaluations.failures}
        return Study(self.store.root, self.plan, failures)

    def _wanted(self) -> set[str]:
        """Arms that the steps in hand are about, with all that these are made from.

        Of steps of evaluations all arms of the models that they open: which rows the base has depends on them.
        """
        if self._only is None:
            return set(self.plan.promises)
        loads = {self.plan.promises[self.plan.owners[key]].loads for key in self._only if key in self.plan.owners}
        found = {
            name
            for name, one in self.plan.promises.items()
            if one.loads in loads or (one.step is not None and one.step.id in self._only)
        }
        for promise in reversed(self.plan.promises.values()):
            if promise.arm.name in found:
                found.update(promise.arm.parents)
        return found

    # ---------------------------------------------------------------------------------------------------------- arms

    def _leave_out_twins(self) -> None:
        """Arms of the same bytes are one arm: asked twice they would write into the same folders."""
        seen: dict[tuple[tuple[str, str], str | None], str] = {}
        for name, made in list(self.made.items()):
            digest = made.adapter.digest if made.adapter is not None else None
            first = seen.setdefault((made.loads, digest), name)
            if first != name:
                self.left_out[name] = f"left out: it is byte for byte {first}"
                self.reporter.note(f"{name}: {self.left_out[name]}")
                del self.made[name]

    def _make(self, promise: Promise) -> None:
        """Make one arm, unless what it is made from is missing."""
        arm = promise.arm
        missing = [name for name in arm.parents if name not in self.made]
        if missing:
            self.left_out[arm.name] = f"left out: {missing[0]} is not there"
            self.reporter.note(f"{arm.name}: {self.left_out[arm.name]}")
            return
        if promise.step is None:
            self.made[arm.name] = promise
        elif arm.checkpoint is not None:
            self._checkpoint(arm)
        elif arm.align is not None:
            self._align(promise)
        else:
            self._merge(promise)

    def _align(self, promise: Promise) -> None:
        arm = promise.arm
        starts = {name: info for name in arm.parents if (info := self.made[name].adapter) is not None}
        plan = self.planner.align(arm, starts).of_arm(arm.name, arm.factors)

        def work(folder: StepFolder) -> None:
            carry_out_align(plan, self.plan.registry, self.runner, folder)

        folder = self._carry_out(promise, plan.step, work, intact_adapter)
        if folder is not None:
            self.made[arm.name] = self._aligned(promise, plan, folder)

    def _aligned(self, promise: Promise, plan: AlignPlan, folder: StepFolder) -> Promise:
        if plan.spec.adapter == "none":
            return replace(promise, model=self._model(promise, folder), align=plan)
        adapter = self._adapter(promise, folder.artifact)
        return replace(promise, adapter=adapter, align=plan)

    def _checkpoint(self, arm: Arm) -> None:
        whole = self.made[arm.parents[0]]
        assert whole.adapter is not None
        path = Path(whole.adapter.path) / f"step-{arm.checkpoint}"
        self.made[arm.name] = replace(whole, arm=arm, adapter=self._adapter(replace(whole, arm=arm), path))

    def _merge(self, promise: Promise) -> None:
        arm = promise.arm
        plan = self._merge_plan(arm)
        folder = self.store.step("merge", arm.name, plan.id)
        if not _let_go(folder):
            made = self._carry_out(promise, plan.step, partial(self._merge_into, plan), intact_merge)
            if made is None:
                return
        if plan.spec.form == "adapter":
            self.made[arm.name] = replace(promise, adapter=self._adapter(promise, folder.artifact))
            return
        self.index[self._key(promise)] = plan.id
        self.made[arm.name] = replace(promise, model=self._merged_model(promise, folder))

    def _merge_plan(self, arm: Arm) -> MergePlan:
        assert arm.merge is not None
        inputs = []
        for given, name in zip(arm.merge.inputs, arm.parents, strict=True):
            made = self.made[name]
            path = made.adapter.path if made.adapter is not None else made.model.path
            inputs.append(MergeInput(ref=path, weight=given.weight))
        found = plan_merge(arm.merge.model_copy(update={"inputs": tuple(inputs)}), self.plan.registry)
        return replace(found, step=replace(found.step, arm=arm.name, factors=dict(arm.factors)))

    def _merge_into(self, plan: MergePlan, folder: StepFolder) -> None:
        carry_out_merge(plan, MergeSettings(), self.runner, folder)

    def _merged_model(self, promise: Promise, folder: StepFolder) -> ModelInfo:
        """A merged model as its evaluation knows it; of one whose weights were let go, as it was."""
        if _let_go(folder):
            kept = ModelInfo.model_validate({**read_json(folder.path / MODEL)["model"], "ref": "", "path": ""})
            return kept.model_copy(update={"path": str(folder.artifact), "ref": str(folder.artifact)})
        model = self._model(promise, folder)
        write_json(folder.path / MODEL, {"model": model.model_dump(mode="json", exclude={"path", "ref"})})
        return model

    def _opened_by(self, plan: EvalPlan) -> Promise | None:
        """The arm whose weights an evaluation opens: the base itself, or a merged model."""
        loads = plan.model.name, plan.model.weights_digest
        return next((one for one in self.made.values() if one.loads == loads), None)

    def _let_go(self, plan: EvalPlan, ended: bool) -> None:
        """Delete the weights of a merged model that has been answered for; its record and recipe stay."""
        made = self._opened_by(plan)
        if made is None or made.arm.kind != "merge" or "merge" in self.plan.read.spec.keep or not ended:
            return
        needed = [arm.name for arm in self.plan.arms if made.arm.name in arm.parents and arm.name not in self.made]
        artifact = Path(made.model.path)
        if needed:
            return
        if not (marker := artifact.parent / GONE).exists():
            write_json(marker, {"weights": made.model.weights_digest, "why": "nothing needs them any more"})
        # Also where it was said before, and the process was killed.
        for file in artifact.glob("model*.safetensors"):
            file.unlink()

    def _bring_back(self, plan: EvalPlan) -> None:
        """Merge again what was let go, where something asks for it after all."""
        made = self._opened_by(plan)
        if made is None or not (Path(made.model.path).parent / GONE).exists():
            return
        merge = self._merge_plan(made.arm)
        folder = self.store.step("merge", made.arm.name, merge.id)
        folder.reopen("its weights are needed again")
        (folder.path / GONE).unlink()
        self._carry_out(made, merge.step, partial(self._merge_into, merge), intact_merge)

    # --------------------------------------------------------------------------------------------------------- steps

    def _carry_out(
        self,
        promise: Promise,
        step: Step,
        work: Callable[[StepFolder], None],
        intact: Callable[[Step, StepFolder], str | None],
    ) -> StepFolder | None:
        """The folder of a step that has ended well, now or before; None where it failed."""
        folder, arm = self.store.step(step.kind, promise.arm.name, step.id), promise.arm.name
        self.index[self._key(promise)] = step.id
        status = folder.status()
        if status is not None and status.status == "done":
            if (problem := intact(step, folder)) is None:
                return folder
            self.reporter.note(f"{folder.name}: {problem}; it is done again")
            folder.reopen(problem)
        elif self._only is not None and self._key(promise) not in self._only:
            self.left_out[arm] = f"failed: {status.error}" if status is not None else "its step has not ended"
            return None
        elif status is not None:
            if not self._again:
                self.left_out[arm] = f"failed before, and is left (--retry-failed tries again): {status.error}"
                self.reporter.note(f"{arm}: {self.left_out[arm]}")
                return None
            folder.reopen("it had failed and is tried again")
        # It may come out otherwise than before: until they are asked again, what builds on it has no numbers.
        self._write_index({one.id for one in self.plan.graph.depending_on(self._key(promise))})
        self.reporter.note(f"{step.kind} {arm}")
        try:
            with FolderLock(folder.path, folder.name, keep=False):
                work(folder)
        except Exception as error:
            if is_fatal(error) and not isinstance(error, UserError):
                raise
            self.left_out[arm] = f"failed: {first_line(str(error)) or type(error).__name__}"
            if folder.status() is None:
                self.runner.fail(step, folder, error)
            else:
                # Recorded where it happened, with type and place.
                why = self.runner.failures.setdefault(folder.name, str(error))
                self.reporter.note(f"failed: {why}")
            return None
        return folder

    def _key(self, promise: Promise) -> str:
        step = self.plan.promises[promise.arm.name].step
        assert step is not None
        return step.id

    def _adapter(self, promise: Promise, folder: Path) -> AdapterInfo:
        base = self.planner.base(promise.arm)
        mismatch = self.plan.read.spec.bases[promise.arm.base].allow_template_mismatch
        found = inspect_adapter(str(folder), base, allow_template_mismatch=mismatch, conditioned=True)
        return found.model_copy(update={"name": promise.arm.name})

    def _model(self, promise: Promise, folder: StepFolder) -> ModelInfo:
        given = self.plan.read.spec.bases[promise.arm.base].model_dump(exclude={"template", "model", "revision"})
        found = inspect_model(ModelSpec(model=str(folder.artifact), **given), conditioned=True)
        # Beside its base it goes by the base's name, and by the arm's.
        return found.model_copy(update={"name": promise.arm.base})

    # --------------------------------------------------------------------------------------------------------- index

    def _ids(self) -> set[str] | None:
        """Ids of the steps that are meant; None: all."""
        if self._only is None:
            return None
        return {self.index[key] for key in self._only if key in self.index}

    def _index_evaluation(self, plan: EvalPlan) -> None:
        """Ids of answers and scores by their keys, which the plan has in the same places."""
        keys = {place: task for planned in self.plan.evaluations for place, task in _placed(planned)}
        for place, task in _placed(plan):
            if (planned := keys.get(place)) is not None:
                self.index[planned.answers.id] = task.answers.id
                for mine, its in zip(planned.scores, task.scores, strict=True):
                    self.index[mine.id] = its.id

    def _write_index(self, forget: Collection[str] = ()) -> None:
        write_index(self.store.root, self.index, self.left_out if self._only is None else None, forget)


def _placed(plan: EvalPlan) -> Iterator[tuple[tuple[str, str | None, str | None, str, str], TaskPlan]]:
    """Tasks by what they have in common whether their arms are promised or there; not by the name of a base's row,
    which says whose template it is asked in.
    """
    for row in plan.arms:
        for task in row.tasks:
            yield (row.model.name, row.label, task.template, task.name, task.variant), task
