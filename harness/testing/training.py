"""The contracts of an adapter and of an aligner, tried on a tiny model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.alignment.checks import check_method, has_reference, recipe_of, rows_of
from harness.alignment.pairwise import PairwiseLoss
from harness.contracts.adapter import Adapter, ParameterGroup
from harness.contracts.aligner import Aligner, PairLogps, Stage, TrainingJob
from harness.contracts.dataset import DatasetRow
from harness.contracts.recipe import Recipe
from harness.core.errors import HarnessError, StepError, UserError
from harness.core.specs import ModelSpec
from harness.data.row_schema import settled
from harness.testing.common import check_plugin, demand, options_of
from harness.testing.tiny import SENTENCES, tiny_model


def check_adapter(adapter: Adapter, *, options: Mapping[str, Any] | None = None) -> None:
    """Try an adapter against its contract: it trains beside a frozen base, and saves in peft's format.

    Args:
        adapter: the instance that the hook yields.
        options: for the adapter's Config.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_plugin(adapter, Adapter)
    config = options_of(adapter, options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_model(Path(scratch) / "tiny")
        spec = adapter.quantization(config)
        more = {} if spec is None else {"quantization_config": spec}

        def attach() -> tuple[Any, dict[str, Any]]:
            base = AutoModelForCausalLM.from_pretrained(folder, **more)
            torch.manual_seed(0)
            model = adapter.attach(base, config)
            return model, {name: p for name, p in model.named_parameters() if p.requires_grad}

        model, trainable = attach()
        demand(bool(trainable), "`attach` returns a model with trainable weights.", "none requires a gradient")
        count = sum(parameter.numel() for parameter in trainable.values())
        total = sum(parameter.numel() for parameter in model.parameters())
        demand(count < total, "`attach` freezes the base.", f"all {total} weights are trainable")
        ids = torch.tensor([[0, 5, 6, 7, 8, 9]])
        loss = model(input_ids=ids, labels=ids).loss
        if loss.requires_grad:
            loss.backward()
        moving = [
            n for n, p in trainable.items() if p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any()
        ]
        demand(
            bool(moving), "A backward pass reaches the trainable weights.", "no gradient that is finite and not zero"
        )
        _check_groups(adapter, model, config)
        _, again = attach()
        same = trainable.keys() == again.keys() and all(torch.equal(p, again[n]) for n, p in trainable.items())
        demand(same, "With the same seed `attach` gives the same weights.", "two attachments differ")
        out = Path(scratch) / "saved"
        model.save_pretrained(out)
        absent = [n for n in ("adapter_config.json", "adapter_model.safetensors") if not (out / n).is_file()]
        demand(not absent, "`save_pretrained` writes peft's files.", f"no {', '.join(absent)}")


def _check_groups(adapter: Adapter, model: Any, config: Any) -> None:
    """Groups with learning rates of their own, as the driver would refuse them."""
    from harness.alignment.driven import check_groups

    groups = adapter.parameter_groups(model, config)
    if groups is None:
        return
    rule = "`parameter_groups` has every trainable weight in exactly one harness.ParameterGroup."
    demand(bool(groups) and all(isinstance(one, ParameterGroup) for one in groups), rule, repr(groups)[:200])
    try:
        check_groups(model, groups)
    except StepError as error:
        raise AssertionError(f"{rule}\n  seen: {error.what}") from None


def check_aligner(
    aligner: Aligner,
    *,
    options: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    steps: int = 4,
    loss_falls: bool = True,
) -> None:
    """Try an aligner against its contract: every stage trains, reproducibly, and leaves the base alone.

    Stages are a chain, as in `harness align`; after each the method's ``export`` is tried, too.

    The kit builds the training job by hand: a tiny model with a LoRA adapter, four tokenised rows in one batch, three
    of them held out too, constant learning rate 1e-2, CPU.

    Args:
        aligner: the instance that the hook yields.
        options: for the aligner's Config.
        rows: of a :class:`harness.TrainingRow` of the aligner's own, as a data set gives them; otherwise tokenised
            rows (as :class:`harness.TrainingJob` has them), which are made up for pairs and demonstrations. The same
            for every stage.
        steps: optimizer steps of each stage.
        loss_falls: whether the last loss must be below the first (all steps see the same batch).

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(aligner, Aligner)
    recipe = issubclass(aligner.Config, Recipe)
    demand(recipe, "`Config` of an aligner is a subclass of harness.Recipe.", repr(aligner.Config.__mro__[1]))
    config = options_of(aligner, options)
    try:
        check_method(aligner, config)
    except UserError as error:
        raise AssertionError(f"`harness align` takes the method.\n  seen: {error.what}\n  {error.fix}") from None
    if isinstance(aligner, PairwiseLoss):
        for count in (3, 1):
            _check_loss(aligner, config, count)
    with tempfile.TemporaryDirectory() as scratch:
        bench = _Bench(aligner, config, rows, steps, Path(scratch))
        earlier: Path | None = None
        for number, stage in enumerate(aligner.stages(config)):
            own, after = recipe_of(config, stage), Path(scratch) / f"after-{number}.safetensors"
            first, losses, held = bench.train(stage, own, earlier, after)
            finite = len(losses) == steps and all(math.isfinite(loss) for loss in losses)
            demand(finite, f"The trainer logs a finite loss at each of {steps} steps.", f"stage {stage.name}: {losses}")
            if loss_falls:
                lower = losses[-1] < losses[0]
                demand(lower, "On one batch, repeated, the loss falls.", f"stage {stage.name}: {losses}")
            finite = bool(held) and all(math.isfinite(loss) for loss in held)
            demand(finite, "Each held-out row has a finite loss.", f"stage {stage.name}: {held}")
            second, repeated, _ = bench.train(stage, own, earlier, after)
            same = losses == repeated and first == second
            demand(same, "On a CPU the same seed gives the same bytes.", f"stage {stage.name}: {losses} and {repeated}")
            earlier = after


def _check_loss(aligner: PairwiseLoss, config: Any, count: int) -> None:
    """The loss and the rewards of made-up pairs; the trainer would find the same faults once there is a model."""
    import torch

    from harness.alignment.pairwise_trainer import losses, rewards

    lengths_B = torch.arange(2, 2 + count)
    policy = PairLogps(
        (-1.0 * lengths_B).requires_grad_(), (-1.5 * lengths_B).requires_grad_(), lengths_B, lengths_B + 1
    )
    reference = replace(policy, chosen=-1.1 * lengths_B, rejected=-1.4 * lengths_B) if aligner.needs_reference else None
    try:
        losses(aligner, policy, reference, config, trained=True)
        rewards(aligner, policy, reference, config)
    except StepError as error:
        rule = "`loss` returns a loss for each pair, (B,), that depends on the policy; `rewards` two such tensors."
        raise AssertionError(f"{rule}\n  seen: {error.what}") from None


@dataclass(frozen=True)
class _Bench:
    """What every stage of an aligner is tried with."""

    aligner: Aligner
    config: Recipe
    rows: Sequence[Mapping[str, Any]] | None
    steps: int
    scratch: Path

    def train(
        self, stage: Stage, config: Recipe, earlier: Path | None, after: Path
    ) -> tuple[dict[str, bytes], list[float], list[float]]:
        """Train one stage from what the one before has left, and let the method export.

        Returns:
            bytes by name (weights and exported files), the logged losses, and those of held-out rows.
        """
        import torch
        from datasets import Dataset

        from harness.alignment import driven

        seen = f"stage {stage.name}"
        model, before, tokenizer = self._model(stage, config, earlier)
        given = _given(self.aligner, stage, tokenizer, self.rows)
        held = given[:3]
        job = TrainingJob(
            stage=stage,
            model=model,
            tokenizer=tokenizer,
            rows=Dataset.from_list(given),
            config=config,
            seed=0,
            arguments=self._arguments(len(given)),
            heldout=Dataset.from_list(held),
            reference=_made_up if has_reference(self.aligner, stage) else None,
        )
        rule = "`trainer` returns a harness.TrainerCall of a transformers.Trainer on the rows of the job."
        try:
            trainer = driven.build(self.aligner.trainer(job), job)
            rule = f"The trainer logs a finite loss at each of {self.steps} steps."
            began = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            trainer.train()
        except HarnessError as error:
            what = error.what if isinstance(error, StepError | UserError) else error
            raise AssertionError(f"{rule}\n  seen: {seen}: {what}") from None
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        # A trainer may wrap the model or add to it, but what it trains must be what it was given.
        now = dict(model.named_parameters())
        moved = [n for n, old in before.items() if "lora_" not in n and not torch.equal(old, now[n])]
        demand(not moved, "Training leaves the base's weights alone.", f"{seen} changed {', '.join(moved[:2])}")
        changed = [n for n, old in began.items() if not torch.equal(old, now[n])]
        demand(bool(changed), "Training changes the adapter that the job's model carries.", f"{seen} changed nothing")
        driven.save_for_next(model, after, earlier)
        made = {name: now[name].detach().numpy().tobytes() for name in now.keys() - (before.keys() - _lora(before))}
        measured = _held_losses(trainer, held)
        return {**made, **self._exported(job, trainer.model, seen)}, losses, measured

    def _model(self, stage: Stage, config: Recipe, earlier: Path | None) -> tuple[Any, dict[str, Any], Any]:
        """A tiny model with a LoRA adapter and the method's own modules; its weights before those; its tokenizer."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from harness.alignment import driven

        folder = tiny_model(self.scratch / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.aligner.attach(model, tokenizer, config)
        if earlier is not None:
            try:
                driven.hand_on(model, earlier, stage.name)
            except StepError as error:
                rule = "`attach` adds the same modules before every stage."
                raise AssertionError(f"{rule}\n  seen: stage {stage.name}: {error.what}") from None
        return model, before, tokenizer

    def _arguments(self, count: int) -> Callable[..., Any]:
        from harness.alignment import driven

        fixed = {
            "output_dir": str(self.scratch),
            "max_steps": self.steps,
            "per_device_train_batch_size": count,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "logging_first_step": True,
            # By default transformers logs a loss of NaN as 0.
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 0,
            "data_seed": 0,
            "train_sampling_strategy": driven.IN_ORDER,
        }
        return lambda cls, **overrides: cls(**{**fixed, **overrides})

    def _exported(self, job: TrainingJob, model: Any, seen: str) -> dict[str, bytes]:
        """What the method's ``export`` writes, by name."""
        from harness.alignment.export import FilesBeside

        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            try:
                self.aligner.export(job, model, FilesBeside(Path(folder), self.aligner.name))
            except StepError as error:
                rule = "`export` writes into the folder that it is given, under names that nothing else has."
                raise AssertionError(f"{rule}\n  seen: {seen}: {error.what}") from None
            files = [file for file in Path(folder).rglob("*") if file.is_file()]
            return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _lora(names: Iterable[str]) -> set[str]:
    return {name for name in names if "lora_" in name}


def _held_losses(trainer: Any, held: Sequence[Mapping[str, Any]]) -> list[float]:
    """Held-out rows measured as `harness align` does it."""
    from harness.alignment.heldout import LOSS, measure

    measured = measure(trainer, [str(row.get("id", index)) for index, row in enumerate(held)])
    return [row.get(LOSS, math.nan) for row in measured]


def _given(
    aligner: Aligner, stage: Stage, tokenizer: Any, rows: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The rows of the job: tokenised from the author's own, handed in, or made up."""
    schema = rows_of(aligner, stage)
    needs_reference = has_reference(aligner, stage)
    if isinstance(schema, str):
        if rows is None:
            return _rows(stage, tokenizer, needs_reference)
        return [_referenced(dict(row)) if needs_reference else dict(row) for row in rows]
    from harness.data.tokenise import Tokeniser
    from harness.models.chat_templates import resolve_template
    from harness.models.inspect import inspect_model

    demand(bool(rows), f"The kit makes no rows of a class: pass `rows`, as a data set gives {schema.__name__}.", "none")
    try:
        read = [settled(DatasetRow(f"kit/{i}", row), schema, "rows of the kit") for i, row in enumerate(rows or ())]
        model = inspect_model(ModelSpec(model=str(tokenizer.name_or_path)))
        length = min(256, model.max_length)
        tokeniser = Tokeniser(tokenizer, resolve_template(model, "vicuna"), max_length=length, schema=schema)
        tokeniser.keep(read)
        found = tokeniser.finish().rows
    except UserError as error:
        raise AssertionError(f"Rows follow {schema.__name__} and render.\n  seen: {error.what}") from None
    if needs_reference:
        return [_referenced(row) for row in found]
    return found


def _referenced(row: dict[str, Any]) -> dict[str, Any]:
    """Any two numbers will do as the log-probabilities of a reference."""
    sides = ("chosen", "rejected") if "chosen_ids" in row else ("completion",)
    return {**{f"ref_{side}_logps": -3.0 * len(row[f"{side}_ids"]) for side in sides}, **row}


def _made_up(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The same for rows that a method asks for beside its own."""
    return [float(_referenced(dict(row))["ref_completion_logps"]) for row in rows]


def _rows(stage: Stage, tokenizer: Any, needs_reference: bool) -> list[dict[str, Any]]:
    """Four tokenised rows of the stage's schema; other schemas must be handed in."""
    columns: dict[Any, tuple[str, ...]] = {
        "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
        "demonstrations": ("prompt_ids", "completion_ids"),
    }
    demand(
        stage.consumes in columns,
        "The kit makes rows of pairs and demonstrations only: pass `rows`.",
        str(stage.consumes),
    )
    names = columns[stage.consumes]
    texts = [[SENTENCES[(3 * i + j) % len(SENTENCES)][: 20 + 5 * j] for j in range(len(names))] for i in range(4)]
    made: list[dict[str, Any]] = []
    for row in texts:
        ids = [tokenizer(text, add_special_tokens=index == 0)["input_ids"] for index, text in enumerate(row)]
        made.append({"id": f"kit/{len(made)}", **dict(zip(names, ids, strict=True))})
        if stage.consumes == "demonstrations":
            made[-1]["labels_mask"] = [0] * len(ids[0]) + [1] * len(ids[1])
    return [_referenced(row) for row in made] if needs_reference else made
