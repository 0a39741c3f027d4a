"""Drive a trainer to its end: order of rows, checkpoints, resume, log, memory that runs out, signals.

Heavy: imported when training starts.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from harness.alignment.driven import IN_ORDER, Driven
from harness.contracts.recipe import Recipe
from harness.steps.files import fsync_folder, write_json, writing
from harness.steps.folder import CHECKPOINT_COMPLETE


class StoppedError(BaseException):
    """Training stopped because a signal asked for it; the last checkpoint is complete."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def out_of_memory(error: Exception) -> str | None:
    """The first line of an error that says that memory ran out; None for any other."""
    text = str(error)
    known = "out of memory" in text.lower() or "can't allocate memory" in text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and known):
        return (text.splitlines() or [type(error).__name__])[0]
    return None


def order_rows(lengths: Sequence[int], *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Which rows each optimiser step sees.

    Epoch after epoch of seeded permutations, cut into effective batches; within one batch longest first, which packs
    micro batches of like length and cannot change what a step learns from.

    Args:
        lengths: tokens of each row.
        batch_size: rows per optimiser step.
        steps: optimiser steps.
        seed: of the permutations.

    Returns:
        per step, indices of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    while len(stream) < steps * batch_size:
        stream += torch.randperm(len(lengths), generator=generator).tolist()
    batches = [stream[i * batch_size : (i + 1) * batch_size] for i in range(steps)]
    return [sorted(batch, key=lambda index: (-lengths[index], index)) for batch in batches]


def micro_batch_size(batch_size: int, most: int) -> int:
    """The greatest number of rows up to ``most`` that divides the effective batch: every step sees whole micro batches.

    Otherwise accumulation would round the effective batch up, and shift all later steps against the batch plan.
    """
    return max(rows for rows in range(1, min(batch_size, most) + 1) if batch_size % rows == 0)


@dataclass
class Progress:
    """What callbacks tell the driver, and the driver the callbacks."""

    report: Callable[[int, dict[str, float]], None]
    log: Callable[..., None]
    keep: frozenset[int] = frozenset()
    stop: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)


def settings(
    recipe: Recipe, folder: Path, *, seed: int, micro: int, cuda: bool, bf16: bool, heldout: bool, processes: int = 1
) -> dict[str, Any]:
    """transformers' training arguments for a recipe, the same for every method."""
    return {
        "output_dir": str(folder),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": recipe.batch_size // (micro * processes),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps,
        "max_grad_norm": recipe.max_grad_norm,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "optim": optimizer_name(cuda),
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not cuda,
        "bf16": bf16,
        "save_strategy": "steps",
        "save_steps": recipe.checkpoint_every,
        "logging_steps": recipe.log_every,
        # A loss that is not a number must be seen, not filtered out of the log.
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if heldout and recipe.eval_every else "no",
        "eval_steps": recipe.eval_every or None,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_num_workers": 0,
        # The rows already lie in the order of the batch plan.
        "train_sampling_strategy": IN_ORDER,
        **(_shared(cuda) if processes > 1 else {}),
    }


def _shared(cuda: bool) -> dict[str, Any]:
    # Every trainable weight has a gradient in every step: looking for others costs a walk over the graph.
    return {"ddp_backend": "nccl" if cuda else "gloo", "ddp_find_unused_parameters": False}


def optimizer_name(cuda: bool) -> str:
    """Paged AdamW on CUDA (arXiv 2406.04879, Table 6), torch's AdamW elsewhere; the substitution is recorded."""
    return "paged_adamw_32bit" if cuda else "adamw_torch"


def drive(
    trainer: Driven,
    progress: Progress,
    batches: Sequence[Sequence[str]],
    heldout: Sequence[str] = (),
    curves: Sequence[TrainerCallback] = (),
) -> list[dict[str, Any]]:
    """Train to the end, from the last complete checkpoint if there is one, and measure held-out rows.

    Args:
        trainer: of :func:`harness.alignment.driven.build`; its training rows are in the order of ``batches``.
        progress: callbacks.
        batches: row ids of every optimiser step, for messages.
        heldout: ids of the held-out rows.
        curves: callbacks that hand on what is logged.

    Returns:
        per held-out row its id and values (see :mod:`harness.alignment.heldout`).

    Raises:
        StepError: the loss is not a number.
        StoppedError: a signal asked to stop; a checkpoint has been written.
    """
    trainer.harness_batches, trainer.harness_heldout = batches, heldout
    # The harness shows progress itself.
    trainer.remove_callback(PrinterCallback)
    for callback in (_Callback(progress), *curves):
        trainer.add_callback(callback)
    if trainer.args.process_index:
        # Every process draws its own dropout; one that goes on takes its state from the checkpoint.
        torch.manual_seed(trainer.args.seed + trainer.args.process_index)
    folder = Path(str(trainer.args.output_dir))
    with trainer.args.main_process_first(desc="checkpoints"):
        last = last_checkpoint(folder)
    if last is not None:
        progress.log("resumed", checkpoint=last.name)
    trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    if progress.stop is not None and trainer.state.global_step < trainer.args.max_steps:
        raise StoppedError(progress.stop)
    if heldout:
        trainer.evaluate()
    return trainer.harness_measured[1] if trainer.harness_measured is not None else []


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; incomplete ones are deleted."""
    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        if (path / CHECKPOINT_COMPLETE).is_file():
            complete.append((int(path.name.rsplit("-", 1)[1]), path))
        else:
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


class _Callback(TrainerCallback):
    """Progress, log, complete checkpoints, kept checkpoints, and stopping on request."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        step = state.global_step
        self.progress.stop = _agreed(self.progress.stop, args)
        if self.progress.stop is not None:
            control.should_save, control.should_training_stop = True, True
        if step in self.progress.keep:
            control.should_save = True
        self.progress.report(step, {})
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        values = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self.progress.history.append({"step": state.global_step, **values})
        self.progress.log("train", step=state.global_step, **values)
        self.progress.report(state.global_step, values)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.world_size > 1:
            # Every process writes its own random state; the checkpoint is whole when all have.
            torch.distributed.barrier()
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in [*(file for file in folder.rglob("*") if file.is_file()), folder]:
            # A file or a folder, it is the same call.
            with writing(path):
                fsync_folder(path)
        write_json(folder / CHECKPOINT_COMPLETE, {"step": state.global_step})
        keep = {f"checkpoint-{step}" for step in self.progress.keep} | {folder.name}
        for old in Path(args.output_dir).glob("checkpoint-*"):
            if old.name not in keep and old != folder:
                shutil.rmtree(old)


def _agreed(stop: int | None, args: Any) -> int | None:
    """The signal that any process has met: they must all stop after the same step."""
    if args.world_size == 1:
        return stop
    number = torch.tensor(stop or 0, device=args.device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return int(number) or None


def read_history(file: Path) -> list[dict[str, Any]]:
    """Lines of a log.jsonl that are about training, in the order of steps.

    A run that was interrupted logs the steps after its last checkpoint twice; the later line is the one that counts.
    """
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            # Cut short by a kill.
            continue
        if line.get("event") == "train" and "train_runtime" not in line:
            found[int(line["step"]), any(key.startswith("eval_") for key in line)] = line
    return [found[key] for key in sorted(found)]
