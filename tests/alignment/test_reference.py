"""Reference log-probabilities: computed once per policy and row, and anew when what they depend on changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.alignment.reference import ReferenceStore, plan
from harness.alignment.run import Alignment
from tests.alignment.processes import Zygote, as_set, log_of

Align = Callable[..., Alignment]


@pytest.fixture(autouse=True)
def store(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of this test's own."""
    monkeypatch.setenv("HARNESS_CACHE", str(alone / "own"))
    return alone / "own" / "reference"


def computed(made: Alignment) -> tuple[int, int]:
    """Rows that had to be computed, and all rows."""
    (line,) = log_of(made.folder, "reference")
    return line["computed"], line["rows"]


@pytest.fixture
def every(align: Align) -> Callable[..., Alignment]:
    """Alignments that see every row, whatever the seed."""
    return lambda method, out, **more: align(method, out, samples=20, steps=5, **more)


def test_seeds_and_recipes_share_it(every: Align) -> None:
    """TRL's own cache never hits across seeds (trl #3985)."""
    assert computed(every("dpo", "a")) == (25, 25)
    assert computed(every("dpo", "b", seed=1)) == (0, 25)
    again = every("ipo", "c", beta=0.3, learning_rate=1e-4, lora={"rank": 2})
    assert computed(again) == (0, 25)
    # (0 - 1 / (2 * 0.3))^2: what was stored is the policy that this run starts from.
    assert again.history[0]["loss"] == pytest.approx((1 / 0.6) ** 2, abs=1e-4)
    assert computed(every("dpo", "d", adapter="none")) == (0, 25)


def test_other_policies_do_not(every: Align) -> None:
    """Another type, another quantisation, another start, another template, another base: computed anew."""
    every("dpo", "a")
    from harness.core.specs import ModelSpec

    def of(dtype: str, model: Any) -> Any:
        return ModelSpec(model=str(model), dtype=dtype)

    made = every("dpo", "quantised", adapter="qlora")
    assert computed(made)[0] == 25
    assert computed(every("dpo", "vicuna", template="vicuna"))[0] == 25
    assert computed(every("dpo", "continued", start="a"))[0] == 25
    assert computed(every("dpo", "continued2", start="a", seed=3))[0] == 0


@pytest.mark.slow
def test_dtypes_do_not_share(zygote: Zygote, command: list[str], alone: Path) -> None:
    """bf16 is not fp32; full fine-tuning computes in fp32 what was opened in bf16; `auto` on a CPU is fp32."""
    whole = [*command, "dpo", "--samples", "20", "--steps", "5"]
    for out, more, expected in (
        ("auto", [], 25),
        ("single", ["--dtype", "float32"], 0),
        ("half", ["--dtype", "bfloat16"], 25),
        ("full", ["--dtype", "bfloat16", "--adapter", "none"], 25),
    ):
        code, said = zygote.run([*whole, *more, "--out", out], cwd=alone, HARNESS_CACHE=str(alone / "own"))
        assert code == 0, said
        assert log_of(alone / out, "reference")[0]["computed"] == expected, out


def test_the_values_are_those_of_the_base(every: Align, tiny: Path, store: Path) -> None:
    """Peer: transformers' logits, one answer at a time, no padding."""
    from harness.steps.journal import read_members

    seen: list[Any] = []
    real = ReferenceStore.fill

    def fill(self: Any, rows: Any, *rest: Any) -> Any:
        found = real(self, rows, *rest)
        seen.extend(zip(rows, found[0], strict=True))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceStore, "fill", fill)
        every("dpo", "a")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert len(seen) == 25
    for row, logps_of in seen:
        for ids, value in ((row[f"{name}_ids"], logps_of[name]) for name in ("chosen", "rejected")):
            whole = torch.tensor([[*row["prompt_ids"], *ids]])
            with torch.no_grad():
                logps = model(whole).logits.log_softmax(-1)[0, :-1]
            own = logps.gather(1, whole[0, 1:, None])[-len(ids) :].sum()
            assert value == pytest.approx(float(own), abs=1e-3)
    (file,) = store.glob("*.jsonl.gz")
    assert sum(len(rows) for _, rows in read_members(file)[0]) == 25


def test_a_torn_store_is_recovered(every: Align, store: Path) -> None:
    """The last batch is lost, and only that one."""
    from harness.alignment import reference

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.plan, "__defaults__", (256,))
        every("dpo", "a")
        (file,) = store.glob("*.jsonl.gz")
        whole = file.read_bytes()
        file.write_bytes(whole[:-3])
        fewer, rows = computed(every("dpo", "b", seed=1))
    assert 0 < fewer < rows
    assert file.read_bytes() == whole


def test_two_processes_at_once(zygote: Zygote, command: list[str], alone: Path) -> None:
    """One computes, the other waits and computes nothing; the store is whole."""
    arguments = [*command, "dpo", "--samples", "20", "--steps", "5", *as_set(eval_rows=0)]
    # Slow enough to meet; batches small enough to interleave, if they could.
    patch = """
import time, harness.alignment.reference as r, harness.alignment.pairwise_trainer as t
r.plan.__defaults__ = (256,)
real = t.pair_logps
def pair_logps(*a, **k):
    time.sleep(0.02)
    return real(*a, **k)
t.pair_logps = pair_logps
"""
    children = [
        zygote.start(
            [*arguments, "--seed", str(n), "--out", f"s{n}"], cwd=alone, patch=patch, HARNESS_CACHE=str(alone / "own")
        )
        for n in (0, 1)
    ]
    assert [child.wait() for child in children] == [0, 0], children[1].said()
    found = [log_of(alone / f"s{n}", "reference")[0]["computed"] for n in (0, 1)]
    assert sorted(found) == [0, 20]


def test_batches_fit_the_budget() -> None:
    """Padded tokens of both answers: 2 x width x rows, longest first; a row that is too long goes alone."""
    rows = [{"prompt_ids": [0] * n, "chosen_ids": [0], "rejected_ids": [0, 0]} for n in (3, 8, 100, 8)]
    # Widths 5, 10, 102, 10: 204 > 60 alone; then 2 * 10 * 3 = 60 just fits.
    assert plan(rows, budget=60) == [[2], [1, 3, 0]]
    assert plan(rows, budget=59) == [[2], [1, 3], [0]]
    assert json.dumps(plan([], budget=59)) == "[]"
