"""What an alignment leaves: files that peft, transformers and `harness eval` take, and a record of what was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.alignment import driver as training
from harness.alignment.run import Alignment
from harness.core.specs import ModelSpec
from harness.models.inspect import inspect_model
from harness.models.lineage import base_for_peft
from harness.steps.journal import read_rows
from harness.steps.provenance import digest_of_bytes
from harness.testing import tiny_model
from tests.alignment.processes import N_PAIRS, log_of

Align = Callable[..., Alignment]
TASK = """\
name: asks
prompt: chat
template: "{{ prompt }}"
target: "{{ chosen }}"
decoding: {max_new_tokens: 2}
dataset:
  name: jsonl
  options: {path: PAIRS}
scorers:
- name: exact_match
"""
IDS = torch.tensor([[0, 5, 60, 7, 80, 9, 200, 31]])


@pytest.fixture
def task(alone: Path, pairs: Path) -> list[str]:
    """Options of `harness eval` that ask the very prompts of the pairs, as chat."""
    (alone / "asks.yaml").write_text(TASK.replace("PAIRS", str(pairs)), encoding="utf-8")
    return ["--task", str(alone / "asks.yaml"), "--engine", "transformers"]


def sent(run: str) -> set[tuple[int, ...]]:
    """Token ids that an evaluation sent."""
    files = list(Path(run).glob("requests/*.jsonl.gz"))
    assert len(files) == 1
    return {tuple(request["prompt_ids"]) for row in read_rows(files[0]) for request in row["requests"]}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Token ids of the prompts that training really saw; filled when an alignment trains."""
    found: set[tuple[int, ...]] = set()
    real = training.Driven.training_step

    def training_step(trainer: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        # Chosen answers come first; what is neither padding nor answer is the prompt.
        for ids, mask, is_answer in zip(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True
        ):
            found.add(tuple(ids[(mask == 1) & (is_answer == 0)].tolist()))
        return real(trainer, model, inputs, *rest)

    monkeypatch.setattr(training.Driven, "training_step", training_step)
    return found


def test_peft_takes_it(align: Align, tiny: Path) -> None:
    """Plain peft, from the folder; it is no copy of the base, and none of its files says where it was made."""
    made = align("dpo", "out", checkpoints=(3,))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        before = base(IDS).logits
        after = PeftModel.from_pretrained(base, made.folder).eval()(IDS).logits
    assert not torch.equal(before, after)
    names = {path.name for path in made.folder.iterdir() if path.name != ".lock"}
    weights = {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "lineage.json"}
    weights |= {"checksums.json"}
    assert names == {*weights, "README.md", "step-3", "step"}
    assert {path.name for path in (made.folder / "step-3").iterdir()} == weights
    files = [path for path in made.folder.rglob("*") if path.is_file() and path.suffix not in (".gz", ".safetensors")]
    assert len(files) >= 10
    for path in files:
        assert str(Path.cwd()) not in path.read_text(encoding="utf-8"), path
        assert str(tiny) not in path.read_text(encoding="utf-8"), path


def logits(model: Any) -> torch.Tensor:
    """Of the same few tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def by_hand(base: Path, adapter: Path) -> torch.Tensor:
    """What the adapter on this base says."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def test_auto_peft_finds_a_local_base(align: Align, cli: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder in which it was trained; a base beside it, trained from elsewhere, from the adapter's own."""
    shutil.copytree(tiny, "models/base")
    made = align("orpo", "runs/arm", model=Path("models/base"), steps=1)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("models/base", None)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("runs/arm")), by_hand(tiny, made.folder))
    assert (
        "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), THIS)`"
        in (made.folder / "README.md").read_text()
    )
    merge = ["merge", "linear", "--as", "adapter", "--base", "models/base", "--inputs", made.folder, made.folder]
    assert cli(*merge, "--out", "merged").code == 0
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("merged")), by_hand(tiny, Path("merged")))
    Path("cwd").mkdir()
    monkeypatch.chdir("cwd")
    beside = align("orpo", "../models/arm", model=Path("../models/base"), steps=1)
    monkeypatch.chdir(beside.folder)
    assert json.loads(Path("adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(".")), by_hand(tiny, Path()))


def test_auto_peft_finds_a_base_of_the_hub(
    align: Align, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From anywhere, at the commit it was trained on."""
    repository, commit = tmp_path / "hub" / "models--some--base", "1" * 40
    shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = align("orpo", "out", model="some/base", steps=1)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", commit)
    # The branch has moved on since.
    (repository / "refs" / "main").write_text("2" * 40)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(made.folder)), by_hand(tiny, made.folder))
    assert "`AutoPeftModelForCausalLM.from_pretrained(THIS)` opens it" in (made.folder / "README.md").read_text()


def test_a_base_elsewhere_is_named_without_its_place(tmp_path: Path, tiny: Path) -> None:
    """A path with .. up to the root would be an absolute one in disguise."""
    info = inspect_model(ModelSpec(model=str(tiny)))
    assert base_for_peft(info, tmp_path / "out") == {"base_model_name_or_path": "tiny", "revision": None}


def test_template_and_lineage(align: Align, tiny: Path) -> None:
    """The template's bytes lie beside the adapter, and their digest is in the lineage."""
    made = align("sft", "out")
    template = (made.folder / "chat_template.jinja").read_bytes()
    assert template.decode() == AutoTokenizer.from_pretrained(tiny).chat_template
    lineage = json.loads((made.folder / "lineage.json").read_text())
    assert lineage["template"] == digest_of_bytes(template)
    assert (lineage["adapters"], lineage["method"], lineage["step"]) == ([], "sft", made.plan.id)


def test_evaluation_sends_what_training_saw(
    align: Align, cli: Any, task: list[str], tiny: Path, seen: set[tuple[int, ...]]
) -> None:
    """The parity gate."""
    align("dpo", "out")
    # Six steps of four rows.
    assert len(seen) == 24
    ran = cli("eval", "--model", tiny, "--adapter", "out", *task, "--out", "run")
    assert ran.code == 0, ran.err
    asked = sent("run")
    assert len(asked) == N_PAIRS
    assert seen < asked


def test_a_base_without_template_speaks_as_its_adapter(
    align: Align, cli: Any, task: list[str], tmp_path: Path, seen: set[tuple[int, ...]]
) -> None:
    """It has none; the adapter brings the one it was trained with."""
    bare = tiny_model(tmp_path / "bare", chat_template=False)
    align("dpo", "out", model=bare, template="vicuna")
    ran = cli("eval", "--model", bare, "--adapter", "out", *task, "--out", "run")
    assert ran.code == 0, ran.err
    assert seen < sent("run")


def test_another_template_stops(align: Align, cli: Any, task: list[str], tiny: Path) -> None:
    """Unless the user says that it may differ."""
    align("dpo", "out", template="vicuna")
    evaluate = ["eval", "--model", str(tiny), "--adapter", "out", *task, "--out", "run"]
    ran = cli(*evaluate)
    assert ran.code == 2
    assert "--adapter out: was trained with chat template" in ran.err
    assert "--allow-template-mismatch" in ran.err
    assert not Path("run").exists()
    assert cli(*evaluate, "--allow-template-mismatch").code == 0


def test_a_model_trained_whole(align: Align, cli: Any, task: list[str], tiny: Path) -> None:
    """`none` leaves a model folder: transformers and `harness eval` open it, and it generates with a cache."""
    made = align("dpo", "out", adapter="none")
    assert made.history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.config.use_cache is True
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        assert not torch.equal(model(IDS).logits, base(IDS).logits)
    ran = cli("eval", "--model", "out", *task, "--out", "run")
    assert ran.code == 0, ran.err
    assert (made.folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_a_model_trained_whole_is_opened_once(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL would load a second copy as the reference."""
    from trl.trainer import dpo_trainer

    opened: list[str] = []
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *_, **__: opened.append("again"))
    align("dpo", "out", adapter="none", steps=1)
    assert opened == []


def test_the_record(align: Align) -> None:
    """Log, provenance and card say what was in force, not what was asked for."""
    made = align("dpo", "out", lora={"rank": 4, "dropout": 0.25, "targets": ["q_proj"]}, samples=40)
    lines = log_of(made.folder, "train")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "rewards/margins", "rewards/accuracies", "learning_rate", "grad_norm"} <= trained[0].keys()
    # Cosine from 1e-3 over six steps: the first step is at the peak.
    assert trained[0]["learning_rate"] == pytest.approx(1e-3)
    assert trained[3]["learning_rate"] == pytest.approx(0.5e-3)
    engine = json.loads((made.folder / "step" / "provenance.json").read_text())["engine"]
    # Two layers; q_proj is square, so A and B have the same number of weights.
    width = made.plan.model.config["hidden_size"]
    assert engine["trainable_parameters"] == 2 * 2 * 4 * width
    assert engine["dropout_in_force"] == [0.25]
    assert engine["trainable_dtypes"] == ["torch.float32"]
    # On a CPU there is no paged AdamW.
    assert engine["optimizer"] == "adamw_torch"
    card = (made.folder / "README.md").read_text()
    assert "Method `dpo`, adapter `lora`, seed 0" in card
    assert f"Base `{made.plan.model.name}` (weights {made.plan.model.weights_digest[:12]})." in card
    assert "selected to train 40" in card
    assert "| adapter.dropout | 0.25 |" in card
    assert f"Last training loss: {trained[-1]['loss']:.6g} at step 6." in card
    assert f"* eval_loss: {made.heldout['eval_loss']:.6g}" in card
    assert "runtime" not in card
    assert "Not measured here: helpfulness and harmlessness." in card


def test_finished_returns_at_once(align: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same history."""
    first = align("dpo", "out")
    with monkeypatch.context() as patch:
        patch.setattr("harness.alignment.run._Run.carry_out", lambda _: pytest.fail("it trained again"))
        again = align("dpo", "out")
    assert (again.history, again.heldout) == (first.history, first.heldout)


def test_fresh_deletes_an_alignment_and_nothing_else(align: Align, cli: Any) -> None:
    """A user's own file in the folder stops it."""
    from harness.core.errors import UserError

    align("dpo", "out", checkpoints=(2,))
    align("dpo", "out", seed=1, fresh=True)
    assert not Path("out/step-2").exists()
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that are no alignment's \(notes.txt\)"):
        align("dpo", "out", seed=2, fresh=True)
    assert Path("out/adapter_model.safetensors").exists()


def test_no_file_of_an_alignment_says_where_its_data_lay(align: Align, pairs: Path) -> None:
    """Neither as a path nor with its slashes made into dashes."""
    made = align("sft", "out", steps=1)
    folder = str(pairs.parent).strip("/")
    written = [path for path in made.folder.rglob("*") if path.is_file()]
    for path in written:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert folder not in text and folder.replace("/", "-") not in text, path
    lineage = json.loads((made.folder / "lineage.json").read_text())
    assert lineage["dataset"] == "jsonl:pairs.jsonl"
    assert made.plan.arm.startswith("sft-jsonl-pairs.jsonl-")


def test_samples_and_selected_count_rows_that_are_trained_on(align: Align, alone: Path) -> None:
    """Every third prompt is longer than the context; such rows take nobody's place."""
    rows = [
        {"prompt": f"Say {n}." + " more" * (200 if n % 3 == 0 else 0), "chosen": f"Yes, {n}.", "rejected": f"No {n}."}
        for n in range(60)
    ]
    file = alone / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = align("sft", "out", data=file, samples=20, steps=1, max_length=64)
    step = json.loads((made.folder / "step" / "step.json").read_text())
    assert step["counts"]["jsonl:rows.jsonl"]["selected to train"] == 20
    assert step["tokens"]["kept"] == 20
    assert step["dropped"]["prompt longer than the context (64 tokens)"] == step["tokens"]["rows"] - 20 > 0
