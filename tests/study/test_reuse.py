"""What other runs have made is taken over, nothing damaged is; and resources are defaults, never more."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from harness.cli.study import taken
from harness.study.card import card_of
from harness.study.plan import plan_study
from tests.study.conftest import WATCHER, Write, records


def test_steps_of_another_run_aretaken(
    cli: Any, small: dict[str, Any], write: Write, small_run: Path, copied: Any, begun: Any
) -> None:
    """Adapters, answers and scores as they are; of a damaged one nothing, and merged weights are gone there."""
    other = copied(small_run)
    (damaged,) = other.glob("steps/align-dpo-*/artifact/adapter_model.safetensors")
    data = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(data[:-4] + b"torn")
    file = write({**small, "reuse": ["run"]})
    ran = cli("study", "run", file, "--out", "mine", "--plugin", WATCHER)
    assert ran.code == 0, ran.err
    assert "align-dpo-" in ran.err and "it is not taken" in ran.err
    assert Counter(line.partition(" ")[0] for line in begun()) == {"align": 1, "merge": 1}
    assert records(Path("mine")) == records(small_run)
    mine, its = (next(root.glob("steps/align-sft-*")) for root in (Path("mine"), other))
    assert (mine / "artifact" / "adapter_model.safetensors").samefile(its / "artifact" / "adapter_model.safetensors")
    assert not (mine / "step.json").samefile(its / "step.json")
    assert damaged.read_bytes().endswith(b"torn"), "nothing is written there"


def test_a_folder_that_is_no_run_is_refused(cli: Any, small: dict[str, Any], write: Write, alone: Path) -> None:
    ran = cli("study", "run", write({**small, "reuse": ["nowhere"]}), "--out", "run")
    assert ran.code == 2 and "reuse" in ran.err
    assert "'nowhere' is no run: it has no folder `steps`\n  Give the folder of a run (its --out)." in ran.err
    assert not Path("run").exists()


def test_resources_are_defaults(cli: Any, small: dict[str, Any], write: Write) -> None:
    file = write({**small, "resources": {"card": "A100-80GB", "cores": 3, "devices": 2}})
    plan = plan_study(file)
    assert taken(plan) == {"cores": 3, "gpus": [0, 1]}
    assert card_of(None, None, plan.read.spec.resources) == card_of("A100-80GB", None)
    told = json.loads(cli("study", "plan", file, "--json").out)
    assert told["costs"]["card"]["name"] == "A100-80GB"
    told = json.loads(cli("study", "plan", file, "--json", "--card", "H100-80GB").out)
    assert told["costs"]["card"]["name"] == "H100-80GB"
    ran = cli("study", "plan", write({**small, "resources": {"card": "A1000"}}))
    assert ran.code == 2 and "resources, card: unknown card 'A1000'" in ran.err
