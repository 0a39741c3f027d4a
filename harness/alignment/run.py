"""Train one arm: rows, template, starting policy, adapter, trainer, export. And `align`, the same from Python.

The folder that comes out is a peft adapter (or a model, for full fine-tuning) with its template, lineage, log,
provenance and model card; what is needed to go on after an interruption lies in ``step/`` within it.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from harness.alignment.export import Target, export, lineage_of
from harness.alignment.folder import ALIGNMENT, has_checkpoint, record_alignment, tidy
from harness.alignment.heldout import HELDOUT, means, summaries
from harness.alignment.plan import AlignPlan, plan_align
from harness.alignment.policy import described_quantization, open_policy, release, starting_policy
from harness.alignment.ranks import ALONE, Children, Rank, train_apart
from harness.contracts.aligner import Aligner, TrainingJob
from harness.contracts.dataset import Dataset, schema_name
from harness.contracts.registry import Registry, load_plugins
from harness.core.config import parse_options
from harness.core.errors import Requeue, StepError, UserError
from harness.core.progress import Reporter, stored
from harness.core.specs import AlignSpec, ModelSpec
from harness.core.stats import Summary
from harness.data.expression import parse_expression
from harness.data.row_schema import form_of
from harness.data.selection import Keep, Selection, select
from harness.data.token_cache import Prepared, TokenCache, pinned
from harness.data.tokenise import Tokenised, Tokeniser
from harness.models.artifact import read_artifact
from harness.models.inspect import open_tokenizer
from harness.steps.alone import Alone
from harness.steps.files import read_json, slug, write_bytes, write_json, writing
from harness.steps.folder import STEP, StepFolder
from harness.steps.journal import read_rows, write_rows
from harness.steps.lock import FolderLock
from harness.steps.provenance import NUMERICS, code_digest, provenance_record
from harness.steps.runner import Ended, Runner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
        **settings: further fields of ``AlignSpec``: adapter, start, template, samples, checkpoints, seed, options.

    Raises:
        UserError: a mistake of the user's, before anything ran.
        StepError: training failed.
    """
    model_spec = model if isinstance(model, ModelSpec) else ModelSpec(model=str(model))
    fields = {"method": method, "model": model_spec, "dataset": dataset, **settings}
    spec = parse_options(AlignSpec, fields, "harness align")
    registry = registry or load_plugins()
    plan = plan_align(spec, registry)
    folder = Path(out) if out is not None else Path("runs") / f"{slug(plan.arm)}-{plan.id[:8]}"
    return run_align(plan, registry, folder, fresh=fresh, reporter=reporter)


