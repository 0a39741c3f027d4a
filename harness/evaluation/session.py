"""What the parts of one pass over a plan share: step folders, open tasks, clocks, and what becomes of a failure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harness.contracts.executor import Observers
from harness.contracts.registry import Registry
from harness.core.errors import CorruptionError, UserError
from harness.core.progress import Reporter
from harness.core.records import StepRecord
from harness.evaluation import ask
from harness.evaluation.plan import ArmPlan, EvalPlan, ScoresPlan, TaskPlan
from harness.evaluation.resume import ANSWERS_FILE, damage
from harness.models.inspect import open_tokenizer
from harness.steps.files import read_json
from harness.steps.folder import StepFolder
from harness.steps.journal import Journal
from harness.steps.runner import Runner
from harness.steps.store import RunStore
from harness.tasks.questions import Questions, asked_as, open_task, read_samples


@dataclass(frozen=True)
class Unit:
    """One task of one arm: an answers step and the scores steps on it."""

    arm: ArmPlan
    task: TaskPlan

    @property
    def id(self) -> str:
        """Of its answers step."""
        return self.task.answers_id


class EvalSession:
    """One pass over a plan in one process."""

    def __init__(
        self,
        plan: EvalPlan,
        registry: Registry,
        store: RunStore,
        reporter: Reporter,
        observers: Observers | None = None,
    ) -> None:
        """``observers``: hear of the steps; those of the registry by default."""
        self.plan, self.registry, self.store = plan, registry, store
        self.scratch = store.scratch
        """Folder of what goes when it has been used, of the order in hand alone."""
        self.seconds: dict[str, float] = {"prepare": 0.0, "load": 0.0, "answer": 0.0, "score": 0.0}
        self.report_to(reporter, observers or registry)
        self._tokenizers: dict[str | None, Any] = {}
        self._questions: dict[tuple[int, str, str | None, int], Questions] = {}
        self._open: dict[str, Questions] = {}
        self._opened: dict[str, StepFolder] = {}
        self._folders = {
            (path.name.partition("-")[0], path.name.rpartition("-")[2]): path
            for path in sorted((store.root / "steps").glob("*-*"))
        }

    @property
    def units(self) -> list[Unit]:
        """Every task of every arm."""
        return [Unit(arm, task) for arm in self.plan.arms for task in arm.tasks]

    def report_to(self, reporter: Reporter, observers: Observers) -> None:
        """Tell somebody else from now on: of another order, in a process that carries out several."""
        self.runner = Runner(observers, reporter)
        self.reporter = self.runner.reporter

    def folder(self, unit: Unit) -> StepFolder:
        """Of the answers."""
        return self._folder("answers", f"{unit.arm.name}-{unit.task.name}", unit.id)

    def scores_folder(self, unit: Unit, step: ScoresPlan) -> StepFolder:
        """Of one scorer's scores."""
        return self._folder("scores", f"{unit.arm.name}-{unit.task.name}-{step.ref.name}", step.id)

    def _folder(self, kind: str, arm: str, step_id: str) -> StepFolder:
        # One object for each: it remembers which attempt it has begun.
        if step_id not in self._opened:
            folder = self.store.step(kind, arm, step_id)
            # A step is its id: in company its arm may go by another name than alone.
            known = self._folders.setdefault((kind, step_id[:12]), folder.path)
            self._opened[step_id] = StepFolder(known, step_id, kind, known / "artifact")
        return self._opened[step_id]

    def forget_folders(self) -> None:
        """The run folder was cleared."""
        self._folders = {}
        self._opened.clear()

    def ended(self, unit: Unit) -> bool:
        """Whether all of a unit's steps are done and their files still hold what was recorded.

        Steps of which that is not so are reopened, so that they alone are done again.
        """
        whole = True
        for folder in [self.folder(unit), *(self.scores_folder(unit, step) for step in unit.task.scores)]:
            status = folder.status()
            if status is None or status.status != "done":
                if status is None and (folder.path / "status.json").exists():
                    self.reporter.note(f"{folder.path.name}: status.json is damaged; it is done again where needed")
                whole = False
                continue
            problem = damage(folder, status, self.store) or self.again(status)
            if problem is not None:
                self.reporter.note(f"{folder.path.name}: {problem}; it is done again where needed")
                folder.reopen(problem)
                whole = False
        return whole

    def again(self, status: StepRecord) -> str | None:
        """Why a step that is done is worth another try: calls of an endpoint, the model's or a judge's, failed."""
        errors = status.counts.get("errors", 0)
        if status.kind == "answers" and errors and self.plan.engine.remote:
            return f"{errors} of {status.counts['requests']} calls of the endpoint failed"
        again = status.counts.get("again", 0)
        return f"{again} of {status.counts['samples']} calls of the judge failed" if again else None

    # ------------------------------------------------------------------------------------------------ what was stored

    def stored(self, unit: Unit) -> Questions:
        """A unit's task as its arm was asked it, read back: it takes no tokenizer, and has no ``runtime``.

        Raises:
            CorruptionError: it cannot be read.
        """
        described = read_json(self.folder(unit).path / "step.json")
        digest = str(described["questions"])
        samples = read_samples(self.store.requests(digest), digest)
        return Questions(samples, described["dropped"], tuple(described["notes"]))

    def answers(self, unit: Unit) -> ask.Answered | None:
        """The stored answers to :meth:`stored`; None where one is missing."""
        return ask.load_answers(self.stored(unit).samples, Journal(self.folder(unit).artifact / ANSWERS_FILE))

    def answered(self, unit: Unit) -> ask.Answered | None:
        """The answers of a step that has ended, if they and what they answer are what was recorded."""
        status = self.folder(unit).status()
        if status is None or status.status != "done":
            return None
        try:
            found = self.answers(unit)
        except CorruptionError as error:
            self.reporter.note(f"{error}")
            return None
        if found is None or found.digest != status.digest:
            return None
        self.reporter.note(f"{self.said(unit)}: all {found.reused} answers were stored before")
        return found

    def said(self, unit: Unit) -> str:
        """What messages call a unit."""
        return unit.task.name if len(self.plan.arms) == 1 else f"{unit.arm.name}, {unit.task.name}"

    # ---------------------------------------------------------------------------------------------------- open tasks

    def unopenable(self, unit: Unit) -> Exception | None:
        """Open a task; a user's mistake is raised, anything else fails this task alone."""
        try:
            self.questions(unit)
        except UserError:
            raise
        except Exception as error:
            return error
        return None

    def questions(self, unit: Unit) -> Questions:
        """A unit's task as the base is asked it; arms with the same template share it, and as long a control."""
        task, model = unit.task, unit.arm.model
        tokenizer = self._tokenizer(unit.arm) if unit.arm.control is not None else None
        taken = unit.arm.steering.tokens(tokenizer)
        key = (id(task.chosen), task.variant, task.template, taken)
        if key not in self._questions:
            with self.clock("prepare"):
                self.reporter.note(f"preparing {task.name} ({task.variant})")
                tokenizer = self._tokenizer(unit.arm)
                # What a control takes of the context is lost to prompts and answers.
                model = model.model_copy(update={"max_length": model.max_length - taken}) if taken else model
                opened = open_task(task.chosen, task.variant, model, tokenizer, self.registry, seed=self.plan.spec.seed)
                self._questions[key] = opened
                for note in opened.notes:
                    self.reporter.note(f"note: {note}")
        return self._questions[key]

    def opened(self, unit: Unit) -> Questions:
        """A unit's task as its arm is asked it; kept until :meth:`forget`."""
        if unit.id not in self._open:
            opened, arm = self.questions(unit), unit.arm
            if arm.adapter is not None or arm.control is not None:
                tokenizer = self._tokenizer(arm) if arm.control is not None else None
                opened = asked_as(opened, arm.steering.steered(tokenizer))
            self._open[unit.id] = opened
        return self._open[unit.id]

    def forget(self, unit: Unit) -> None:
        """Let an arm's requests go: hundreds of arms would fill the memory."""
        if len(self.plan.arms) > 1:
            self._open.pop(unit.id, None)

    def _tokenizer(self, arm: ArmPlan) -> Any:
        # An endpoint whose tokenizer nobody named is sent text; its folder is empty.
        if not arm.model.path:
            return None
        if arm.model.template_digest not in self._tokenizers:
            self._tokenizers[arm.model.template_digest] = open_tokenizer(arm.model)
        return self._tokenizers[arm.model.template_digest]

    # --------------------------------------------------------------------------------------------------------- time

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time spent to one part of the account."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begun
