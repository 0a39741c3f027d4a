"""Adapters and models under the controls that they were trained with, from `--control` to the rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import harness
from harness import Decoding, ModelSpec, Request, UserError, insert_control
from harness.evaluation.control import Steering
from harness.models.inspect import inspect_adapter, inspect_model
from harness.steps.journal import read_rows
from harness.testing import tiny_adapter
from harness_plugins.engines.transformers.engine import TransformersEngine
from tests.conditioned import BAD, GOOD, describe, lora, soft, whole, written

KINDS = {"text": written, "adapter": lora, "embeddings": soft}


def evaluate(model: Path, sums: Path, out: str, **settings: Any) -> Any:
    fields = {"engine": "transformers", "limit": 4, "task_folders": [sums], "tasks": ["sums"], **settings}
    return harness.evaluate(str(model), out=Path(out), **fields)


def texts(made: Any) -> dict[str, list[str]]:
    """Arm -> its answers."""
    found = {}
    for arm in made.plan.arms:
        (folder,) = made.root.glob(f"steps/answers-*-{arm.tasks[0].answers_id[:12]}")
        found[arm.name] = [row["output"]["text"] for row in read_rows(folder / "artifact" / "answers.jsonl.gz")]
    return found


def ids(made: Any) -> list[str]:
    return [task.answers_id for arm in made.plan.arms for task in arm.tasks]


@pytest.mark.parametrize("kind", KINDS)
def test_each_value_is_an_arm(kind: str, tiny: Path, sums: Path, alone: Path) -> None:
    """Two values of one adapter answer differently, on one loaded engine; absent is the default, under its very id."""
    folder = KINDS[kind](alone / "arm", tiny)
    both = evaluate(tiny, sums, "both", adapter=folder, control=["good", "bad"])
    rows = {row.adapter: row for row in both.rows}
    assert {name: row.control for name, row in rows.items()} == {"arm@good": "good", "arm@bad": "bad"}
    answers = texts(both)
    assert set(answers) == {"tiny+arm@good", "tiny+arm@bad"}
    assert answers["tiny+arm@good"] != answers["tiny+arm@bad"]
    default = evaluate(tiny, sums, "default", adapter=folder)
    assert texts(default) == {"tiny+arm": answers["tiny+arm@good"]}
    assert ids(default) == ids(both)[:1]
    assert [(row.adapter, row.control) for row in default.rows] == [("arm", "good")]
    note = f"under control good, the default of its conditioning ({kind}, after_bos)"
    assert note in default.rows[0].notes
    plan = json.loads((default.root / "plan.json").read_text())
    assert (plan["arms"][0]["control"], plan["arms"][0]["under"]) == ("good", note)
    # The same folder, asked the other way: everything was done before.
    assert ids(evaluate(tiny, sums, "default", adapter=folder, control="good")) == ids(default)
    assert ids(evaluate(tiny, sums, "every", adapter=folder, control="all")) == ids(both)


def test_an_adapter_without_one_keeps_its_id(tiny: Path, sums: Path, alone: Path) -> None:
    plain, steered = tiny_adapter(alone / "plain", tiny), soft(alone / "soft", tiny)
    made = evaluate(tiny, sums, "out", adapters=[plain, steered])
    assert ids(evaluate(tiny, sums, "alone", adapter=plain)) == [ids(made)[1]]
    assert [row.control for row in made.rows] == [None, None, "good"]
    assert made.plan.arms[1].tasks[0].answers.whole["control"] is None
    with pytest.raises(UserError, match=r"--control: 'good' given, but adapter plain has no conditioning.json"):
        evaluate(tiny, sums, "no", adapter=plain, control="good")
    with pytest.raises(UserError, match=r"--control: 'good' given, but there is nothing to steer"):
        evaluate(tiny, sums, "no", control="good")


def test_what_is_not_one(tiny: Path, sums: Path, alone: Path) -> None:
    folder = soft(alone / "arm", tiny)
    said = r"--control \(adapter arm\): no value 'god' was trained\n  Did you mean 'good'\? Trained: good, bad; or all"
    with pytest.raises(UserError, match=said):
        evaluate(tiny, sums, "no", adapter=folder, control="god")
    assert not (alone / "no").exists()


def test_several_preferences(tiny: Path, sums: Path, alone: Path) -> None:
    folder = tiny_adapter(alone / "arm", tiny)
    values = {
        "helpful=good": "Help. ",
        "helpful=bad": "Nope. ",
        "harmless=good": "Nicely. ",
        "harmless=bad": "Rudely. ",
    }
    told = {"preferences": {"helpful": ["good", "bad"], "harmless": ["good", "bad"]}}
    describe(folder, {name: {"text": text} for name, text in values.items()}, "helpful=good,harmless=good", **told)
    every = evaluate(tiny, sums, "every", adapter=folder, control="all")
    assert len(set(ids(every))) == 4
    one = evaluate(tiny, sums, "one", adapter=folder, control=["harmless=bad", "helpful=bad, harmless=bad"])
    assert [arm.control for arm in one.plan.arms] == ["harmless=bad,helpful=good", "harmless=bad,helpful=bad"]
    assert set(ids(one)) < set(ids(every))
    for asked, what in (("kind=good", "no preference 'kind=good'"), ("helpful=so", "no value of helpful 'so'")):
        with pytest.raises(UserError, match=what):
            evaluate(tiny, sums, "no", adapter=folder, control=asked)


def test_a_whole_model(tiny: Path, sums: Path, alone: Path) -> None:
    """Full fine-tuning leaves a conditioning too; it is part of the model's digest."""
    model = whole(alone / "whole", tiny)
    made = evaluate(model, sums, "out", control="all")
    assert {row.adapter: row.control for row in made.rows} == {"@good": "good", "@bad": "bad"}
    answers = texts(made)
    assert answers["whole@good"] != answers["whole@bad"]
    assert ids(evaluate(model, sums, "default")) == ids(made)[:1]
    spec = ModelSpec(model=str(model))
    before = inspect_model(spec, conditioned=True).weights_digest
    assert before != inspect_model(ModelSpec(model=str(tiny))).weights_digest
    describe(model, {"good": {"text": "x"}, "bad": {"text": "y"}})
    assert inspect_model(spec, conditioned=True).weights_digest != before
    with pytest.raises(UserError, match="conditioning of its own, and adapters are to lie on it"):
        evaluate(model, sums, "no", adapter=tiny_adapter(alone / "arm", model))
    with pytest.raises(UserError, match=r"trained with a conditioning .* which is not applied here"):
        inspect_model(spec)


