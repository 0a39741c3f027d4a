"""Rows of a plugin's own, from a converter of its own to its trainer; and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import Aligner, Stage, StepError, TrainerCall, UserError
from harness.alignment.checks import check_method
from harness_plugins.aligners.sft import Sft

PLUGIN = Path(__file__).parent / "weighed_rows.py"


def test_columns_reach_the_trainer(align: Callable[..., Any], alone: Path, pairs: Path) -> None:
    """A pair is weighed by 1 / length of its chosen answer: as here, from the file."""
    made = align("weighed-sft", "out", plugins=[PLUGIN], log_every=1, eval_rows=3)
    seen = json.loads(Path("seen.json").read_text())
    chosen = [json.loads(line)["chosen"] for line in pairs.read_text().splitlines()]
    assert set(seen["train"]) | set(seen["heldout"]) <= {1 / len(answer) for answer in chosen}
    assert seen["columns"] == ["id", "prompt_ids", "completion_ids", "labels_mask", "weight"]
    assert len(seen["heldout"]) == 3
    assert (made.folder / "adapter_model.safetensors").is_file()
    assert made.plan.step.identity["data"]["schema"] == "Weighed"
    (part,) = made.plan.step.identity["data"]["parts"]
    assert len(part["converter"]) == 64, "a stranger's conversion enters the id"


def test_token_ids_are_not_those_of_another_rendering(align: Callable[..., Any], alone: Path) -> None:
    """The cache knows the rows, but not what the changed plugin makes of them."""
    first = align("weighed-sft", "a", plugins=[PLUGIN])
    changed = alone / "changed" / PLUGIN.name
    changed.parent.mkdir()
    changed.write_text(PLUGIN.read_text().replace('"completion": self.answer', '"completion": self.answer + "!"'))
    second = align("weighed-sft", "b", plugins=[changed])
    tokens = [json.loads((one.folder / "step" / "step.json").read_text())["tokens"] for one in (first, second)]
    assert tokens[1]["answer tokens"] > tokens[0]["answer tokens"]


def method(**overrides: Any) -> Aligner:
    made: Aligner = type("Made", (Sft,), {"name": "made", **overrides})()
    return made


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"consumes": "triples"},
            "METHOD: made consumes 'triples', which are no rows to train on\n"
            "  Consume demonstrations, pairs, rated, or a subclass of harness.TrainingRow.",
        ),
        (
            {"stages": lambda self, config: (Stage("one", "demonstrations"), Stage("one", "demonstrations"))},
            "METHOD: stages of made are named 'one', 'one'\n"
            "  Give each a name of its own, of letters, digits and . _ @ + -.",
        ),
        (
            {"stages": lambda self, config: (Stage("a/b", "demonstrations"),)},
            "METHOD: stages of made are named 'a/b'\n  Give each a name of its own, of letters, digits and . _ @ + -.",
        ),
        (
            {"stages": lambda self, config: (Stage("one", "pairs"), Stage("two", "prompts"))},
            "METHOD: stage two of made consumes 'prompts', which are no rows to train on\n"
            "  Consume demonstrations, pairs, rated, or a subclass of harness.TrainingRow.",
        ),
        (
            {"stages": lambda self, config: ()},
            "METHOD: `stages` of made returned ()\n  Return a tuple of one or more harness.Stage.",
        ),
        (
            {"stages": lambda self, config: (Stage("one", "pairs"),)},
            "METHOD: stage one of made consumes pairs, and made demonstrations\n  Let both name the same rows.",
        ),
    ],
)
def test_a_method_that_cannot_be_trained_is_refused(overrides: dict[str, Any], message: str) -> None:
    one = method(**overrides)
    with pytest.raises(UserError) as caught:
        check_method(one, one.Config())
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda call: None, "`trainer` returned NoneType, not a harness.TrainerCall"),
        (
            lambda call: TrainerCall(dict, call.arguments),
            "<class 'dict'>, which is no subclass of transformers",
        ),
        (
            lambda call: TrainerCall(call.cls, {**call.arguments, "eval_dataset": None}),
            "its trainer has none as `eval_dataset`, and the job has 5",
        ),
    ],
)
def test_a_trainer_that_cannot_be_driven_is_a_fault_of_the_method(
    align: Callable[..., Any], alone: Path, monkeypatch: pytest.MonkeyPatch, change: Any, what: str
) -> None:
    real = Sft.trainer
    monkeypatch.setattr(Sft, "trainer", lambda self, job: change(real(self, job)))
    with pytest.raises(StepError) as caught:
        align("sft", "out", eval_rows=5)
    assert what in str(caught.value)
    assert str(caught.value).startswith("the method's trainer: ")
    assert caught.value.fix == "This is a fault of the method: `harness.testing.check_aligner` finds such."
