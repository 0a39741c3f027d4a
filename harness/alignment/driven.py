"""The trainer that a method asks for, as a subclass of our own: built, checked, with what it does differently.

Heavy: imported when training starts.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from harness.alignment.heldout import means, measure
from harness.alignment.labels import project_labels_alone
from harness.contracts.adapter import ParameterGroup
from harness.contracts.aligner import TrainerCall, TrainingJob
from harness.core.errors import StepError
from harness.steps.files import fsync_folder, writing

TRAINABLE = "trainable.safetensors"
IN_ORDER = "sequential"
"""transformers' word for rows that are trained on in the order in which they lie."""


def build(call: TrainerCall, job: TrainingJob, groups: Sequence[ParameterGroup] | None = None) -> Driven:
    """The trainer of a method, as a subclass that the harness drives.

    Args:
        call: what the method asks for.
        job: what it was given.
        groups: of the adapter; None: the trainer makes its own.

    Raises:
        StepError: it is no trainer, or does not train on the rows of the job, in their order.
    """
    if not isinstance(call, TrainerCall):
        raise _fault(f"`trainer` returned {type(call).__name__}, not a harness.TrainerCall")
    if not (isinstance(call.cls, type) and issubclass(call.cls, Trainer)):
        raise _fault(f"`trainer` asks for {call.cls!r}, which is no subclass of transformers.Trainer")
    driven = type(f"Driven{call.cls.__name__}", (Driven, call.cls), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer: Driven = driven(**call.arguments)
    if trainer.args.train_sampling_strategy != IN_ORDER:
        raise _fault("its trainer takes rows in an order of its own: its arguments were not made by `job.arguments`")
    for name, given in (("train_dataset", job.rows), ("eval_dataset", job.heldout)):
        found = getattr(trainer, name)
        if given is not None and (found is None or len(found) != len(given)):
            seen = "none" if found is None else f"{len(found):,} rows"
            raise _fault(f"its trainer has {seen} as `{name}`, and the job has {len(given):,}")
    project_labels_alone(trainer.model)
    trainer.harness_groups = groups
    return trainer


def _fault(what: str) -> StepError:
    fix = "This is a fault of the method: `harness.testing.check_aligner` finds such."
    return StepError("the method's trainer", what, fix)


def check_groups(model: Any, groups: Sequence[ParameterGroup]) -> None:
    """Hold an adapter's groups against its trainable weights.

    Raises:
        StepError: one is in no group, or in two; or a group holds something else, or has a rate that is not positive.
    """
    fix = "This is a fault of the adapter: `harness.testing.check_adapter` finds such."
    where = "the adapter's parameter groups"
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    counts = Counter(id(parameter) for group in groups for parameter in group.parameters)
    if strange := [one for one in counts if one not in names]:
        raise StepError(where, f"{len(strange)} of their weights are not trainable weights of the model", fix)
    if absent := [name for one, name in names.items() if one not in counts]:
        raise StepError(where, f"{absent[0]} is in none of them", fix)
    if twice := [names[one] for one, count in counts.items() if count > 1]:
        raise StepError(where, f"{twice[0]} is in two of them", fix)
    if wrong := [group.rate for group in groups if not group.rate > 0]:
        raise StepError(where, f"a rate is {wrong[0]}, and rates are above 0", fix)


class Driven(Trainer):
    """Mixed in front of the plugin's trainer class by :func:`build`."""

    harness_batches: Sequence[Sequence[str]] = ()
    harness_heldout: Sequence[str] = ()
    harness_measured: tuple[int, list[dict[str, Any]]] | None = None
    harness_groups: Sequence[ParameterGroup] | None = None

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Held-out rows, each weighing the same; nothing is done again at a step that has been evaluated."""
        step = self.state.global_step
        if self.harness_measured is None or self.harness_measured[0] != step:
            self.harness_measured = step, measure(self, self.harness_heldout)
            found = {f"{metric_key_prefix}_{k}": v for k, v in means(self.harness_measured[1]).items()}
            self.log(dict(found))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return {f"{metric_key_prefix}_{k}": v for k, v in means(self.harness_measured[1]).items()}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own optimiser; with groups of the adapter, the recipe's over those.

        Raises:
            StepError: groups that do not cover the trainable weights, or beside an optimiser of the trainer's own.
        """
        groups, model = self.harness_groups, self.model
        if groups is None:
            return super().create_optimizer(*args, **kwargs)
        assert model is not None
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            raise _fault("its trainer brings an optimiser, and the adapter has parameter groups: one would be ignored")
        check_groups(model, groups)
        decaying = set(self.get_decay_parameter_names(model))
        decays = {id(p) for name, p in model.named_parameters() if name in decaying}
        cls, arguments = self.get_optimizer_cls_and_kwargs(self.args)
        made = []
        for group in groups:
            for decay in (True, False):
                chosen = [parameter for parameter in group.parameters if (id(parameter) in decays) is decay]
                if chosen:
                    weight_decay = self.args.weight_decay if decay else 0.0
                    rate = self.args.learning_rate * group.rate
                    made.append({"params": chosen, "lr": rate, "weight_decay": weight_decay})
        self.optimizer = cls(made, **arguments)
        return self.optimizer

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: TRL writes a card into every checkpoint, and ours is written once, at the end."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss.detach()).all():
            step = self.state.global_step
            ids = self.harness_batches[step] if step < len(self.harness_batches) else []
            raise StepError(
                f"step {step + 1}",
                f"the loss is {loss.item()} on rows {', '.join(map(str, ids))}",
                "Lower learning_rate, or look at those rows with `harness data show`.",
            )
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The trainable weights alone: adapters of any kind, or all weights."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / TRAINABLE):
            save_file(trainable(self.model), folder / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.model if model is None else model, Path(resume_from_checkpoint) / TRAINABLE)


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the trainable weights, by name, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def restore(model: Any, file: Path) -> None:
    """Put saved trainable weights back; every one must be there."""
    stored = load_file(file)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(stored[name])


def save_for_next(model: Any, file: Path, earlier: Path | None) -> None:
    """Write what a stage leaves to the next: its trained weights, and those that stages before it have trained.

    Args:
        model: the job's.
        file: written atomically.
        earlier: the same of the stage before; None: there was none.
    """
    kept = set(load_file(earlier)) if earlier is not None else set[str]()
    weights = {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in kept
    }
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with writing(file):
        save_file(weights, temporary)
        # A file or a folder, it is the same call.
        fsync_folder(temporary)
        temporary.replace(file)
        fsync_folder(file.parent)


def hand_on(model: Any, file: Path, stage: str) -> None:
    """Put the weights into a model that the stage before has left.

    Raises:
        StepError: it has no such weight, or one of another shape.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in load_file(file).items():
            found = parameters.get(name)
            if found is None or found.shape != weight.shape:
                seen = "has none of that name" if found is None else f"has it as {list(found.shape)}"
                what = f"an earlier stage has trained {name} {list(weight.shape)}, and the model {seen}"
                fix = "This is a fault of the method: its `attach` adds the same modules before every stage."
                raise StepError(f"stage {stage}", what, fix)
            found.copy_(weight)
