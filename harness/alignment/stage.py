"""One stage of an alignment, trained in this process, alone or as one of several, or in processes of its own."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.alignment.bases import Bases
from harness.alignment.export import Target, export
from harness.alignment.folder import TRAINED
from harness.alignment.heldout import HELDOUT
from harness.alignment.plan import AlignPlan, StagePlan, needs_reference
from harness.alignment.policy import attach_policy, described_policy, release, starting_policy
from harness.alignment.ranks import ALONE, Children, Rank, train_apart
from harness.alignment.rows import open_tokenizer_of, prepare_rows, row_length, row_tokens
from harness.alignment.say import stepper
from harness.alignment.stopping import Stopping
from harness.contracts.aligner import TrainerCall, TrainingJob
from harness.contracts.registry import Registry
from harness.core.errors import StepError
from harness.core.progress import Reporter
from harness.core.trackers import Tracking, tracking_json
from harness.data.token_cache import Prepared
from harness.steps.files import read_json, write_json, writing
from harness.steps.folder import PROVENANCE, StepFolder
from harness.steps.journal import read_rows, write_rows
from harness.steps.provenance import file_digest, provenance_record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKPOINTS = "checkpoints"
BEGAN_WITH = "began-with.json"
"""Beside the checkpoints of a later stage: the weights of the stage before, by digest."""


@dataclass
class StageTraining:
    """The training of one stage."""

    plan: AlignPlan
    stage: StagePlan
    registry: Registry
    reporter: Reporter
    tokenizer: PreTrainedTokenizerBase
    work: StepFolder
    """Of the stage's record; of the last stage that of the alignment, whose artifact is the adapter's folder."""
    stopping: Stopping
    earlier: Path | None = None
    """Weights that the stage before has left; None: it is the first."""
    rank: Rank = ALONE
    own: frozenset[str] = frozenset()
    """Names of the weights and buffers that the method has added to the model."""
    bases: Bases = field(default_factory=Bases)
    """Where its base is opened, and held against what it was."""
    tracking: Tracking | None = None
    """Trackers that its log is handed on to."""

    def run(self, data: Prepared) -> tuple[list[dict[str, Any]], int]:
        """Train; when memory runs out, with half the micro batch from the last checkpoint on.

        Returns:
            per held-out row its id and values, and the micro batch with which it came to its end.
        """
        from harness.alignment.driver import StoppedError, micro_batch_size, out_of_memory

        plan, recipe = self.plan, self.stage.recipe
        self._refuse_other_beginnings()
        share = recipe.batch_size // plan.spec.processes
        micro = micro_batch_size(share, recipe.micro_batch_size)
        if micro < min(recipe.micro_batch_size, share):
            self.reporter.note(f"micro batches of {micro}: the most that divides {share} evenly")
        while True:
            try:
                return (self.train(data, micro) if plan.spec.processes == 1 else self._train_apart(micro)), micro
            except StoppedError as stopped:
                raise self.stopping.stopped(stopped.number) from None
            except Exception as error:
                problem = out_of_memory(error)
                if problem is None:
                    raise
                if micro == 1:
                    raise StepError(
                        plan.arm,
                        f"out of memory with one row at a time: {problem}",
                        "Lower max_length, or set gradient_checkpointing=true, or use --adapter qlora.",
                    ) from error
            # Not within `except`: there the traceback keeps the model that did not fit.
            micro = micro_batch_size(share, micro // 2)
            self.reporter.note(f"out of memory: going on with micro batches of {micro}")
            self.work.log("out_of_memory", micro_batch_size=micro, error=problem)
            release()

    def _refuse_other_beginnings(self) -> None:
        """Checkpoints that came of other weights than the stage before has left now are none of this training's."""
        if self.earlier is None:
            return
        folder, digest = self.work.path / CHECKPOINTS, file_digest(self.earlier)
        began = folder / BEGAN_WITH
        if folder.exists() and not (began.is_file() and read_json(began).get("weights") == digest):
            shutil.rmtree(folder)
            self.work.log("checkpoints of other weights are deleted")
        write_json(began, {"weights": digest})

    def _train_apart(self, micro: int) -> list[dict[str, Any]]:
        """Train in processes of their own."""
        from harness.alignment.driver import StoppedError

        plan = self.plan
        payload = {
            "spec": plan.spec.model_dump(mode="json"),
            "start": plan.start.model_dump(mode="json") if plan.start is not None else None,
            "plugins": self.registry.loose_files,
            "folder": str(self.work.path),
            "out": str(self.work.artifact),
            "id": plan.id,
            "stage": plan.stages.index(self.stage),
            "earlier": str(self.earlier) if self.earlier is not None else None,
            "micro": micro,
            "tracking": tracking_json(self.tracking),
        }

        def started(children: Children) -> None:
            # Signals set its `stop`.
            self.stopping.watch(children)

        ended = train_apart(payload, plan.spec.processes, self.reporter, started)
        if ended is None:
            return read_rows(self.work.path / HELDOUT) if (self.work.path / HELDOUT).exists() else []
        raise StoppedError(ended.signal or signal.SIGTERM)

    def train(self, data: Prepared, micro: int) -> list[dict[str, Any]]:
        """Train in this process, alone or as one of several; returns per held-out row its id and values.

        Raises:
            StepError: the method has changed weights of the base that it does not train.
        """
        with self.bases.in_use(self.plan):
            return self._train(data, micro)

    def _train(self, data: Prepared, micro: int) -> list[dict[str, Any]]:
        import datasets

        from harness.alignment import driven, driver
        from harness.alignment.curves import tracked

        plan, recipe, train, held = self.plan, self.stage.recipe, data.train, data.heldout
        model, cuda, bf16 = self.open_model()
        lengths = [row_length(row) for row in train.rows]
        steps = driver.order_rows(lengths, batch_size=recipe.batch_size, steps=recipe.steps, seed=plan.spec.seed)
        ids = [[train.rows[i]["id"] for i in step] for step in steps]
        if self.rank.first:
            planned = [{"step": n + 1, "rows": step} for n, step in enumerate(ids)]
            write_rows(self.work.path / "batches.jsonl.gz", planned)
        # Rows that no step will see need no reference.
        seen = sorted({i for step in steps for i in step})
        found, held_rows = [train.rows[i] for i in seen], held.rows if held is not None else []
        if needs_reference(plan, self.stage):
            full = self.with_reference(model, [*found, *held_rows], bf16)
            found, held_rows = full[: len(found)], full[len(found) :]
        # By length: less padding. Every row weighs the same, whatever batch it is in.
        held_rows = sorted(held_rows, key=lambda row: (-row_length(row), row["id"]))
        rows = dict(zip(seen, found, strict=True))
        common = driver.settings(
            recipe,
            self.work.path / CHECKPOINTS,
            seed=plan.spec.seed,
            micro=micro,
            cuda=cuda,
            bf16=bf16,
            heldout=bool(held_rows),
            processes=self.rank.count,
        )
        job = TrainingJob(
            stage=self.stage.stage,
            model=model,
            tokenizer=self.tokenizer,
            rows=datasets.Dataset.from_list([rows[i] for step in steps for i in step]),
            config=recipe,
            seed=plan.spec.seed,
            arguments=lambda cls, **overrides: cls(**{**common, **overrides}),
            heldout=datasets.Dataset.from_list(held_rows) if held_rows else None,
            reference=self._reference_of(model, bf16) if needs_reference(plan, self.stage) else None,
        )
        call = plan.aligner.trainer(job)
        trainer = driven.build(call, job, plan.adapter.parameter_groups(model, plan.adapter_options))
        advance = self.reporter.start(self._title, recipe.steps)
        progress = driver.Progress(
            stepper(advance, self.reporter, [sum(row_tokens(train.rows[i]) for i in step) for step in steps]),
            self.work.log,
            frozenset(plan.spec.checkpoints if self._is_last else ()),
        )
        self.stopping.watch(progress)
        if self.rank.first:
            self._record_engine(call, trainer, micro)
        with tracked(self.tracking if self.rank.first else None, self._title, self.reporter.note) as curves:
            measured = driver.drive(trainer, progress, ids, [row["id"] for row in held_rows], curves)
        if self.rank.first:
            if measured:
                write_rows(self.work.path / HELDOUT, measured)
            self.leave(job, trainer.model)
        return measured

    @property
    def _is_last(self) -> bool:
        return self.stage is self.plan.stages[-1]

    @property
    def _title(self) -> str:
        arm = self.plan.arm
        return arm if len(self.plan.stages) == 1 else f"{arm}, {self.stage.stage.name}"

    def open_model(self) -> tuple[Any, bool, bool]:
        """The model with all its trainable weights; whether on CUDA, and whether under bf16 autocast."""
        from harness.alignment.driven import hand_on

        base = self.bases.open(self.plan, self.rank.number, self.work.log)
        model, cuda, bf16 = attach_policy(self.plan, base)
        before = _names(model)
        self.plan.aligner.attach(model, self.tokenizer, self.stage.recipe)
        self.own = _names(model) - before
        if self.earlier is not None:
            hand_on(model, self.earlier, self.stage.stage.name)
        return model, cuda, bf16

    def with_reference(self, model: Any, rows: Sequence[dict[str, Any]], bf16: bool) -> list[dict[str, Any]]:
        """Rows with the log-probabilities of their answers under the policy that the stage begins with.

        Args:
            model: of :meth:`open_model`, not yet trained.
            rows: tokenised.
            bf16: whether training runs under bf16 autocast.
        """
        from harness.alignment.reference import ReferenceStore, row_scorer

        policy = described_policy(self.plan, model, bf16)
        if self.earlier is not None:
            policy["earlier"] = file_digest(self.earlier)
        advance = self.reporter.start("reference log-probabilities", len(rows))
        # A later stage begins with what is trained already, the adapter's weights included.
        is_first, continued = self.earlier is None, self.plan.start is not None
        with starting_policy(model, continued) if is_first else contextlib.nullcontext():
            scorer = row_scorer(model, self.tokenizer, bf16=bf16)
            values, computed = ReferenceStore.of(policy).fill(rows, scorer, advance)
        self.work.log("reference", rows=len(values), computed=computed)
        self.reporter.note(f"reference: {computed:,} of {len(values):,} rows computed, the others were known")
        return [
            {**row, **{f"ref_{name}_logps": logp for name, logp in logps.items()}}
            for row, logps in zip(rows, values, strict=True)
        ]

    def _reference_of(self, model: Any, bf16: bool) -> Callable[[Sequence[Mapping[str, Any]]], list[float]]:
        """What a method is given to ask for further rows."""

        def of(rows: Sequence[Mapping[str, Any]]) -> list[float]:
            found = self.with_reference(model, [dict(row) for row in rows], bf16)
            return [row["ref_completion_logps"] for row in found]

        return of

    def leave(self, job: TrainingJob, model: Any) -> None:
        """Write the adapter and the kept checkpoints; of an earlier stage the weights for the next."""
        if self._is_last:
            export(model, job, Target(self.plan, self.tokenizer, self.work, self.own))
        else:
            from harness.alignment.driven import save_for_next

            save_for_next(job.model, self.work.path / TRAINED, self.earlier)

    def _record_engine(self, call: TrainerCall, trainer: Any, micro: int) -> None:
        """What is really in force: dropout, dtypes, optimiser, batch."""
        import torch

        dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
        dropouts = {m.p for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
        facts = {
            "trainer": call.cls.__name__,
            "optimizer": str(trainer.args.optim.value),
            "trainable_dtypes": sorted(dtypes),
            "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "dropout_in_force": sorted(dropouts),
            "micro_batch_size": micro,
            "processes": self.rank.count,
            "accumulation": trainer.args.gradient_accumulation_steps,
            "device": str(trainer.args.device.type),
            "threads": torch.get_num_threads(),
        }
        write_json(self.work.path / PROVENANCE, provenance_record({"engine": facts}))


def _names(model: Any) -> frozenset[str]:
    return frozenset(name for name, _ in (*model.named_parameters(), *model.named_buffers()))


@dataclass(frozen=True)
class RankShare:
    """The part of one process in a training that several share."""

    rank: Rank
    stage: int
    """Place of the stage in the plan."""
    earlier: Path | None
    """Weights that the stage before has left."""
    micro: int
    """Rows per forward pass."""
    tracking: Tracking | None = None


def train_in_rank(plan: AlignPlan, registry: Registry, reporter: Reporter, work: StepFolder, share: RankShare) -> None:
    """The part of one process in a training that several share.

    Args:
        plan: the same in all of them.
        registry: of this process.
        reporter: of the first process.
        work: folder of the stage's record.
        share: of this process.
    """
    stage, stopping = plan.stages[share.stage], Stopping(reporter.note)
    tokenizer = open_tokenizer_of(plan)
    training = StageTraining(plan, stage, registry, reporter, tokenizer, work, stopping, share.earlier, share.rank)
    training.tracking = share.tracking
    data = prepare_rows(plan, stage, registry, tokenizer)
    with stopping.handled(), writing(work.path):
        training.train(data, share.micro)
