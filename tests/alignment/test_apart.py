"""An alignment whose record lies apart from its adapter, as in a study: the same bytes; and what is wrong with one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.alignment.folder import intact
from harness.alignment.run import carry_out_align
from harness.contracts.registry import load_plugins
from harness.core.progress import Reporter
from harness.steps.folder import StepFolder
from harness.steps.runner import Runner

WEIGHTS = "adapter_model.safetensors"


def test_a_record_apart(align: Callable[..., Any], alone: Path) -> None:
    within = align("dpo", "within", checkpoints=(3,))
    record = alone / "run" / "record"
    work = StepFolder(record, within.plan.id, "align", record / "artifact")
    apart = carry_out_align(within.plan, load_plugins(), Runner(None, Reporter()), work)
    for name in (WEIGHTS, f"step-3/{WEIGHTS}", "lineage.json"):
        assert (record / "artifact" / name).read_bytes() == (within.folder / name).read_bytes()
    assert apart.heldout == within.heldout
    assert {path.name for path in record.iterdir()} >= {"step.json", "status.json", "log.jsonl", "result.json"}
    assert not (record / "artifact" / "step").exists()
    assert not (record / "checkpoints").exists()
    assert intact(within.plan.step, work) is None


def _weights(work: StepFolder) -> None:
    file = work.artifact / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_weights, f"{WEIGHTS} has SHA-256 "),
        (lambda work: (work.artifact / "lineage.json").unlink(), "lineage.json is missing"),
        (lambda work: (work.artifact / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda work: (work.path / "status.json").unlink(), "it has not ended well"),
        (lambda work: (work.artifact / "README.md").write_text("mine"), None),
    ],
)
def test_what_is_wrong_with_one(align: Callable[..., Any], harm: Callable[[StepFolder], Any], said: str | None) -> None:
    made = align("sft", "out", steps=1, eval_rows=0)
    work = StepFolder.within(made.folder, made.plan.id, "align")
    harm(work)
    found = intact(made.plan.step, work)
    assert found is None if said is None else found is not None and found.startswith(said)
