"""The contracts of an adapter and of an aligner, tried on a tiny model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.alignment.pairwise import PairwiseLoss
from harness.contracts.adapter import Adapter
from harness.contracts.aligner import Aligner, PairLogps, Stage, TrainingJob
from harness.contracts.recipe import Recipe
from harness.core.errors import StepError
from harness.data.row_schema import FIELDS
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
        _, again = attach()
        same = trainable.keys() == again.keys() and all(torch.equal(p, again[n]) for n, p in trainable.items())
        demand(same, "With the same seed `attach` gives the same weights.", "two attachments differ")
        out = Path(scratch) / "saved"
        model.save_pretrained(out)
        absent = [n for n in ("adapter_config.json", "adapter_model.safetensors") if not (out / n).is_file()]
        demand(not absent, "`save_pretrained` writes peft's files.", f"no {', '.join(absent)}")


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
        rows: tokenised rows (as :class:`harness.TrainingJob` has them); made up for pairs and demonstrations.
        steps: optimizer steps of each stage.
        loss_falls: whether the last loss must be below the first (all steps see the same batch).

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(aligner, Aligner)
    recipe = issubclass(aligner.Config, Recipe)
    demand(recipe, "`Config` of an aligner is a subclass of harness.Recipe.", repr(aligner.Config.__mro__[1]))
    config = options_of(aligner, options)
    schema = getattr(aligner, "consumes", None)
    known = schema in FIELDS if isinstance(schema, str) else isinstance(schema, type)
    demand(known, f"`consumes` is one of {', '.join(FIELDS)}, or a row class.", repr(schema))
    if isinstance(aligner, PairwiseLoss):
        for count in (3, 1):
            _check_loss(aligner, config, count)
    stages = aligner.stages(config)
    proper = isinstance(stages, tuple) and bool(stages) and all(isinstance(stage, Stage) for stage in stages)
    demand(proper, "`stages` returns a tuple of one or more harness.Stage.", repr(stages))
    names = [stage.name for stage in stages]
    demand(len(set(names)) == len(names), "Names of stages are distinct.", repr(names))
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_model(Path(scratch) / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        given = list(rows) if rows is not None else _rows(stage, tokenizer, aligner.needs_reference)
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
        trainer = aligner.trainer(job)
        demand(isinstance(trainer, Trainer), "`trainer` returns a transformers.Trainer.", type(trainer).__name__)
        trainer.train()
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

    rule = "The trainer evaluates the held-out rows of the job (`eval_dataset=job.heldout`)."
    demand(trainer.eval_dataset is not None, rule, "it has no `eval_dataset`")
    measured = measure(trainer, [str(row.get("id", index)) for index, row in enumerate(held)])
    return [row.get(LOSS, math.nan) for row in measured]


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
        if needs_reference and stage.consumes == "pairs":
            # Any two numbers will do as the log-probabilities of a reference.
            made[-1] |= {"ref_chosen_logps": -3.0 * len(ids[1]), "ref_rejected_logps": -3.0 * len(ids[2])}
    return made
