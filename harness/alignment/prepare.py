"""What arms that differ in their seed share, made once before they start: token ids and reference log-probabilities.

It fills the caches that every alignment reads (:mod:`harness.data.token_cache`, :mod:`harness.alignment.reference`):
five seeds started together would otherwise be four loaded models that wait on a lock. `harness align` needs none of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from harness.alignment.bases import Bases
from harness.alignment.plan import AlignPlan, needs_reference
from harness.alignment.rows import described, open_tokenizer_of, prepare_rows, row_length, tokens
from harness.alignment.say import say_counts
from harness.alignment.stage import StageTraining
from harness.alignment.stopping import Stopping
from harness.contracts.adapter import Adapter
from harness.contracts.registry import Registry
from harness.core.records import StepRecord, digest_of
from harness.data.token_cache import Prepared, pinned
from harness.steps.files import slug, writing
from harness.steps.folder import StepFolder
from harness.steps.journal import rows_digest
from harness.steps.runner import Ended, Runner
from harness.steps.step import Step, make_step


def prepare_step(plan: AlignPlan) -> Step:
    """What is prepared for an alignment: one step for all arms that differ in their seed alone.

    It holds what token ids and the starting policy hang on, so that arms of other learning rates share it too, and of
    other ranks where the adapter does not say how the base opens. It is known without torch.
    """
    stages = [{"data": stage.data, "tokens": tokens(plan, stage)} for stage in plan.stages]
    reference = None
    if needs_reference(plan, plan.stages[0]):
        # What it quantises to only its own library could say; its options decide it.
        opens = type(plan.adapter).quantization is not Adapter.quantization
        reference = {
            "model": plan.model.identity()["weights"],
            "from": plan.start.digest if plan.start is not None else None,
            "adapter": {"name": plan.spec.adapter, **plan.adapter_options.model_dump(mode="json")} if opens else None,
            "whole": plan.spec.adapter == "none",
            "dtype": plan.spec.model.dtype,
        }
    identity = {"stages": stages, "reference": reference, "code": plan.step.whole["code"]}
    factors = {name: plan.step.factors[name] for name in ("method", "data", "base", "samples")}
    samples = f"-n{factors['samples']}" if factors["samples"] is not None else ""
    arm = slug(f"rows-{factors['method']}-{factors['data']}-{factors['base']}{samples}")
    # Token ids alone are of no model: bases of one tokenizer and template share them.
    made_from = plan.step.made_from if reference is not None else {}
    return make_step("prepare", identity, arm=arm, factors=factors, made_from=made_from)


def saves_work(plan: AlignPlan) -> bool:
    """Whether anything that is prepared for an alignment is kept for others: rows that nothing pins are read anew."""
    return needs_reference(plan, plan.stages[0]) or all(pinned(stage.data) for stage in plan.stages)


def intact(step: Step, folder: StepFolder) -> str | None:
    """What is wrong with the record of what was prepared; None where it is whole.

    The caches that were filled check themselves: what is not there (any more) is made by the alignment that needs it.
    """
    return folder.problem(step)


def carry_out_prepare(
    plan: AlignPlan,
    registry: Registry,
    runner: Runner,
    work: StepFolder,
    *,
    sharing: Sequence[AlignPlan] = (),
    bases: Bases | None = None,
) -> StepRecord:
    """Tokenise the rows of all stages, and score those of the first under the starting policy; what is known is kept.

    Args:
        plan: of any of the arms.
        registry: that it was planned with.
        runner: records the step, and tells its observers.
        work: the folder of the record; there is no artifact beside it. The caller has locked it.
        sharing: plans of the arms, this one included: rows that none of them sees are not scored; none given: all are.
        bases: where the base is opened, and kept for those arms.

    Raises:
        UserError: a mistake of the user's.
        Requeue: a signal has stopped it; what is scored is kept.
    """
    step, stopping = prepare_step(plan), Stopping(runner.reporter.note)
    if work.status() is not None:
        work.reopen("it had failed")
    with runner.recorded(step, work), writing(work.path), stopping.handled():
        begun = time.perf_counter()
        tokenizer = open_tokenizer_of(plan)
        stages = [(stage, prepare_rows(plan, stage, registry, tokenizer)) for stage in plan.stages]
        first, data = stages[0]
        say_counts(runner.reporter, data, plan.template.name)
        runner.begin(step, work, described(plan, data))
        files: dict[str, str] = {}
        for stage, found in stages:
            name = stage.stage.name
            work.log("data", stage=name, read=found.read, tokenised=found.tokenised)
            files[f"{name}/train"] = rows_digest(found.train.rows)
            if found.heldout is not None:
                files[f"{name}/heldout"] = rows_digest(found.heldout.rows)
        tokenised = time.perf_counter()
        counts = {"rows": len(data.train.rows)}
        if needs_reference(plan, first):
            opened = bases or Bases()
            training = StageTraining(plan, first, registry, runner.reporter, tokenizer, work, stopping, bases=opened)
            with opened.in_use(plan):
                model, _, bf16 = training.open_model()
                scored = training.with_reference(model, _seen(data, sharing), bf16)
                del model
            values = [
                {key: value for key, value in row.items() if key == "id" or key.startswith("ref_")} for row in scored
            ]
            counts["scored"], files["reference"] = len(values), rows_digest(values)
        seconds = {"tokenise": tokenised - begun, "reference": time.perf_counter() - tokenised}
        return runner.finish(step, work, Ended("rows", digest_of(files), files, counts=counts, seconds=seconds))


def _seen(data: Prepared, sharing: Sequence[AlignPlan]) -> list[dict[str, Any]]:
    """The rows that any of these arms sees in its first stage (all where there is none), and those held out."""
    from harness.alignment.driver import order_rows

    rows = data.train.rows
    places = set(range(len(rows))) if not sharing else set[int]()
    lengths = [row_length(row) for row in rows]
    for batch_size, steps, seed in {_order(plan) for plan in sharing}:
        for step in order_rows(lengths, batch_size=batch_size, steps=steps, seed=seed):
            places.update(step)
    return [rows[place] for place in sorted(places)] + (data.heldout.rows if data.heldout is not None else [])


def _order(plan: AlignPlan) -> tuple[int, int, int]:
    """What the order of an arm's rows hangs on."""
    recipe = plan.stages[0].recipe
    return recipe.batch_size, recipe.steps, plan.spec.seed
