"""Losses, gradients and the reference against peers: TRL's own trainer, and a plain forward of transformers'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import align, load_plugins
from harness_plugins.aligners.preference import Dpo, Ipo
from harness_plugins.aligners.sft import Sft
from tests.numerics.building import built

Job = Callable[..., Any]
KEPT = 1e9
"""A gradient norm that nothing reaches: gradients are compared as they are, not scaled down."""


def referenced(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with log-probabilities under the base, as harness.alignment.run adds them."""
    from harness.alignment.reference import row_scorer

    with model.disable_adapter():
        values = row_scorer(model, tokenizer)(rows)
    return [
        {**row, **{f"ref_{name}_logps": logp for name, logp in logps.items()}}
        for row, logps in zip(rows, values, strict=True)
    ]


def one_step(trainer: Any) -> tuple[float, dict[str, Any]]:
    """Train one optimiser step; the logged loss, and the gradients by name at the moment of the step."""
    from transformers import TrainerCallback

    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad:
                    found[name] = parameter.grad.detach().clone()

    trainer.add_callback(Look())
    trainer.train()
    (loss,) = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return loss, found


def same_gradients(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every LoRA weight's gradient is the peer's; none is missing or zero."""
    import torch

    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 4 * 2, "two layers with four adapted modules, A and B of each"
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        assert scale > 0, name
        assert torch.allclose(gradient, theirs[name], rtol=1e-5, atol=1e-5 * scale), name


# ------------------------------------------------------------------------------------------------- TRL's DPO trainer


def trl_trainer(folder: Path, model: Any, rows: list[dict[str, Any]], tokenizer: Any, out: Path, **options: Any) -> Any:
    """TRL's own trainer with a LoRA adapter of its own making, which then gets our adapter's weights.

    An adapter that is there beforehand would become TRL's reference; so its reference is the base, as ours is.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    arguments = DPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=len(rows),
        max_steps=1,
        max_grad_norm=KEPT,
        max_length=None,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.peft_config["default"]
    plain = [{key: row[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
    trainer = Tokenised(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(plain),
        processing_class=tokenizer,
        peft_config=config,
    )
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            parameter.copy_(ours[name])
    return trainer


@pytest.mark.parametrize(
    ("method", "config", "options"),
    [
        (Dpo(), {"beta": 0.1}, {"loss_type": ["sigmoid"], "beta": 0.1}),
        (Dpo(), {"beta": 0.7}, {"loss_type": ["sigmoid"], "beta": 0.7, "precompute_ref_log_probs": True}),
        (Ipo(), {"beta": 0.1, "per_token": True}, {"loss_type": ["ipo"], "beta": 0.1}),
    ],
    ids=["dpo", "dpo, TRL's reference computed beforehand", "ipo"],
)
def test_loss_and_gradients_are_trls(
    method: Any,
    config: dict[str, Any],
    options: dict[str, Any],
    tiny: Path,
    pairs: list[dict[str, Any]],
    tokenizer: Any,
    adapted: Callable[..., Any],
    job: Job,
    tmp_path: Path,
) -> None:
    """Ours accumulates three micro batches of two and reads a reference from its store; TRL sees one batch of six."""
    model = adapted()
    theirs = trl_trainer(tiny, model, pairs, tokenizer, tmp_path / "trl", **options)
    their_loss, their_gradients = one_step(theirs)
    ours = built(method, job(method, model, referenced(model, tokenizer, pairs), max_grad_norm=KEPT, **config))
    assert ours.args.gradient_accumulation_steps == 3
    loss, gradients = one_step(ours)
    assert abs(loss - math.log(2)) > 1e-3, "the adapter is not zero"
    assert loss == pytest.approx(their_loss, rel=1e-5)
    same_gradients(gradients, their_gradients)


def test_trls_sigmoid_ignores_label_smoothing(
    tiny: Path, pairs: list[dict[str, Any]], tokenizer: Any, adapted: Callable[..., Any], tmp_path: Path
) -> None:
    """Why cdpo is checked by hand alone: if TRL ever honours it, compare with it."""
    model = adapted()
    losses = []
    for smoothing in (0.0, 0.3):
        trainer = trl_trainer(tiny, model, pairs, tokenizer, tmp_path / str(smoothing), label_smoothing=smoothing)
        losses.append(one_step(trainer)[0])
    assert losses[0] == losses[1]


def test_no_second_adapter_stays(pairs: list[dict[str, Any]], tokenizer: Any, adapted: Any, job: Job) -> None:
    """TRL copies an adapter that is there as its reference; the copy is gone, and the policy still trains."""
    model = adapted()
    trainer = built(Dpo(), job(Dpo(), model, referenced(model, tokenizer, pairs)))
    assert list(trainer.model.peft_config) == ["default"]
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)


# ------------------------------------------------------------------------------------------------ reference and dropout


def test_the_reference_is_the_base(
    tiny: Path, pairs: list[dict[str, Any]], tokenizer: Any, adapted: Callable[..., Any]
) -> None:
    """Against a plain forward of the base, answer by answer: the sum of log softmax over the answer's tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for row in referenced(adapted(), tokenizer, pairs):
        for which in ("chosen", "rejected"):
            ids, answer = row["prompt_ids"] + row[f"{which}_ids"], row[f"{which}_ids"]
            with torch.no_grad():
                logps = base(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(row["prompt_ids"])
            summed = sum(float(logps[start + i - 1, token]) for i, token in enumerate(answer))
            assert row[f"ref_{which}_logps"] == pytest.approx(summed, rel=1e-5)


def test_dropout_is_in_force_in_training_and_off_in_the_reference(
    pairs: list[dict[str, Any]], tokenizer: Any, adapted: Callable[..., Any], job: Job
) -> None:
    import torch

    model = adapted(dropout=0.5)
    model.train()
    rows = referenced(model, tokenizer, pairs)
    assert rows == referenced(model, tokenizer, pairs)
    assert model.training, "scoring leaves the mode as it was"
    trainer = built(Dpo(), job(Dpo(), model, rows))
    assert {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    inputs = trainer.data_collator([dict(row) for row in rows])

    def loss() -> float:
        with torch.no_grad():
            return float(trainer.compute_loss(trainer.model, inputs))

    trainer.model.train()
    assert loss() != loss()
    trainer.model.eval()
    assert loss() == loss()


# ---------------------------------------------------------------------------------------------------------------- SFT


def test_sft_is_cross_entropy_over_the_labelled_tokens_of_a_step(
    tiny: Path, pairs: list[dict[str, Any]], adapted: Callable[..., Any], job: Job
) -> None:
    """Against transformers' own loss on one padded batch with -100 where there is none.

    Rows have 3 to 9 labelled tokens: a mean of the micro batches' means would be another number.
    """
    import torch

    rows = []
    for row in pairs:
        mask = [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"])
        # An earlier answer, as `all_answers` marks it.
        mask[2] = int(row["id"] == "r3")
        rows.append({**row, "completion_ids": row["chosen_ids"], "labels_mask": mask})
    longest = max(len(row["labels_mask"]) for row in rows)
    ids_BT, labels_BT, attention_BT = (torch.full((6, longest), fill) for fill in (2, -100, 0))
    for index, row in enumerate(rows):
        ids = torch.tensor(row["prompt_ids"] + row["completion_ids"])
        ids_BT[index, : len(ids)], attention_BT[index, : len(ids)] = ids, 1
        labels_BT[index, : len(ids)] = torch.where(torch.tensor(row["labels_mask"]) == 1, ids, -100)
    plain = adapted()
    expected = plain(input_ids=ids_BT, attention_mask=attention_BT, labels=labels_BT).loss
    expected.backward()
    loss, gradients = one_step(built(Sft(), job(Sft(), adapted(), rows, max_grad_norm=KEPT)))
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    same_gradients(gradients, {n: p.grad for n, p in plain.named_parameters() if p.requires_grad})


# ----------------------------------------------------------------------------------------------- the command's own way


@pytest.fixture
def preferences(alone: Path) -> Path:
    """24 preference pairs in TRL's format."""
    rows = [
        {"prompt": f"What is {i} and {i}?", "chosen": f"It is {2 * i}.", "rejected": f"No idea what {i} is, sorry."}
        for i in range(24)
    ]
    file = alone / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def engine_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "step" / "provenance.json").read_text())["engine"]
    return found


def test_what_is_in_force_is_recorded_and_the_first_loss_is_ln_2(tiny: Path, preferences: Path, alone: Path) -> None:
    """B is 0 at first, so the policy is the reference, dropout or not, and every pair's loss is ln 2.

    The effective batch is 10 rows; micro batches of 4 do not divide it, so they have 2 rows (5 is more than 4).
    """
    options = {
        "batch_size": 10,
        "micro_batch_size": 4,
        "steps": 2,
        "log_every": 1,
        "eval_rows": 0,
        "learning_rate": 0.01,
    }
    registry = load_plugins()
    made = align("dpo", str(tiny), f"jsonl:{preferences}", out=alone / "a", registry=registry, options=options)
    losses = [line["loss"] for line in made.history if "loss" in line]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[1] != losses[0]
    engine = engine_of(made.folder)
    assert engine["dropout_in_force"] == [0.05]
    assert engine["trainable_dtypes"] == ["torch.float32"]
    assert (engine["micro_batch_size"], engine["accumulation"]) == (2, 5)
    if engine["device"] == "cpu":
        assert engine["optimizer"] == "adamw_torch"

    # Continued: A is frozen and active, and part of the reference; its own dropout is over with its own training.
    config = made.folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_dropout": 0.05', '"lora_dropout": 0.9'))
    (made.folder / "checksums.json").unlink()  # the change is ours
    more = align(
        "dpo",
        str(tiny),
        f"jsonl:{preferences}",
        out=alone / "b",
        registry=registry,
        start=str(made.folder),
        options={**options, "steps": 1},
    )
    (first,) = [line["loss"] for line in more.history if "loss" in line]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert engine_of(more.folder)["dropout_in_force"] == [0.05]


def test_the_optimiser_by_device() -> None:
    """Table 6: paged AdamW where there is CUDA, torch's AdamW elsewhere; both are names that transformers knows."""
    from transformers.training_args import OptimizerNames

    from harness.alignment.driver import optimizer_name

    assert [optimizer_name(cuda) for cuda in (True, False)] == ["paged_adamw_32bit", "adamw_torch"]
    assert {OptimizerNames(optimizer_name(cuda)) for cuda in (True, False)} == {
        OptimizerNames.PAGED_ADAMW,
        OptimizerNames.ADAMW_TORCH,
    }


def test_micro_batches_divide_the_effective_batch() -> None:
    """Divisors of 10: 1, 2, 5, 10; of 16: 1, 2, 4, 8, 16; 7 has none between."""
    from harness.alignment.driver import micro_batch_size

    assert [micro_batch_size(10, most) for most in (1, 2, 4, 5, 9, 10, 99)] == [1, 2, 2, 5, 5, 10, 10]
    assert [micro_batch_size(16, most) for most in (4, 3, 16)] == [4, 2, 16]
    assert micro_batch_size(7, 6) == 1


# ------------------------------------------------------------------------------------------------- TRL's KTO trainer


def test_loss_and_gradients_are_those_of_trls_kto(
    tiny: Path, pairs: list[dict[str, Any]], tokenizer: Any, adapted: Callable[..., Any], job: Job, tmp_path: Path
) -> None:
    """Ours sees three micro batches of two, TRL one batch of six; the reference point is not 0, the weights differ."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import KTOConfig, KTOTrainer

    from harness.alignment.reference import row_scorer
    from harness_plugins.aligners.kto import Kto
    from harness_plugins.aligners.kto_loss import mismatched

    rated = [
        {
            "id": row["id"],
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row["chosen_ids"],
            "labels_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
            "ratings": {"preference": float(n < 2)},
        }
        for n, row in enumerate(pairs)
    ]
    others = [row["completion_ids"] for row in mismatched(rated, 1024)]
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}

    class Tokenised(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    fixed = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    model = adapted()
    theirs = Tokenised(
        model=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        args=KTOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=len(rated),
            max_steps=1,
            max_grad_norm=KEPT,
            max_length=None,
            logging_steps=1,
            gradient_checkpointing=False,
            **weights,
            **fixed,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    **{key: row[key] for key in ("prompt_ids", "completion_ids")},
                    "KL_completion_ids": other,
                    "label": bool(row["ratings"]["preference"]),
                }
                for row, other in zip(rated, others, strict=True)
            ]
        ),
        processing_class=tokenizer,
        peft_config=model.peft_config["default"],
    )
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            parameter.copy_(ours[name])
    their_loss, their_gradients = one_step(theirs)
    (their_kl,) = [line["kl"] for line in theirs.state.log_history if "kl" in line]

    def reference(rows: Any) -> list[float]:
        with model.disable_adapter():
            return [one["completion"] for one in row_scorer(model, tokenizer)(list(rows))]

    given = job(Kto(), model, referenced(model, tokenizer, rated), max_grad_norm=KEPT, **weights)
    given.reference = reference
    trainer = built(Kto(), given)
    assert trainer.args.gradient_accumulation_steps == 3
    loss, gradients = one_step(trainer)
    (kl,) = [line["kl"] for line in trainer.state.log_history if "kl" in line]
    assert kl == pytest.approx(their_kl, rel=1e-4)
    assert kl > 1e-3
    assert loss == pytest.approx(their_loss, rel=1e-5)
    same_gradients(gradients, their_gradients)
