"""A method by a third party, used as its users would: installed, listed, trained with, evaluated."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from harness.testing import tiny_model

ROOT = Path(__file__).parents[2]
PACKAGE = Path(__file__).parent / "harness_simpo"


def _dist_info(site: Path, project: Path) -> None:
    """What an installer writes for a project's entry points, from its own pyproject.toml."""
    data = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{data['name'].replace('-', '_')}-{data['version']}.dist-info"
    info.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {data['name']}\nVersion: {data['version']}\n"
    (info / "METADATA").write_text(head, encoding="utf-8")
    lines = [f"{name} = {value}" for name, value in data["entry-points"]["harness"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[harness]", *lines, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed (and harness itself, where this checkout is not)."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE / "harness_simpo", site / "harness_simpo")
    _dist_info(site, PACKAGE)
    try:
        distribution("harness-align")
    except PackageNotFoundError:
        _dist_info(site, ROOT)
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "plugins"), str(ROOT / "tasks")])
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "HARNESS_CACHE": cache}


def run(environment: dict[str, str], code: str, *arguments: str) -> str:
    """Standard output of Python code in a process of its own, which must end well."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CLI = "from harness.cli.app import main; main()"
ALL = """
import json, sys
from harness.cli.app import main
for arguments in json.loads(sys.argv.pop()):
    sys.argv = ["harness", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
import harness_simpo
from harness.testing import check_aligner
check_aligner(harness_simpo.SimPO(), steps=2)
print("passed the kit")
"""
"""Command lines one after another, then the contract kit: one process, because importing takes longest."""
TASK = """
name: say
prompt: chat
template: 'Say {{ n }}.'
target: 'It is {{ n }}.'
decoding: {max_new_tokens: 8}
dataset: {name: jsonl, options: {path: say.jsonl}}
scorers: [{name: includes}]
"""


@pytest.fixture(scope="module")
def used(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `harness align simpo` (``out``), `harness eval` (``run``) and the kit (``said``) left."""
    folder = tmp_path_factory.mktemp("used")
    model, pairs = tiny_model(folder / "tiny"), folder / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "I am sorry."} for i in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "say.yaml").write_text(TASK, encoding="utf-8")
    asked = "".join(json.dumps({"id": f"s{n}", "n": n}) + "\n" for n in range(5))
    (folder / "tasks" / "say.jsonl").write_text(asked, encoding="utf-8")
    settings = ["batch_size=8", "micro_batch_size=8", "log_every=1", "learning_rate=0.01", "gamma=0.5", "eval_rows=8"]
    out, evaluated = str(folder / "out"), str(folder / "run")
    align = ["align", "simpo", "--model", str(model), "--dataset", f"jsonl:{pairs}", "--steps", "6", "--out", out]
    evaluate = ["eval", "--model", str(model), "--adapter", out, "--tasks", str(folder / "tasks"), "--task", "say"]
    commands = [
        align + [word for one in settings for word in ("--set", one)],
        [*evaluate, "--engine", "transformers", "--out", evaluated],
    ]
    (folder / "said").write_text(run(environment, ALL, json.dumps(commands)), encoding="utf-8")
    return folder


def test_it_uses_public_names_alone() -> None:
    source = (PACKAGE / "harness_simpo" / "__init__.py").read_text(encoding="utf-8")
    imported = [line for line in source.splitlines() if "harness" in line and line.startswith(("import", "from"))]
    assert imported == ["from harness import PairLogps, PairwiseLoss, PairwiseRecipe, hookimpl"]


def test_it_passes_the_contract_kit(used: Path) -> None:
    assert (used / "said").read_text(encoding="utf-8").splitlines()[-1] == "passed the kit"


def test_it_is_listed_with_its_pedigree(environment: dict[str, str]) -> None:
    rows = {
        (row["kind"], row["name"]): row for row in json.loads(run(environment, CLI, "plugins", "--json"))["plugins"]
    }
    found = rows["aligner", "simpo"]
    assert (found["distribution"], found["version"]) == ("harness-simpo", "0.1.0")


def test_it_trains(used: Path) -> None:
    trained = used / "out"
    lines = [json.loads(line) for line in (trained / "step" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < 0.7 * losses[0]
    assert not [line for line in lines if line.get("event") == "reference"], "no reference is computed"
    identity = json.loads((trained / "step" / "step.json").read_text())["identity"]
    assert (identity["method"], identity["recipe"]["beta"], identity["recipe"]["gamma"]) == ("simpo", 2.0, 0.5)
    heldout = json.loads((trained / "step" / "result.json").read_text())["heldout"]
    assert heldout["eval_rewards/accuracies"] == 1.0, "every chosen answer begins alike, and so does every rejected one"
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32), "PairwiseRecipe's defaults"


def test_what_it_trained_is_evaluated(used: Path) -> None:
    (row,) = json.loads((used / "run" / "report" / "report.json").read_text(encoding="utf-8"))["rows"]
    assert (row["task"], row["variant"], row["n"] + row["n_unscored"]) == ("say", "chat", 5)
    plan = json.loads((used / "run" / "plan.json").read_text(encoding="utf-8"))
    assert plan["adapter"]["name"] == "out"


@pytest.fixture
def simpo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PACKAGE))
    return __import__("harness_simpo").SimPO()


def test_the_loss_by_hand(simpo: Any) -> None:
    """beta 2, gamma 0.5; mean log p: -10 / 5 = -2 and -20 / 8 = -2.5; 2 * 0.5 - 0.5 = 0.5.

    -log sigmoid(0.5) = log(1 + e^-0.5) = log 1.6065307 = 0.4740770. Its derivative in log p(chosen) is
    -sigmoid(-0.5) * beta / |chosen| = -0.3775407 * 2 / 5 = -0.1510163; in
    log p(rejected) 0.3775407 * 2 / 8 = 0.0943852.
    """
    import torch

    from harness import PairLogps

    chosen, rejected = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (-10.0, -20.0))
    policy = PairLogps(chosen, rejected, torch.tensor([5]), torch.tensor([8]))
    (loss,) = simpo.loss(policy, None, simpo.Config(beta=2.0, gamma=0.5))
    loss.backward()
    assert loss.item() == pytest.approx(0.4740770, abs=5e-8)
    assert chosen.grad.item() == pytest.approx(-0.1510163, abs=5e-8)
    assert rejected.grad.item() == pytest.approx(0.0943852, abs=5e-8)
    (even,) = simpo.loss(
        PairLogps(chosen, chosen, policy.chosen_tokens, policy.chosen_tokens), None, simpo.Config(gamma=0)
    )
    assert even.item() == pytest.approx(math.log(2), abs=1e-12)