@pytest.mark.parametrize("position", ["after_bos", "before_answer"])
def test_what_is_sent(position: str, tiny: Path, sums: Path, alone: Path) -> None:
    """The token ids are those that training makes with the public functions, the control where it stood."""
    folder = written(alone / "arm", tiny, position=position)
    plain = evaluate(tiny, sums, "plain")
    made = evaluate(tiny, sums, "out", adapter=folder, control=["good", "bad"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (asked,) = [read_rows(file) for file in plain.root.glob("requests/*")]
    prompts = [row["requests"][0]["prompt_ids"] for row in asked]
    for arm, text in zip(made.plan.arms, ("A good answer: ", "No! "), strict=True):
        own = harness.control_tokens(tokenizer, text)
        (folder,) = made.root.glob(f"steps/answers-*-{arm.tasks[0].answers_id[:12]}")
        name = json.loads((folder / "step.json").read_text())["requests"]
        sent = [row["requests"][0]["prompt_ids"] for row in read_rows(made.root / "requests" / name)]
        assert sent == [insert_control(prompt, own, position, tokenizer.bos_token_id) for prompt in prompts]
        at = 1 if position == "after_bos" else len(prompts[0])
        assert sent[0] == [*prompts[0][:at], *own, *prompts[0][at:]]


def test_the_context_is_shorter_by_the_control(tiny: Path, sums: Path, alone: Path) -> None:
    """A prompt that just fits is cut under a control, and says so."""
    config = tiny / "config.json"
    long = "1 " * 600
    (sums / "sums.yaml").write_text((sums / "sums.yaml").read_text().replace("{{ a }}+", f"{long}{{{{ a }}}}+"))
    assert json.loads(config.read_text())["max_position_embeddings"] == 512
    made = evaluate(tiny, sums, "out", adapter=soft(alone / "arm", tiny), with_base=True, limit=1)
    lengths = {}
    for arm in made.plan.arms:
        (folder,) = made.root.glob(f"steps/answers-*-{arm.tasks[0].answers_id[:12]}")
        name = json.loads((folder / "step.json").read_text())["requests"]
        (row,) = read_rows(made.root / "requests" / name)
        lengths[arm.label] = len(row["requests"][0]["prompt_ids"])
        assert row["cut"]
    assert lengths == {None: 512 - 8, "arm": 512 - 8 - len(GOOD)}


# ---------------------------------------------------------------------------------------------- the transformers engine


def ask(session: Any, requests: list[Request]) -> list[Any]:
    outputs: dict[int, Any] = {}
    for batch in session.batches(requests):
        outputs |= dict(zip(batch, session.run([requests[i] for i in batch]), strict=True))
    return [outputs[i] for i in range(len(requests))]


@pytest.mark.parametrize("kind", ["generate", "loglikelihood"])
def test_embeddings_of_real_ids_are_the_ids(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Exactly, in one batch with plain prompts and under both values; with a control that stands in the middle, too."""
    model = inspect_model(ModelSpec(model=str(tiny), dtype="float32"))
    adapter = inspect_adapter(str(soft(tmp_path / "arm", tiny)), model, conditioned=True)
    first, second, third = (0, 50, 51, 52), (0, 40, 41, 42, 60, 61, 62), (0, 60, 61)

    def request(prompt: tuple[int, ...], **more: Any) -> Request:
        one = Request("generate", prompt, decoding=Decoding(max_new_tokens=10), adapter="arm", **more)
        return one if kind == "generate" else replace(one, kind="loglikelihood", continuation_ids=(5, 6), decoding=None)

    hard = [request((0, *GOOD, *first[1:])), request((*second, *BAD)), request(third), request((0, *BAD, *first[1:]))]
    virtual = [
        request(first, control="good", control_at=1),
        request(second, control="bad", control_at=len(second)),
        request(third),
        request(first, control="bad", control_at=1),
    ]
    engine = TransformersEngine()
    session = engine.open(model, [adapter], engine.Config())
    try:
        expected = ask(session, hard)
        assert ask(session, virtual) == expected
        assert len(session.batches(virtual)) == 1
        # Those that differ in the control alone share no answer.
        assert expected[0] != expected[3]
        outside = ask(session, [request((0,) * 511, control="good", control_at=1)])
        assert outside[0].error is not None
        assert "of 512" in outside[0].error
        with pytest.raises(UserError, match="no virtual tokens of arm stand for 'great'"):
            session.run([request(first, control="great", control_at=1)])
        with pytest.raises(UserError, match="the model has no conditioning"):
            session.run([replace(request(first, control="good", control_at=1), adapter=None)])
    finally:
        session.close()


def test_a_folded_control_is_the_two_adapters(tiny: Path, tmp_path: Path) -> None:
    """Logits of the sum, of rank 5, equal base + adapter + control, computed here from their factors in fp32."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = inspect_model(ModelSpec(model=str(tiny), dtype="float32"))
    folder = lora(tmp_path / "arm", tiny)
    adapter = inspect_adapter(str(folder), model, conditioned=True)
    steering = Steering(model, adapter, "arm@good", "good")
    opened = steering.opened(tmp_path / "scratch")
    assert opened is not None
    assert (opened.name, opened.rank) == ("arm@good", 5)
    ids_BT = torch.tensor([[0, 50, 51, 52, 60, 7]])
    one = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), opened.path).eval()
    two = AutoModelForCausalLM.from_pretrained(tiny).eval()
    for part in (folder, folder / "conditioning" / "good"):
        factors = load_file(part / "adapter_model.safetensors")
        for name, a in factors.items():
            if name.endswith("lora_A.weight"):
                module = two.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight.data += factors[name.replace("lora_A", "lora_B")] @ a  # alpha / r is 1
    with torch.inference_mode():
        assert (one(ids_BT).logits - two(ids_BT).logits).abs().max() < 1e-5
