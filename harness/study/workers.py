"""A study through an executor: orders become ready as what they build on ends, and worker processes carry them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.contracts.registry import Registry
from harness.core.progress import Reporter
from harness.steps.execute import Execute, Execution, executor_of, open_pool
from harness.steps.runner import Runner
from harness.study.folder import write_index
from harness.study.plan import StudyPlan
from harness.study.run import Study, unsearched
from harness.study.worker import jobs_of, unfinished


def through(how: Execution, registry: Registry) -> Callable[[StudyPlan, Path, Reporter, bool], Study]:
    """Return what `run_study` takes to carry a study out through an executor's pool.

    Raises:
        UserError: an unknown executor, or options that are none of its; before anything is written.
    """
    executor_of(how, registry)

    def execute(plan: StudyPlan, root: Path, reporter: Reporter, retry_failed: bool) -> Study:
        plan.read.source["retry_failed"] = retry_failed
        runner = Runner(plan.registry, reporter)
        with open_pool(how, plan.registry, reporter) as pool:
            work = Execute(pool, runner, plan.registry, lambda order: unfinished(plan, root, order))
            work.carry_out(list(jobs_of(plan, root, max(1, pool.capacity()))))
        left_out: dict[str, str] = {}
        for result in work.results.values():
            runner.failures.update(result.get("failures") or {})
            left_out |= result.get("left_out") or {}
        left_out |= unsearched(plan)
        write_index(root, {}, left_out)
        return Study(root, plan, {**runner.failures, **left_out})

    return execute
