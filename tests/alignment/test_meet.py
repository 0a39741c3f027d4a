"""MEET as `harness align` carries it out: what evaluation gets is what training saw, and a kill changes nothing."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness import ModelSpec, UserError, control_place, inspect_model, soft_prompt
from harness.models.inspect import inspect_adapter
from harness.steps.journal import read_rows
from tests.alignment.processes import Zygote, as_set, log_of
from tests.alignment.test_resume import AT_STEP
from tests.alignment.test_stages import at_file

CONTROL = Path("step") / "stages" / "control"
SHORT: dict[str, Any] = {"control_steps": 4, "adapter": {"rank": 2, "dropout": 0.1}}
PROMPT = {**SHORT, "control": "prompt", "tokens": 3, "control_rate": 0.5}
LORA = {**SHORT, "control": "lora", "control_rank": 2, "control_rate": 0.02}


def settings(**given: Any) -> dict[str, Any]:
    adapter = given.pop("adapter", None)
    return {**given, **({"lora": adapter} if adapter is not None else {})}


def measured(out: Path) -> dict[str, dict[str, float]]:
    return {row["id"]: row for row in read_rows(out / "step" / "heldout.jsonl.gz")}


def loss_of(model: Any, row: dict[str, Any], soft_ND: torch.Tensor | None, place: int) -> float:
    """Nats per answer token, with vectors behind so many of the prompt's tokens."""
    ids = [*row["prompt_ids"], *row["completion_ids"]]
    words_TD = model.get_input_embeddings()(torch.tensor(ids))
    extra = 0 if soft_ND is None else len(soft_ND)
    parts = [words_TD[:place], *([] if soft_ND is None else [soft_ND]), words_TD[place:]]
    with torch.no_grad():
        logps_TV = model(inputs_embeds=torch.cat(parts)[None]).logits[0].log_softmax(-1)
    begin = len(row["prompt_ids"]) + extra
    found = [logps_TV[begin + n - 1, token].item() for n, token in enumerate(row["completion_ids"])]
    return -sum(found) / len(found)


def heldout_rows(made: Any) -> list[dict[str, Any]]:
    from harness.alignment.rows import open_tokenizer_of, prepare_rows
    from harness.contracts.registry import load_plugins

    data = prepare_rows(made.plan, made.plan.stages[-1], load_plugins(), open_tokenizer_of(made.plan))
    assert data.heldout is not None
    return data.heldout.rows


@pytest.mark.parametrize("position", ["after_bos", "before_answer"])
def test_virtual_tokens_stand_where_evaluation_puts_them(
    align: Callable[..., Any], tiny: Path, alone: Path, position: str
) -> None:
    """The held-out losses of training, computed again from what was exported alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = align("meet", "out", **settings(**PROMPT), position=position)
    info = inspect_adapter("out", inspect_model(ModelSpec(model=str(tiny))), conditioned=True)
    assert info.conditioning is not None
    assert (info.conditioning.default, info.conditioning.position) == ("good", position)
    bos = made_bos(tiny)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "out").eval()
    found = measured(Path("out"))
    for row in heldout_rows(made):
        own = "good" if row["ratings"]["preference"] >= 0.5 else "bad"
        place = control_place(row["prompt_ids"], info.conditioning.position, bos)
        losses = {one: loss_of(model, row, soft_prompt(info, one), place) for one in ("good", "bad")}
        other = losses["bad" if own == "good" else "good"]
        assert losses[own] == pytest.approx(found[row["id"]]["loss"], abs=2e-5)
        assert other - losses[own] == pytest.approx(found[row["id"]]["gain"], abs=2e-5)
    assert any(abs(row["gain"]) > 1e-3 for row in found.values())
    assert "eval_gain" in made.heldout


def made_bos(tiny: Path) -> int | None:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny).bos_token_id


def test_rows_go_through_the_updates_of_their_own_values(align: Callable[..., Any], tiny: Path, alone: Path) -> None:
    """What hooks computed for mixed micro-batches, against peft with the two adapters of one value."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = align("meet", "out", **settings(**LORA))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "out")
    for value in ("good", "bad"):
        model.load_adapter(f"out/conditioning/{value}", value)
    found = measured(Path("out"))
    for row in heldout_rows(made):
        own, other = ("good", "bad") if row["ratings"]["preference"] >= 0.5 else ("bad", "good")
        losses = []
        for value in (own, other):
            model.base_model.set_adapter(["default", value])
            model.eval()
            losses.append(loss_of(model, row, None, 0))
        assert losses[0] == pytest.approx(found[row["id"]]["loss"], abs=2e-5)
        assert losses[1] - losses[0] == pytest.approx(found[row["id"]]["gain"], abs=2e-5)
    assert any(abs(row["gain"]) > 1e-4 for row in found.values())


