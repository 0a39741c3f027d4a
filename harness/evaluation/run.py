"""Walk a plan: open what is needed once, answer, score, record. And `evaluate`, the same from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.executor import Failure, Pool
from harness.contracts.registry import Registry, load_plugins
from harness.core.config import parse_options
from harness.core.errors import HarnessError, StepError
from harness.core.progress import Reporter
from harness.core.records import Row, digest_of
from harness.core.specs import EvalSpec, ModelSpec
from harness.evaluation.ask import Answered
from harness.evaluation.load import remove_scratch
from harness.evaluation.parity_run import second_plan
from harness.evaluation.plan import EvalPlan, plan_eval
from harness.evaluation.resume import SCORES_FILE, check_folder, claim
from harness.evaluation.session import EvalSession, Unit
from harness.evaluation.take import other_run, take_steps
from harness.evaluation.worker import EvalWorker, jobs_of, unfinished
from harness.report.notebook import rows_html
from harness.steps.execute import Execute, Execution, open_pool
from harness.steps.files import read_json, slug
from harness.steps.orders import error_of
from harness.steps.store import RUN, RunStore
from harness.tasks.catalog import load_catalog

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Evaluation:
    """What one evaluation left behind."""

    root: Path
    plan: EvalPlan
    rows: list[Row]
    """Whole-task rows."""
    leaves: list[Row]
    """Rows of leaf tasks (MMLU subjects, BBH files)."""
    failures: dict[str, str] = field(default_factory=dict)
    """Step folder name -> why it failed."""
    seconds: dict[str, float] = field(default_factory=dict)

    def to_pandas(self) -> pd.DataFrame:
        """The whole-task rows as a data frame, one row per number."""
        import pandas as pd

        return pd.DataFrame([row.model_dump(mode="json") for row in self.rows])

    def _repr_html_(self) -> str:
        """What a notebook shows: every number with its interval and n; of what failed the names of the steps."""
        notes = [f"failed: {', '.join(sorted(self.failures))}"] if self.failures else []
        return rows_html(self.plan.model.name, self.rows, notes)


def evaluate(
    model: str | ModelSpec,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    adapter: str | None = None,
    control: str | Sequence[str] = (),
    out: str | Path | None = None,
    fresh: bool = False,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    executor: str | Execution = "local",
    stores: Sequence[str | Path] = (),
    **settings: Any,
) -> Evaluation:
    """Evaluate one model, or many adapters of one base on one loaded engine: what `harness eval` does.

    Args:
        model: folder or hub id; a ``ModelSpec`` for revision, dtype and trust settings.
        tasks: task names; with ``suite`` both run. Neither: suite ``quick``.
        suite: suite name.
        adapter: folder or hub id of a peft adapter: only it is evaluated.
        control: values of the conditioning that adapters (or the model) were trained with, an arm for each; ``all``:
            every one. The default is applied where none is given.
        out: run folder; continues if it holds this very evaluation. By default ``runs/<model>-<digest>``.
        fresh: delete what the folder holds of an earlier run first.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.
        executor: who carries it out: a registered executor's name, or an ``Execution`` with its options.
        stores: other run folders, whose ended steps of the same ids are linked instead of computed.
        **settings: further fields of ``EvalSpec``: ``adapters`` (several, or folders of several: they and the base are
            evaluated), engine, limit, seed, options, task_folders, trust_task_code, ...

    Raises:
        UserError: a mistake of the user's, before anything ran.
        StepError: every step failed.
    """
    model_spec = model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))
    if adapter is not None:
        model_spec = model_spec.model_copy(update={"adapter": str(adapter)})
    settings["task_folders"] = tuple(str(folder) for folder in settings.get("task_folders", ()))
    settings["adapters"] = tuple(str(one) for one in settings.get("adapters", ()))
    controls = (control,) if isinstance(control, str) else tuple(control)
    fields = {"model": model_spec, "tasks": tuple(tasks), "suite": suite, "control": controls, **settings}
    spec = parse_options(EvalSpec, fields, "harness eval")
    registry = registry or load_plugins()
    catalog = load_catalog(registry, spec.task_folders, trust_task_code=spec.trust_task_code)
    plan = plan_eval(spec, registry, catalog)
    return run_plan(
        plan,
        registry,
        default_out(plan) if out is None else Path(out),
        fresh=fresh,
        reporter=reporter,
        executor=Execution(executor) if isinstance(executor, str) else executor,
        stores=stores,
    )


def default_out(plan: EvalPlan) -> Path:
    """``runs/<arm>-<digest>``: the same command finds its folder again."""
    ids = [[task.answers_id, *(step.id for step in task.scores)] for task in plan.tasks]
    return Path("runs") / f"{slug(plan.arm)}-{digest_of([plan.arm, ids])[:8]}"


def run_plan(
    plan: EvalPlan,
    registry: Registry,
    out: Path,
    *,
    fresh: bool = False,
    reporter: Reporter | None = None,
    executor: Execution | None = None,
    stores: Sequence[str | Path] = (),
) -> Evaluation:
    """Carry out a plan in a run folder; what is there already is kept.

    Args:
        plan: what is to be done.
        registry: that it was planned with.
        out: the run folder.
        fresh: delete what it holds first.
        reporter: says what is going on.
        executor: how it is carried out; in this process by default.
        stores: other run folders, whose ended steps of the same ids are taken over.
    """
    executor = executor or Execution()
    reporter = reporter or Reporter()
    # Asked before the lock as well: nothing is written into a folder that is somebody else's.
    RUN.refuse(out, fresh=True) if fresh else check_folder(out, plan)
    with RunStore(out) as store:
        if not fresh:
            check_folder(out, plan)
        evaluation = _Run(plan, registry, store, reporter).carry_out(executor, tuple(map(Path, stores)), fresh)
        registry.announce("study_finished", run=out)
        for warning in registry.warnings:
            reporter.note(f"warning: {warning}")
        registry.warnings.clear()
        return evaluation


class _Run:
    """One pass over a plan: groups of answers, then scores, through an executor's pool."""

    def __init__(self, plan: EvalPlan, registry: Registry, store: RunStore, reporter: Reporter) -> None:
        self.plan, self.store, self.reporter = plan, store, reporter
        self.run = EvalSession(plan, registry, store, reporter)
        self._answered: dict[str, Answered] = {}
        # What is wrong with a second engine is said before anything runs.
        second_plan(plan, registry)

    def carry_out(self, how: Execution, stores: Sequence[Path], fresh: bool = False) -> Evaluation:
        """Prepare, answer, close the model, score, collect the numbers.

        Every task is opened before anything is deleted, written or loaded: what a mistake refuses leaves no trace.
        """
        run = self.run
        self.reporter.note(f"engine {self.plan.engine.name} ({self.plan.engine_reason})")
        if self.plan.dtype_note is not None:
            self.reporter.note(f"note: {self.plan.dtype_note}")
        for task in {task.name: task for task in self.plan.tasks}.values():
            if task.chosen.asked is not None:
                self.reporter.note(f"{task.name} ({task.variant}) {task.chosen.spec.notes[-1]}")
        others = [other_run(folder, self.store.root) for folder in stores]
        pending = [unit for unit in run.units if fresh or not run.ended(unit)]
        unanswered = [unit for unit in pending if fresh or not self._is_answered(unit)]
        broken = {unit.id: error for unit in unanswered if (error := run.unopenable(unit)) is not None}
        worker = EvalWorker(run, broken, self._answered)
        with ExitStack() as opened:
            pool = None
            if pending or self.plan.spec.parity is not None:
                pool = opened.enter_context(open_pool(how, run.registry, self.reporter, worker.carry_out))
            if fresh:
                RUN.clear(self.store.root)
                run.forget_folders()
            claim(self.store, self.plan, self.reporter)
            remove_scratch(self.store.scratch)
            for other in others:
                take_steps(run, [unit for unit in pending if unit.id not in broken], other)
                pending = [unit for unit in pending if not run.ended(unit)]
                unanswered = [unit for unit in unanswered if unit in pending and not self._is_answered(unit)]
            if pool is not None:
                self._execute(pool, pending, unanswered)
        if not pending:
            self.reporter.note("everything was done before")
        rows, leaves = self._collect()
        if (error := run.runner.last_error) is not None and not rows:
            raise error
        return Evaluation(self.store.root, self.plan, rows, leaves, run.runner.failures, dict(run.seconds))

    def _is_answered(self, unit: Unit) -> bool:
        found = self.run.answered(unit)
        if found is not None and len(self.plan.arms) == 1:
            self._answered[unit.id] = found
        return found is not None

    def _execute(self, pool: Pool, pending: Sequence[Unit], unanswered: Sequence[Unit]) -> None:
        run = self.run
        execute = Execute(pool, run.runner, run.registry, lambda order: unfinished(run, order, execute.finished))
        execute.carry_out(list(jobs_of(run, pending, unanswered, pool.capacity())))
        for result in execute.results.values():
            self._add(result)

    def _add(self, result: Mapping[str, Any]) -> None:
        """What became of an order elsewhere: an order that was carried out here says nothing."""
        runner = self.run.runner
        runner.failures.update(result.get("failures") or {})
        if (error := result.get("error")) is not None:
            kept = error_of(Failure.model_validate(error))
            runner.last_error = kept if isinstance(kept, HarnessError) else StepError("worker", str(kept))
        for name, value in (result.get("seconds") or {}).items():
            self.run.seconds[name] += value

    def _collect(self) -> tuple[list[Row], list[Row]]:
        """Rows of every scores step that is done, in the plan's order."""
        rows: list[Row] = []
        for unit in self.run.units:
            for step in unit.task.scores:
                folder = self.run.scores_folder(unit, step)
                status = folder.status()
                if status is not None and status.status == "done":
                    stored = read_json(folder.artifact / SCORES_FILE)
                    rows += [Row.model_validate(row) for row in stored["rows"]]
        return [row for row in rows if row.leaf is None], [row for row in rows if row.leaf is not None]
