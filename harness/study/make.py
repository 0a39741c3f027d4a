"""Make the arms of a study: prepare, align, merge; what is there already is found, and what fails is left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from harness.alignment.bases import Bases
from harness.alignment.folder import intact as intact_adapter
from harness.alignment.plan import AlignPlan
from harness.alignment.prepare import carry_out_prepare, intact as intact_rows, prepare_step
from harness.alignment.run import carry_out_align
from harness.contracts.executor import Observers
from harness.core.conditioning import refuse_control
from harness.core.errors import CorruptionError, UserError
from harness.core.progress import Reporter
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import MergeInput, ModelSpec
from harness.core.text import first_line
from harness.merging.plan import MergePlan, plan_merge
from harness.merging.publish import intact as intact_merge
from harness.merging.run import MergeSettings, carry_out_merge
from harness.models.inspect import inspect_adapter, inspect_model
from harness.steps.files import read_json, write_json
from harness.steps.folder import STEP, StepFolder
from harness.steps.lock import FolderLock, FolderTakenError
from harness.steps.runner import Runner, is_fatal
from harness.steps.step import Step
from harness.steps.store import RunStore
from harness.study.arms import Arm
from harness.study.controls import where_asked
from harness.study.folder import read_index, write_index
from harness.study.plan import Planner, Preparation, Promise, StudyPlan
from harness.study.reuse import stores_of, take
from harness.study.tracked import tracking_in
from harness.study.turns import is_model

MODEL = "model.json"
"""In the folder of a merge: what an evaluation knows of the model, should its weights be let go."""
GONE = "gone.json"
"""In the folder of a merge whose weights were let go: nothing needs them any more."""


def is_let_go(folder: StepFolder) -> bool:
    """Whether the weights of a merge were let go; only where all else that is known of it is whole."""
    marker, status = folder.path / GONE, folder.status()
    if not marker.exists():
        return False
    with contextlib.suppress(OSError, CorruptionError):
        if status is not None and status.status == "done" and read_json(folder.path / MODEL):
            return True
    marker.unlink()
    return False


def _is_gone(made: Promise) -> bool:
    """Whether an arm is a merged model whose weights were let go."""
    return is_model(made) and (Path(made.model.path).parent / GONE).exists()


def _unreadable(folder: StepFolder) -> str | None:
    """Why step.json cannot be read: boards take an arm's recipe from it."""
    try:
        read_json(folder.path / STEP)
    except (OSError, CorruptionError) as error:
        return f"{STEP} is {'missing' if isinstance(error, FileNotFoundError) else 'damaged'}"
    return None