def run_align(
    plan: AlignPlan, registry: Registry, out: Path, *, fresh: bool = False, reporter: Reporter | None = None
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
        try:
            return carry_out_align(plan, registry, Runner(registry, reporter), work)
        except UserError:
            if not has_checkpoint(work) and not begun_before and work.path.exists():
                # What is refused leaves nothing behind, so that the corrected command finds the folder as this one did.
                ALIGNMENT.clear(out)
            raise


def carry_out_align(plan: AlignPlan, registry: Registry, runner: Runner, work: StepFolder) -> Alignment:
    """Carry out a plan from where its folder stands, and say what is kept when that is cut short.

    Args:
        plan: of :func:`harness.alignment.plan.plan_align`.
        registry: that it was planned with.
        runner: records the step, and tells its observers.
        work: the folder of the record, and that of the adapter: within each other or apart. The caller has locked it,
            and knows that the step has not ended well.

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
            return _Run(plan, registry, runner, work).carry_out()
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
    result = read_json(work.path / "result.json")
    return Alignment(out, plan, read_history(work.path / "log.jsonl"), result["heldout"], summaries(measured))


class _Run:
    """One pass over an alignment in this process."""

    def __init__(
        self, plan: AlignPlan, registry: Registry, runner: Runner, work: StepFolder, rank: Rank = ALONE
    ) -> None:
        self.plan, self.registry, self.runner, self.reporter = plan, registry, runner, runner.reporter
        self.work, self.out, self.rank = work, work.artifact, rank
        self.tokenizer: PreTrainedTokenizerBase = open_tokenizer(plan.model)
        self.tokenizer.chat_template = plan.template.source
        self._signal: int | None = None
        self._progress: Any = None

    def carry_out(self) -> Alignment:
        """Rows, model, reference, training, export."""
        work = self.work
        begun = time.perf_counter()
        data = self.prepare()
        selection, train, held = data.selection, data.train, data.heldout
        self._say_counts(selection, train)
        described = self._described(selection, train)
        if held is not None:
            described["heldout"] = {"rows": len(held.rows), "dropped": held.rejected}
        self.runner.begin(self.plan.step, work, described)
        work.log("data", read=data.read, tokenised=data.tokenised)
        prepared = time.perf_counter()
        try:
            with self.signals():
                measured, history, micro = self._train_all(train, held)
                seconds = {"prepare": prepared - begun, "train": time.perf_counter() - prepared}
                return self._finish(measured, history, {"rows": len(train.rows), "micro_batch_size": micro}, seconds)
        finally:
            if self._signal is not None:
                # It came too late to stop this training, and was not meant for this training alone.
                signal.raise_signal(self._signal)

    # ------------------------------------------------------------------------------------------------------- data

    def prepare(self) -> Prepared:
        """Rows as token ids, from the cache where it knows them."""
        return self._token_cache().prepare(self._select, self._tokeniser)

    def _token_cache(self) -> TokenCache:
        plan, recipe = self.plan, self.plan.recipe
        names = sorted({part.name for part in parse_expression(plan.spec.dataset, self.registry)})
        code = [code_digest(self.registry.registered(Dataset, name, "--dataset")) for name in names]
        how = {
            "tokenizer": plan.model.tokenizer_digest,
            "template": plan.template.digest,
            "max_length": min(recipe.max_length, plan.model.max_length),
            "loss_on": recipe.loss_on,
            "schema": schema_name(plan.aligner.consumes),
        }
        if not isinstance(plan.aligner.consumes, str):
            # Its `render` decides what is tokenised.
            how["code"] = code_digest(self.registry.registered(Aligner, plan.spec.method, "METHOD"))
        return TokenCache({"data": plan.data, "code": code} if pinned(plan.data) else {}, how)

    def _select(self, keep: Keep) -> Selection:
        plan = self.plan
        return select(
            plan.spec.dataset,
            schema=plan.aligner.consumes,
            registry=self.registry,
            seed=plan.spec.data_seed,
            samples=plan.spec.samples,
            heldout=plan.recipe.eval_rows,
            options=plan.data_options,
            keep=keep,
        )

    def _tokeniser(self) -> Tokeniser:
        recipe, schema = self.plan.recipe, self.plan.aligner.consumes
        return Tokeniser(
            self.tokenizer,
            self.plan.template,
            max_length=min(recipe.max_length, self.plan.model.max_length),
            schema=schema,
            loss_on="last" if form_of(schema) == "pairs" else recipe.loss_on,
        )

    def _say_counts(self, selection: Selection, train: Tokenised) -> None:
        say = self.reporter.note
        for label, counts in selection.counts.items():
            say(f"{label}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
        for reason, count in {**selection.dropped, **train.rejected}.items():
            say(f"dropped {count:,}: {reason}")
        for note in [*selection.notes, *train.notes]:
            say(f"note: {note}")
        say(f"training on {len(train.rows):,} rows, template {self.plan.template.name}")

    def _described(self, selection: Selection, train: Tokenised) -> dict[str, Any]:
        return {
            "template": self.plan.template.name,
            "counts": selection.counts,
            "dropped": {**selection.dropped, **train.rejected},
            "tokens": train.stats,
            "notes": [*selection.notes, *train.notes],
        }

    # ---------------------------------------------------------------------------------------------------- training

    def _train_all(self, train: Tokenised, held: Tokenised | None) -> tuple[list[dict[str, Any]], list[Any], int]:
        """Train; when memory runs out, with half the micro batch from the last checkpoint on."""
        from harness.alignment.driver import StoppedError, micro_batch_size, out_of_memory, read_history

        share = self.plan.recipe.batch_size // self.plan.spec.processes
        micro = micro_batch_size(share, self.plan.recipe.micro_batch_size)
        if micro < min(self.plan.recipe.micro_batch_size, share):
            self.reporter.note(f"micro batches of {micro}: the most that divides {share} evenly")
        while True:
            try:
                alone = self.plan.spec.processes == 1
                measured = self.train(train, held, micro) if alone else self._train_apart(micro)
            except StoppedError as stopped:
                self._signal = None
                if stopped.number == signal.SIGINT:
                    raise KeyboardInterrupt from None
                raise Requeue(signal.Signals(stopped.number).name) from None
            except Exception as error:
                problem = out_of_memory(error)
                if problem is None:
                    raise
                if micro == 1:
                    raise StepError(
                        self.plan.arm,
                        f"out of memory with one row at a time: {problem}",
                        "Lower max_length, or set gradient_checkpointing=true, or use --adapter qlora.",
                    ) from error
            else:
                return measured, read_history(self.work.path / "log.jsonl"), micro
            # Not within `except`: there the traceback keeps the model that did not fit.
            micro = micro_batch_size(share, micro // 2)
            self.reporter.note(f"out of memory: going on with micro batches of {micro}")
            self.work.log("out_of_memory", micro_batch_size=micro, error=problem)
            release()

    def _train_apart(self, micro: int) -> list[dict[str, Any]]:
        """Train in processes of their own."""
        from harness.alignment.driver import StoppedError

        plan = self.plan
        payload = {
            "spec": plan.spec.model_dump(mode="json"),
            "plugins": self.registry.loose_files,
            "folder": str(self.work.path),
            "out": str(self.out),
            "id": plan.id,
            "micro": micro,
        }

        def started(children: Children) -> None:
            # Signals set its `stop`.
            self._progress = children
            children.stop = self._signal

        ended = train_apart(payload, plan.spec.processes, self.reporter, started)
        if ended is None:
            return read_rows(self.work.path / HELDOUT) if (self.work.path / HELDOUT).exists() else []
        raise StoppedError(ended.signal or signal.SIGTERM)

    def train(self, train: Tokenised, held: Tokenised | None, micro: int) -> list[dict[str, Any]]:
        """One training in this process, alone or as one of several."""
        import datasets

        from harness.alignment import driven, driver

        plan, recipe = self.plan, self.plan.recipe
        model, cuda, bf16 = self._open_model()
        lengths = [_length(row) for row in train.rows]
        steps = driver.order_rows(lengths, batch_size=recipe.batch_size, steps=recipe.steps, seed=plan.spec.seed)
        ids = [[train.rows[i]["id"] for i in step] for step in steps]
        if self.rank.first:
            planned = [{"step": n + 1, "rows": step} for n, step in enumerate(ids)]
            write_rows(self.work.path / "batches.jsonl.gz", planned)
        # Rows that no step will see need no reference.
        seen = sorted({i for step in steps for i in step})
        found, held_rows = self._with_reference(
            model, [train.rows[i] for i in seen], held.rows if held is not None else [], bf16
        )
        # By length: less padding. Every row weighs the same, whatever batch it is in.
        held_rows = sorted(held_rows, key=lambda row: (-_length(row), row["id"]))
        rows = dict(zip(seen, found, strict=True))
        ordered = datasets.Dataset.from_list([rows[i] for step in steps for i in step])
        common = driver.settings(
            recipe,
            self.work.path / "checkpoints",
            seed=plan.spec.seed,
            micro=micro,
            cuda=cuda,
            bf16=bf16,
            heldout=bool(held_rows),
            processes=self.rank.count,
        )
        job = TrainingJob(
            stage=plan.aligner.stages(recipe)[0],
            model=model,
            tokenizer=self.tokenizer,
            rows=ordered,
            config=recipe,
            seed=plan.spec.seed,
            arguments=lambda cls, **overrides: cls(**{**common, **overrides}),
            heldout=datasets.Dataset.from_list(held_rows) if held_rows else None,
        )
        call = plan.aligner.trainer(job)
        trainer = driven.build(call, job, plan.adapter.parameter_groups(model, plan.adapter_options))
        advance = self.reporter.start(plan.arm, recipe.steps)
        self._progress = driver.Progress(
            _stepper(advance, self.reporter, [sum(_tokens(train.rows[i]) for i in step) for step in steps]),
            self.work.log,
            frozenset(plan.spec.checkpoints),
        )
        self._progress.stop = self._signal
        if self.rank.first:
            self._record_engine(call.cls.__name__, trainer, micro)
        held_ids = [row["id"] for row in held_rows]
        measured = driver.drive(trainer, self._progress, ids, held_ids)
        if self.rank.first:
            if measured:
                write_rows(self.work.path / HELDOUT, measured)
            self._export(trainer.model)
        return measured

    def _open_model(self) -> tuple[Any, bool, bool]:
        """The base with its trainable weights attached; whether on CUDA, and whether under bf16 autocast."""
        return open_policy(self.plan, self.rank.number)

    def _with_reference(
        self, model: Any, rows: list[dict[str, Any]], held: list[dict[str, Any]], bf16: bool
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Rows with the starting policy's log-probabilities, where the method needs them."""
        if not self.plan.aligner.needs_reference:
            return rows, held
        import torch

        from harness.alignment.reference import ReferenceStore, pair_scorer

        plan = self.plan
        policy = {
            "model": plan.model.identity()["weights"],
            "from": plan.start.digest if plan.start is not None else None,
            "quantization": described_quantization(plan.adapter.quantization(plan.adapter_options)),
            "dtype": str(getattr(torch, plan.spec.model.dtype)),
            # Full fine-tuning computes in fp32 whatever the weights were opened in.
            "computes": sorted({str(p.dtype) for n, p in model.named_parameters() if ".default." not in n}),
            "autocast": bf16,
            "device": str(next(model.parameters()).device.type),
            "numerics": NUMERICS,
        }
        advance = self.reporter.start("reference log-probabilities", len(rows) + len(held))
        with starting_policy(model, plan.start is not None):
            values, computed = ReferenceStore.of(policy).fill(
                [*rows, *held], pair_scorer(model, self.tokenizer, bf16=bf16), advance
            )
        self.work.log("reference", rows=len(values), computed=computed)
        self.reporter.note(f"reference: {computed:,} of {len(values):,} rows computed, the others were known")
        full = [
            {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for row, (chosen, rejected) in zip([*rows, *held], values, strict=True)
        ]
        return full[: len(rows)], full[len(rows) :]

    def _record_engine(self, name: str, trainer: Any, micro: int) -> None:
        """What is really in force: dropout, dtypes, optimiser, batch."""
        import torch

        dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
        dropouts = {m.p for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Dropout)}
        facts = {
            "trainer": name,
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
        write_json(self.work.path / "provenance.json", provenance_record({"engine": facts}))

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGUSR1 end the step in hand, save, and stop; a second Ctrl-C stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._signal is not None and number != signal.SIGINT:
                # Schedulers repeat themselves; that must not cut the saving short.
                return
            if self._progress is None or self._signal is not None:
                # No step is in hand (or the user insists): what is on disk is what is kept.
                raise KeyboardInterrupt if number == signal.SIGINT else Requeue(signal.Signals(number).name)
            self._signal = self._progress.stop = number
            self.reporter.note("stopping after this step: what is done is saved")

        before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            # Outside the main thread signals belong to somebody else.
            with contextlib.suppress(ValueError):
                before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------------------------------ export

    def _export(self, model: Any) -> None:
        """Write the adapter (and the kept checkpoints) into the output folder."""
        export(model, Target(self.plan, self.tokenizer, self.work, self.out))

    def _finish(
        self, measured: list[dict[str, Any]], history: list[Any], counts: dict[str, int], seconds: Mapping[str, float]
    ) -> Alignment:
        from harness.models.card import model_card

        heldout = {f"eval_{name}": value for name, value in means(measured).items()}
        found = summaries(measured)
        described = {name: asdict(summary) for name, summary in found.items()}
        write_json(self.work.path / "result.json", {"heldout": heldout, "rows": len(measured), "summaries": described})
        step = read_json(self.work.path / "step.json")
        write_bytes(self.out / "README.md", model_card(step, lineage_of(self.plan), heldout, history).encode())
        record_alignment(self.work)
        made = read_artifact(self.out)
        ended = Ended(made.kind, made.digest, {}, made.rank, made.template, counts, seconds)
        self.runner.finish(self.plan.step, self.work, ended)
        # After the end is on record: a kill in between must not cost the training.
        tidy(self.work)
        return Alignment(self.out, self.plan, history, heldout, found)


def train_in_rank(
    plan: AlignPlan, registry: Registry, reporter: Reporter, work: StepFolder, share: tuple[Rank, int]
) -> None:
    """The part of one process in a training that several share.

    Args:
        plan: the same in all of them.
        registry: of this process.
        reporter: of the first process.
        work: folder of the step.
        share: which process this is, and rows per forward pass.
    """
    rank, micro = share
    run = _Run(plan, registry, Runner(None, reporter), work, rank)
    data = run.prepare()
    with run.signals(), writing(work.path):
        run.train(data.train, data.heldout, micro)


def _length(row: Mapping[str, Any]) -> int:
    if "completion_ids" in row:
        return len(row["prompt_ids"]) + len(row["completion_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _stepper(
    advance: Callable[[int], None], reporter: Reporter, tokens: Sequence[int]
) -> Callable[[int, dict[str, float]], None]:
    """Bars for steps, and a line with loss, reward margin and tokens/s whenever the trainer logs.

    Args:
        advance: of the bar.
        reporter: for the lines.
        tokens: how many each step reads, padding left out.
    """
    last, spoken, since = 0, 0, time.monotonic()

    def report(step: int, values: dict[str, float]) -> None:
        nonlocal last, spoken, since
        if step > last:
            # A resumed run starts in the middle: what was done before is not part of its speed.
            if last == 0 and step > 1:
                stored(advance, step - 1)
                spoken = last = step - 1
            advance(step - last)
            last = step
        shown = [f"{n} {values[k]:.4g}" for k, n in _SHOWN.items() if k in values]
        now = time.monotonic()
        if "loss" in values and step > spoken:
            shown.append(f"{sum(tokens[spoken:step]) / max(now - since, 1e-9):,.0f} tokens/s")
            spoken, since = step, now
        if shown:
            reporter.note(f"step {step}: " + ", ".join(shown))

    return report


def _tokens(row: Mapping[str, Any]) -> int:
    """Tokens that a forward pass over a row reads: both answers of a pair come with their prompt."""
    if "completion_ids" in row:
        return len(row["prompt_ids"]) + len(row["completion_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


_SHOWN = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "preference accuracy",
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "held-out accuracy",
    "eval_rewards/margins": "held-out margin",
    "grad_norm": "gradient norm",
}
