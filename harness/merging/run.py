"""Merge models: adapters and checkpoints into one model or one adapter, streamed. And `merge`, the same from Python.

Nothing is written but the output folder, which appears when it is whole; no input model is ever in memory whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from harness.contracts.registry import Registry, load_plugins
from harness.core.config import Config, parse_options
from harness.core.progress import Reporter
from harness.core.records import StepRecord
from harness.core.specs import MergeInput, MergeSpec, ModelSpec
from harness.merging.compute import Maker
from harness.merging.page import render
from harness.merging.plan import MergePlan, parse_input, plan_merge
from harness.merging.publish import MERGE, MERGED, Made, publish
from harness.merging.record import Spent, lineage_of, merge_card, record_of
from harness.merging.tensor_plan import TensorRecipe
from harness.merging.threads import Clock, TensorWork, carry_out, default_workers
from harness.merging.write import SHARD_SIZE, Shards, TensorShape, check_disk, target_dtype, write_small_files
from harness.models.lineage import LINEAGE
from harness.models.tensors import FLOATS
from harness.steps.alone import Alone
from harness.steps.files import read_json, write_bytes, write_json
from harness.steps.folder import StepFolder
from harness.steps.runner import Runner


class MergeSettings(Config):
    """How a merge is carried out; none of it changes a byte of a tensor, but for the device."""

    workers: int | None = Field(None, ge=1, description="threads; the number of cores, at most 8, when absent")
    shard_size: int = Field(SHARD_SIZE, ge=1, description="most bytes of tensors in one file")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="cpu, cuda, or auto: cuda if present")


@dataclass(frozen=True)
class Merging:
    """What one merge left behind."""

    folder: Path
    id: str
    record: dict[str, Any] = field(default_factory=dict)
    """What ``merge.json`` holds."""
    before: bool = False
    """Whether the folder held this merge already."""


def merge(
    method: str | MergeSpec,
    inputs: Sequence[str | Path | tuple[str | Path, float] | MergeInput] = (),
    *,
    base: str | Path | ModelSpec | None = None,
    out: str | Path,
    fresh: bool = False,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Merging:
    """Merge models: what `harness merge` does.

    Args:
        method: registered merger (slerp, dare_ties, ...), or a ``MergeSpec`` instead of inputs, base and settings.
        inputs: adapters and checkpoints, folders or hub ids, in order; ``"PATH:0.3"`` or ``(path, 0.3)`` with a weight.
        base: the model that differences are taken from.
        out: folder of the result; returns at once if it holds this very merge.
        fresh: replace another merge that the folder holds.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.
        **settings: further fields of ``MergeSpec`` (options, seed, dtype, form, rank) and ``MergeSettings`` (workers,
            shard_size, device).

    Raises:
        UserError: a mistake of the user's, before anything was written.
    """
    carried = {key: settings.pop(key) for key in MergeSettings.model_fields if key in settings}
    running = parse_options(MergeSettings, carried, "merge")
    if isinstance(method, MergeSpec):
        spec = method.model_copy(update=settings)
    else:
        fields: dict[str, Any] = {"method": method, "inputs": tuple(parse_input(one) for one in inputs), **settings}
        if base is not None:
            fields["base"] = base if isinstance(base, ModelSpec) else ModelSpec(model=str(base))
        spec = parse_options(MergeSpec, fields, "harness merge")
    registry = registry or load_plugins()
    reporter = reporter or Reporter()
    plan = plan_merge(spec, registry, running.device)
    return run_merge(plan, Path(out), running, fresh=fresh, registry=registry, reporter=reporter)


def run_merge(
    plan: MergePlan, out: Path, running: MergeSettings, *, fresh: bool, registry: Registry, reporter: Reporter
) -> Merging:
    """Carry out a plan; the folder appears at the end, or not at all."""
    if Alone(plan.step, out, MERGED).done_before(reporter, fresh=fresh) is not None:
        return Merging(out, plan.id, read_json(out / MERGE), before=True)
    alone = Alone(plan.step, out, MERGED)
    carry_out_merge(plan, running, Runner(registry, reporter), alone.folder)
    return Merging(out, plan.id, read_json(out / MERGE))


def carry_out_merge(plan: MergePlan, running: MergeSettings, runner: Runner, folder: StepFolder) -> StepRecord:
    """Carry out a plan, wherever its record and its artifact lie."""
    run, out = _Run(plan, running, runner.reporter), folder.artifact
    return publish(plan.step, folder, runner, lambda model: run.carry_out(out, model))


class _Run:
    """One pass over a merge."""

    def __init__(self, plan: MergePlan, running: MergeSettings, reporter: Reporter) -> None:
        self.plan, self.running, self.reporter = plan, running, reporter
        self.spent = Spent(running.workers or default_workers(), Clock(), {"plan": plan.seconds})

    def carry_out(self, out: Path, folder: Path) -> Made:
        """Merge, and write all that is to lie in ``out`` into ``folder``."""
        begun = time.perf_counter()
        import torch  # noqa: F401 - so that its import is on its own account

        self.spent.seconds["import"] = time.perf_counter() - begun
        plan = self.plan
        maker = Maker(plan.opened, plan.merger, plan.spec.seed, plan.device, self.spent.clock)
        begun = time.perf_counter()
        maker.merger = maker.prepared(plan.recipe.tensors)
        self.spent.seconds["prepare"] = time.perf_counter() - begun
        begun = time.perf_counter()
        if plan.spec.form == "adapter":
            files = self._write_adapter(out, folder, maker)
        else:
            files = self._write_model(out, folder, maker)
        self.spent.seconds["compute"] = time.perf_counter() - begun
        if plan.opened.carried is not None:
            plan.opened.carried.write(folder)
        record = record_of(plan, maker, files, self.spent)
        write_json(folder / MERGE, record)
        write_bytes(folder / "merge.html", render(record).encode())
        write_json(folder / LINEAGE, lineage_of(plan))
        write_bytes(folder / "README.md", merge_card(record).encode())
        return Made(record["counts"], record["seconds"], tuple(record["notes"]))

    def _write_model(self, out: Path, folder: Path, maker: Maker) -> dict[str, int]:
        plan = self.plan
        plans = {recipe.name: self._planned(recipe, maker) for recipe in plan.recipe.tensors}
        check_disk(out.absolute().parent, sum(one.size for one in plans.values()), f"--out {out}")
        shards = Shards(folder, list(plans.values()), self.running.shard_size)

        def job(recipe: TensorRecipe) -> TensorWork:
            one = plans[recipe.name]
            return TensorWork(one, maker.needs(recipe), lambda: maker.make(recipe, one.dtype))

        try:
            advance = self.reporter.start(f"merge {out.name}", len(plans))
            jobs = [job(recipe) for recipe in plan.recipe.tensors]
            carry_out(jobs, shards, self.spent.workers, self.spent.clock, advance)
            files = shards.finish()
        finally:
            shards.close()
        changes = {**plan.opened.config_changes, **plan.recipe.config_changes}
        write_small_files(
            folder, plan.opened.info, changes=changes, dtype=plan.spec.dtype, template=plan.opened.template
        )
        return files

    def _planned(self, recipe: TensorRecipe, maker: Maker) -> TensorShape:
        origin = maker.origin(recipe)
        entry = maker.model(origin).entry(origin.tensor)
        dtype = target_dtype(entry.dtype, self.plan.spec.dtype) if entry.dtype in FLOATS else entry.dtype
        return TensorShape(recipe.name, dtype, entry.shape)

    def _write_adapter(self, out: Path, folder: Path, maker: Maker) -> dict[str, int]:
        import torch

        from harness.merging.low_rank import changed_recipes, is_transposed, low_rank, rank_of, write_adapter_config

        plan, opened = self.plan, self.plan.opened
        assert opened.base is not None
        recipes = changed_recipes(plan.recipe.tensors, maker)
        rank = rank_of(opened, recipes, plan.spec.rank)
        # An adapter is small: fp32 unless asked otherwise, so that exact stays exact.
        dtype = target_dtype("F32", plan.spec.dtype)
        target = getattr(torch, plan.spec.dtype if plan.spec.dtype != "auto" else "float32")
        transposed = is_transposed(opened)
        plans, jobs = [], []
        for recipe in recipes:
            rows, columns = opened.base.entry(recipe.base.tensor if recipe.base else recipe.name).shape
            rows, columns = (columns, rows) if transposed else (rows, columns)
            stem = f"base_model.model.{recipe.name.removesuffix('.weight')}"
            a = TensorShape(f"{stem}.lora_A.weight", dtype, (rank, columns))
            b = TensorShape(f"{stem}.lora_B.weight", dtype, (rows, rank))
            plans += [a, b]
            jobs.append((recipe, a, b))
        check_disk(out.absolute().parent, sum(one.size for one in plans), f"--out {out}")
        shards = Shards(folder, plans, 1 << 62, stem="adapter_model")

        def make(recipe: TensorRecipe, b: TensorShape) -> torch.Tensor:
            found = low_rank(recipe, maker, rank)
            first, second = (found.b.t(), found.a.t()) if transposed else (found.a, found.b)
            shards.write(b.name, second.to(target).contiguous())
            self.spent.low_rank[recipe.name] = {"how": found.how, "lost": found.lost, "whole": found.whole}
            return first.to(target).contiguous()

        def job(recipe: TensorRecipe, a: TensorShape, b: TensorShape) -> TensorWork:
            return TensorWork(a, maker.needs(recipe), lambda: make(recipe, b))

        try:
            advance = self.reporter.start(f"merge {out.name}", len(jobs))
            carry_out([job(*one) for one in jobs], shards, self.spent.workers, self.spent.clock, advance)
            files = shards.finish()
        finally:
            shards.close()
        write_adapter_config(folder, opened, recipes, rank)
        if opened.template is not None:
            write_bytes(folder / "chat_template.jinja", opened.template.encode())
        return files
