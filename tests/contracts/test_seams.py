"""The page of seams is true of the code, and those without a test elsewhere are in force."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import TrainerCall, TrainingJob

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "seams.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
FILES = [path for root in ("harness", "plugins/harness_plugins") for path in sorted((ROOT / root).rglob("*.py"))]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{Path(row[0].strip('`')).stem} {row[1].strip('`')}")
def test_files_names_and_tests_of_the_page_exist(row: list[str]) -> None:
    file, name, of, why, test = (cell.strip("`") for cell in row)
    assert name in (ROOT / file).read_text(encoding="utf-8"), f"{file} does not use it any more"
    assert of and why
    where, _, function = test.partition("::")
    tree = ast.parse((ROOT / where).read_text(encoding="utf-8"))
    assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


def test_versions_of_the_page_are_those_that_are_pinned() -> None:
    pins = {
        name: version
        for build in ("cpu", "cuda")
        for name, version in re.findall(
            r"^([\w.-]+)==([\w.]+)$", (ROOT / f"scripts/pins-{build}.txt").read_text(), re.M
        )
    }
    for name, version in re.findall(r"([\w-]+) (\d+\.\d+\.\d+)", TEXT.replace("\n", " ")):
        assert pins[name.lower()] == version, name


# -------------------------------------------------------------------------------------------------- what is not there


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names of others: attributes of anything but self and cls, and what is imported from other libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            inner = node.value
            if not (isinstance(inner, ast.Name) and inner.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.module.startswith("harness"):
            yield from (part for part in node.module.split(".") if is_private(part))
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            named = node.args[1]
            if isinstance(named, ast.Constant) and isinstance(named.value, str) and is_private(named.value):
                yield named.value


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


PYTHON = {"_exit", "_replace"}
"""Of os and of named tuples: documented, though they begin so."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_private_name_of_others_is_missing_on_the_page(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_of_self(node)}
    listed = {row[1].strip("`") for row in ROWS if row[0].strip("`") == file.relative_to(ROOT).as_posix()}
    assert set(private_names(tree)) - own - PYTHON <= listed


def is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_no_private_method_of_a_trainer_is_missing_on_the_page() -> None:
    """Ours that stand in place of one of theirs, and theirs that ours use."""
    from transformers import Trainer

    from harness.alignment.driven import Driven
    from harness.alignment.pairwise_trainer import PairwiseTrainer
    from harness_plugins.aligners.sft_trainer import MaskedSftTrainer

    listed = {row[1].strip("`") for row in ROWS}
    for cls in (Driven, PairwiseTrainer, MaskedSftTrainer):
        theirs = {name for base in cls.__mro__[1:] for name in vars(base) if is_private(name)}
        assert {name for name in vars(cls) if is_private(name)} & theirs <= listed
        tree = ast.parse(Path(__import__(cls.__module__, fromlist=["x"]).__file__ or "").read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_of_self(node)]
        made = {node.attr for node in nodes if isinstance(node.ctx, ast.Store)} | vars(cls).keys()
        assert {node.attr for node in nodes if is_private(node.attr)} - made <= listed
    assert issubclass(Driven, Trainer)


# --------------------------------------------------------------------------------------------------- what is in force


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Pairs of 5 tokens of prompt and 2 of answer."""
    return [
        {
            "id": f"r{i}",
            "prompt_ids": [0, 10 + i, 11, 12, 13],
            "chosen_ids": [20 + i, 1],
            "rejected_ids": [30 + i, 1],
            "ref_chosen_logps": -9.0,
            "ref_rejected_logps": -9.0,
        }
        for i in range(count)
    ]


def job(tiny: Path, folder: Path, method: Any, data: list[dict[str, Any]], **config: Any) -> TrainingJob:
    """A job on the tiny model with a LoRA adapter."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.alignment.driver import settings
    from harness_plugins.adapters.lora import Lora

    recipe = method.Config(**{"batch_size": 2, "micro_batch_size": 2, "steps": 2, "checkpoint_every": 1, **config})
    fixed = settings(recipe, folder, seed=0, micro=2, cuda=False, bf16=False, heldout=False)
    return TrainingJob(
        stage=method.stages(recipe)[0],
        model=Lora().attach(AutoModelForCausalLM.from_pretrained(tiny), Lora.Config(dropout=0.0)),
        tokenizer=AutoTokenizer.from_pretrained(tiny),
        rows=Dataset.from_list(data),
        config=recipe,
        seed=0,
        arguments=lambda cls, **overrides: cls(**{**fixed, **overrides}),
    )