class Maker:
    """Makes arms in this process, each once: what is prepared, aligned, merged, and what came of it."""

    def __init__(
        self,
        plan: StudyPlan,
        store: RunStore,
        reporter: Reporter,
        *,
        retry_failed: bool = False,
        only: Collection[str] | None = None,
        observers: Observers | None = None,
        bases: Bases | None = None,
    ) -> None:
        """Prepare.

        Args:
            plan: of the study.
            store: its run folder.
            reporter: says what is going on.
            retry_failed: try again what failed.
            only: keys of the steps to carry out, where not all are meant.
            observers: hear of the steps; those of the plan's registry by default.
            bases: where alignments open their base, which stays open for the next one: the caller lets it go; by
                default it goes with this pass.
        """
        self.plan, self.store, self.reporter, self._again, self.only = plan, store, reporter, retry_failed, only
        self.runner = Runner(observers or plan.registry, reporter)
        self.observers, self.bases, self.own_bases = observers, bases or Bases(keep=True), bases is None
        self.planner = Planner(plan.read, plan.registry)
        self.stores = stores_of(plan.read, store.root)
        """Other runs whose steps are taken over."""
        self.made: dict[str, Promise] = {}
        """Arm -> what it is made of, now that it is there."""
        self.index: dict[str, str] = {}
        """Key -> id."""
        self.left_out: dict[str, str] = {}
        self._prepared: dict[str, str | None] = {}
        """Key of what is prepared -> why it is not there; None: it is."""

    def make(self, promise: Promise) -> None:
        """Make one arm, unless what it is made from is missing."""
        arm = promise.arm
        missing = [name for name in arm.parents if name not in self.made]
        if missing:
            self.left_out[arm.name] = f"left out: {missing[0]} is not there"
            self.reporter.note(f"{arm.name}: {self.left_out[arm.name]}")
            return
        if arm.control is not None:
            self._under_control(arm)
        elif promise.step is None:
            self.made[arm.name] = promise
        elif arm.checkpoint is not None:
            self._checkpoint(arm)
        elif arm.align is not None:
            self._align(promise)
        else:
            self._merge(promise)

    def _align(self, promise: Promise) -> None:
        arm = promise.arm
        plan = self._align_plan(arm)
        shared = self.plan.prepared_by.get(arm.name)
        needs = shared if shared is not None and not self._has_ended(arm.name, plan.id) else None
        if needs is not None and (why := self.why_not_prepared(needs)) is not None:
            self.left_out[arm.name] = f"left out: {needs.step.arm} is not there: {why}"
            self.reporter.note(f"{arm.name}: {self.left_out[arm.name]}")
            return

        def work(folder: StepFolder) -> None:
            if plan.spec.processes > 1:
                # They open it themselves, and need the room.
                self.bases.release()
            registry, tracking = self.plan.registry, tracking_in(self.store.root, self.plan)
            carry_out_align(plan, registry, self.runner, folder, bases=self.bases, tracking=tracking)

        folder = self._carry_out(arm.name, self._key(promise), plan.step, work, intact_adapter)
        if folder is not None:
            self.made[arm.name] = self._aligned(promise, plan, folder)

    def _align_plan(self, arm: Arm) -> AlignPlan:
        starts = {name: info for name in arm.parents if (info := self.made[name].adapter) is not None}
        return self.planner.align(arm, starts).of_arm(arm.name, arm.factors)

    def _has_ended(self, arm: str, step_id: str) -> bool:
        status = self.folder("align", arm, step_id).status()
        return status is not None and status.status == "done"

    def _is_needed(self, shared: Preparation) -> bool:
        """Whether two or more of its arms are still to be aligned; the last one prepares its own."""
        known = {**read_index(self.store.root), **self.index}
        keys = [(name, self._key(self.plan.promises[name])) for name in shared.arms]
        return sum(not self._has_ended(name, known.get(key, key)) for name, key in keys) > 1

    def why_not_prepared(self, shared: Preparation) -> str | None:
        """Prepare what several arms share, unless it has been; returns why it is not there, None where it is."""
        key = shared.step.id
        if key not in self._prepared:
            self._prepared[key] = self._prepare(shared) if self._is_needed(shared) else None
        return self._prepared[key]

    def _prepare(self, shared: Preparation) -> str | None:
        promises = [self.plan.promises[name] for name in shared.arms]
        if shared.step.parents:
            there = [one for one in promises if all(name in self.made for name in one.arm.parents)]
            if not there:
                return f"{promises[0].arm.parents[0]} is not there"
            plans = [self._align_plan(one.arm) for one in there]
        else:
            # Rows alone do not hang on what the arms go on from, which may not be there yet.
            plans = [one.align.of_arm(one.arm.name, one.arm.factors) for one in promises if one.align is not None]
        step = prepare_step(plans[0])

        def work(folder: StepFolder) -> None:
            registry, bases = self.plan.registry, self.bases
            carry_out_prepare(plans[0], registry, self.runner, folder, sharing=plans, bases=bases)

        if self._carry_out(step.arm, key := shared.step.id, step, work, intact_rows) is not None:
            return None
        return self.left_out.pop(step.arm, f"step {key[:12]} has not ended")

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

    def _under_control(self, arm: Arm) -> None:
        """An arm under a value: from here on it is known whether it was trained."""
        whole = self.made[arm.parents[0]]
        owner = whole.adapter if whole.adapter is not None else whole.model
        place = where_asked(arm, self.plan.read)
        try:
            assert arm.control is not None
            what = f"{whole.arm.name} has left no conditioning.json"
            refuse_control([arm.control], owner.conditioning, what, place)
            assert owner.conditioning is not None
            control = owner.conditioning.resolve(arm.control, place)
        except UserError as error:
            self._leave_out(arm.name, error)
            return
        self.made[arm.name] = replace(whole, arm=replace(arm, control=control))

    def _leave_out(self, name: str, error: UserError) -> None:
        self.left_out[name] = f"failed: {error.where}: {error.what}. {error.fix}"
        self.reporter.note(f"{name}: {self.left_out[name]}")

    def _merge(self, promise: Promise) -> None:
        arm = promise.arm
        assert arm.merge is not None
        folder = self._merged_before(promise)
        if folder is None:
            try:
                plan = self._merge_plan(arm)
            except UserError as error:
                # What inputs hold may not fit together once it is there: of others' values nothing is known before.
                self._leave_out(arm.name, error)
                return
            folder = self.store.step("merge", arm.name, plan.id)
            if not is_let_go(folder):
                work = partial(self._merge_into, plan)
                if self._carry_out(arm.name, self._key(promise), plan.step, work, intact_merge) is None:
                    return
        if arm.merge.form == "adapter":
            self.made[arm.name] = replace(promise, adapter=self._adapter(promise, folder.artifact))
            return
        self.index[self._key(promise)] = folder.id
        self.made[arm.name] = replace(promise, model=self._merged_model(promise, folder))

    def _merged_before(self, promise: Promise) -> StepFolder | None:
        """The folder of a merge that is there while weights that it was made from are gone, as its record knows them.

        None where it is not, or is not whole: it is planned from its inputs, which are brought back for it.
        """
        inputs = [self.made[name] for name in promise.arm.parents]
        known = {**read_index(self.store.root), **self.index}.get(self._key(promise))
        if known is None or not any(map(_is_gone, inputs)):
            return None
        folder = self.store.step("merge", promise.arm.name, known)
        status = folder.status()
        digests = {
            f"input {number}": one.adapter.digest if one.adapter is not None else one.model.weights_digest
            for number, one in enumerate(inputs, 1)
        }
        if status is None or status.status != "done" or not digests.items() <= status.made_from.items():
            return None
        assert promise.step is not None
        return folder if is_let_go(folder) or intact_merge(promise.step, folder) is None else None

    def _is_made(self, name: str) -> bool:
        """Whether an arm is there, by this pass or by the record of another process."""
        if name in self.plan.waiting:
            return False
        step = self.plan.promises[name].step
        if name in self.made or step is None:
            return True
        known = read_index(self.store.root).get(step.id)
        status = self.folder(step.kind, name, known).status() if known is not None else None
        return status is not None and status.status == "done"

    def _merge_plan(self, arm: Arm) -> MergePlan:
        assert arm.merge is not None
        inputs = []
        for given, name in zip(arm.merge.inputs, arm.parents, strict=True):
            made = self.made[name]
            if _is_gone(made):
                self.bring_back(made)
            path = made.adapter.path if made.adapter is not None else made.model.path
            inputs.append(MergeInput(ref=path, weight=given.weight, control=given.control))
        found = plan_merge(arm.merge.model_copy(update={"inputs": tuple(inputs)}), self.plan.registry)
        return replace(found, step=replace(found.step, arm=arm.name, factors=dict(arm.factors)))

    def _merge_into(self, plan: MergePlan, folder: StepFolder) -> None:
        self.bases.release()
        carry_out_merge(plan, MergeSettings(), self.runner, folder)

    def _merged_model(self, promise: Promise, folder: StepFolder) -> ModelInfo:
        """A merged model as its evaluation knows it; of one whose weights were let go, as it was."""
        if is_let_go(folder):
            kept = ModelInfo.model_validate({**read_json(folder.path / MODEL)["model"], "ref": "", "path": ""})
            return kept.model_copy(update={"path": str(folder.artifact), "ref": str(folder.artifact)})
        model = self._model(promise, folder)
        write_json(folder.path / MODEL, {"model": model.model_dump(mode="json", exclude={"path", "ref"})})
        return model

    def bring_back(self, made: Promise) -> None:
        """Merge again what was let go, where something asks for it after all."""
        if not _is_gone(made):
            return
        if self.only is not None:
            # It was asked for when it was made.
            self.only = {*self.only, self._key(made)}
        merge = self._merge_plan(made.arm)
        folder = self.store.step("merge", made.arm.name, merge.id)
        folder.reopen("its weights are needed again")
        (folder.path / GONE).unlink()
        self._carry_out(made.arm.name, self._key(made), merge.step, partial(self._merge_into, merge), intact_merge)

    # --------------------------------------------------------------------------------------------------------- steps

    def _take(self, step: Step, folder: StepFolder, intact: Callable[[Step, StepFolder], str | None]) -> bool:
        """Take a step over from another run, unless another process is at it."""
        if not self.stores:
            return False
        with contextlib.suppress(FolderTakenError), FolderLock(folder.path, folder.name, keep=False):
            return take(step, folder, self.stores, intact, self.reporter.note)
        return False

    def folder(self, kind: str, arm: str, step_id: str) -> StepFolder:
        """The folder of a step, which may go by the name of another arm that shares it: a cell that was chosen."""
        folder = self.store.step(kind, arm, step_id)
        if folder.path.exists():
            return folder
        known = sorted((self.store.root / "steps").glob(f"{kind}-*-{step_id[:12]}"))
        return replace(folder, path=known[0], artifact=known[0] / "artifact") if known else folder

    def _carry_out(
        self,
        arm: str,
        key: str,
        step: Step,
        work: Callable[[StepFolder], None],
        intact: Callable[[Step, StepFolder], str | None],
    ) -> StepFolder | None:
        """The folder of a step that has ended well, now or before; None where it failed."""
        folder = self.folder(step.kind, arm, step.id)
        self.index[key] = step.id
        status = folder.status()
        if status is None and self._take(step, folder, intact):
            status = folder.status()
        if status is not None and status.status == "done":
            if (problem := intact(step, folder) or _unreadable(folder)) is None:
                return folder
            self.reporter.note(f"{folder.name}: {problem}; it is done again")
            folder.reopen(problem)
        elif self.only is not None and key not in self.only:
            self.left_out[arm] = f"failed: {status.error}" if status is not None else "its step has not ended"
            return None
        elif status is not None:
            if not self._again:
                self.left_out[arm] = f"failed before, and is left (--retry-failed tries again): {status.error}"
                self.reporter.note(f"{arm}: {self.left_out[arm]}")
                return None
            folder.reopen("it had failed and is tried again")
        # It may come out otherwise than before: until they are asked again, what builds on it has no numbers. What is
        # prepared decides none.
        others = self.plan.graph.depending_on(key) if step.kind != "prepare" else []
        self.write_index({one.id for one in others})
        self.reporter.note(f"{step.kind} {arm}")
        try:
            with FolderLock(folder.path, folder.name, keep=False):
                # Whoever held it meanwhile may have done the step.
                ended = folder.status()
                if ended is None or ended.status != "done" or intact(step, folder) is not None:
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

    def write_index(self, forget: Collection[str] = ()) -> None:
        """Add to index.json what is known by now: ids, and which arms are not there."""
        if self.only is None:
            write_index(self.store.root, self.index, self.left_out, forget)
        else:
            among, left_out = self._said()
            write_index(self.store.root, self.index, left_out, forget, among=among)

    def _said(self) -> tuple[set[str], dict[str, str]]:
        """Arms that the steps in hand decide on, with those that are made from them; and which of them have failed."""
        assert self.only is not None
        own = {name for name, one in self.plan.promises.items() if one.step is not None and one.step.id in self.only}
        gone = {name: why for name in own if (why := self.left_out.get(name, "")).startswith("failed")}
        for key in self.only:
            if (shared := self.plan.preparations.get(key)) is not None:
                own.update(shared.arms)
                if (missing := self._prepared.get(key)) is not None:
                    gone |= dict.fromkeys(shared.arms, f"left out: {shared.step.arm} is not there: {missing}")
        for name, one in self.plan.promises.items():
            if not own.isdisjoint(one.arm.parents):
                own.add(name)
                if lost := [parent for parent in one.arm.parents if parent in gone]:
                    gone.setdefault(name, f"left out: {lost[0]} is not there")
        return own, gone