@pytest.mark.parametrize("options", [PROMPT, LORA], ids=["prompt", "lora"])
def test_the_base_stays_what_it_was(
    align: Callable[..., Any], tiny: Path, alone: Path, options: dict[str, Any]
) -> None:
    """After the stage control a whole model is left byte for byte, and the control has moved."""
    given = {key: value for key, value in options.items() if key != "adapter"}
    align("meet", "out", adapter="none", stages=["control"], **given)
    before, after = load_file(tiny / "model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    described = json.loads(Path("out/conditioning.json").read_text())["values"]
    file = described["good"].get("embeddings") or f"{described['good']['adapter']}/adapter_model.safetensors"
    assert Path("out", file).is_file()
    assert any(abs(row["gain"]) > 0 for row in measured(Path("out")).values())


def test_several_preferences(align: Callable[..., Any], tiny: Path, alone: Path) -> None:
    rows = [
        {
            "prompt": f"Question {i} about {i % 7}?",
            "completion": f"Answer {i % 5}" + " more" * (i % 3),
            "ratings": {"helpful": float(i % 2), "harmless": float(i // 2 % 2)},
        }
        for i in range(40)
    ]
    Path("rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"helpful": ["good", "bad"], "harmless": ["good", "bad"]}
    made = align("meet", "out", data=Path("rated.jsonl"), preferences=both, **settings(**PROMPT))
    info = inspect_adapter("out", inspect_model(ModelSpec(model=str(tiny))), conditioned=True)
    assert info.conditioning is not None
    assert info.conditioning.default == "harmless=good,helpful=good"
    assert len(soft_prompt(info, "harmless=good,helpful=bad")) == 2 * 3
    assert {"eval_gain/helpful", "eval_gain/harmless"} <= made.heldout.keys()


def test_hindsight_and_control_tokens_leave_texts(align: Callable[..., Any], tiny: Path, alone: Path) -> None:
    made = align("coh", "coh", lora={"rank": 2})
    told = json.loads(Path("coh/conditioning.json").read_text())
    assert told["values"] == {"good": {"text": " A good answer:"}, "bad": {"text": " A bad answer:"}}
    assert (told["default"], told["position"]) == ("good", "before_answer")
    assert {"eval_loss", "eval_gain"} <= made.heldout.keys()
    assert made.history[0]["chains_too_long"] == 0
    align("control-token", "token", lora={"rank": 2}, phrases={"good": "Well: "})
    told = json.loads(Path("token/conditioning.json").read_text())
    assert told["values"] == {"good": {"text": "Well: "}, "bad": {"text": "<bad> "}}


def test_what_does_not_fit(align: Callable[..., Any], tiny: Path, alone: Path) -> None:
    """Rows that fill the context leave no room for virtual tokens."""
    context = inspect_model(ModelSpec(model=str(tiny))).max_length
    rows = [{"prompt": "Go on", "chosen": "very " * 4 * context + str(i), "rejected": f"no {i}"} for i in range(20)]
    rows = [{**row, "prompt": f"Go on {i}"} for i, row in enumerate(rows)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        align("meet", "out", data=Path("long.jsonl"), **settings(**{**PROMPT, "tokens": 20}))
    assert f"has {context} tokens, its control 20, and the model's context is {context}" in str(caught.value)
    assert f"--set max_length={context - 20}." in str(caught.value)


def test_layers_that_are_not_there(align: Callable[..., Any], tiny: Path, alone: Path) -> None:
    with pytest.raises(UserError) as caught:
        align("meet", "out", **settings(**LORA), control_targets=["qproj"])
    assert "--set control_targets: the model has no linear layer 'qproj'" in str(caught.value)
    assert "q_proj" in caught.value.fix


# ------------------------------------------------------------------------------------------------------------ killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the module's processes write into."""
    return tmp_path_factory.mktemp("meet")


def left(out: Path) -> dict[str, bytes]:
    """What an adapter's folder holds that evaluation reads."""
    return {
        str(file.relative_to(out)): file.read_bytes()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.relative_to(out).parts[0].startswith(("adapter_model", "conditioning"))
    }


KILLS = {
    "in-the-first-stage": (AT_STEP.format(step=3, name="SIGKILL"), ["checkpoint-2"], []),
    "between-the-stages": (at_file("control/status.json", after=True), [], []),
    "in-the-second-stage": (AT_STEP.format(step=5, name="SIGKILL"), [], ["checkpoint-4"]),
}


@pytest.mark.parametrize("control", ["prompt", "lora"])
def test_killed(zygote: Zygote, folder: Path, command: list[str], control: str) -> None:
    """SIGKILL, then the same command: the same bytes, and no stage trained twice."""
    options = as_set(
        checkpoint_every=2, control=control, control_steps=4, tokens=3, control_rank=2, adapter__dropout=0.2
    )
    arguments = [*command, "meet", *options]
    code, said = zygote.run([*arguments, "--out", f"{control}-whole"], cwd=folder)
    assert code == 0, said
    whole = left(folder / f"{control}-whole")
    assert {"adapter_model.safetensors", "conditioning.json"} < whole.keys()
    for name, (patch, first, second) in KILLS.items():
        out = folder / f"{control}-{name}"
        assert zygote.run([*arguments, "--out", out.name], cwd=folder, patch=patch)[0] == -signal.SIGKILL
        code, said = zygote.run([*arguments, "--out", out.name], cwd=folder)
        assert code == 0, said
        assert left(out) == whole, name
        lines = list(map(json.loads, (out / CONTROL / "log.jsonl").read_text().splitlines()))
        assert [line["checkpoint"] for line in lines if line["event"] == "resumed"] == first
        assert [line["checkpoint"] for line in log_of(out, "resumed")] == second
        shutil.rmtree(out)