def test_a_checkpoint_is_put_back_by_our_own_file(tiny: Path, tmp_path: Path) -> None:
    """transformers calls our method, and nothing of peft's is in a checkpoint, nor a card of TRL's."""
    import torch

    from harness.alignment.driven import TRAINABLE, build, trainable
    from harness_plugins.aligners.preference import Dpo

    first = job(tiny, tmp_path, Dpo(), rows())
    build(Dpo().trainer(first), first).train()
    left = {file.name for file in (tmp_path / "checkpoint-1").iterdir()}
    assert TRAINABLE in left and not left & {"adapter_model.safetensors", "README.md"}
    assert not (tmp_path / "README.md").exists()

    again = job(tiny, tmp_path, Dpo(), rows())
    trainer = build(Dpo().trainer(again), again)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2
    for name, weight in trainable(first.model).items():
        assert torch.equal(weight, trainable(again.model)[name]), name


def test_trl_takes_rows_as_they_are(tiny: Path, tmp_path: Path) -> None:
    """Every row, with its reference, reaches the collator as it was; no reference is computed anew."""
    from trl import DPOTrainer

    from harness.alignment.driven import build
    from harness_plugins.aligners.preference import Dpo

    assert {"_prepare_dataset", "_precompute_ref_logps"} <= vars(DPOTrainer).keys()
    one = job(tiny, tmp_path, Dpo(), rows())
    trainer = build(Dpo().trainer(one), one)
    assert trainer.train_dataset.to_list() == rows()
    batches = list(trainer.get_train_dataloader())
    assert [batch["ref_chosen_logps"].tolist() for batch in batches] == [[-9.0, -9.0]] * 2
    # Chosen answers first, in the order of the rows.
    assert [batch["input_ids"][:, 5].tolist() for batch in batches] == [[20, 21, 30, 31], [22, 23, 32, 33]]


@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_only_labelled_positions_are_projected(
    method: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 5 tokens and answers of 2: the head sees 2 positions a sequence, where TRL alone has 6 on a CPU."""
    from trl.kernels import ChunkedLogProbFunction

    from harness.alignment.driven import build
    from harness_plugins.aligners.preference import Dpo
    from harness_plugins.aligners.sft import Sft

    seen: list[int] = []
    head = ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        ChunkedLogProbFunction,
        "apply",
        lambda hidden, *rest: (seen.append(hidden.shape[0]), head(hidden, *rest))[1],
    )
    aligner = Dpo() if method == "dpo" else Sft()
    data = [{**row, "completion_ids": row["chosen_ids"]} for row in rows()]
    one = job(tiny, tmp_path, aligner, data)
    call: TrainerCall = aligner.trainer(one)  # type: ignore[attr-defined]
    trainer = build(call, one)
    trainer.train()
    sequences = 2 if method == "sft" else 4
    assert seen == [2 * sequences] * 2


@pytest.mark.parametrize("shifted", [False, True])
def test_the_numbers_are_those_of_all_positions(tiny: Path, shifted: bool) -> None:
    """Log-probabilities, their gradient, and TRL's other figures, with a row of no label at all."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer import add_fused_lm_head

    from harness.alignment.labels import project_labels_alone

    ids_BT = torch.randint(3, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    labels_BT = ids_BT.clone()
    labels_BT[:, :4] = labels_BT[2] = -100
    given = {"shift_labels" if shifted else "labels": labels_BT}
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    found = []
    for alone in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny)
        add_fused_lm_head(model, outputs=outputs)
        if alone:
            project_labels_alone(model)
        made = model(input_ids=ids_BT, fused_lm_head=True, **given)
        made.log_probs.sum().backward()
        found.append((made, model.model.embed_tokens.weight.grad))
        logits = model(input_ids=ids_BT).logits
        assert logits.shape[:2] == ids_BT.shape, "without the fused head the forward is the model's own"
    (plain, gradient), (ours, our_gradient) = found
    for name in ("label_mask", *outputs):
        assert torch.equal(getattr(ours, name), getattr(plain, name)) or torch.allclose(
            getattr(ours, name).float(), getattr(plain, name).float(), rtol=1e-6, atol=0
        ), name
    assert ours.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert torch.allclose(our_gradient, gradient, rtol=1e-4, atol=1e-7)


def test_trls_count_of_tokens_is_left_out_of_packed_rows(tiny: Path, tmp_path: Path) -> None:
    """TRL keeps it where ours takes it out; of rows that are not packed it stays."""
    from harness.alignment.driven import build
    from harness_plugins.aligners.sft import Sft

    data = [{**row, "completion_ids": row["chosen_ids"]} for row in rows()]
    for packing, names in ((False, {"num_tokens"}), (True, set())):
        one = job(tiny, tmp_path / str(packing), Sft(), data, packing=packing, log_every=1)
        trainer = build(Sft().trainer(one), one)
        trainer.train()
        assert {"num_tokens"} & trainer.state.log_history[0].keys() == names
        assert "entropy" in trainer.state.log_history[0]


def test_the_kind_of_attention_is_in_the_configuration(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    for kind in ("sdpa", "eager"):
        assert AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=kind).config._attn_implementation == kind
