"""Train one arm: rows, template, starting policy, adapter, trainer, export. And `align`, the same from Python.

The folder that comes out is a peft adapter (or a model, for full fine-tuning) with its template, lineage, log,
provenance and model card; what is needed to go on after an interruption lies in ``step/`` within it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.alignment.bases import Bases
from harness.alignment.export import lineage_of
from harness.alignment.folder import (
    ALIGNMENT,
    STAGES,
    TRAINED,
    has_checkpoint,
    record_alignment,
    stage_folder,
    tidy,
)
from harness.alignment.heldout import HELDOUT, means, summaries
from harness.alignment.plan import AlignPlan, StagePlan, plan_align
from harness.alignment.policy import release
from harness.alignment.rows import described, open_tokenizer_of, prepare_rows, row_length, row_tokens
from harness.alignment.say import say_counts
from harness.alignment.stage import StageTraining
from harness.alignment.stopping import Stopping
from harness.contracts.recipe import Recipe
from harness.contracts.registry import Registry, load_plugins
from harness.core.config import parse_options
from harness.core.errors import Requeue, UserError
from harness.core.machine import torch_device
from harness.core.progress import Reporter
from harness.core.records import StepRecord
from harness.core.specs import AlignSpec, ModelSpec
from harness.core.stats import Summary
from harness.core.trackers import FOLDER, Tracking, check_trackers
from harness.data.token_cache import Prepared
from harness.models.artifact import read_artifact
from harness.steps.alone import Alone
from harness.steps.files import read_json, slug, write_bytes, write_json, writing
from harness.steps.folder import LOG, STEP, StepFolder
from harness.steps.journal import read_rows
from harness.steps.lock import FolderLock
from harness.steps.provenance import file_digest
from harness.steps.runner import Ended, Runner
from harness.steps.step import Step

RESULT = "result.json"


@dataclass
class Alignment:
    """What one alignment left behind."""

    folder: Path
    plan: AlignPlan
    history: list[dict[str, Any]]
    """Lines of the training log: step, loss, rewards, held-out figures."""
    heldout: dict[str, float] = field(default_factory=dict)
    """Held-out loss and, for pairs, preference accuracy and margin, at the end: means over rows."""
    summaries: dict[str, Summary] = field(default_factory=dict)
    """The same with n, standard error and 95 % interval; the values per row are in step/heldout.jsonl.gz."""


def align(
    method: str,
    model: str | ModelSpec,
    dataset: str,
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    trackers: Sequence[str] = (),
    **settings: Any,
) -> Alignment:
    """Align one model: what `harness align` does.

    Args:
        method: registered aligner (sft, dpo, ...).
        model: folder or hub id of the base, or a ``ModelSpec``.
        dataset: expression over data sets, e.g. ``hh-rlhf:harmless``.
        out: folder of the adapter; goes on if it holds this very alignment. By default ``runs/<arm>-<digest>``.
        fresh: delete what the folder holds of an earlier alignment first.
        registry: from ``load_plugins``; all installed plugins by default.
        reporter: says what is going on; silent by default.
        trackers: told of the training curves as they are logged (tensorboard, wandb, mlflow, trackio); they write into
            ``step/trackers`` of the folder.
        **settings: further fields of ``AlignSpec``: adapter, start, template, samples, checkpoints, seed, options.

    Raises:
        UserError: a mistake of the user's, before anything ran.
        StepError: training failed.
    """
    model_spec = model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))
    fields = {"method": method, "model": model_spec, "dataset": dataset, **settings}
    spec = parse_options(AlignSpec, fields, "harness align")
    check_trackers(trackers, "--tracker")
    registry = registry or load_plugins()
    plan = plan_align(spec, registry)
    folder = Path(out) if out is not None else Path("runs") / f"{slug(plan.arm)}-{plan.id[:8]}"
    return run_align(plan, registry, folder, fresh=fresh, reporter=reporter, trackers=trackers)


def run_align(
    plan: AlignPlan,
    registry: Registry,
    out: Path,
    *,
    fresh: bool = False,
    reporter: Reporter | None = None,
    trackers: Sequence[str] = (),
) -> Alignment:
    """Carry out a plan in a folder; an interrupted one goes on from its last checkpoint."""
    reporter = reporter or Reporter()
    alone = Alone(plan.step, out, ALIGNMENT, lambda out: has_checkpoint(StepFolder.within(out, "", "align")))
    if fresh or not ALIGNMENT.is_ours(out):
        # Asked before the lock as well: nothing is written into a folder that is somebody else's.
        ALIGNMENT.refuse(out, fresh=fresh)
    with FolderLock(out, ALIGNMENT.where(out)):
        if fresh:
            ALIGNMENT.clear(out)
        work = alone.folder
        if alone.done_before(reporter) is not None:
            tidy(work)
            return _load(out, plan, work)
        begun_before = (work.path / STEP).exists()
        folder = (work.path / FOLDER).absolute()
        tracking = Tracking(tuple(trackers), folder, "harness-align") if trackers else None
        try:
            return carry_out_align(plan, registry, Runner(registry, reporter), work, tracking=tracking)
        except UserError:
            if not has_checkpoint(work) and not begun_before and work.path.exists():
                # What is refused leaves nothing behind, so that the corrected command finds the folder as this one did.
                ALIGNMENT.clear(out)
            raise


def carry_out_align(
    plan: AlignPlan,
    registry: Registry,
    runner: Runner,
    work: StepFolder,
    *,
    bases: Bases | None = None,
    tracking: Tracking | None = None,
) -> Alignment:
    """Carry out a plan from where its folder stands, and say what is kept when that is cut short.

    Args:
        plan: of :func:`harness.alignment.plan.plan_align`.
        registry: that it was planned with.
        runner: records the step, and tells its observers.
        work: the folder of the record, and that of the adapter: within each other or apart. The caller has locked it,
            and knows that the step has not ended well.
        bases: where the base is opened, and may stay open for the next alignment; let go by default.
        tracking: trackers that are told what is logged.

    Raises:
        UserError: a mistake of the user's.
        StepError: training failed.
        Requeue: a signal has stopped it; what is done is saved.
    """
    note = runner.reporter.note
    if work.status() is not None:
        work.reopen("it had failed")
    try:
        with runner.recorded(plan.step, work), writing(work.artifact):
            return _Run(plan, registry, runner, work, bases or Bases(), tracking).carry_out()
    except UserError:
        if has_checkpoint(work):
            note("the last checkpoint is kept: the same command goes on from there")
        raise
    except (KeyboardInterrupt, Requeue):
        if not has_checkpoint(work):
            note("there is no checkpoint yet: the same command trains from the first step")
        raise


def _load(out: Path, plan: AlignPlan, work: StepFolder) -> Alignment:
    from harness.alignment.driver import read_history

    measured = read_rows(work.path / HELDOUT) if (work.path / HELDOUT).exists() else []
    result = read_json(work.path / RESULT)
    return Alignment(out, plan, read_history(work.path / LOG), result["heldout"], summaries(measured))


class _Run:
    """One pass over an alignment in this process."""

    def __init__(
        self,
        plan: AlignPlan,
        registry: Registry,
        runner: Runner,
        work: StepFolder,
        bases: Bases,
        tracking: Tracking | None,
    ) -> None:
        self.bases, self.tracking = bases, tracking
        self.plan, self.registry, self.runner, self.reporter = plan, registry, runner, runner.reporter
        self.work, self.out = work, work.artifact
        self.tokenizer = open_tokenizer_of(plan)
        self.stopping = Stopping(self.reporter.note)
        self._trained = 0

    def carry_out(self) -> Alignment:
        """All stages, each from what the one before has left."""
        try:
            with self.stopping.handled():
                earlier: Path | None = None
                for stage in self.plan.stages[:-1]:
                    earlier = self._earlier_stage(stage, earlier)
                return self._last_stage(earlier)
        finally:
            if self.stopping.asked is not None:
                # It came too late to stop this training, and was not meant for this training alone.
                signal.raise_signal(self.stopping.asked)

    def _earlier_stage(self, stage: StagePlan, earlier: Path | None) -> Path:
        """Carry out a stage that others follow, unless it has been; returns the file of weights that it leaves."""
        name, work = stage.stage.name, stage_folder(self.work, stage.stage.name, stage.step.id)
        weights = work.path / TRAINED
        before = {"earlier": file_digest(earlier)} if earlier is not None else {}
        step = replace(stage.step, made_from={**stage.step.made_from, **before})
        if (record := work.status()) is not None:
            if (why := _differs(record, step, weights)) is None:
                tidy(work)
                self.reporter.note(f"stage {name} has been done")
                return weights
            work.reopen(why)
        self.reporter.note(f"stage {name}, {self.plan.stages.index(stage) + 1} of {len(self.plan.stages)}")
        # Its failure is the alignment's, which is counted once.
        runner = Runner(self.registry, self.reporter)
        with runner.recorded(step, work):
            begun = time.perf_counter()
            data = prepare_rows(self.plan, stage, self.registry, self.tokenizer)
            say_counts(self.reporter, data, self.plan.template.name)
            self._begin({})
            runner.begin(step, work, described(self.plan, data))
            ended, _ = self._train(stage, work, data, (earlier, begun))
            runner.finish(step, work, replace(ended, artifact="weights", digest=file_digest(weights)))
        # After the end is on record: a kill in between must not cost the training.
        tidy(work)
        release()
        if self.stopping.asked is not None:
            raise self.stopping.stopped(self.stopping.asked)
        return weights

    def _last_stage(self, earlier: Path | None) -> Alignment:
        """Carry out the stage that ends with the adapter, whose record is the alignment's."""
        from harness.alignment.driver import read_history
        from harness.models.card import model_card

        plan, work, stage = self.plan, self.work, self.plan.stages[-1]
        begun = time.perf_counter()
        data = prepare_rows(plan, stage, self.registry, self.tokenizer)
        say_counts(self.reporter, data, plan.template.name)
        self._begin(described(plan, data))
        ended, measured = self._train(stage, work, data, (earlier, begun))
        history, heldout = read_history(work.path / LOG), _heldout(measured)
        card = model_card(read_json(work.path / STEP), lineage_of(plan), heldout, history)
        write_bytes(self.out / "README.md", card.encode())
        record_alignment(work)
        made = read_artifact(self.out)
        files = {f"{STAGES}/{earlier.parent.name}/{TRAINED}": file_digest(earlier)} if earlier is not None else {}
        ended = replace(ended, artifact=made.kind, digest=made.digest, rank=made.rank, template=made.template)
        self.runner.finish(plan.step, work, replace(ended, files=files))
        tidy(work)
        return Alignment(self.out, plan, history, heldout, summaries(measured))

    def _begin(self, described: Mapping[str, Any]) -> None:
        """Begin the alignment with its first stage that there is work to do for; later ones add to what it is."""
        if self.work.attempt:
            self.work.describe(**described)
            return
        names = [one.stage.name for one in self.plan.stages]
        self.runner.begin(self.plan.step, self.work, {**described, **({"stages": names} if len(names) > 1 else {})})

    def _spent(self, trained_tokens: int) -> None:
        """Count what a stage took to the alignment."""
        self._trained += trained_tokens
        self.runner.spent(self.work, trained_tokens=self._trained)
        if self.plan.spec.processes > 1:
            # Each rank is a process of its own, with a device of its own.
            self.runner.spent(self.work, devices=self.plan.spec.processes if torch_device() == "cuda" else 0)

    def _train(
        self, stage: StagePlan, work: StepFolder, data: Prepared, since: tuple[Path | None, float]
    ) -> tuple[Ended, list[dict[str, Any]]]:
        """Train one stage, and record what its held-out rows are worth.

        Args:
            stage: of the plan.
            work: folder of its record, which has begun.
            data: its rows.
            since: the weights of the stage before, and when the rows were begun with.

        Returns:
            how it ended, without the artifact, and the values per held-out row.
        """
        earlier, begun = since
        work.log("data", read=data.read, tokenised=data.tokenised)
        prepared = time.perf_counter()
        plan, tokenizer, stopping = self.plan, self.tokenizer, self.stopping
        training = StageTraining(
            plan, stage, self.registry, self.reporter, tokenizer, work, stopping, earlier, bases=self.bases
        )
        training.tracking = self.tracking
        try:
            measured, micro = training.run(data)
        finally:
            stopping.watch(None)
        described = {name: asdict(summary) for name, summary in summaries(measured).items()}
        result = {"heldout": _heldout(measured), "rows": len(measured), "summaries": described}
        write_json(work.path / RESULT, result)
        seconds = {"prepare": prepared - begun, "train": time.perf_counter() - prepared}
        counts = {"rows": len(data.train.rows), "micro_batch_size": micro}
        self._spent(trained_tokens=trained_tokens(data.train.rows, stage.recipe, plan.spec.seed))
        return Ended("weights", "", counts=counts, seconds=seconds), measured


def trained_tokens(rows: Sequence[Mapping[str, Any]], recipe: Recipe, seed: int) -> int:
    """Tokens that the training passes of one run read, all steps together; held-out rows and references not counted."""
    from harness.alignment.driver import order_rows

    lengths = [row_length(row) for row in rows]
    steps = order_rows(lengths, batch_size=recipe.batch_size, steps=recipe.steps, seed=seed)
    return sum(row_tokens(rows[place]) for step in steps for place in step)


def _differs(record: StepRecord, step: Step, weights: Path) -> str | None:
    """Why an earlier stage has to be trained again; None where what it has left is what is asked for."""
    if record.status != "done":
        return "it had failed"
    if (record.id, record.made_from) != (step.id, step.made_from):
        return "it was made of something else"
    if not weights.is_file() or file_digest(weights) != record.digest:
        return f"{weights.name} is missing or damaged"
    return None


def _heldout(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in means(measured).items()}
