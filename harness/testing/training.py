"""The contracts of an adapter and of an aligner, tried on a tiny model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.alignment.checks import check_method
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
    """Try an aligner against its contract: every stage trains an adapter, reproducibly, and leaves the base alone.

    The kit builds the training job by hand: a tiny model with a LoRA adapter, four tokenised rows in one batch, three
    of them held out too, constant learning rate 1e-2, CPU.

    Args:
        aligner: the instance that the hook yields.
        options: for the aligner's Config.
        rows: of a :class:`harness.TrainingRow` of the aligner's own, as a data set gives them; otherwise tokenised
            rows (as :class:`harness.TrainingJob` has them), which are made up for pairs and demonstrations.
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
    stages = aligner.stages(config)
    for stage in stages:
        first, losses, held = _train(aligner, stage, config, rows, steps)
        finite = len(losses) == steps and all(math.isfinite(loss) for loss in losses)
        demand(finite, f"The trainer logs a finite loss at each of {steps} steps.", f"stage {stage.name}: {losses}")
        if loss_falls:
            lower = losses[-1] < losses[0]
            demand(lower, "On one batch, repeated, the loss falls.", f"stage {stage.name}: {losses}")
        finite = bool(held) and all(math.isfinite(loss) for loss in held)
        demand(finite, "Each held-out row has a finite loss.", f"stage {stage.name}: {held}")
        second, repeated, _ = _train(aligner, stage, config, rows, steps)
        same = losses == repeated and first == second
        demand(same, "On a CPU the same seed gives the same bytes.", f"stage {stage.name}: {losses} and {repeated}")


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


def _train(
    aligner: Aligner, stage: Stage, config: Any, rows: Sequence[Mapping[str, Any]] | None, steps: int
) -> tuple[dict[str, bytes], list[float], list[float]]:
    """Train one stage from scratch; returns the adapter's bytes, the logged losses, and those of held-out rows."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.alignment import driven

    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_model(Path(scratch) / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        given = _given(aligner, stage, tokenizer, rows)
        fixed = {
            "output_dir": scratch,
            "max_steps": steps,
            "per_device_train_batch_size": len(given),
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

        def arguments(cls: Any, **overrides: Any) -> Any:
            return cls(**{**fixed, **overrides})

        held = given[:3]
        job = TrainingJob(
            stage=stage,
            model=model,
            tokenizer=tokenizer,
            rows=Dataset.from_list(given),
            config=config,
            seed=0,
            arguments=arguments,
            heldout=Dataset.from_list(held),
        )
        rule = "`trainer` returns a harness.TrainerCall of a transformers.Trainer on the rows of the job."
        try:
            trainer = driven.build(aligner.trainer(job), job)
            rule = f"The trainer logs a finite loss at each of {steps} steps."
            trainer.train()
        except HarnessError as error:
            seen = error.what if isinstance(error, StepError | UserError) else error
            raise AssertionError(f"{rule}\n  seen: stage {stage.name}: {seen}") from None
        losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
        # A trainer may wrap the model or add to it, but what it trains must be what it was given.
        after = dict(model.named_parameters())
        moved = [n for n, old in before.items() if "lora_" not in n and not torch.equal(old, after[n])]
        demand(
            not moved, "Training leaves the base's weights alone.", f"stage {stage.name} changed {', '.join(moved[:2])}"
        )
        adapter = {n: after[n].detach() for n in before if "lora_" in n}
        changed = any(not torch.equal(before[n], tensor) for n, tensor in adapter.items())
        demand(
            changed, "Training changes the adapter that the job's model carries.", f"stage {stage.name} changed nothing"
        )
        return {name: tensor.numpy().tobytes() for name, tensor in adapter.items()}, losses, _held_losses(trainer, held)


def _held_losses(trainer: Any, held: Sequence[Mapping[str, Any]]) -> list[float]:
    """Held-out rows measured as `harness align` does it."""
    from harness.alignment.heldout import LOSS, measure

    measured = measure(trainer, [str(row.get("id", index)) for index, row in enumerate(held)])
    return [row.get(LOSS, math.nan) for row in measured]


def _given(
    aligner: Aligner, stage: Stage, tokenizer: Any, rows: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The rows of the job: tokenised from the author's own, handed in, or made up."""
    schema = aligner.consumes
    if isinstance(schema, str):
        return [dict(row) for row in rows] if rows is not None else _rows(stage, tokenizer, aligner.needs_reference)
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
    if aligner.needs_reference:
        return [_referenced(row) for row in found]
    return found


def _referenced(row: dict[str, Any]) -> dict[str, Any]:
    """Any two numbers will do as the log-probabilities of a reference."""
    logps = {f"ref_{side}_logps": -3.0 * len(row[f"{side}_ids"]) for side in ("chosen", "rejected")}
    return {**row, **logps}


def _rows(stage: Stage, tokenizer: Any, needs_reference: bool) -> list[dict[str, Any]]:
    """Four tokenised rows of the stage's schema; other schemas must be handed in."""
    columns = {
        "pairs": ("prompt_ids", "chosen_ids", "rejected_ids"),
        "demonstrations": ("prompt_ids", "completion_ids"),
    }
    demand(
        stage.consumes in columns, "The kit makes rows of pairs and demonstrations only: pass `rows`.", stage.consumes
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
